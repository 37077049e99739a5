"""The language model: its three ways to compute, its state, and what it refuses."""

import pytest
import torch

from statetrack import LanguageModel, ModelConfig, mixer_config, mixer_configs


def make(name="deltanet", **options):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=7, d_model=12, mixer=mixer_config(name)(), **{"mlp_ratio": 2.0, **options})
    return LanguageModel(config).double()


@pytest.mark.parametrize("name", mixer_configs())
def test_forward_scan_and_step_agree(name):
    model, ids = make(name), torch.randint(7, (3, 19))
    logits = model(ids)
    state, outputs = model.init_state(3), []
    for token in ids.unbind(1):
        y, state = model.step(token, state)
        outputs.append(y)
    assert torch.allclose(torch.stack(outputs, 1), logits)
    first, state = model.scan(ids[:, :8])
    second, _ = model.scan(ids[:, 8:], state)
    assert torch.allclose(torch.cat([first, second], 1), logits)


def test_packed_sequences_equal_sequences_alone():
    model, ids = make(), torch.randint(7, (1, 12))
    packed = model(ids, torch.tensor([0, 5, 12]))
    assert torch.allclose(packed, torch.cat([model(ids[:, :5]), model(ids[:, 5:])], 1))


def test_logits_can_be_had_at_some_positions_only():
    model, ids = make(), torch.randint(7, (2, 9))
    at = torch.tensor([0, 4, 8])
    assert torch.allclose(model.scan(ids, positions=at)[0], model(ids)[:, at])
    assert model.scan(ids, positions=torch.tensor([], dtype=torch.long))[0].shape == (2, 0, 7)


def test_transitions_are_those_of_every_layer():
    model, ids = make(num_layers=3), torch.randint(7, (2, 9))
    transitions = model.transitions(ids)
    assert len(transitions) == 3
    assert all(t is not None and t.batch_shape == (2, 9, 4) for t in transitions)


def test_outputs_need_not_be_the_vocabulary():
    assert make(output_size=3)(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 3)


def test_the_final_norm_can_be_left_out():
    model, ids = make(final_norm=False, mlp_ratio=0.0), torch.zeros(1, 3, dtype=torch.long)
    assert "norm.weight" not in model.state_dict()
    assert "norm.weight" in make().state_dict()
    assert model(ids).isfinite().all()


def test_num_parameters_counts_all():
    model = LanguageModel(
        ModelConfig(vocab_size=5, d_model=8, num_layers=1, mixer=mixer_config("deltanet")(conv_size=0))
    )
    embedding_and_head, norms, projections = 2 * 5 * 8, 2 * 8, 4 * 8 * 8 + 4 * 8
    head_norm = 2
    assert model.num_parameters() == embedding_and_head + norms + projections + head_norm


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), "B, T >= 1"),
        (torch.zeros(0, 2, dtype=torch.long), "B, T >= 1"),
        (torch.zeros(3, dtype=torch.long), "B, T >= 1"),
        (torch.zeros(2, 2), "integer tensor"),
        (torch.full((1, 1), 7), r"0\.\.6 for this model, got 7\.\.7"),
        (torch.full((1, 1), -1), r"got -1\.\.-1"),
    ],
)
def test_wrong_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        make()(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"d_model": -4}, "d_model must be a positive integer"),
        ({"num_layers": True}, "num_layers must be a positive integer"),
        ({"mlp_ratio": -1}, "mlp_ratio must be 0"),
        ({"mlp": "deep"}, "mlp must be gated or relu"),
        ({"mlp_depth": 2}, "mlp_depth = 2 needs mlp = relu"),
        ({"mlp": "relu", "mlp_depth": 0}, "mlp_depth must be a positive integer"),
        ({"norm_eps": 0}, "norm_eps must be a small positive number"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"vocab_size": 4, **options})
