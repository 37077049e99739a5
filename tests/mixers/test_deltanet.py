"""The DeltaNet family against its originals, on copied weights: outputs and gradients to 1e-5, in float32.

Those of transformers are called. Those of FLA need a GPU and are recorded (`tests/fixtures/make_fla_fixtures.py`). Each
original has a pair of functions: its config as options of ours, and its weights by the names of ours.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from statetrack import EigenvalueRange, layers, mixer_config
from statetrack.mixers.deltanet import (
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
    KimiDeltaAttentionConfig,
)

FLA = Path(__file__).parents[1] / "fixtures" / "fla" / "layers"
TOLERANCE = 1e-5
D_MODEL, LENGTH = 16, 21
D_MODEL_FLA = 12


def range_of(allow_neg_eigval):
    return EigenvalueRange(-1 if allow_neg_eigval else 0, 1)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def qwen3_next_options(config):
    return {
        "num_heads": config.linear_num_key_heads,
        "num_value_heads": config.linear_num_value_heads,
        "head_dim": config.linear_key_head_dim,
        "value_dim": config.linear_value_head_dim,
        "conv_size": config.linear_conv_kernel_dim,
        "output_norm_eps": config.rms_norm_eps,
        "eigenvalue_range": (0, 1),
        "normalize": False,
    }


def qwen3_next_weights(theirs, config):
    """Qwen3-Next puts q, k, v and the gate z of a key head side by side, and so beta and the decay."""
    h, per_head = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    key_dim, value_dim = config.linear_key_head_dim, per_head * config.linear_value_head_dim
    qkvz = theirs["in_proj_qkvz.weight"].unflatten(0, (h, -1)).split([key_dim, key_dim, value_dim, value_dim], 1)
    ba = theirs["in_proj_ba.weight"].unflatten(0, (h, -1)).split([per_head, per_head], 1)
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "b_proj.weight", "a_proj.weight")
    return {
        **{name: weight.flatten(0, 1) for name, weight in zip(names, (*qkvz, *ba), strict=True)},
        **one_convolution(theirs["conv1d.weight"], h * key_dim, h * value_dim),
        "A_log": theirs["A_log"],
        "dt_bias": theirs["dt_bias"],
        "o_norm.weight": theirs["norm.weight"],
        "o_proj.weight": theirs["out_proj.weight"],
    }


def olmo_hybrid_options(config):
    return {
        **qwen3_next_options(config),
        "output_norm_eps": 1e-5,
        "eigenvalue_range": range_of(config.linear_allow_neg_eigval),
    }


def olmo_hybrid_weights(theirs, config):
    """Olmo-Hybrid has all projections apart, named as ours, and one convolution over q, k and v."""
    key_size = config.linear_num_key_heads * config.linear_key_head_dim
    value_size = config.linear_num_value_heads * config.linear_value_head_dim
    ours = dict(theirs)
    return {**one_convolution(ours.pop("conv1d.weight"), key_size, value_size), **ours}


def kimi_linear_options(config):
    return {
        "num_heads": config.linear_num_heads,
        "head_dim": config.linear_head_dim,
        "conv_size": config.linear_conv_kernel_dim,
        "output_norm_eps": config.rms_norm_eps,
        "eigenvalue_range": (0, 1),
        "normalize": False,
    }


def kimi_linear_weights(theirs, config):
    """Kimi-Linear has the two matrices of the decay in a module of their own, f, and those of the gate beside it."""
    h, key_dim = config.linear_num_heads, config.linear_head_dim
    ours = dict(theirs)
    return {
        **one_convolution(ours.pop("conv1d.weight"), h * key_dim, h * key_dim),
        "a_proj.0.weight": ours.pop("forget_gate.f_a_proj.weight"),
        "a_proj.1.weight": ours.pop("forget_gate.f_b_proj.weight"),
        "A_log": ours.pop("forget_gate.A_log").flatten(),
        "dt_bias": ours.pop("forget_gate.dt_bias").view(h, key_dim),
        "g_proj.0.weight": ours.pop("g_a_proj.weight"),
        "g_proj.1.weight": ours.pop("g_b_proj.weight"),
        **ours,
    }


def one_convolution(weight, key_size, value_size):
    """The weights of our three convolutions from one over q, k and v side by side."""
    parts = weight.split([key_size, key_size, value_size])
    return {f"convolutions.{name}.weight": part for name, part in zip("qkv", parts, strict=True)}


def qwen3_next(**options):
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=D_MODEL, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5, linear_conv_kernel_dim=3, **options,
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, layer_idx=0)
    return layer, GatedDeltaNetConfig(**qwen3_next_options(config)), lambda named: qwen3_next_weights(named, config)


def olmo_hybrid(**options):
    from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=D_MODEL, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
        linear_value_head_dim=5, **options,
    )  # fmt: skip
    layer = OlmoHybridGatedDeltaNet(config, layer_idx=0)
    return layer, GatedDeltaNetConfig(**olmo_hybrid_options(config)), lambda named: olmo_hybrid_weights(named, config)


def kimi_linear(**options):
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=D_MODEL, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_heads=2,
        linear_head_dim=6, **options,
    )  # fmt: skip
    layer = KimiLinearDeltaAttention(config, layer_idx=0)
    ours = KimiDeltaAttentionConfig(**kimi_linear_options(config))
    return layer, ours, lambda named: kimi_linear_weights(named, config)


@pytest.mark.parametrize(
    ("original", "options"),
    [
        (qwen3_next, {}),
        (qwen3_next, {"rms_norm_eps": 1e-2}),
        (olmo_hybrid, {"linear_allow_neg_eigval": True}),
        (olmo_hybrid, {"linear_allow_neg_eigval": False}),
        (kimi_linear, {}),
        (kimi_linear, {"rms_norm_eps": 1e-2, "linear_conv_kernel_dim": 3}),
    ],
)
def test_outputs_and_gradients_equal_those_of_transformers(original, options):
    theirs, ours, rename = copies(original, **options)
    x = torch.randn(4, LENGTH, D_MODEL)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, actual = theirs(inputs[0]), ours(inputs[1])
    assert relative_error(actual, expected) < TOLERANCE

    # Outputs as their own gradients: with random ones the few numbers of A_log get sums that all but cancel.
    for outputs in (expected, actual):
        (outputs * expected.detach()).sum().backward()
    assert relative_error(inputs[1].grad, inputs[0].grad) < TOLERANCE
    gradients = rename({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < TOLERANCE, name


@pytest.mark.parametrize("original", [qwen3_next, olmo_hybrid, kimi_linear])
def test_keys_as_short_as_the_eps_of_their_norm_need_normalize_to_be_off(original):
    theirs, ours, _ = copies(original, shrink=0.05)
    other = replace(ours.config, normalize=True).build(D_MODEL)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(4, LENGTH, D_MODEL)
    expected = theirs(x)
    assert relative_error(ours(x), expected) < TOLERANCE
    assert relative_error(other(x), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda", "deltaproduct", "gated_deltaproduct"])
def test_the_shortest_keys_write_no_more_than_others(name):
    """Activations far below 0, of which silu leaves almost nothing: beta / |k|^2 must not blow up what is written."""
    torch.manual_seed(0)
    layer = mixer_config(name)(num_heads=8, output_norm=False, output_gate=False).build(D_MODEL)
    x = torch.randn(2, 40, D_MODEL, requires_grad=True)
    usual = layer(x).abs().max()
    with torch.no_grad():
        layer.k_proj.weight.mul_(200)
    y = layer(x)
    assert y.abs().max() < 10 * usual
    y.square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def copies(original, shrink=1.0, **options):
    """A layer of transformers with random weights, ours with the same, and what renames the weights."""
    pytest.importorskip("transformers", reason="compares with transformers")
    torch.manual_seed(0)
    theirs, config, rename = original(**options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, D_MODEL**-0.5)
            elif name.endswith(("A_log", "dt_bias")):
                parameter.normal_(0, 0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
            if name == "conv1d.weight":
                parameter.mul_(shrink)
    ours = config.build(D_MODEL)
    ours.load_state_dict(rename(theirs.state_dict()))
    return theirs, ours, rename


def fla_config(layer, arguments):
    """The config of ours for a layer of FLA, by its class and arguments, whose defaults are those of the layers."""
    options = {
        "num_heads": arguments["num_heads"],
        "conv_size": arguments.get("conv_size", 4),
        "conv_bias": arguments.get("conv_bias", False),
        "output_norm_eps": arguments.get("norm_eps", 1e-5),
        "normalize": False,
    }
    if layer == "DeltaNet":
        sizes = {name: arguments.get(f"expand_{name}", 1) * D_MODEL_FLA // arguments["num_heads"] for name in "kv"}
        return DeltaNetConfig(
            **options,
            head_dim=int(sizes["k"]),
            value_dim=int(sizes["v"]),
            output_gate=arguments.get("use_gate", False),
            eigenvalue_range=range_of(arguments.get("allow_neg_eigval", False)),
        )
    expand_v = arguments.get("expand_v", 1 if layer == "KimiDeltaAttention" else 2)
    options |= {
        "num_value_heads": arguments.get("num_v_heads"),
        "head_dim": arguments["head_dim"],
        "value_dim": int(expand_v * arguments["head_dim"]),
        "eigenvalue_range": range_of(arguments.get("allow_neg_eigval", layer == "GatedDeltaProduct")),
    }
    if layer == "GatedDeltaNet":
        activation = arguments.get("output_gate_activation", "swish").replace("swish", "silu")
        return GatedDeltaNetConfig(**options, output_gate=arguments.get("use_gate", True), gate_activation=activation)
    if layer == "GatedDeltaProduct":
        chosen = GatedDeltaProductConfig if arguments.get("use_forget_gate", True) else DeltaProductConfig
        output_gate, factors = arguments.get("use_output_gate", True), arguments.get("num_householder", 2)
        return chosen(**options, output_gate=output_gate, num_householder=factors)
    assert layer == "KimiDeltaAttention"
    return KimiDeltaAttentionConfig(**options, gate_bias=True)


def fla_weights(theirs, config):
    """FLA names its weights as ours are, but for the convolutions and, of Kimi Delta Attention, the decay."""
    ours = {}
    for name, weight in theirs.items():
        for letter in "qkv":
            name = name.replace(f"{letter}_conv1d.", f"convolutions.{letter}.")
        ours[name.replace("f_proj.", "a_proj.")] = weight
    if isinstance(config, KimiDeltaAttentionConfig):
        ours["dt_bias"] = ours["dt_bias"].view(config.value_heads, -1)
    return ours


@pytest.mark.parametrize("file", sorted(FLA.glob("*.safetensors")), ids=lambda file: file.stem)
def test_outputs_and_gradients_equal_those_recorded_from_fla(file):
    with safe_open(file, "pt") as recorded:
        origin = json.loads(recorded.metadata()["origin"])
        tensors = {name: recorded.get_tensor(name) for name in recorded.keys()}  # noqa: SIM118
    weights = {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}
    config = fla_config(origin["layer"], origin["arguments"])
    ours = config.build(D_MODEL_FLA)
    ours.load_state_dict(fla_weights(weights, config))
    x = tensors["input"].requires_grad_()
    y = ours(x)
    assert relative_error(y, tensors["output"]) < TOLERANCE
    (y * tensors["output_gradient"]).sum().backward()
    assert relative_error(x.grad, tensors["input_gradient"]) < TOLERANCE


def test_every_layer_of_fla_is_recorded_with_and_without_negative_eigenvalues():
    stems = {file.stem for file in FLA.glob("*.safetensors")}
    for layer in ("delta_net", "gated_deltanet", "gated_deltaproduct"):
        assert {layer, f"{layer}_negative"} <= stems


@pytest.mark.parametrize("name", ["gated_deltanet", "gated_deltaproduct", "kda"])
def test_signed_decay_beside_signed_beta_reaches_both_signs_at_once(name):
    """2 d - 1 for the decay and 2 sigmoid for beta, on the weights of the native mixer, against both written out."""
    torch.manual_seed(0)
    native = mixer_config(name)(eigenvalue_range=(0, 1)).build(D_MODEL).double()
    signed = mixer_config(name)(eigenvalue_range=(-1, 1), decay_range=(-1, 1)).build(D_MODEL).double()
    with torch.no_grad():
        native.A_log.zero_()
        native.dt_bias.normal_()
    signed.load_state_dict(native.state_dict())
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    narrow, wide = native.transition(x), signed.transition(x)
    assert torch.allclose(wide.beta, 2 * narrow.beta)
    assert torch.allclose(wide.decay, 2 * narrow.decay - 1)
    assert wide.decay.min() < 0 < wide.decay.max()
    assert wide.beta.max() > 1
    assert wide.eigenvalues().abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "gated_deltaproduct", "kda"])
def test_more_heads_of_values_are_heads_of_their_own_with_the_keys_repeated(name):
    torch.manual_seed(0)
    grouped = mixer_config(name)(num_heads=2, head_dim=4, num_value_heads=6).build(D_MODEL).double()
    alone = mixer_config(name)(num_heads=6, head_dim=4).build(D_MODEL).double()
    weights = grouped.state_dict()
    for key, value in weights.items():
        if key.startswith(("q_proj", "k_proj", "convolutions.q", "convolutions.k")):
            factors = grouped.num_householder if "k_proj" in key or ".k." in key else 1
            rows = value.unflatten(0, (factors, 2, 4)).repeat_interleave(3, 1)
            weights[key] = rows.flatten(0, 2)
    alone.load_state_dict(weights)
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    assert torch.allclose(alone(x), grouped(x))


@pytest.mark.parametrize("config", [DeltaNetConfig, GatedDeltaProductConfig])
def test_a_bias_moves_all_eigenvalues_and_learns(config):
    torch.manual_seed(0)
    mixer = config(beta_gain=4.0, beta_bias=2.0, conv_size=0).build(D_MODEL).double()
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    logits = mixer.b_proj(x).view(2, LENGTH, mixer.num_householder, mixer.num_heads) + 2
    beta = mixer.transition(x).beta
    assert torch.allclose(beta, 2 * torch.sigmoid(4 * logits))
    assert (beta > 1.5).double().mean() > 0.95
    mixer(x).square().sum().backward()
    assert mixer.beta_bias.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DeltaNetConfig(), (-1, 1)),
        (DeltaNetConfig(eigenvalue_range=(0.5, 1)), (0.5, 1)),
        (DeltaProductConfig(eigenvalue_range=(0, 1)), (0, 1)),
        (DeltaProductConfig(eigenvalue_range=(0.5, 1)), (0.25, 1)),
        (DeltaProductConfig(eigenvalue_range=(0, 1), learn_lower_end=True), None),
        (DeltaProductConfig(), None),
        (GatedDeltaNetConfig(decay_range=(-1, 1)), (-1, 1)),
        (GatedDeltaNetConfig(eigenvalue_range=(0, 1), decay_range=(-0.5, 1)), (-0.5, 1)),
        (GatedDeltaNetConfig(eigenvalue_range=(-1, 1), decay_range=(0, 0.5)), (-0.5, 0.5)),
        (GatedDeltaProductConfig(eigenvalue_range=(0, 1)), (0, 1)),
        (GatedDeltaProductConfig(eigenvalue_range=(0, 1), decay_range=(-1, 1)), (-1, 1)),
        (GatedDeltaProductConfig(), None),
        (KimiDeltaAttentionConfig(), (-1, 1)),
        (KimiDeltaAttentionConfig(eigenvalue_range=(0, 1)), (0, 1)),
        (KimiDeltaAttentionConfig(eigenvalue_range=(0, 1), decay_range=(-1, 1)), (-1, 1)),
        (KimiDeltaAttentionConfig(decay_range=(-1, 1)), None),
        (KimiDeltaAttentionConfig(eigenvalue_range=(0, 1), num_householder=2), None),
    ],
)
def test_the_spectrum_is_the_interval_that_can_be_proved(config, expected):
    assert config.spectrum() == (None if expected is None else EigenvalueRange(*expected))
    if expected is None:
        return
    # Adversarial gates: at the ends of their ranges and near the middle, the keys of a product alike.
    torch.manual_seed(0)
    mixer = config.build(D_MODEL).double()
    with torch.no_grad():
        for parameter in mixer.eigenvalue_parameters():
            parameter.copy_(3 * torch.randn_like(parameter))
        if config.num_householder == 2:
            half = mixer.k_proj.weight.shape[0] // 2
            for weight in (mixer.k_proj.weight, mixer.convolutions["k"].weight):
                weight[half:] = weight[:half]
    eigenvalues = mixer.transition(torch.randn(2, 200, D_MODEL, dtype=torch.float64)).eigenvalues()
    assert eigenvalues.imag.abs().max() <= 1e-7
    assert eigenvalues.real.min() >= expected[0] - 1e-9
    assert eigenvalues.real.max() <= expected[1] + 1e-9


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda: DeltaNetConfig(num_heads=4, num_value_heads=6), "must be a multiple of num_heads = 4, got 6"),
        (lambda: DeltaNetConfig(output_norm_eps=-1.0), "output_norm_eps must be a number of at least 0"),
        (lambda: DeltaNetConfig(gate_activation="relu"), "gate_activation must be silu or sigmoid, got 'relu'"),
        (lambda: DeltaNetConfig(beta_bias=float("inf")), "beta_bias must be a finite number or None, got inf"),
        (lambda: KimiDeltaAttentionConfig(decay_rank=0), "decay_rank of kda must be a positive integer, got 0"),
        (lambda: GatedDeltaNetConfig(decay_range=(-2, 1)), "-1 <= lo < hi <= 1"),
    ],
)
def test_a_wrong_option_is_refused(make_wrong, message):
    with pytest.raises(ValueError, match=message):
        make_wrong()


JOINED = [
    DeltaNetConfig(num_heads=2),
    DeltaNetConfig(num_heads=2, conv_size=0, activation="identity"),
    GatedDeltaNetConfig(num_heads=2, num_value_heads=4, conv_bias=True),
    DeltaProductConfig(num_heads=2, activation="identity", output_gate=True, beta_bias=0.5),
    KimiDeltaAttentionConfig(num_heads=2),
]


@pytest.mark.parametrize("config", JOINED, ids=lambda config: config.name)
def test_the_layers_as_one_product_compute_the_same(config, monkeypatch):
    """In one piece, in two with the state of the first, packed, compiled, and one token."""
    monkeypatch.setattr(layers, "_JOINED_ON", ("cpu",))
    mixer, x = config.build(16), torch.randn(1, 250, 16, requires_grad=True)
    names = list(mixer.state_dict())
    products, joined = [], layers._Join.apply
    monkeypatch.setattr(layers._Join, "apply", lambda *args: products.append(1) or joined(*args))

    def results(compiled):
        whole = mixer(x)
        first, state = mixer.scan(x[:, :120])
        second, after = mixer.scan(x[:, 120:], state)
        packed = mixer(x, torch.tensor([0, 1, 1, 200, 250]))
        y, _ = mixer.step(x[:, 0], after)
        traced = compiled(x)
        outputs = [whole, first, second, packed, y, traced, *(after[name] for name in sorted(after))]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *mixer.parameters()])
        return [*outputs, *gradients, mixer.transition(x).dense()]

    torch._dynamo.reset()
    found = results(torch.compile(mixer, fullgraph=True, backend="aot_eager"))
    assert len(products) == 5  # one token is not worth it, and the compiler joins by itself
    assert list(mixer.state_dict()) == names
    monkeypatch.setattr(layers, "JOIN", False)
    for a, b in zip(found, results(mixer), strict=True):
        assert relative_error(a, b) < TOLERANCE
    assert len(products) == 5
