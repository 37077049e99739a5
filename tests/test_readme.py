"""The README's examples run, and its numbers come from results/."""

import re
import shlex
import shutil
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


def test_a_language_model_is_trained_judged_and_writes(tmp_path, monkeypatch, capsys):
    """As the README has it, with fewer and shorter sequences."""
    for package in ("tokenizers", "transformers"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("toml")
    (tmp_path / "config.toml").write_text(config)
    (tmp_path / "src").mkdir()
    # So many that some are held out whatever is in them: a document's hash decides.
    for path in (ROOT / "src" / "statetrack").glob("*.py"):
        shutil.copy(path, tmp_path / "src")
    sizes = ["training.steps=2", "data.sequence_length=64", "data.batch_size=2", "training.precision=float32"]
    sizes += ["model.num_layers=1", "model.d_model=32", "schedule.warmup_steps=1"]
    smaller = {
        "pretrain": [word for size in sizes for word in ("--set", size)],
        "data": ["--vocab-size", "300", "--held-out", "0.4"],
        "evaluate": ["--lengths", "16,32", "--probes", "none"],
    }
    (commands,) = blocks("shell")
    for line in commands.strip().splitlines():
        program, command, *words = shlex.split(line, comments=True)
        assert program == "statetrack"
        assert main([command, *words, *smaller.get(command, [])]) == 0, line
    assert capsys.readouterr().out


def test_every_file_that_the_readme_names_exists():
    names = re.findall(r"`((?:docs|results|benchmarks)/[\w./-]+)`", TEXT) + re.findall(
        r"\]\((?!https?:)([^)]+)\)", TEXT
    )
    assert len(names) >= 4
    assert [name for name in names if not (ROOT / name).exists()] == []
