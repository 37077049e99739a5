"""Triton kernels compiled ahead of their first launch, in the background: those of a backward during its forward.

Triton compiles a kernel when it is first launched, and everything waits: for its own compiler, for the assembler, for
the C compiler that makes the launcher, and then for the same with the next kernel. Two things shorten that:

- The launcher is made beside the kernel.
- Where an operator whose input takes part in autograd meets a kernel that is not compiled, its function and that of its
  backward are called once more, with tensors that have no memory (of the device "meta"). Nothing is launched for these:
  the kernels are queued, and threads compile them. What sizes and addresses tell triton of a tensor, these tell it too,
  so that the kernels are those that the true calls ask for.

A guess that was wrong costs time alone: a kernel that is not there when it is launched is compiled then, as ever, and
one that is just being compiled is waited for. Once its kernels are compiled, an operator takes none of these ways.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import partial, wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from statetrack.machine import available_cores


def _threads() -> int:
    """How many compile at once, beside the one that needs the kernels: of this process's share of the cores.

    Triton's own compiler is half Python, which takes turns; assemblers and C compilers run at once.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun, on this host
    return max(0, min(8, available_cores() // processes - 1))


Visit = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], None]
"""(name, kernel, arguments, options) of a launch."""
Then = Callable[..., object]
"""Calls the function of an operator's backward, given the operator's results and its arguments."""


_Job = tuple[Any, Callable[[], Any]]
"""A kernel's place in the tables, and what compiles it."""


class _Here(threading.local):
    """What this thread does."""

    call: tuple[Callable[..., Any], Then, tuple[Any, ...]] | None = None
    """The operator that runs here, until a kernel of it was missing."""
    visit: Visit | None = None
    missing: list[_Job] | None = None
    """Where kernels that are not compiled are noted, in place of being compiled."""


class _Work:
    """What is compiled, or is to be, in this process."""

    def __init__(self, threads: int) -> None:
        self.lock = threading.Lock()
        self.threads = threads
        """That may run beside each other."""
        self.running = 0
        self.queue: deque[tuple[Any, Callable[[], Any], Future[Any]]] = deque()
        self.futures: dict[Any, Future[Any]] = {}
        """By kernel, device and triton's key: the compiled kernel, or None if it did not come about."""

    def take(self, place: Any, mine: Future[Any]) -> Future[Any] | None:
        """Leaves a kernel to the caller, or returns the future of somebody who compiles it already."""
        with self.lock:
            other = self.futures.get(place)
            if other is None or other.cancel():  # which works with those that are still in the queue
                self.futures[place] = mine
                return None
            return other

    def done(self, place: Any, future: Future[Any], compiled: Any) -> None:
        with self.lock:
            if self.futures.get(place) is future:
                del self.futures[place]  # the kernel is in triton's own table, or there is none
        future.set_result(compiled)

    def put(self, jobs: list[_Job]) -> None:
        """Queues those that nobody has in hand, before those of earlier calls: backwards come last to first."""
        with self.lock:
            new = {place: job for place, job in jobs if place not in self.futures}
            futures = {place: Future() for place in new}
            self.futures |= futures
            self.queue.extendleft(reversed([(place, job, futures[place]) for place, job in new.items()]))
            for _ in range(min(self.threads - self.running, len(new))):
                # Python waits for threads before it ends, unless they are daemons: those it stops in the midst of
                # whatever they do, which the compiler's C++ doesn't survive.
                threading.Thread(target=self._run, name="statetrack: compiles kernels").start()
                self.running += 1

    def _run(self) -> None:
        while True:
            with self.lock:
                # What is in the queue is nobody's concern if the program has ended or was interrupted.
                if not self.queue or not threading.main_thread().is_alive():
                    self.running -= 1
                    return
                place, job, future = self.queue.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            compiled = None
            try:
                compiled = job()
            except BaseException:  # whoever launches the kernel compiles it again, and sees the error
                pass
            finally:
                self.done(place, future, compiled)


_here = _Here()
_work = _Work(_threads())


