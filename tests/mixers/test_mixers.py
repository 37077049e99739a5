"""What every mixer must show, for every mixer in the registry: a new file is tested here without touching this one."""

import dataclasses

import pytest
import torch
from torch import nn

from statetrack import DeltaNet, EigenvalueRange, LanguageModel, Mamba, ModelConfig, mixer_config, mixer_configs
from statetrack.config import from_data, to_data

D_MODEL = 12


def variants():
    """Every mixer as it comes, and with each of its options that has an interesting other value."""
    others = {
        "eigenvalue_range": ["0,1", "-1,1"],
        "decay_range": ["-1,1"],
        "num_householder": [1, 3],
        "conv_size": [0, 2],
        "activation": ["identity"],
        "output_norm": [False],
        "output_gate": [True],
        "value_dim": [5],
        "beta_gain": [8.0],
        "state_size": [3],
        "dt_rank": [2],
        "read_before": [True],
    }
    for name, config in mixer_configs().items():
        yield pytest.param(config(), id=name)
        for field in dataclasses.fields(config):
            for value in others.get(field.name, []):
                yield pytest.param(config(**{field.name: value}), id=f"{name}-{field.name}={value}")


@pytest.fixture(params=variants())
def config(request):
    return request.param


def make(config, dtype=torch.float64):
    torch.manual_seed(0)
    return config.build(D_MODEL).to(dtype)


def states_equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name]) for name in a)


def test_sequence_equals_steps_equals_split_with_state(config):
    mixer, x = make(config), torch.randn(3, 23, D_MODEL, dtype=torch.float64)
    whole, end = mixer.scan(x)
    assert whole.shape == x.shape
    assert torch.equal(mixer(x), whole)

    state, outputs = mixer.init_state(3), []
    for token in x.unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    assert torch.allclose(torch.stack(outputs, 1), whole)
    assert states_equal(state, end)

    for split in (1, 2, 16):
        first, state = mixer.scan(x[:, :split])
        second, state = mixer.scan(x[:, split:], state)
        assert torch.allclose(torch.cat([first, second], 1), whole)
        assert states_equal(state, end)


def test_packed_sequences_equal_sequences_alone(config):
    mixer, x = make(config), torch.randn(1, 20, D_MODEL, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 1, 3, 13, 20])
    packed, states = mixer.scan(x, None, cu_seqlens)
    for index, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)):
        if start == stop:
            continue
        alone, state = mixer.scan(x[:, start:stop])
        assert torch.allclose(packed[:, start:stop], alone)
        assert states_equal({name: value[index : index + 1] for name, value in states.items()}, state)


def test_the_mixer_is_causal(config):
    mixer, x = make(config), torch.randn(1, 10, D_MODEL, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.allclose(mixer(x)[:, :6], mixer(changed)[:, :6])
    assert not torch.allclose(mixer(x)[:, 6:], mixer(changed)[:, 6:])


def test_the_spectrum_lies_inside_the_declared_range(config):
    mixer = make(config)
    with torch.no_grad():
        for parameter in mixer.parameters():  # wide weights, so that gates reach the ends of their ranges
            parameter.mul_(3)
    transition = mixer.transition(torch.randn(2, 50, D_MODEL, dtype=torch.float64))
    eigenvalues = transition.eigenvalues()
    assert eigenvalues.abs().max() <= 1 + 1e-9
    factors = getattr(config, "num_householder", 1)
    decay = getattr(config, "decay_range", EigenvalueRange(0, 1))
    if factors == 1:
        lowest = min(config.eigenvalue_range.lo, decay.lo, config.eigenvalue_range.lo * decay.hi)
        assert eigenvalues.imag.abs().max() <= 1e-7
        assert eigenvalues.real.min() >= lowest - 1e-9
    if config.eigenvalue_range.lo < 0:
        assert eigenvalues.real.min() < 0
    if config.eigenvalue_range.lo == 0 and factors <= 2 and decay.lo == 0:
        assert eigenvalues.real.min() >= -1e-9  # proposition 1 of the paper: two factors of [0, 1] stay in [0, 1]


def test_a_config_survives_plain_data(config):
    data = to_data(ModelConfig(vocab_size=5, d_model=D_MODEL, mixer=config))
    assert from_data(ModelConfig, data).mixer == config


def test_every_parameter_gets_a_finite_gradient(config):
    mixer, x = make(config, torch.float32), torch.randn(2, 9, D_MODEL, requires_grad=True)
    mixer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", mixer_configs())
def test_gradients_of_the_whole_model_agree_with_finite_differences(name):
    torch.manual_seed(0)
    mixer = mixer_config(name)().build(4).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,), atol=1e-5)


