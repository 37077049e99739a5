"""Homogeneous DeltaProduct against its equation, written out in float64; and what its learned state asks for."""

import tomllib

import pytest
import torch

from statetrack import HomogeneousDeltaProduct, HomogeneousDeltaProductConfig, mixer_config
from statetrack.config import TrainingConfig, read_mixer, run_config
from statetrack.evaluation import evaluate
from statetrack.tasks import get_task
from statetrack.training import train

D = 12


def make(**options):
    torch.manual_seed(0)
    options = {"num_heads": 3, "head_dim": 5, "value_dim": 4, "beta_gain": 2.0, "beta_bias": 0.3, **options}
    return HomogeneousDeltaProduct(D, **options).double()


def written_out(mixer, x):
    """One sequence [T, D] -> [T, D], a factor at a time."""
    config = mixer.config
    h, n, dim = config.num_heads, config.num_householder, config.head_dim
    lo = config.eigenvalue_range.lo
    state, outputs = list(mixer.initial_state), []
    for token in x:
        keys = (mixer.k_proj.weight @ token).view(n, h, dim)
        betas = (1 - lo) * torch.sigmoid(config.beta_gain * (mixer.b_proj.weight @ token + mixer.beta_bias)).view(n, h)
        read = []
        for head in range(h):
            for key, beta in zip(keys[:, head], betas[:, head], strict=True):
                key = key / key.norm()
                state[head] = (torch.eye(dim, dtype=x.dtype) - beta * torch.outer(key, key)) @ state[head]
            query = mixer.query[head] / (mixer.query[head].square().sum() + 1e-6).sqrt()
            read.append(state[head].T @ query / dim**0.5)
        outputs.append(mixer.o_proj.weight @ torch.cat(read))
    return torch.stack(outputs), torch.stack(state)


def assert_gradients_alike(mixer, x, actual, expected):
    weights, inputs = torch.randn_like(x), [x, *mixer.parameters()]
    found, wanted = (torch.autograd.grad((y * weights).sum(), inputs) for y in (actual, expected))
    for name, a, b in zip(["x", *(name for name, _ in mixer.named_parameters())], found, wanted, strict=True):
        assert b.norm() > 0, name
        assert (a - b).norm() < 1e-10 * b.norm(), name


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("eigenvalue_range", [(-1, 1), (0, 1), (-0.5, 1)])
@pytest.mark.parametrize("num_householder", [1, 3])
def test_values_and_gradients_are_those_of_the_equation(num_householder, eigenvalue_range, backend):
    mixer = make(num_householder=num_householder, eigenvalue_range=eigenvalue_range, backend=backend)
    x = torch.randn(2, 37, D, dtype=torch.float64, requires_grad=True)
    actual, after = mixer.scan(x)
    expected, states = (torch.stack(each) for each in zip(*(written_out(mixer, row) for row in x), strict=True))
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(after["recurrence"], states, rtol=1e-10, atol=1e-12)
    assert_gradients_alike(mixer, x, actual, expected)


@pytest.mark.parametrize("num_householder", [1, 3])
def test_every_packed_sequence_starts_from_the_learned_state(num_householder):
    mixer, lengths = make(num_householder=num_householder), [1, 0, 20, 3]
    x = torch.randn(1, sum(lengths), D, dtype=torch.float64, requires_grad=True)
    actual, after = mixer.scan(x, None, torch.tensor([0, *lengths]).cumsum(0))
    pieces = [written_out(mixer, piece[0]) for piece in x.split(lengths, 1) if piece.shape[1]]
    expected = torch.cat([y for y, _ in pieces]).unsqueeze(0)
    assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
    states = [state for _, state in pieces]
    states.insert(1, mixer.initial_state)  # nothing acted on the state of the empty sequence
    assert torch.allclose(after["recurrence"], torch.stack(states), rtol=1e-10, atol=1e-12)
    assert_gradients_alike(mixer, x, actual, expected)


