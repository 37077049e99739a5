"""What every mixer must show, for every mixer in the registry: a new file is tested here without touching this one."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from statetrack import DeltaNet, EigenvalueRange, LanguageModel, Mamba, ModelConfig, mixer_config, mixer_configs
from statetrack.config import from_data, to_data
from statetrack.mixers.mixer import Widening, with_options

D_MODEL = 24

# Other values for options whose type does not tell them.
OTHERS = {
    "num_householder": [1, 3],
    "conv_size": [0, 2],
    "value_dim": [5],
    "num_value_heads": [8],
    "decay_rank": [7],
    "gate_rank": [5],
    "beta_gain": [8.0],
    "beta_bias": [1.0],
    "state_size": [3],
    "dt_rank": [2],
    "n_groups": [2],
    "dt_max": [0.05],
    "gate_gain": [4.0],
    "gate_normalizer": [1.0],
    "rank": [3],
    "num_key_value_heads": [2],
    "window": [4],
}


def others(config, field) -> list[Any]:
    hint = get_type_hints(config)[field.name]
    if hint is bool:
        return [not getattr(config(), field.name)]
    if hint is EigenvalueRange:
        return ["0,1", "-1,1", "-0.5,1"]
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if value != getattr(config(), field.name)]
    return OTHERS.get(field.name, [])


def variants():
    """Every mixer as it comes, and with each of its options that has an interesting other value."""
    for name, config in mixer_configs().items():
        yield pytest.param(config(), id=name)
        for field in dataclasses.fields(config):
            for value in others(config, field):
                try:
                    yield pytest.param(config(**{field.name: value}), id=f"{name}-{field.name}={value}")
                except ValueError:
                    continue  # an option that is refused on its own; what is refused is tested where the mixer is


def with_option(option):
    """The mixers that have an option."""
    return [name for name, config in mixer_configs().items() if option in {f.name for f in dataclasses.fields(config)}]


@pytest.fixture(params=variants())
def config(request):
    return request.param


def make(config, dtype=torch.float64, d_model=D_MODEL):
    """The mixer with random weights; a little noise, as some initial weights are 0 and hide what they multiply."""
    torch.manual_seed(0)
    mixer = config.build(d_model).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def goes_on_alike(mixer, a, b):
    """Whether two states are one to the mixer: nothing that follows tells them apart."""
    assert a.keys() == b.keys()
    rows = next(iter(a.values())).shape[0]
    x = torch.randn(rows, 3, D_MODEL, dtype=torch.float64)
    return torch.allclose(mixer.scan(x, a)[0], mixer.scan(x, b)[0])


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
    assert goes_on_alike(mixer, state, end)

    for split in (1, 2, 16):
        first, state = mixer.scan(x[:, :split])
        second, state = mixer.scan(x[:, split:], state)
        assert torch.allclose(torch.cat([first, second], 1), whole)
        assert goes_on_alike(mixer, state, end)


def test_a_step_in_place_equals_a_step(config):
    mixer, x = make(config), torch.randn(3, 4, D_MODEL, dtype=torch.float64)
    state = mixer.scan(x[:, :1])[1]
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    tensors = dict(state)
    with torch.no_grad():
        expected = state
        for token in x[:, 1:].unbind(1):
            kept = {name: tensor.clone() for name, tensor in expected.items()}
            y, after = mixer.step(token, expected)
            assert all(
                torch.equal(expected[name], tensor) for name, tensor in kept.items()
            )  # `step` overwrites nothing
            expected = {name: tensor.clone() for name, tensor in after.items()}
            assert torch.equal(mixer.step_(token, state), y)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    grown = {name for name, tensor in state.items() if tensor is not tensors[name]}
    assert grown == ({"k", "v"} if config.name == "attention" else set())


def test_padding_anywhere_moves_nothing(config):
    mixer, x = make(config), torch.randn(4, 9, D_MODEL, dtype=torch.float64)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, 6:] = mask[2, 2:5] = mask[3] = False
    x[~mask] = torch.nan
    y, end = mixer.scan_padded(x, mask)
    assert torch.equal(mixer(x, mask=mask), y)
    for row in range(4):
        if not mask[row].any():
            continue
        alone, state = mixer.scan(x[row, mask[row]][None])
        assert torch.allclose(y[row, mask[row]], alone[0])
        assert goes_on_alike(mixer, {name: value[row : row + 1] for name, value in end.items()}, state)
    assert (y[~mask] == 0).all()
    assert goes_on_alike(mixer, {name: value[3:] for name, value in end.items()}, mixer.init_state(1))


def test_packed_sequences_equal_sequences_alone(config):
    mixer, x = make(config), torch.randn(1, 20, D_MODEL, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 1, 3, 13, 20])
    packed, states = mixer.scan(x, None, cu_seqlens)
    assert torch.equal(mixer(x, cu_seqlens.int()), packed)
    for index, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False)):
        if start == stop:
            continue
        alone, state = mixer.scan(x[:, start:stop])
        assert torch.allclose(packed[:, start:stop], alone)
        assert goes_on_alike(mixer, {name: value[index : index + 1] for name, value in states.items()}, state)


def test_gradients_of_packed_sequences_are_those_of_sequences_alone(config):
    """Documents as text has them: a few long ones and many short ones."""
    lengths = [2, 17, 1, 9, 0, 3, 3, 12, 1]
    mixer = make(config)
    x = torch.randn(1, sum(lengths), D_MODEL, dtype=torch.float64, requires_grad=True)
    weights, inputs = torch.randn_like(x), [x, *mixer.parameters()]
    packed = mixer(x, torch.tensor([0, *lengths]).cumsum(0))
    alone = torch.cat([mixer(piece) for piece in x.split(lengths, 1) if piece.shape[1]], 1)
    assert torch.allclose(packed, alone)
    found, expected = (torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True) for y in (packed, alone))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-9 * (1e-3 + b.norm())


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
    # Wide inputs as well: where a gate has a large bias, wide weights alone don't reach the other end.
    transition, declared = mixer.transition(10 * torch.randn(2, 50, D_MODEL, dtype=torch.float64)), config.spectrum()
    if transition is None:
        assert declared is None
        assert not hasattr(config, "eigenvalue_range")
        return
    eigenvalues = transition.eigenvalues()
    if declared is not None:
        assert eigenvalues.abs().max() <= 1 + 1e-9
        assert eigenvalues.imag.abs().max() <= 1e-7
        assert eigenvalues.real.min() >= declared.lo - 1e-9
        assert eigenvalues.real.max() <= declared.hi + 1e-9
    if getattr(config, "eigenvalue_range", EigenvalueRange()).lo < 0:
        assert eigenvalues.real.min() < 0


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
    mixer = make(mixer_config(name)(), d_model=8)
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,), atol=1e-5)


@pytest.mark.parametrize("name", with_option("backend"))
def test_fast_and_reference_backends_agree_in_the_mixer(name):
    torch.manual_seed(0)
    fast, slow = (mixer_config(name)(backend=backend).build(D_MODEL) for backend in ("auto", "reference"))
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 67, D_MODEL)
    assert torch.allclose(fast(x), slow(x), atol=1e-4)


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_keeps_the_state_in_float32(name, mode):
    mixer, x = make(mixer_config(name)(), torch.float32), torch.randn(2, 33, D_MODEL)
    expected = mixer(x)
    if mode == "weights":
        y, state = mixer.bfloat16().scan(x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y, state = mixer.scan(x)
    assert y.dtype == torch.bfloat16
    if mixer.transition(x.to(mixer_dtype(mixer))) is not None:
        assert state["recurrence"].dtype == torch.float32
    assert (y.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("name", mixer_configs())
def test_a_mixer_is_a_drop_in_layer(name):
    network = nn.Sequential(nn.Linear(3, D_MODEL), mixer_config(name)().build(D_MODEL), nn.Linear(D_MODEL, 1))
    assert network(torch.randn(2, 6, 3)).shape == (2, 6, 1)


def mixer_dtype(mixer):
    return next(mixer.parameters()).dtype


@pytest.mark.parametrize("name", with_option("eigenvalue_range"))
def test_the_range_changes_the_function_and_nothing_else(name):
    torch.manual_seed(0)
    narrow = mixer_config(name)(eigenvalue_range=(0, 1)).build(D_MODEL)
    wide = mixer_config(name)(eigenvalue_range=(-1, 1)).build(D_MODEL)
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(1, 8, D_MODEL)
    assert not torch.allclose(narrow(x), wide(x))


@pytest.mark.parametrize("name", with_option("learn_lower_end"))
def test_a_learned_lower_end_starts_as_the_native_function_and_can_be_opened(name):
    native = make(mixer_config(name)(eigenvalue_range=(0, 1)))
    opened = mixer_config(name)(eigenvalue_range=(0, 1), learn_lower_end=True).build(D_MODEL).double()
    widened = mixer_config(name)(eigenvalue_range=(-1, 1)).build(D_MODEL).double()
    missing, unexpected = opened.load_state_dict(native.state_dict(), strict=False)
    assert missing
    assert not unexpected
    widened.load_state_dict(native.state_dict())
    x = torch.randn(2, 8, D_MODEL, dtype=torch.float64)
    assert torch.allclose(opened(x), native(x))
    ends = [module.lower_end for module in opened.modules() if isinstance(module, Widening)]
    opened(x).square().sum().backward()
    for end in ends:
        assert end is not None
        assert end.grad is not None
        assert end.grad.abs().sum() > 0
        with torch.no_grad():
            end.fill_(-1)
    assert torch.allclose(opened(x), widened(x))
    for end in ends:  # beyond -1 nothing changes any more
        with torch.no_grad():
            end.fill_(-1.5)
    assert torch.allclose(opened(x), widened(x))


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize("mode", ["bfloat16 weights", "autocast", "float32"])
def test_constant_inputs_and_extreme_gates_have_finite_gradients(name, mode):
    """Inputs that are all one vector, and weights so large that every gate is at an end of its range."""
    for scale in (1.0, 100.0):
        mixer = make(mixer_config(name)(), torch.bfloat16 if mode == "bfloat16 weights" else torch.float32)
        with torch.no_grad():
            for module in mixer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(scale)
        x = torch.ones(2, 40, D_MODEL, dtype=mixer_dtype(mixer), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            y = mixer(x)
        assert y.isfinite().all()
        (y.float() / (1 + y.float().detach().abs().max())).square().sum().backward()
        for parameter in (x, *mixer.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


# Tracing and the compiler itself use what Python and torch call deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", mixer_configs())
def test_compiled_in_one_graph(name, compiler):
    mixer, x = make(mixer_config(name)(), torch.float32), torch.randn(2, 21, D_MODEL)
    results = []
    torch._dynamo.reset()
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend=compiler)):
        mixer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in mixer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-4, rtol=1e-4)


class Step(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, state):
        return self.mixer.step(x, state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", mixer_configs())
def test_the_decode_step_can_be_exported(name):
    mixer = make(mixer_config(name)(), torch.float32).eval()
    x, state = torch.randn(2, D_MODEL), mixer.scan(torch.randn(2, 4, D_MODEL))[1]
    state = {key: value.detach() for key, value in state.items()}
    with torch.no_grad():
        program = torch.export.export(Step(mixer), (x, state))
        (y, after), (expected, expected_after) = program.module()(x, state), mixer.step(x, state)
    assert torch.allclose(y, expected, atol=1e-6)
    assert after.keys() == expected_after.keys()
    assert all(torch.allclose(after[key], expected_after[key], atol=1e-6) for key in after)


def test_modules_take_their_options_directly():
    layer = DeltaNet(16, num_heads=2, eigenvalue_range=(-1, 1), num_householder=2)
    assert layer.config.eigenvalue_range == EigenvalueRange(-1, 1)
    assert Mamba(16, eigenvalue_range=(0, 1)).config.eigenvalue_range == EigenvalueRange(0, 1)


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: DeltaNet(16, num_head=2), "unknown option num_head for deltanet; the options are eigenvalue_range"),
        (lambda: DeltaNet(16, num_heads=3), "num_heads = 3 must divide d_model = 16"),
        (lambda: DeltaNet(16, num_heads=0), "num_heads of deltanet must be a positive integer, got 0"),
        (lambda: DeltaNet(16, num_householder=1.5), "num_householder of deltanet must be an integer"),
        (lambda: DeltaNet(16, conv_size=2.5), "conv_size of deltanet must be an integer, got 2.5"),
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


@pytest.mark.parametrize("name", [name for name in mixer_configs() if name not in with_option("eigenvalue_range")])
def test_a_mixer_without_a_range_says_why(name):
    with pytest.raises(ValueError, match=f"{name} has no eigenvalue_range: .{{20}}"):
        with_options(mixer_config(name), None, {"eigenvalue_range": (-1, 1)})


def test_the_whole_model_runs_with_every_mixer():
    for name in mixer_configs():
        model = LanguageModel(ModelConfig(vocab_size=7, d_model=D_MODEL, num_layers=2, mixer=mixer_config(name)()))
        assert model(torch.randint(7, (2, 5))).shape == (2, 5, 7)


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.bool), "padding only"),
        (torch.ones(2, 5), "bool tensor"),
        (torch.ones(2, 4, dtype=torch.bool), r"\[B, T\] = \(2, 5\)"),
    ],
    ids=["padding only", "no bool", "another shape"],
)
def test_a_mask_that_does_not_fit_is_refused(name, mask, message):
    mixer = mixer_config(name)().build(D_MODEL)
    with pytest.raises(ValueError, match=message):
        mixer(torch.randn(2, 5, D_MODEL), mask=mask)


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize(("b", "boundaries"), [(2, [0, 5]), (1, [0, 4]), (1, [0, 3, 2, 5])])
def test_boundaries_that_do_not_fit_are_refused(name, b, boundaries):
    mixer = mixer_config(name)().build(D_MODEL)
    with pytest.raises(ValueError, match=r"B must be 1|cu_seqlens must run"):
        mixer(torch.randn(b, 5, D_MODEL), torch.tensor(boundaries))


@pytest.mark.parametrize("name", mixer_configs())
@pytest.mark.parametrize(
    "x",
    [torch.ones(5, D_MODEL), torch.ones(2, 0, D_MODEL), torch.ones(0, 5, D_MODEL), torch.ones(2, 5, D_MODEL).long()],
)
def test_an_input_that_is_none_is_refused(name, x):
    mixer = mixer_config(name)().build(D_MODEL)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    for call in (mixer, lambda x: mixer(x, mask=mask), lambda x: mixer.step(x.unsqueeze(-1), mixer.init_state(2))):
        with pytest.raises(ValueError, match="x must be a floating-point tensor"):
            call(x)


def with_numbers():
    """Every option of every mixer whose type is a number, a switch or a string, with a value of another type."""
    for name, config in mixer_configs().items():
        for option, hint in get_type_hints(config).items():
            kinds = set(get_args(hint) or (hint,))
            if option in {f.name for f in dataclasses.fields(config)} and kinds & {bool, int, float, str}:
                yield pytest.param(name, option, 3 if kinds & {bool, str} else "x", id=f"{name}-{option}")


@pytest.mark.parametrize(("name", "option", "value"), list(with_numbers()))
def test_an_option_of_another_type_is_refused(name, option, value):
    with pytest.raises(ValueError, match=option):
        mixer_config(name)(**{option: value})
