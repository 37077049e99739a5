"""What becomes a CUDA graph, and when; with a graph that only remembers, as the machine may have no GPU."""

import warnings

import pytest
import torch

from statetrack.graphs import Graphs, Lead, Side


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
    mode = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    monkeypatch.setattr(Remembering, "sync_debug_mode", mode, raising=False)
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


def wait():
    """Waits for the device as PyTorch does, which only its debug mode notices."""
    if Remembering.sync_debug_mode[-1] == "warn":
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)


def test_what_waits_for_the_device_or_can_not_be_captured_is_called_as_it_is(on_gpu, monkeypatch):
    done = []

    def waits():
        done.append("call")
        wait()

    for _ in range(4):
        on_gpu.run("waits", waits)
    assert done == ["call"] * 4
    assert not made
    assert Remembering.sync_debug_mode == [0, "warn", 0]

    monkeypatch.setattr(Remembering, "capture_end", lambda self: (_ for _ in ()).throw(RuntimeError("invalidated")))
    calls = []
    for _ in range(4):
        on_gpu.run("refused", lambda: calls.append(0))
    assert len(calls) == 5  # one of them in vain
    assert made[0].calls == [("begin", None)]


def test_a_step_that_waits_after_it_has_changed_the_weights_is_taken_once_a_call(on_gpu):
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)

    def step():
        weight.grad = torch.ones(1)
        optimizer.step()
        wait()

    for _ in range(5):
        on_gpu.run("step", step)
    assert optimizer.state[weight]["step"] == 5
    assert weight.item() == pytest.approx(0.5)


@pytest.mark.gpu
def test_on_a_gpu_a_step_that_waits_is_noticed_and_taken_once_a_call():
    device = torch.device("cuda")
    weight = torch.ones(1, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    on_device, losses = Graphs(device), []

    def step():
        loss = weight.sum()
        weight.grad = None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with on_device.context():
        for _ in range(5):
            on_device.run("step", step)
    assert losses == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6], abs=1e-5)


def test_errors_of_a_function_are_its_own(on_gpu):
    on_gpu.run("wrong", lambda: None)

    def wrong():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        on_gpu.run("wrong", wrong)
    assert Remembering.sync_debug_mode[-1] == 0


def test_on_a_cpu_functions_are_just_called():
    plain, done = Graphs(torch.device("cpu")), []
    with plain.context():
        for _ in range(4):
            plain.run(8, lambda: done.append("call"), before=lambda: done.append("before"))
    assert done == ["before", "call"] * 4


class Device:
    """A GPU that does what it was given only while somebody waits for it; events as those of `torch.cuda`."""

    def __init__(self):
        self.given = self.done = 0

    def event(self):
        device = self

        class Event:
            at = 0

            def record(self, stream):
                assert stream is device
                self.at = device.given

            def synchronize(self):
                device.done = max(device.done, self.at)

        return Event()


def test_the_host_gets_ahead_of_a_gpu_by_a_few_steps_and_no_more(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: device)
    lead, ahead = Lead(torch.device("cuda")), []
    for _ in range(100):
        device.given += 1
        ahead.append(device.given - device.done)
        lead.step()
    assert max(ahead) == 2 * Lead.STEPS
    assert ahead[: Lead.STEPS + 1] == list(range(1, Lead.STEPS + 2))  # it waits for nothing at first
    assert device.done == 88  # not for what was just launched either, so that a GPU always has something to do


def test_a_cpu_is_never_waited_for(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    lead = Lead(torch.device("cpu"))
    for _ in range(4 * Lead.STEPS):
        device.given += 1
        lead.step()
    assert device.done == 0
