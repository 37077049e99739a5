"""What generation is said to cost: memory to the byte, a time, and a Transformer of the same size."""

import pytest
import torch

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.language_models.causal import RecurrentModel
from statetrack.language_models.generation_costs import generation_costs, transformer_beside


def make(*names, **options):
    mixer = tuple(mixer_config(name)() for name in names)
    sizes = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "mlp_ratio": 3.0}
    return RecurrentModel(LanguageModel(ModelConfig(mixer=mixer, **{**sizes, **options})))


def test_a_state_keeps_its_size_and_keys_and_values_grow():
    models = [make("deltanet"), make("attention"), transformer_beside(make("deltanet"))]
    costs = [generation_costs(models, length, tokens=2) for length in (5, 600)]  # 600: in two pieces
    for short, long in zip(*costs, strict=True):
        assert (short.length, long.length) == (5, 600)
        assert min(short.seconds, long.seconds) > 0
    # Four heads of 8 x 8, and the last three inputs of three convolutions of 32 channels; two layers.
    assert costs[0][0].state_bytes == costs[1][0].state_bytes == 2 * 4 * (4 * 8 * 8 + 3 * 3 * 32)
    for model in (1, 2):  # a key and a value of 32 numbers for each token and layer
        assert costs[1][model].state_bytes - costs[0][model].state_bytes == 595 * 2 * 2 * 32 * 4


def test_the_clock_is_read_around_each_token():
    ticks = iter(range(1000))
    (cost,) = generation_costs([make("deltanet")], 3, tokens=4, clock=lambda: float(next(ticks)))
    assert cost.seconds == 1.0
    assert cost.to_data()["tokens_per_second"] == 1.0


def test_what_is_decoded_are_the_likeliest_tokens(monkeypatch):
    model, seen = make("gated_deltanet"), []
    decoder = model.decoder

    def recorded(state):
        decode = decoder(state)

        class Recorder:
            state_bytes = decode.state_bytes

            def __call__(self, ids):
                seen.append(int(ids))
                return decode(ids)

        return Recorder()

    monkeypatch.setattr(model, "decoder", recorded)
    generation_costs([model], 7, tokens=4)
    ids = torch.randint(50, (1, 7), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, torch.tensor([seen])], 1)
    logits = model.model(ids)[0]
    assert seen[0] == ids[0, 6]
    # The first token that is fed is the last of the context once more.
    assert seen[1:] == logits[7:-1].argmax(-1).tolist()


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"d_model": 96, "num_layers": 4}])
def test_the_transformer_beside_has_as_many_parameters(options):
    model = make("deltanet", **options)
    beside = transformer_beside(model)
    assert beside.num_parameters == pytest.approx(model.num_parameters, rel=0.05)
    assert beside.vocab_size == model.vocab_size
    assert not beside.constant_memory


def test_a_transformer_has_none_beside_it():
    assert transformer_beside(make("attention")) is None
    assert transformer_beside(transformer_beside(make("deltanet"))) is None
    assert transformer_beside(make("mamba", d_model=33)) is None


@pytest.mark.parametrize(("length", "tokens", "message"), [(0, 1, "length must be"), (1, 0, "tokens must be")])
def test_bad_numbers_are_refused(length, tokens, message):
    with pytest.raises(ValueError, match=f"{message} at least 1, got 0"):
        generation_costs([make("deltanet")], length, tokens=tokens)
