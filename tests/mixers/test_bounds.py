"""Bounds on spectra from the norms of weights: they hold for every input, and where they should be tight they are."""

import pytest
import torch

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack.mixers import mixer_configs
from statetrack.mixers.bounds import FactorBounds, silu_interval

D = 8
UNKNOWN = {"attention", "lstm", "slstm", "retnet", "rwkv7"}
"""Mixers without a transition, one whose state turns with the position, and one whose matrices are not symmetric."""

CASES = [
    *((name, {}) for name, config in mixer_configs().items() if config().build(D).factor_bounds(torch.ones(D))),
    ("deltanet", {"eigenvalue_range": (0, 1), "beta_gain": 4.0}),
    ("deltanet", {"beta_gain": 4.0, "beta_bias": 1.0}),
    ("deltanet", {"learn_lower_end": True, "eigenvalue_range": (-0.5, 1), "num_heads": 2, "num_value_heads": 4}),
    ("deltaproduct", {"num_householder": 3, "eigenvalue_range": (0, 1)}),
    ("homogeneous_deltaproduct", {"num_householder": 3, "beta_gain": 4.0, "beta_bias": 0.5}),
    ("gated_deltanet", {"decay_range": (-1, 1)}),
    ("gated_deltaproduct", {"decay_range": (-1, 1)}),
    ("kda", {"decay_range": (-1, 1)}),
    ("kda", {"num_householder": 2}),
    ("gla", {"decay": "head", "gate_normalizer": 2.0}),
    ("mamba", {"conv_size": 0, "learn_lower_end": True}),
    ("mamba2", {"dt_min": 0.1, "dt_max": 0.5, "gate_gain": 3.0}),
    ("mlstm", {"eigenvalue_range": (0, 1), "gate_soft_cap": 2.0, "gate_gain": 4.0}),
]


def mixer(name, options, seed=0):
    """With weights far from where they start, so that gates reach far."""
    torch.manual_seed(seed)
    made = mixer_config(name)(**options).build(D).double()
    with torch.no_grad():
        for parameter in made.eigenvalue_parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.3)
    return made


def inputs(scale, made):
    """Inputs at the edge of what is allowed: random ones, and those that push single gates as far as they go."""
    rows = [torch.randn(64, D, dtype=torch.float64)]
    for parameter in made.parameters():
        if parameter.ndim == 2 and parameter.shape[1] == D:
            rows += [parameter * scale, -parameter * scale]
    u = torch.cat(rows)
    return (scale * u / u.norm(dim=1, keepdim=True).clamp(min=1e-9)).unsqueeze(0)


def inside(values, bounds, head):
    interval, spread = bounds.real_interval(head), bounds.spread(head)
    if interval is not None:
        lo, hi = interval
        return (values.imag.abs() < 1e-5) & (values.real > lo - 1e-6) & (values.real < hi + 1e-6)
    if spread == float("inf"):
        return values.abs() < 1 + 1e-6
    return (1 - values).abs().square() <= spread * (1 - values.abs().square()) + 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_eigenvalues_of_all_inputs_lie_inside_the_bounds(name, options):
    made = mixer(name, options)
    scale = torch.rand(D, dtype=torch.float64) * 2
    bounds = made.factor_bounds(scale)
    assert (bounds.lo >= -1).all()
    assert (bounds.lo <= bounds.hi).all()
    assert (bounds.hi <= 1).all()
    values = made.transition(inputs(scale, made)).eigenvalues()
    for head in range(values.shape[2]):
        assert inside(values[:, :, head].flatten(), bounds, head).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["deltanet", "gla", "mamba2", "mlstm"])
