"""The benchmark of language models: runs add up over calls, what has no time is no result, and tables say the truth."""

import json
import sys

import pytest

from benchmarks import language_models
from benchmarks.language_models_tables import tables
from statetrack.data import PrepareConfig, TextSource, prepare

_TINY = [
    "model.d_model=16", "model.num_layers=1", "model.mlp_size=16", "model.mixer.num_heads=1", "data.sequence_length=16",
    "data.batch_size=4", "training.precision=float32", "execution.micro_batch_size=2", "execution.log_every=1",
]  # fmt: skip


@pytest.fixture
def call(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for index in range(20):
        (text / f"{index:02d}.txt").write_text(f"one and {index} are more than {index}. " * 8)
    prepare([TextSource("prose", str(text))], tmp_path / "data", PrepareConfig(tokenizer="bytes", held_out=0.3))

    def call(*options):
        arguments = ["language_models", *options, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", arguments)
        language_models.main()
        return json.loads((tmp_path / "out" / "summary.json").read_text())["results"]

    settings = [part for value in _TINY for part in ("--set", value)]
    return lambda *options: call(str(tmp_path / "data"), "--device", "cpu", "--tokens", "512", *settings, *options)


def test_runs_add_up_and_those_that_end_early_go_on(call, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # the time is up after the first step
        patch.setattr(language_models.time, "monotonic", iter([0.0, 0.0, *[100.0] * 9]).__next__)
        (record,) = call("--only", "deltanet-widened", "--minutes", "1")
    assert not record["finished"]
    assert (record["tokens"], record["held_out"]) == (64, {})
    first, second = call("--only", "deltanet-widened", "deltanet")
    assert [first["name"], second["name"]] == ["deltanet", "deltanet-widened"]
    assert first["finished"]
    assert second["finished"]
    assert [tokens for tokens, _ in second["loss"]] == [64 * step for step in range(1, 9)]
    assert second["loss"][0] == record["loss"][0]
    assert first["loss"] != second["loss"]
    assert all(record["tokens"] == record["unique_tokens"] == 512 for record in (first, second))
    # The same tokens at all lengths; a byte has at most as many choices as the vocabulary, give or take.
    assert list(second["held_out"]["prose"]) == [str(16 * 2**i) for i in range(5)]
    assert all(1 < value < 400 for value in second["held_out"]["prose"].values())
    assert call("--only", "deltanet")[0] == first  # not trained again
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"summary.json", "summary.md"}
    with pytest.raises(SystemExit, match="other settings"):
        call("--set", "optimizer.learning_rate=1e-4")


def test_differences_are_those_of_the_losses():
    def record(name, seed, value):
        return {
            "name": name, "by": "statetrack", "mixer": "deltanet", "eigenvalue_range": [-1, 1], "num_householder": 1,
            "seed": seed, "finished": True, "parameters": 1e6, "tokens": 2e6, "unique_tokens": 1e6, "mfu": None,
            "tokens_per_second": 10.0, "peak_memory_gb": None, "held_out": {"code": {"16": value}}, "device": "cpu",
        }  # fmt: skip

    text = tables([record("deltanet-widened", 0, 10.0), record("deltanet-widened-seed1", 1, 11.0)])
    assert "| one setting, seed 1 against seed 0 | +0.0953 |" in text
    assert "| DeltaNet [-1, 1], seed 0 | 1.0 M | 2.0 M | 1.0 M | 10.000 | 10 |" in text


def test_a_curve_keeps_its_end():
    lines = language_models.thinned(range(1000))
    assert len(lines) <= 300
    assert lines[-1] == 999
    assert language_models.thinned(range(7)) == list(range(7))
