"""Ctrl-C while a command is still importing torch, which takes seconds: the process ends, without a traceback.

The package imports this first, for its effect. In a process that merely imports the package it has none.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether this process is `statetrack ...` or `python -m statetrack ...`: then its name is "-m" until it begins."""
    return sys.argv[:1] == ["-m"] or Path(sys.argv[0] if sys.argv else "").stem == "statetrack"


def handle_again() -> None:
    """Makes ctrl-C a KeyboardInterrupt again, once there is somebody who catches it."""
    if _unhandled:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Not by an exception: many packages take any that meets them in an import for another one. Jobs in the background
# ignore ctrl-C, and shall go on to.
_unhandled = _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _unhandled:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
