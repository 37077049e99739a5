"""Perplexity: against the plain computation, at every length on the same tokens, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.data import PackedTokens, PrepareConfig, TextSource, prepare
from statetrack.language_models.causal import RecurrentModel
from statetrack.language_models.held_out import perplexity


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    (place / "a").mkdir()
    for index in range(60):
        (place / "a" / f"{index}.txt").write_text(f"document {index} counts to {index * index}. " * (3 + index % 5))
    prepare([TextSource("a", str(place / "a"))], place / "data", PrepareConfig(tokenizer="bytes", held_out=0.4))
    return place / "data"


def make(*mixers, **options):
    torch.manual_seed(0)
    pattern = tuple(mixer_config(name)() for name in mixers or ("deltanet",))
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, num_layers=2, mixer=pattern, **options))
    return RecurrentModel(model.double().eval())


@pytest.mark.parametrize("text", ["concatenated", "documents"])
@pytest.mark.parametrize("tokens_at_once", [24, 2**13])  # pieces of windows, or whole ones
def test_each_length_is_the_plain_mean_over_its_windows(data, text, tokens_at_once):
    model, source = make("deltanet", "attention"), PackedTokens(data, "held_out")
    model.tokens_at_once = tokens_at_once
    (result,) = perplexity(model, data, [32, 96], text=text, tokens=96 * 5)
    ids, begins = source.read(0, source.num_tokens)
    ids = torch.from_numpy(ids)
    if text == "concatenated":
        starts = list(range(0, len(ids) - 96, 96))
    else:
        ends = [*begins[1:].tolist(), len(ids)]
        starts = [start for start, end in zip(begins.tolist(), ends, strict=True) if end - start > 96]
    count = min(5, len(starts))
    starts = [starts[i * len(starts) // count] for i in range(count)]
    assert result.stretches == count > 1
    for loss in result.by_length:
        means = []
        for start in starts:
            windows = [ids[at : at + loss.stop + 1] for at in range(start, start + 96, loss.stop)]
            losses = [F.cross_entropy(model.model(w[None, :-1])[0].double(), w[1:]) for w in windows]
            means.append(torch.stack(losses).mean().item())
        means = torch.tensor(means, dtype=torch.float64)
        assert loss.loss == pytest.approx(float(means.mean()), abs=1e-6)
        assert loss.stderr == pytest.approx(float(means.std() / count**0.5), abs=1e-6)
        assert loss.tokens == 96 * count
    short, long = result.by_length
    assert long.change == pytest.approx(long.loss - short.loss, abs=1e-9)
    weighted = sum(p.loss * p.tokens for p in result.by_position) / sum(p.tokens for p in result.by_position)
    assert weighted == pytest.approx(long.loss, abs=1e-9)
    assert [(p.start, p.stop) for p in result.by_position] == [(0, 64), (64, 96)]
    assert result.to_data()["by_length"][0]["perplexity"] == pytest.approx(math.exp(short.loss))


def test_a_length_without_text_is_left_out(data):
    (result,) = perplexity(make(), data, [64, 2**20], tokens=256)
    assert [loss.stop for loss in result.by_length] == [64]
    assert result.left_out == (2**20,)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "at least one"),
        ([0, 4], {}, "positive"),
        ([48, 64], {}, "48 does not divide 64"),
        ([2**20], {}, "no held-out text"),
        ([64], {"text": "pages"}, "text must be"),
        ([64], {"tokens": 0}, "tokens must be"),
        ([64], {"domains": ["prose"]}, "no domain 'prose'"),
    ],
)
def test_bad_input_is_refused(data, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(make(), data, lengths, **options)


def test_a_vocabulary_that_is_too_small_is_refused(data):
    model = RecurrentModel(LanguageModel(ModelConfig(vocab_size=100, d_model=16)))
    with pytest.raises(ValueError, match="257 token ids"):
        perplexity(model, data, [64])
