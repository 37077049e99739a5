"""The language model: its three ways to compute, its state, and what it refuses."""

import pytest
import torch

from statetrack import LanguageModel, ModelConfig, mixer_config, mixer_configs
from statetrack.model import owned


def make(name="deltanet", **options):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=7, d_model=16, mixer=mixer_config(name)(), **{"mlp_ratio": 2.0, **options})
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


@pytest.mark.parametrize("name", mixer_configs())
def test_steps_in_place_agree_with_the_whole_and_leave_copies_alone(name):
    model, ids = make(name), torch.randint(7, (2, 9))
    logits, state = model(ids), model.scan(ids[:, :5])[1]
    kept = owned(state)
    mine = owned(state)
    for t in range(5, 9):
        assert torch.allclose(model.step_(ids[:, t], mine), logits[:, t])
    for before, copy, after in zip(state, kept, mine, strict=True):
        assert all(torch.equal(before[name], tensor) for name, tensor in copy.items())
        assert any(not torch.equal(before[name], tensor) for name, tensor in after.items() if name != "length")
    embedded = model.embedding(ids[:, 5])
    assert torch.allclose(model.step_(embedded, owned(state)), logits[:, 5])


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
        ({"mlp_size": 0}, "mlp_size must be a positive integer"),
        ({"mlp_size": 4, "mlp_ratio": 2.0}, "mlp_ratio or mlp_size, not both"),
        ({"tie_embeddings": True, "output_size": 3}, "output_size = vocab_size = 4, got output_size = 3"),
        ({"norm_placement": "inside"}, "norm_placement must be before, after or none, got 'inside'"),
        ({"norm_placement": ("before",) * 3}, "a pattern of 3 values for norm_placement"),
        ({"mixer": (mixer_config("deltanet")(),) * 3}, "a pattern of 3 values for mixer .* num_layers = 2"),
        ({"mixer": ()}, "a pattern of 0 values for mixer"),
        ({"mixer": ("deltanet", "mamba")}, "config of a mixer or a tuple of configs, got 'deltanet'"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"vocab_size": 4, **options})


HYBRID = (mixer_config("deltanet")(num_heads=2), mixer_config("mamba")(state_size=3))


def test_a_pattern_of_mixers_is_repeated_over_the_layers():
    config = ModelConfig(vocab_size=7, d_model=12, num_layers=4, mixer=HYBRID)
    assert config.layer_mixers() == (*HYBRID, *HYBRID)
    assert config.mixer_name == "deltanet+mamba"
    model, ids = LanguageModel(config).double(), torch.randint(7, (2, 9))
    assert [block.mixer.config for block in model.blocks] == [*HYBRID, *HYBRID]
    logits = model(ids)
    state, outputs = model.init_state(2), []
    for token in ids.unbind(1):
        y, state = model.step(token, state)
        outputs.append(y)
    assert torch.allclose(torch.stack(outputs, 1), logits)
    transitions = model.transitions(ids)
    assert [type(transition).__name__ for transition in transitions] == ["Householder", "Discretized"] * 2


def test_patterns_that_say_the_same_are_the_same_config():
    whole, short = (ModelConfig(vocab_size=7, num_layers=4, mixer=mixer) for mixer in (HYBRID * 2, HYBRID))
    assert whole == short
    assert ModelConfig(vocab_size=7, mixer=(HYBRID[0],) * 2) == ModelConfig(vocab_size=7, mixer=HYBRID[0])


def test_the_mlp_may_have_a_size_of_its_own():
    model = make(mlp_ratio=0.0, mlp_size=5)
    assert model.blocks[0].mlp.up_proj.weight.shape == (5, 16)


def test_norms_after_the_parts_normalize_what_they_add():
    model, ids = make(num_layers=2, norm_placement=("before", "after")), torch.randint(7, (2, 5))
    x = model.embedding(ids)
    first, second = model.blocks
    x = x + first.mixer(first.mixer_norm(x))
    x = x + first.mlp(first.mlp_norm(x))
    x = x + second.mixer_norm(second.mixer(x))
    x = x + second.mlp_norm(second.mlp(x))
    assert model.head is not None
    assert torch.allclose(model(ids), model.head(model.norm(x)))
    assert model.transitions(ids)[1] is not None


def test_tied_embeddings_are_one_parameter():
    model, ids = make(tie_embeddings=True), torch.randint(7, (2, 5))
    untied = make()
    untied.load_state_dict({**model.state_dict(), "head.weight": model.embedding.weight})
    assert "head.weight" not in model.state_dict()
    assert torch.equal(model(ids), untied(ids))


