"""The mixer that CONTRIBUTING.md adds in one file is found by itself, and passes what every mixer must show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# One more place where the registry looks for mixers, so that the file need not be put among the sources.
PLUGIN = """
import statetrack.mixers
statetrack.mixers.__path__.append({folder!r})
"""


@pytest.fixture(scope="module")
def with_the_mixer(tmp_path_factory):
    """Runs Python in a process that knows the mixer; returns its output."""
    folder = tmp_path_factory.mktemp("contributed")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (folder / "mixers").mkdir()
    (folder / "mixers" / "signed_attention.py").write_text(code, encoding="utf-8")
    (folder / "plugin.py").write_text(PLUGIN.format(folder=str(folder / "mixers")), encoding="utf-8")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    return run


def test_the_generic_tests_cover_it(with_the_mixer):
    run = with_the_mixer(
        *("-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-vv"),
        *("tests/mixers/test_mixers.py", "-k", "signed_attention"),
    )
    assert run.returncode == 0, run.stdout[-3000:]
    for name in ("sequence_equals_steps", "padding_anywhere", "spectrum", "learned_lower_end", "compiled", "exported"):
        assert re.search(rf"test_\w*{name}\w*\[.*signed_attention.* PASSED", run.stdout), name


def test_it_is_on_the_command_line_and_can_be_certified(with_the_mixer, tmp_path):
    options = ("--mixer", "signed_attention", "--eigenvalue-range=0,1", "--steps", "2", "--batch-size", "2")
    program = (
        "import plugin, sys; from statetrack.cli import main; "
        f"sys.exit(main(['train', 'parity', *{options!r}, '--out', {str(tmp_path / 'run')!r}]) "
        f"or main(['certify', {str(tmp_path / 'run')!r}]))"
    )
    run = with_the_mixer("-c", program)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "cannot solve parity" in run.stdout