def _forget() -> None:
    """In a forked process, which has none of the threads, and perhaps a lock that one of them held."""
    global _work
    _work = _Work(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def foreseen(function: Callable[..., Any], then: Then) -> Callable[..., Any]:
    """An operator's function, whose kernels and those of its backward, which `then` calls, are compiled ahead."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        before, _here.call = _here.call, (function, then, arguments)
        try:
            return function(*arguments)
        finally:
            _here.call = before

    return call


def compile_ahead(kernel: Any) -> None:
    """Lets a kernel, a function of `triton.jit`, be compiled in the background, and never twice at once.

    Objects that are not kernels, and kernels of the interpreter, are ignored.
    """
    prepare = getattr(kernel, "_do_compile", None)
    if prepare is None or hasattr(kernel, "is_compiled_ahead"):
        return

    @wraps(prepare)
    def prepare_once(key: Any, signature: Any, device: Any, *others: Any, **named: Any) -> Any:
        place, work = (id(kernel), device, key), _work
        job = partial(prepare, key, signature, device, *others, **named)
        launcher = partial(_make_launcher, kernel, signature, *others)
        if _here.missing is not None:
            _here.missing.append((place, lambda: (launcher(), job())[1]))
            return None
        mine: Future[Any] = Future()
        mine.set_running_or_notify_cancel()
        compiled = None
        try:
            while other := work.take(place, mine):
                if (compiled := other.result()) is not None:
                    return compiled
            _foresee(work)
            with _beside(launcher) if work.threads else nullcontext():
                compiled = job()
            return compiled
        finally:
            work.done(place, mine, compiled)

    kernel._do_compile, kernel.is_compiled_ahead = prepare_once, True


def _foresee(work: _Work) -> None:
    """Queues the kernels of the operator that runs here, once, where it is known to have a backward."""
    call, _here.call = _here.call, None
    if call is None or not work.threads:
        return
    function, then, arguments = call
    x = next((x for x in arguments if isinstance(x, Tensor) and _trains(x)), None)
    if x is None:
        return

    def note(name: str, kernel: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernel.warmup(*given, grid=(1,), **options)

    _here.missing = missing = []
    try:
        with torch.cuda.device_of(x):
            rehearse(function, then, arguments, note)
    except Exception:  # launches that were not seen are compiled when their time has come
        pass
    finally:
        _here.missing = None
    with suppress(RuntimeError):  # no thread can be started, and what is in the queue may stay there
        work.put(missing)


def _trains(x: Tensor) -> bool:
    """Whether a backward on a GPU is likely to follow, at once."""
    return x.is_cuda and x.requires_grad and not torch.cuda.is_current_stream_capturing()


def rehearse(function: Callable[..., Any], then: Then, arguments: tuple[Any, ...], visit: Visit) -> None:
    """Visits the launches that an operator's function and that of its backward would make for these arguments."""
    without_memory = tree_map_only(Tensor, _without_memory, arguments)
    with torch.no_grad(), visited(visit):
        then(function(*without_memory), *without_memory)


def _without_memory(x: Tensor) -> Tensor:
    """A tensor of the shape, strides and dtype, at an address that is as far from a multiple of 16."""
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.empty(size, dtype=x.dtype, device="meta")
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


@contextmanager
def visited(visit: Visit) -> Iterator[None]:
    """Launches by this thread, of kernels from `triton_common.kernels`, are visited and not made."""
    before, _here.visit = _here.visit, visit
    try:
        yield
    finally:
        _here.visit = before


def is_visited() -> bool:
    return _here.visit is not None


def visitors(kernels: Any) -> SimpleNamespace:
    """The kernels of a namespace, whose launches `visited` sees."""
    visit = _here.visit
    assert visit is not None

    class Launcher:
        def __init__(self, name: str, kernel: Any) -> None:
            self.seen = partial(_see, visit, name, kernel)

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.seen

    return SimpleNamespace(**{name: Launcher(name, x) for name, x in vars(kernels).items()})


def _see(visit: Visit, name: str, kernel: Any, /, *arguments: Any, **options: Any) -> None:
    visit(name, kernel, arguments, options)


@contextmanager
def _beside(job: Callable[[], None]) -> Iterator[None]:
    """Does a job in a thread meanwhile, or not at all."""
    thread = threading.Thread(target=job, name="statetrack: makes a launcher")
    with suppress(RuntimeError):  # no more threads
        thread.start()
    yield
    if thread.ident is not None:
        thread.join()


def _make_launcher(kernel: Any, signature: Any, constants: Any, options: Any, attributes: Any, *_: Any) -> None:
    """Puts a kernel's launcher into triton's folder, where the first launch looks for it."""
    try:
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        import_module("triton").runtime.driver.active.launcher_cls(source, _Unknown())
    except Exception:  # the launch makes it, and sees the error
        pass


class _Unknown:
    """In the place of what is only known of a compiled kernel; the launcher's text doesn't depend on it."""

    def __getattr__(self, name: str) -> None:
        return None
