"""The README's examples run, and its numbers come from results/."""

import re
import shlex
from pathlib import Path

import pytest

from statetrack.cli import main

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:30])
def test_python_examples_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert "print" not in code or capsys.readouterr().out


def test_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for commands in blocks("sh") for line in commands.strip().splitlines()]
    assert len(lines) >= 9
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "statetrack"
        assert main(words) == 0, line
    assert (tmp_path / "runs" / "parity.json").exists()
    assert (tmp_path / "runs" / "parity.html").exists()


def test_every_file_that_the_readme_names_exists():
    names = re.findall(r"`((?:docs|results|benchmarks)/[\w./-]+)`", TEXT) + re.findall(
        r"\]\((?!https?:)([^)]+)\)", TEXT
    )
    assert len(names) >= 4
    assert [name for name in names if not (ROOT / name).exists()] == []
