"""Kernels that are compiled before they are launched."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_cases import check_prepared_once, needs_triton, run_compiler

from statetrack.ops import triton_ahead
from statetrack.ops.triton_ahead import compile_ahead, foreseen

MIXERS = [
    *("deltanet", "gated_deltanet", "deltaproduct", "kda"),
    *("gla", "retnet", "mamba", "mamba2", "mlstm", "rwkv6", "rwkv7", "slstm"),
]


@needs_triton
# Of which there are so few that time is not cut into segments, or so many that it is.
@pytest.mark.parametrize("processors", [1, 10**6])
@pytest.mark.thin(2)
def test_every_kernel_of_a_training_step_is_foreseen_and_no_other(processors):
    printed = run_compiler("tests/ops/kernels_foreseen.py", str(processors), *MIXERS)
    for mixer, kernels, late, for_nothing in map(json.loads, printed.splitlines()):
        assert kernels >= 8
        assert (late, for_nothing) == ([], []), mixer


@pytest.mark.slow
@needs_triton
def test_kernels_are_compiled_once_and_as_those_that_are_not_ahead(tmp_path):
    alone, ahead = (compiled_by(threads, tmp_path / str(threads))["compiled"] for threads in (0, 3))
    assert {where for *_, where in alone} == {"here"}
    assert sum(where == "background" for *_, where in ahead) >= len(ahead) // 2
    # With the assembler that `triton_assembler` chooses too.
    assert [rest for *rest, _ in ahead] == [rest for *rest, _ in alone]
    assert {version for _, version, _ in ahead} == {"8.8"}


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_kernels_are_compiled_ahead_and_gradients_are_the_same(tmp_path):
    alone, ahead = (compiled_by(threads, tmp_path / str(threads)) for threads in (0, 3))
    assert [rest for *rest, _ in ahead["compiled"]] == [rest for *rest, _ in alone["compiled"]]
    assert "background" in {where for *_, where in ahead["compiled"]}
    assert ahead["gradients"] == alone["gradients"] is not None


def compiled_by(threads, folder):
    return json.loads(run_compiler("tests/ops/kernels_ahead.py", str(threads), TRITON_CACHE_DIR=str(folder)))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("ending", "said"), [("exit", ""), ("interrupt", "KeyboardInterrupt")])
def test_a_program_that_ends_meanwhile_waits_for_no_more_than_what_is_in_hand(ending, said, tmp_path):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/ops/kernels_ahead.py", "1", ending],
        cwd=root,
        env=inherited | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3 if ending == "exit" else done.returncode, done.stderr
    assert done.stdout == ""
    assert done.stderr.strip().endswith(said)
    assert done.stderr.count("Traceback") == bool(said)
    # A quarter of them, and those that were being compiled.
    assert len(list(tmp_path.glob("*/*.cubin"))) <= 5


class Kernel:
    """As triton's: compiles what is not in its table, then launches it."""

    def __init__(self, log, fails=""):
        self.log, self.fails, self.table = log, fails, {}
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def warmup(self, x, grid):
        return self.table.get(tuple(x.shape)) or self._do_compile(tuple(x.shape), {}, 0, {}, None, {}, True)

    def __getitem__(self, grid):
        return lambda x: self.log.append(("launched", self.warmup(x, grid)))

    def _do_compile(self, key, signature, device, *others):
        background = threading.current_thread() is not threading.main_thread()
        self.log.append(("compiled", "background" if background else "here", key))
        if background:
            self.begun.set()
            assert self.go_on.wait(10)
        if self.fails == "everywhere" or (background and self.fails):
            raise ValueError("no such kernel")
        self.table[key] = f"kernel {key}"
        return self.table[key]


@pytest.fixture
def operator(monkeypatch):
    """operator(fails=""): (forward, backward, log, the backward's kernel) of an operator with a kernel each way."""
    monkeypatch.setattr(triton_ahead, "_trains", lambda x: x.requires_grad)
    monkeypatch.setattr(triton_ahead, "_work", triton_ahead._Work(1))

    def make(fails=""):
        log = []
        kernels = SimpleNamespace(first=Kernel(log), second=Kernel(log, fails))
        for kernel in vars(kernels).values():
            compile_ahead(kernel)

        def launch(name, x):
            found = triton_ahead.visitors(kernels) if triton_ahead.is_visited() else kernels
            getattr(found, name)[(1,)](x)
            return x

        def backward(x):
            return launch("second", x)

        return foreseen(lambda x: launch("first", x), lambda result, x: backward(x)), backward, log, kernels.second

    yield make
    assert wait_for(lambda: not triton_ahead._work.running)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


