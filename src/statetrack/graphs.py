"""Functions that are called again and again, replayed from CUDA graphs; called as they are on any other device."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_log = logging.getLogger("statetrack.graphs")


class Side:
    """A CUDA stream beside the one that a model learns on, and who waits for whom; nothing at all on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._finished = self._taken = None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # which makes the memory that is used here
            self._finished, self._taken = torch.cuda.Event(), torch.cuda.Event()

    def context(self) -> AbstractContextManager[Any]:
        """Makes this stream the current one; who waits for whom is left to events."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def finished(self) -> None:
        """Marks the end of the work on this stream that `handing_over` waits for."""
        if self.stream is not None and self._finished is not None:
            self._finished.record(self.stream)

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """The current stream waits for what is finished here; what comes next here waits for the end of the block."""
        if self.stream is None or self._finished is None or self._taken is None:
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_event(self._finished)
        yield
        self._taken.record(current)
        self.stream.wait_event(self._taken)


class Lead:
    """How far the host may be ahead of the steps that a GPU has done; nothing at all on a CPU.

    Replays of graphs return at once. Without a limit the host gets ahead by as many as the driver has room for, which
    the GPU has still to do once the host is told to stop.
    """

    STEPS = 8
    """Once in so many steps the host waits until no more than these are left to do: it gets ahead by twice as many."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = torch.cuda.Event() if device.type == "cuda" else None
        self._steps = 0

    def step(self) -> None:
        """One step more is launched on the current stream; waits if the GPU is too far behind."""
        self._steps += 1
        if self._before is not None and self._steps % self.STEPS == 0:
            self._before.synchronize()  # at once the first time, when it marks nothing
            self._before.record(torch.cuda.current_stream(self._device))


class Graphs:
    """A CUDA graph for each key, captured at the third call with it.

    The first call makes what is made once (tables, compiled kernels, the optimizer's moments), and the second finds out
    whether anything in it waits for the device: such a function is called as it is for ever. All memory that a function
    reads or writes beyond its end must stay where it is.

    Args:
        device: where the functions compute.
        side: the stream that they run on; a new one if None.
    """

    def __init__(self, device: torch.device, side: Side | None = None) -> None:
        self._side = side or Side(device)
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._waiting: set[Hashable] = set()
        self._pool: Any = None

    def context(self) -> AbstractContextManager[Any]:
        """Makes the stream of the functions the current one, as it must be for `run` and for reading results.

        It goes on where the stream before has got to, and that one waits for it at the end.
        """
        stream = self._side.stream
        return contextlib.nullcontext() if stream is None else _current(stream)

    def run(
        self,
        key: Hashable,
        function: Callable[[], None],
        *,
        before: Callable[[], object] = lambda: None,
        random: torch.Generator | None = None,
    ) -> None:
        """Calls the function, or replays what it did.

        Args:
            key: functions with the same key do the same to the same memory.
            function: what to do.
            before: called ahead of every call and every replay, and never part of a graph.
            random: a generator that the function draws from.
        """
        if self._side.stream is None or key in self._waiting:
            before()
            function()
            return
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if calls == 1:
            before()
            function()
        elif calls == 2:
            self._check(key, function, before)
        elif key in self._graphs or self._capture(key, function, random):
            before()
            self._graphs[key].replay()
        else:
            before()
            function()

    def _check(self, key: Hashable, function: Callable[[], None], before: Callable[[], object]) -> None:
        before()
        # It is called once, waits included: what it has changed by the first wait, such as weights, can't be undone.
        with _noticing_waits() as waits:
            function()
        if waits:
            _log.info("no CUDA graph for %r, as it waits for the device: %s", key, waits[0].message)
            self._waiting.add(key)

    def _capture(self, key: Hashable, function: Callable[[], None], random: torch.Generator | None) -> bool:
        """Makes the graph of a key, which does nothing yet; False if that can't be done."""
        graph = torch.cuda.CUDAGraph()
        if random is not None:
            graph.register_generator_state(random)
        try:
            # `torch.cuda.graph` would also wait for the device, which takes long for many graphs. Nothing that a graph
            # has in its pool outlives its replay, so that all of them may share one.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            _log.warning("no CUDA graph for %r, it could not be captured: %s", key, error)
            self._waiting.add(key)
            return False
        self._graphs[key] = graph
        self._pool = self._pool or graph.pool()
        return True


@contextmanager
def _current(stream: torch.cuda.Stream) -> Generator[None]:
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


@contextmanager
def _noticing_waits() -> Generator[list[warnings.WarningMessage]]:
    """Gathers a warning for each operation that makes the host wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        warnings.filterwarnings("always", message="called a synchronizing")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(mode)
