"""What this process may use of the machine."""

from __future__ import annotations

import os


def available_cores() -> int:
    """How many cores this process may run on, where the system tells; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