def test_a_residual_in_float32_is_not_rounded():
    model, ids = make(residual_in_float32=True).bfloat16(), torch.randint(7, (2, 5))
    assert model(ids).dtype == torch.bfloat16
    block, x = model.blocks[0], model.embedding(ids)
    expected = x.float() + block.mixer(block.mixer_norm(x)).float()
    expected = expected + block.mlp(block.mlp_norm(expected.bfloat16())).float()
    got, _ = block(x, None, None)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert not torch.equal(got, got.bfloat16().float())


def padded(generator=0):
    """Rows with padding on the left, on the right, in the middle, nowhere; padding holds what is no token at all."""
    torch.manual_seed(generator)
    ids, mask = torch.randint(7, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, 6:] = mask[2, 2:5] = False
    return torch.where(mask, ids, -100), mask


@pytest.mark.parametrize("name", mixer_configs())
def test_padding_anywhere_moves_nothing(name):
    model, (ids, mask) = make(name), padded()
    logits, state = model.scan(ids, mask=mask)
    assert torch.equal(model(ids, mask=mask), logits)
    assert (logits[~mask] == 0).all()
    for row in range(4):
        alone = model(ids[row, mask[row]][None])
        assert torch.allclose(logits[row, mask[row]], alone[0])
    # The state goes on from the last token of each row.
    more, more_mask = padded(1)
    second = model.scan(more, state, mask=more_mask)[0]
    for row in range(4):
        whole = model(torch.cat([ids[row, mask[row]], more[row, more_mask[row]]])[None])[0]
        assert torch.allclose(second[row, more_mask[row]], whole[mask[row].sum() :])
    at = torch.tensor([0, 3, 8])
    assert torch.allclose(model.scan(ids, mask=mask, positions=at)[0], logits[:, at])


@pytest.mark.parametrize("name", mixer_configs())
def test_a_masked_step_leaves_its_row_alone(name):
    model, (ids, mask) = make(name), padded()
    mask[:, 3] = False
    state, outputs = model.init_state(4), []
    for token, real in zip(ids.unbind(1), mask.unbind(1), strict=True):
        y, state = model.step(token, state, mask=real)
        outputs.append(y)
    assert torch.allclose(torch.stack(outputs, 1), model(torch.where(mask, ids, 0), mask=mask))


def test_no_gradient_comes_from_padding():
    model, (ids, mask) = make(), padded()
    model(ids, mask=mask).square().sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in range(4):
        model(ids[row, mask[row]][None]).square().sum().backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(together, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.zeros(4, 9, dtype=torch.bool)}, "padding only"),
        ({"mask": torch.ones(4, 9)}, "bool tensor"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, r"\[B, T\] = \(4, 9\)"),
        ({"mask": torch.ones(4, 9, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 36])}, "not both"),
        ({"mask": torch.ones(4, 9, dtype=torch.bool)}, r"got -100\.\."),
    ],
)
def test_a_wrong_mask_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make().scan(padded()[0], **options)


def test_a_wrong_mask_of_a_step_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"\[B\] = \(2,\)"):
        model.step(torch.zeros(2, dtype=torch.long), model.init_state(2), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("name", mixer_configs())
def test_initial_weights_have_the_range_that_the_config_gives(name):
    mixer = mixer_config(name)()
    models = []
    for initializer_range in (None, 0.02):
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=64, d_model=64, num_layers=2, mlp_ratio=2, mixer=mixer, initializer_range=initializer_range
        )
        models.append(LanguageModel(config))
    natural, drawn = models
    assert drawn.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for before, block in zip(natural.blocks, drawn.blocks, strict=True):
        # Four layers write to the residual stream: a mixer and an MLP of each of two blocks.
        written = getattr(block.mixer, block.mixer.output_layer)
        assert written.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        for own in block.mixer.own_start:
            # Each model's own draw from the same distribution.
            a, b = (dict(x.mixer.named_parameters()) for x in (before, block))
            for key in a:
                if key.startswith(f"{own}."):
                    assert b[key].std(unbiased=False).item() == pytest.approx(
                        a[key].std(unbiased=False).item(), rel=0.3, abs=1e-6
                    )


def test_the_range_of_initial_weights_reaches_the_layers_of_mixers():
    config = ModelConfig(vocab_size=8, d_model=128, initializer_range=0.05, mixer=mixer_config("deltanet")())
    mixer = LanguageModel(config).blocks[0].mixer
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert mixer.get_parameter("convolutions.k.weight").std().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("wrong", [0.0, -0.02, 2.0, float("nan")])
def test_a_wrong_range_of_initial_weights_is_refused(wrong):
    with pytest.raises(ValueError, match="initializer_range must be a standard deviation"):
        ModelConfig(vocab_size=4, initializer_range=wrong)
