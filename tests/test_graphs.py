"""What becomes a CUDA graph, and when; with a graph that only remembers, as the machine may have no GPU."""

import contextlib

import pytest
import torch

from statetrack import graphs
from statetrack.graphs import Graphs, Side


class Remembering:
    """Takes the place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.calls = []
        made.append(self)

    def register_generator_state(self, generator):
        self.calls.append("generator")

    def capture_begin(self, pool, capture_error_mode):
        self.calls.append(("begin", pool))

    def capture_end(self):
        self.calls.append("end")

    def replay(self):
        self.calls.append("replay")

    def pool(self):
        return "the pool of the first graph"


made: list[Remembering] = []


@pytest.fixture
def on_gpu(monkeypatch):
    made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Remembering)
    monkeypatch.setattr(graphs, "_refusing_to_wait", contextlib.nullcontext)
    side = Side(torch.device("cpu"))
    side.stream = object()
    return Graphs(torch.device("cpu"), side)


def test_a_function_is_captured_at_its_third_call_and_replayed_from_then_on(on_gpu):
    done, generator = [], torch.Generator()
    for _ in range(5):
        on_gpu.run(8, lambda: done.append("call"), before=lambda: done.append("before"), random=generator)
    # The third call of the function is its capture, ahead of which nothing is prepared, as nothing is done.
    assert done == ["before", "call", "before", "call", "call", "before", "before", "before"]
    for _ in range(3):
        on_gpu.run(16, lambda: None)
    assert [graph.calls for graph in made] == [
        ["generator", ("begin", None), "end", "replay", "replay", "replay"],
        [("begin", "the pool of the first graph"), "end", "replay"],
    ]


def test_what_waits_for_the_device_or_can_not_be_captured_is_called_as_it_is(on_gpu, monkeypatch):
    done = []

    def waits():
        done.append("call")
        if len(done) == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    for _ in range(4):
        on_gpu.run("waits", waits)
    assert len(done) == 5  # the second call again
    assert not made

    monkeypatch.setattr(Remembering, "capture_end", lambda self: (_ for _ in ()).throw(RuntimeError("invalidated")))
    calls = []
    for _ in range(4):
        on_gpu.run("refused", lambda: calls.append(0))
    assert len(calls) == 5  # one of them in vain
    assert made[0].calls == [("begin", None)]


def test_errors_of_a_function_are_its_own(on_gpu):
    on_gpu.run("wrong", lambda: None)

    def wrong():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        on_gpu.run("wrong", wrong)


def test_on_a_cpu_functions_are_just_called():
    plain, done = Graphs(torch.device("cpu")), []
    with plain.context():
        for _ in range(4):
            plain.run(8, lambda: done.append("call"), before=lambda: done.append("before"))
    assert done == ["before", "call"] * 4
