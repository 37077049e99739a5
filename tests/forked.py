"""Processes forked from one that has imported PyTorch, where each of their own would take seconds for it.

Where there is no such server, as on Windows, they start on their own.
"""

import multiprocessing

from torch.multiprocessing.spawn import start_processes

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
multiprocessing.set_forkserver_preload(["pytest", "torch.distributed.fsdp", "statetrack.pretraining.loop"])
FORKED = multiprocessing.get_context(_METHOD)


def run_ranks(function, arguments, ranks):
    """Runs function(rank, *arguments) in a process for each rank; an error in one is raised here."""
    start_processes(function, arguments, ranks, start_method=_METHOD)