ONE, TWO = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)


def test_the_backwards_kernel_is_there_when_it_is_launched(operator):
    forward, backward, log, kernel = operator()
    forward(ONE)
    assert wait_for(lambda: kernel.table)
    backward(ONE)
    assert sorted(log) == [
        ("compiled", "background", (1,)),
        ("compiled", "here", (1,)),
        ("launched", "kernel (1,)"),
        ("launched", "kernel (1,)"),
    ]
    forward(ONE)
    assert len(log) == 5  # with one launch more, and nothing that was compiled


def test_a_kernel_in_hand_is_waited_for(operator):
    forward, backward, log, kernel = operator()
    kernel.go_on.clear()
    forward(ONE)
    assert kernel.begun.wait(10)
    threading.Timer(0.05, kernel.go_on.set).start()
    backward(ONE)
    assert log[-1] == ("launched", "kernel (1,)")
    assert log.count(("compiled", "here", (1,))) == 1  # the forward's


def test_a_kernel_in_the_queue_is_not_waited_for(operator):
    forward, backward, log, kernel = operator()
    kernel.go_on.clear()
    forward(ONE)
    assert kernel.begun.wait(10)
    forward(TWO)
    backward(TWO)
    assert log[-2:] == [("compiled", "here", (2,)), ("launched", "kernel (2,)")]
    kernel.go_on.set()
    assert wait_for(lambda: not triton_ahead._work.running)
    assert log[-1] == ("launched", "kernel (2,)")


def test_an_error_in_the_background_is_nobodys(operator, capfd):
    forward, backward, log, kernel = operator("in the background")
    forward(ONE)
    assert kernel.begun.wait(10)
    backward(ONE)
    assert log[-2:] == [("compiled", "here", (1,)), ("launched", "kernel (1,)")]
    assert capfd.readouterr() == ("", "")


def test_an_error_is_that_of_the_launch(operator):
    forward, backward, _, kernel = operator("everywhere")
    forward(ONE)
    assert kernel.begun.wait(10)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such kernel"):
            backward(ONE)
    assert not triton_ahead._work.futures


def test_a_backward_that_cannot_be_rehearsed_is_compiled_in_its_time(operator):
    _, backward, log, _ = operator()

    def fail(result, x):
        raise TypeError("something else")

    foreseen(backward, fail)(ONE)
    assert log == [("compiled", "here", (1,)), ("launched", "kernel (1,)")]


def test_without_a_gradient_nothing_is_foreseen(operator):
    forward, _, log, _ = operator()
    forward(torch.zeros(1))
    assert log == [("compiled", "here", (1,)), ("launched", "kernel (1,)")]


def test_without_threads_kernels_are_compiled_where_they_are_launched(operator, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    forward, backward, log, _ = operator()
    forward(ONE)
    backward(ONE)
    forward(TWO)
    assert ("compiled", "background", (1,)) not in log
    assert log[-1] == ("launched", "kernel (2,)")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system, as Windows, has no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_compiles_by_itself(operator):
    forward, backward, log, kernel = operator()
    kernel.go_on.clear()
    forward(ONE)
    assert kernel.begun.wait(10)  # by a thread that the child doesn't have
    child = os.fork()
    if child == 0:
        backward(ONE)
        forward(TWO)
        os._exit(0 if threading.active_count() == 1 and log[-1] == ("launched", "kernel (2,)") else 1)
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    kernel.go_on.set()
    assert ended == (child, 0)


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_tensors_without_memory_are_aligned_as_those_that_they_stand_for(offset):
    x = torch.empty(64)[offset:].as_strided((3, 5), (9, 1), offset)
    meta = triton_ahead._without_memory(x)
    assert (meta.shape, meta.stride(), meta.dtype) == (x.shape, x.stride(), x.dtype)
    assert meta.data_ptr() % 16 == x.data_ptr() % 16


def test_a_kernel_is_prepared_once_and_other_things_not_at_all():
    check_prepared_once(compile_ahead)