def test_no_state_is_the_learned_one():
    mixer, x = make(), torch.randn(3, 9, D, dtype=torch.float64, requires_grad=True)
    assert torch.equal(mixer.scan(x)[0], mixer.scan(x, mixer.init_state(3))[0])
    assert_gradients_alike(mixer, x, mixer.scan(x, mixer.init_state(3))[0], mixer.scan(x)[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_in_place_leaves_the_parameter_alone(batch):
    mixer = make()
    learned, state = mixer.initial_state.detach().clone(), mixer.init_state(batch)
    tensor = state["recurrence"]
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().data_ptr() != mixer.initial_state.untyped_storage().data_ptr()
    x = torch.randn(batch, 4, D, dtype=torch.float64)
    outputs = torch.stack([mixer.step_(token, state) for token in x.unbind(1)], 1)
    assert state["recurrence"] is tensor  # overwritten where it lies
    assert torch.allclose(outputs, mixer(x))
    assert torch.equal(mixer.initial_state, learned)


def test_the_state_is_float32_and_learned_also_in_bfloat16():
    mixer = make().bfloat16()
    state = mixer.init_state(2)["recurrence"]
    assert state.dtype == torch.float32
    assert torch.equal(state, mixer.initial_state.float().expand(2, -1, -1, -1))


def test_outputs_are_linear_in_the_initial_state():
    """The recurrence is homogeneous: twice the state is twice the output, and from 0 nothing comes."""
    mixer, x = make(), torch.randn(2, 9, D, dtype=torch.float64)
    once = mixer(x)
    with torch.no_grad():
        mixer.initial_state.mul_(2)
        assert torch.allclose(mixer(x), 2 * once)
        mixer.initial_state.zero_()
        assert (mixer(x) == 0).all()


def test_the_bias_moves_eigenvalues_towards_minus_1():
    x, middle, reflecting = torch.randn(64, 16, 32), [], []
    for bias in (-1.0, 0.0, 1.0, 2.0):
        torch.manual_seed(0)
        mixer = HomogeneousDeltaProduct(32, beta_gain=4.0, beta_bias=bias, eigenvalue_range=(-1, 1))
        beta = mixer.transition(x).beta
        middle.append((1 - beta).median().item())
        reflecting.append((beta > 1.9).float().mean().item())
    assert middle == pytest.approx([0.965, 0.0, -0.965, -0.999], abs=0.02)
    assert reflecting == sorted(reflecting)
    assert reflecting[-1] > 0.98  # the others are tokens of which the gate's weights see much


def test_it_learns_s3_in_seconds_and_at_lengths_that_it_has_not_seen():
    mixer = HomogeneousDeltaProductConfig(num_heads=2, head_dim=8, beta_gain=4.0, beta_bias=1.0)
    options = TrainingConfig(steps=300, batch_size=32, min_length=1, max_length=24, learning_rate=1e-2)
    sizes = {"d_model": 16, "num_layers": 1, "final_norm": False}
    model = train(run_config("group:S3", mixer, sizes, options)).model
    assert [found.accuracy for found in evaluate(model, get_task("group:S3"), [40, 256], sequences=32)] == [1, 1]


def test_every_key_of_a_table_is_an_option():
    table = """
        name = "homogeneous_deltaproduct"
        eigenvalue_range = [-0.5, 1]
        learn_lower_end = true
        num_heads = 2
        head_dim = 8
        value_dim = 4
        num_householder = 3
        beta_gain = 4
        beta_bias = -1
        backend = "reference"
    """
    config = read_mixer(tomllib.loads(table))
    assert config == HomogeneousDeltaProductConfig(
        eigenvalue_range=(-0.5, 1), learn_lower_end=True, num_heads=2, head_dim=8, value_dim=4, num_householder=3,
        beta_gain=4.0, beta_bias=-1.0, backend="reference",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads = 5 must divide d_model = 12, or head_dim must be given beside it"),
        ({"num_heads": 0}, "num_heads of homogeneous_deltaproduct must be a positive integer, got 0"),
        ({"head_dim": -1}, "head_dim of homogeneous_deltaproduct must be a positive integer, got -1"),
        ({"value_dim": 0}, "value_dim of homogeneous_deltaproduct must be a positive integer, got 0"),
        ({"num_householder": 0}, "num_householder of homogeneous_deltaproduct must be a positive integer, got 0"),
        ({"beta_gain": 0}, "beta_gain must be a positive number, got 0"),
        ({"beta_gain": float("inf")}, "beta_gain must be a positive number, got inf"),
        ({"beta_bias": float("nan")}, "beta_bias must be a finite number, got nan"),
        ({"beta_bias": "high"}, "beta_bias of homogeneous_deltaproduct must be a number"),
        ({"eigenvalue_range": (-1, 0.5)}, "ends at 1"),
        ({"learn_lower_end": True, "eigenvalue_range": (0.5, 1)}, r"starts in \[-1, 0\]"),
        ({"conv_size": 4}, "unknown option conv_size for homogeneous_deltaproduct"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        HomogeneousDeltaProduct(D, **options)
    assert "\n" not in str(caught.value)


def test_it_is_found_by_its_name():
    assert mixer_config("homogeneous_deltaproduct") is HomogeneousDeltaProductConfig
