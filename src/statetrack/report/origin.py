"""How results came about: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from statetrack.machine import available_cores


def provenance(command: str | None = None, *, device: str = "cuda") -> dict[str, str]:
    """What a reader needs to repeat a result: `{"Command": ..., "Machine": ..., "Commit": ..., ...}`.

    Args:
        command: the command that made the result; None for the command line of this process.
        device: what computed it; no accelerator is named for "cpu".
    """
    from statetrack import __version__  # here, so that the package itself may import this file

    versions = [f"{package} {metadata.version(package)}" for package in ("torch", "numpy")]
    cores = available_cores()
    accelerated = torch.device(device).type == "cuda" and torch.cuda.is_available()
    entries = {
        "Command": command or f"{_program()} {shlex.join(sys.argv[1:])}".strip(),
        "Machine": f"{_processor()}, {cores} core{'s' * (cores != 1)}",
        "Accelerator": torch.cuda.get_device_name(device) if accelerated else "none",
        "System": f"{platform.system()} {platform.release()}",
        "Versions": ", ".join([f"statetrack {__version__}", f"Python {platform.python_version()}", *versions]),
        "Commit": _commit(),
        "Date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: value for name, value in entries.items() if value}


@cache
def run_origin(device: str) -> dict[str, str]:
    """The provenance of all runs that this process makes on a device, with the day of the first."""
    origin = provenance(device=device)
    return {name: value for name, value in origin.items() if name != "Command"} | {"Date": origin["Date"][:10]}


def _program() -> str:
    path = Path(sys.argv[0])
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that this file is from, with a note if the tree was changed since; empty outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        # An installed copy may lie inside the checkout of something else, whose commit would say nothing.
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + (
            " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
