"""The benchmark of docs/checkpoints.md that fine-tunes a widened checkpoint, in two steps instead of a thousand."""

import json
import sys

import pytest

from benchmarks import widening


def test_a_checkpoint_is_read_in_three_ways_and_fine_tuned(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    out = tmp_path / "widening.json"
    sizes = ["--seeds", "1", "--pretraining-steps", "1", "--steps", "2", "--lengths", "4", "9"]
    monkeypatch.setattr(sys, "argv", ["widening", *sizes, "--out", str(out)])
    widening.main()
    runs = {run["way"]: run for run in json.loads(out.read_text())["runs"]}
    assert runs.keys() == widening.WAYS.keys()
    assert runs["preserve"]["even_pairs_before"] == runs["as it is"]["even_pairs_before"]
    assert runs["preserve"]["lowest_end"] < 0
    assert all(run["parity_after"].keys() == {"4", "9"} for run in runs.values())
