"""`statetrack evaluate` and `report` of language models, ours and a Transformer of transformers."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from statetrack import LanguageModel, ModelConfig
from statetrack.cli import main
from statetrack.data import PrepareConfig, TextSource, prepare
from statetrack.data.tokenizer import byte_tokenizer
from statetrack.hf import export
from statetrack.language_models.causal import load_causal_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prepared data, a run whose training has logged, and a Llama."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for domain in ("code", "prose"):
        (place / domain).mkdir()
        for index in range(40):
            (place / domain / f"{index}.txt").write_text(f"{domain} {index} is {index**3}. " * 9)
    sources = [TextSource(domain, str(place / domain)) for domain in ("code", "prose")]
    prepare(sources, place / "data", PrepareConfig(tokenizer="bytes", held_out=0.3))
    (place / "run").mkdir()
    export(LanguageModel(ModelConfig(vocab_size=257, d_model=16)), place / "run" / "model")
    lines = [{"step": s, "tokens": 100 * s, "loss": 5 / s, "tokens_per_second": 10.0 * s} for s in range(1, 6)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 6, "lo'
    (place / "run" / "metrics.jsonl").write_text(text)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(place / "llama")
    for directory in (place / "run" / "model", place / "llama"):
        byte_tokenizer().save(directory)
    return place


def test_models_are_judged_and_compared(place, capsys):
    options = ["--data", str(place / "data"), "--lengths", "64,256", "--tokens", "512", "--probe-lengths", "4"]
    options += ["--sequences", "4", "--generation", "16,64", "--device", "cpu"]
    assert main(["evaluate", str(place / "run"), *options]) == 0
    assert main(["evaluate", str(place / "llama"), *options, "--json", str(place / "llama.json")]) == 0
    ours, theirs = (json.loads((place / name).read_text()) for name in ("run/evaluation.json", "llama.json"))
    for found in (ours, theirs):
        assert [d["domain"] for d in found["perplexity"]] == ["code", "prose"]
        assert [loss["stop"] for loss in found["perplexity"][0]["by_length"]] == [64, 256]
        assert {p["probe"] for p in found["probes"]} == {"parity", "s3", "code"}
        assert [cost["length"] for cost in found["generation"]["models"][0]["costs"]] == [16, 64]
    assert [model["title"] for model in ours["generation"]["models"]] == ["DeltaNet [-1, 1]", "Llama, untrained"]
    assert [model["title"] for model in theirs["generation"]["models"]] == ["Llama"]
    assert ours["perplexity"][0]["bytes"] == theirs["perplexity"][0]["bytes"]
    assert not (place / "llama" / "evaluation.json").exists()

    page = place / "page.html"
    assert main(["report", str(place / "run"), str(place / "llama.json"), "--out", str(page)]) == 0
    text = page.read_text()
    for words in (
        "DeltaNet [−1, 1]",
        "DeltaNet\u00a0[−1,\u00a01]",
        "Llama",
        "Loss in training",
        "prose: by position",
        "Probe: s3",
        "Generation: speed by length",
        "Generation: memory by length",
        "Llama,\u00a0untrained",
        "</html>",
    ):
        assert words in text
    assert "http" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "run", "--task", "parity"], "for runs of a task"),
        (["evaluate", "run", "--lengths", "64"], "--data"),
        (["evaluate", "run", "--probes", "none"], "nothing to judge"),
        (["evaluate", "run", "--data", "nowhere"], "nowhere"),
        (["evaluate", "run", "--probes", "chess"], "unknown probe"),
        (["evaluate", "run", "--probes", "none", "--generation", "0"], "generation"),
        (["evaluate", "run", "--probes", "none", "--generation", "many"], "generation"),
        (["report", "llama"], "was not judged yet"),
        (["report", "run", "code"], "not both"),
        (["report", "run/metrics.jsonl"], "not valid JSON"),
    ],
)
def test_bad_input_ends_in_a_sentence(place, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_transformer_is_read_in_pieces(place):
    model = load_causal_model(place / "llama")
    ids = torch.randint(257, (2, 20))
    whole, _ = model.scan(ids)
    first, state = model.scan(ids[:, :7])
    second, _ = model.scan(ids[:, 7:], state, torch.tensor([0, 12]))
    torch.testing.assert_close(torch.cat([first, second], 1), torch.cat([whole[:, :7], whole[:, [7, 19]]], 1))
