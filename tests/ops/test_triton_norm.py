"""The norm's Triton kernels: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from torch.func import functional_call, vmap
from triton_cases import interpreted

from statetrack.layers import RMSNorm, head_norm
from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops import triton_ahead, triton_norm
from statetrack.ops.triton_norm import add_and_norm

EPS = 1e-5
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
MIXER = DeltaNetConfig(num_heads=2, conv_size=0, backend="chunked")  # quick in the interpreter


def formula(x, y, weight, dtype, center=False):
    """In float64, with the total and the weight rounded as they are declared to be."""
    total = x if y is None else x + y
    rounded = total + (total.to(dtype).double() - total).detach()
    if center:
        rounded = rounded - rounded.mean(-1, keepdim=True)
    normed = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + EPS)
    return total, normed if weight is None else normed * weight


def close(found, expected, dtype):
    return (found.double() - expected).norm() <= (2e-6 if dtype == FLOAT32 else 1.2e-2) * expected.norm() + 1e-30


def check(
    shape, *, weighted=True, added=None, dtype=FLOAT32, normed_dtype=FLOAT32, device="cpu", onward=True, center=False
):
    """Values and all gradients; `onward` where the total is read too."""
    x = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    y = None if added is None else torch.randn(shape, device=device).to(added).requires_grad_()
    weight = torch.rand(shape[-1], device=device).add(0.5).requires_grad_() if weighted else None
    inputs = [tensor for tensor in (x, y, weight) if tensor is not None]
    found = add_and_norm(x, y, weight, EPS, normed_dtype, center=center)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rest = iter(wide[1:])
    total_dtype = found[0].dtype
    assert total_dtype == (dtype if added is None else torch.promote_types(dtype, added))
    expected = formula(
        wide[0],
        None if y is None else next(rest),
        None if weight is None else (last := next(rest)) + (last.to(total_dtype).double() - last).detach(),
        total_dtype,
        center,
    )
    assert found[1].dtype == normed_dtype
    assert close(found[0], expected[0], total_dtype)
    assert close(found[1], expected[1], normed_dtype)
    with torch.no_grad():
        for a, b in zip(add_and_norm(x, y, weight, EPS, normed_dtype, center=center), found, strict=True):
            assert torch.equal(a, b)
    count = slice(None) if onward else slice(1, None)
    weights = [torch.randn_like(tensor) for tensor in found[count]]
    gradients = torch.autograd.grad(found[count], inputs, weights, retain_graph=True)
    exact = torch.autograd.grad(expected[count], wide, [w.double() for w in weights])
    for tensor, a, b in zip(inputs, gradients, exact, strict=True):
        assert a.dtype == tensor.dtype
        assert close(a, b, BFLOAT16 if BFLOAT16 in (a.dtype, total_dtype) else FLOAT32)
    for a, b in zip(torch.autograd.grad(found[count], inputs, weights), gradients, strict=True):
        assert torch.equal(a, b)


SHAPES = [(1, 7), (3, 5, 16), (2, 9, 3, 24), (130, 100)]


@interpreted
@pytest.mark.parametrize("center", [False, True], ids=["RMS norm", "layer norm"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_formula(shape, weighted, center):
    check(shape, weighted=weighted, center=center)
    check(shape, weighted=weighted, center=center, onward=False)


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_before_the_norm(weighted):
    check((3, 5, 24), weighted=weighted, added=FLOAT32)
    check((3, 5, 24), weighted=weighted, added=BFLOAT16, normed_dtype=BFLOAT16)
    check((3, 5, 24), weighted=weighted, added=BFLOAT16, dtype=BFLOAT16, normed_dtype=BFLOAT16, onward=False)


@interpreted
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_products_in_bfloat16(dtype):
    check((4, 33), dtype=dtype, normed_dtype=BFLOAT16)


@interpreted
def test_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr(triton_norm, "_PROGRAMS", 3)
    monkeypatch.setattr(triton_norm, "_NUMBERS", 32)
    check((5, 7, 10))


@interpreted
def test_long_rows():
    check((2, 5000))


@interpreted
def test_no_rows_have_a_gradient_of_zero():
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    normed = add_and_norm(x, None, weight, EPS, BFLOAT16)[1]
    assert (normed.shape, normed.dtype) == ((0, 8), BFLOAT16)
    d_x, d_weight = torch.autograd.grad(normed.sum(), (x, weight))
    assert d_x.shape == (0, 8)
    assert torch.equal(d_weight, torch.zeros(8))


@interpreted
def test_tensors_that_are_not_contiguous_and_gradients_of_one_output():
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    total, normed = add_and_norm(x.mT, None, weight, EPS, FLOAT32)
    expected = torch.nn.functional.rms_norm(x.mT, (6,), weight, EPS)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(
        torch.autograd.grad(normed.sum(), (x, weight), retain_graph=True),
        torch.autograd.grad(expected.sum(), (x, weight)),
    )
    assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones(6, 5))


def replicas(device, dtype=FLOAT32):
    """Every replica as it would be alone."""
    x, y = (torch.randn(3, 4, 5, 24, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.rand(3, 24, device=device, requires_grad=True)
    d = [torch.randn_like(x) for _ in range(2)]
    for inputs in ((x, y, weight), (x, y, weight[0].detach().requires_grad_())):
        dims = (0, 0, 0 if inputs[2].ndim == 2 else None)
        found = vmap(lambda x, y, w: add_and_norm(x, y, w, EPS, dtype), dims)(*inputs)
        weights = inputs[2].expand(3, 24)
        alone = [add_and_norm(a, b, w, EPS, dtype) for a, b, w in zip(x, y, weights, strict=True)]
        expected = [torch.stack(parts) for parts in zip(*alone, strict=True)]
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == FLOAT32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(list(found), expected, **tolerance)
        torch.testing.assert_close(
            torch.autograd.grad(found, inputs, d), torch.autograd.grad(expected, inputs, d), **tolerance
        )


@interpreted
def test_replicas_have_weights_of_their_own():
    replicas("cpu")


@interpreted
def test_gradients_of_gradients():
    x, y, weight = torch.randn(2, 6), torch.randn(2, 6), torch.rand(6)
    inputs = [tensor.requires_grad_() for tensor in (x, y, weight)]

    def penalty(total, normed):
        first = torch.autograd.grad((normed.square() * total).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    norms = torch.nn.functional.rms_norm(x + y, (6,), weight, EPS), torch.nn.functional.layer_norm(x + y, (6,), weight)
    for center, normed in enumerate(norms):
        found = penalty(*add_and_norm(x, y, weight, EPS, FLOAT32, center=bool(center)))
        torch.testing.assert_close(found, penalty(x + y, normed), rtol=1e-4, atol=1e-4)


@interpreted
def test_the_operators_fakes_tell_the_truth():
    x, y, weight = torch.randn(3, 8), torch.randn(3, 8).bfloat16(), torch.rand(8)
    total, normed, scale = triton_norm._forward_op(x, y, weight, EPS, BFLOAT16, True)
    tests = ("test_schema", "test_faketensor")
    for added in (y, None):
        torch.library.opcheck(triton_norm._forward_op, (x, added, weight, EPS, BFLOAT16, True), test_utils=tests)
    for arguments in ((weight, scale, normed, x, FLOAT32, BFLOAT16), (None, scale, normed, None, FLOAT32, None)):
        torch.library.opcheck(triton_norm._backward_op, (total, *arguments, True), test_utils=tests)


@interpreted
def test_norms_of_heads_are_pytorchs(monkeypatch):
    """Rows far from 0, of which a variance as a difference of two means would have nothing left."""
    x = (torch.randn(2, 3, 4, 10) + 1000).requires_grad_()
    weight, bias = torch.randn(40, requires_grad=True), torch.randn(40, requires_grad=True)
    inputs = (x, weight, bias)
    found = head_norm(*inputs, EPS)
    monkeypatch.setattr(triton_norm, "PRIORITY", 0)
    expected = head_norm(*(t.double() for t in inputs), EPS)
    d = torch.randn_like(found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    exact = torch.autograd.grad(expected, inputs, d.double())
    torch.testing.assert_close(torch.autograd.grad(found, inputs, d), exact, rtol=1e-3, atol=1e-3)


def small_model(placement):
    config = ModelConfig(vocab_size=7, d_model=16, mlp_ratio=2.0, norm_placement=placement, mixer=MIXER)
    return LanguageModel(config), torch.randint(7, (2, 5))


def model_gradients(model, ids, *, autocast=False):
    with torch.autocast("cpu", BFLOAT16, enabled=autocast):
        loss = model(ids, labels=ids)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@interpreted
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_model_has_the_same_loss_and_gradients(placement, autocast, monkeypatch):
    model, ids = small_model(placement)
    found = model_gradients(model, ids, autocast=autocast)
    monkeypatch.setattr(triton_norm, "PRIORITY", 0)
    for a, b in zip(found, model_gradients(model, ids, autocast=autocast), strict=True):
        # The interpreter cuts bfloat16 off.
        assert (a - b).norm() <= (0.1 if autocast else 1e-4) * b.norm() + 1e-6


@interpreted
def test_models_of_several_seeds_as_one(monkeypatch):
    models = [small_model("before")[0] for _ in range(2)]
    x = torch.randn(2, 2, 5, 16)
    parameters = {
        name: torch.stack([model.get_parameter(name).detach() for model in models]).requires_grad_()
        for name, _ in models[0].named_parameters()
    }
    del parameters["embedding.weight"]

    def gradients():
        y = vmap(lambda p, x: functional_call(models[0], p, (x,)))(parameters, x)
        return torch.autograd.grad(y.square().sum(), list(parameters.values()))

    found = gradients()
    monkeypatch.setattr(triton_norm, "PRIORITY", 0)
    torch.testing.assert_close(found, gradients(), rtol=1e-3, atol=1e-4)


@interpreted
def test_float64_and_a_norm_without_epsilon_take_pytorchs(monkeypatch):
    monkeypatch.setattr(triton_norm, "add_and_norm", None)
    for norm, dtype in ((RMSNorm(8, eps=EPS).double(), torch.float64), (RMSNorm(8), FLOAT32)):
        x = torch.randn(3, 8, dtype=dtype)
        assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, norm.eps))


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "shape", [*SHAPES, (4000, 1024), (3000, 8, 128), (1000, 2000), (100, 8192), (40, 16_384), (5, 0, 64)]
)
def test_the_kernels_on_a_gpu(shape, weighted):
    if not torch.Size(shape).numel():
        x = torch.randn(shape, device="cuda")
        assert add_and_norm(x, None, None, EPS, BFLOAT16)[1].shape == shape
        return
    options = {"weighted": weighted, "device": "cuda"}
    check(shape, **options)
    check(shape, **options, normed_dtype=BFLOAT16, onward=False)
    check(shape, **options, dtype=BFLOAT16, normed_dtype=BFLOAT16)
    check(shape, **options, added=BFLOAT16, normed_dtype=BFLOAT16)
    check(shape, **options, added=BFLOAT16, dtype=BFLOAT16, normed_dtype=BFLOAT16)
    check(shape, **options, center=True)
    check(shape, **options, center=True, dtype=BFLOAT16, normed_dtype=BFLOAT16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_replicas_on_a_gpu(dtype):
    replicas("cuda", dtype)


@pytest.mark.gpu
def test_no_other_batch_compiles_a_kernel_again_on_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_ahead, "_work", triton_ahead._Work(0))  # in the background others are compiled too
    kernels = triton_norm._kernels()
    counts = []
    for rows in (1, 5, 16, 1000, 4096):
        x = torch.randn(rows, 96, device="cuda", requires_grad=True)
        weight = torch.ones(96, device="cuda", requires_grad=True)
        add_and_norm(x, None, weight, EPS, BFLOAT16)[1].sum().backward()
        counts.append([len(kernel.device_caches[0][0]) for kernel in (kernels.forward, kernels.backward)])
    assert counts == counts[:1] * len(counts)