@pytest.mark.parametrize("name", mixer_configs())
def test_fast_and_reference_backends_agree_in_the_mixer(name):
    torch.manual_seed(0)
    fast, slow = (mixer_config(name)(backend=backend).build(D_MODEL) for backend in ("auto", "reference"))
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 67, D_MODEL)
    assert torch.allclose(fast(x), slow(x), atol=1e-4)


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_keeps_the_state_in_float32(name, mode):
    torch.manual_seed(0)
    exact = mixer_config(name)().build(D_MODEL)
    x = torch.randn(2, 33, D_MODEL)
    expected = exact(x)
    mixer = mixer_config(name)().build(D_MODEL)
    mixer.load_state_dict(exact.state_dict())
    if mode == "weights":
        y, state = mixer.bfloat16().scan(x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y, state = mixer.scan(x)
    assert y.dtype == torch.bfloat16
    assert state["recurrence"].dtype == torch.float32
    assert (y.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("name", mixer_configs())
def test_a_mixer_is_a_drop_in_layer(name):
    network = nn.Sequential(nn.Linear(3, D_MODEL), mixer_config(name)().build(D_MODEL), nn.Linear(D_MODEL, 1))
    assert network(torch.randn(2, 6, 3)).shape == (2, 6, 1)


@pytest.mark.parametrize("name", mixer_configs())
def test_the_range_changes_the_function_and_nothing_else(name):
    torch.manual_seed(0)
    narrow = mixer_config(name)(eigenvalue_range=(0, 1)).build(D_MODEL)
    wide = mixer_config(name)(eigenvalue_range=(-1, 1)).build(D_MODEL)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(1, 8, D_MODEL)
    assert not torch.allclose(narrow(x), wide(x))


def test_modules_take_their_options_directly():
    layer = DeltaNet(16, num_heads=2, eigenvalue_range=(-1, 1), num_householder=2)
    assert layer.config.eigenvalue_range == EigenvalueRange(-1, 1)
    assert Mamba(16, eigenvalue_range=(0, 1)).config.eigenvalue_range == EigenvalueRange(0, 1)


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: DeltaNet(16, num_head=2), "unknown option num_head for deltanet; the options are num_heads"),
        (lambda: DeltaNet(16, num_heads=3), "num_heads = 3 must divide d_model = 16"),
        (lambda: DeltaNet(16, num_heads=0), "num_heads of deltanet must be a positive integer, got 0"),
        (lambda: DeltaNet(16, num_householder=1.5), "num_householder of deltanet must be a positive integer"),
        (lambda: DeltaNet(16, eigenvalue_range=(-1, 0.5)), "ends at 1"),
        (lambda: DeltaNet(16, eigenvalue_range=(1, -1)), "-1 <= lo < hi <= 1"),
        (lambda: DeltaNet(16, conv_size=1), "conv_size must be 0"),
        (lambda: DeltaNet(16, beta_gain=0), "beta_gain must be a positive number"),
        (lambda: DeltaNet(16, activation="relu"), "activation must be silu or identity"),
        (lambda: DeltaNet(16, mixer_config("deltanet")(), num_heads=2), "a config or options, not both"),
        (lambda: DeltaNet(16, backend="fast")(torch.zeros(1, 2, 16)), "unknown backend 'fast'"),
        (lambda: Mamba(16, state_size=-1), "state_size of mamba must be a positive integer, got -1"),
        (lambda: Mamba(16, eigenvalue_range=(-2, 1)), "-1 <= lo < hi <= 1"),
        (lambda: mixer_config("deltanett"), "unknown mixer 'deltanett'; did you mean 'deltanet'"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(make_wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_wrong()
    assert "\n" not in str(caught.value)


def test_the_whole_model_runs_with_every_mixer():
    for name in mixer_configs():
        model = LanguageModel(ModelConfig(vocab_size=7, d_model=D_MODEL, num_layers=2, mixer=mixer_config(name)()))
        assert model(torch.randint(7, (2, 5))).shape == (2, 5, 7)


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize(("b", "boundaries"), [(2, [0, 5]), (1, [0, 4]), (1, [0, 3, 2, 5])])
def test_boundaries_that_do_not_fit_are_refused(name, b, boundaries):
    mixer = mixer_config(name)().build(D_MODEL)
    with pytest.raises(ValueError, match=r"B must be 1|cu_seqlens must run"):
        mixer(torch.randn(b, 5, D_MODEL), torch.tensor(boundaries))
