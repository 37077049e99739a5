"""`python -m benchmarks.ops` measures what its files don't hold yet; its figure. What it measures needs a GPU."""

import json
import time

import pytest
import torch

from benchmarks import ops, ops_gpu_plot


def row(name, value, peer=None):
    return {"row": name, "ours_ms": value, "peer": peer}


@pytest.fixture
def part():
    names = {"a": None, "b": "torch", "c": "no_such_package"}
    measured = []

    def measure(name, with_peer):
        measured.append((name, with_peer))
        return [row(name, 1.0, "torch" if with_peer else None)]

    part = ops.Part(".json", "times", "row", names, measure, lambda rows: rows[0]["row"])
    return part, measured


def test_what_is_there_is_not_measured_again(part):
    part, _ = part
    done = [row("a", 2.0), row("b", 2.0), row("c", 2.0)]
    assert ops.pending(part, [], ["*"], ["*"], again=False) == {"a": False, "c": False, "b": True}
    assert ops.pending(part, done, ["*"], [], again=False) == {}
    assert ops.pending(part, done, ["*"], ["*"], again=False) == {"b": True}  # without its peer so far
    assert ops.pending(part, [*done, row("b", 1.0, "torch")], ["*"], ["*"], again=False) == {}
    assert ops.pending(part, done, ["[ac]"], ["*"], again=True) == {"a": False, "c": False}


def test_calls_add_up_to_one_file(part, tmp_path, monkeypatch):
    part, measured = part
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    path = tmp_path / "card.json"
    rows, left = ops.run(part, {"b": True}, path, time.monotonic() + 60)
    assert (len(rows), left) == (1, [])
    _, left = ops.run(part, {"a": False, "c": False}, path, time.monotonic() - 1)
    assert left == ["a", "c"]
    ops.run(part, {"a": False, "b": True}, path, time.monotonic() + 60)
    assert measured == [("b", True), ("a", False), ("b", True)]
    assert [x["row"] for x in json.loads(path.read_text())["rows"]] == ["a", "b"]
    assert ops.load(path)[0]["commit"]


def test_the_figure_has_ours_and_the_peers(tmp_path):
    speed = [
        {"row": f"sweep-{t}", "pass": which, "T": t, "ours_ms": t / 1e3, "peer_ms": t / 5e2, "floor_ms": t / 1e4}
        for t in (512, 2048)
        for which in ("fwd", "fwd+bwd")
    ]
    accuracy = [
        {
            "case": f"random keys, beta = 2, T = {t}",
            "tensor": "o",
            "T": t,
            "ours": 1e-3,
            "peer": None,
            "recurrence": 1e-3,
        }
        for t in (512, 2048)
    ]
    ops_gpu_plot.draw(speed, accuracy, tmp_path / "card.svg")
    text = (tmp_path / "card.svg").read_text()
    for label in ("statetrack, forward", "flash-linear-attention, with backward", "float32 step loop: random keys"):
        assert label in text
    ops_gpu_plot.draw([], [], tmp_path / "empty.svg")
    assert "statetrack, forward" not in (tmp_path / "empty.svg").read_text()