def test_an_input_along_the_weights_reaches_the_bound(name):
    made = mixer(name, {"gate_normalizer": 1.0} if name == "gla" else {})
    scale = torch.full((D,), 0.7, dtype=torch.float64)
    bounds = made.factor_bounds(scale)
    if name == "gla":
        # One input pushes one channel of a head down; the composite of its two matrices says which.
        first, second = (made.gk_proj.get_parameter(f"{part}.weight") for part in (0, 1))
        weight = second @ first
    else:
        rows = {"deltanet": "b_proj", "mamba2": "in_proj", "mlstm": "fgate_preact"}[name]
        weight = made.get_parameter(f"{rows}.weight")[-4:]
    sides = torch.cat([weight, -weight])
    x = scale * sides / sides.norm(dim=1, keepdim=True)
    values = made.transition(x.unsqueeze(0)).eigenvalues().real
    lowest = values.amin((0, 1, 3))
    assert torch.allclose(lowest, bounds.lo.amin(0), atol=1e-6)


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_nothing_is_said_where_nothing_is_known(name):
    assert mixer(name, {}).factor_bounds(torch.ones(D)) is None
    assert mixer("deltanet", {"normalize": False}).factor_bounds(torch.ones(D)) is None


def test_every_other_mixer_that_is_known_has_bounds():
    bounded = {name for name, options in CASES if not options}
    assert {"deltanet", "deltaproduct", "exact_deltaproduct", "gated_deltanet", "gated_deltaproduct", "kda"} <= bounded
    assert {"gla", "homogeneous_deltaproduct", "mamba", "mamba2", "mlstm", "rwkv6"} <= bounded
    assert not bounded & UNKNOWN


def test_products_of_symmetric_contractions_lie_in_the_disc():
    torch.manual_seed(0)
    for factors in (1, 2, 3, 5):
        lo = torch.rand(factors, 1, dtype=torch.float64) * 1.9 - 0.95
        bounds = FactorBounds(lo, torch.ones_like(lo))
        spread = bounds.spread(0)
        for _ in range(200):
            product = torch.eye(4, dtype=torch.float64)
            for end in lo.flatten():
                q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
                # Ends of the interval are where the bound is closest.
                spectrum = torch.where(torch.rand(4) < 0.5, end, torch.ones(()).double())
                product = q @ torch.diag(spectrum) @ q.T @ product
            values = torch.linalg.eigvals(product)
            assert ((1 - values).abs().square() <= spread * (1 - values.abs().square()) + 1e-9).all()
            if (interval := bounds.real_interval(0)) is not None:
                assert values.imag.abs().max() < 1e-6
                assert values.real.min() >= interval[0] - 1e-9
                assert values.real.max() <= interval[1] + 1e-9


def test_the_disc_of_one_factor_is_attained():
    bounds = FactorBounds(torch.tensor([[-0.8]]).double(), torch.ones(1, 1).double())
    spread = bounds.spread(0)
    assert (1 - spread) / (1 + spread) == pytest.approx(-0.8)


def test_silu_on_intervals():
    lo = torch.tensor([-5.0, -1.0, 0.5, -9.0]).double()
    hi = torch.tensor([-3.0, 2.0, 1.0, 0.0]).double()
    least, most = silu_interval((lo, hi))
    for i in range(4):
        values = torch.nn.functional.silu(torch.linspace(float(lo[i]), float(hi[i]), 10001, dtype=torch.float64))
        assert float(least[i]) == pytest.approx(float(values.min()), abs=1e-6)
        assert float(most[i]) == pytest.approx(float(values.max()), abs=1e-6)


@torch.no_grad()
def test_what_a_mixer_reads_is_bounded_by_the_norm_before_it():
    model = LanguageModel(ModelConfig(vocab_size=3, d_model=D, num_layers=2)).double()
    block = model._blocks()[1]
    block.mixer_norm.weight.uniform_(-2, 2)
    scale = block.mixer_input_scale()
    assert scale is not None
    read = block.mixer_input(torch.randn(50, D).double() * 1e3)
    assert (read / scale).norm(dim=-1).max() <= 1
    assert (read / scale).norm(dim=-1).max() > 0.999
    unbounded = ModelConfig(vocab_size=3, d_model=D, num_layers=1, norm_placement="after")
    assert LanguageModel(unbounded)._blocks()[0].mixer_input_scale() is None
