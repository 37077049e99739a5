"""The Triton kernels of products with a gate: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from torch.func import vmap
from triton_cases import interpreted

from statetrack import layers
from statetrack.ops import triton_gate
from statetrack.ops.triton_gate import gated, gated_halves

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def formula(gate, x, silu):
    opened = torch.sigmoid(gate)
    return (gate * opened if silu else opened) * x


def check(shape, *, silu, device="cpu", dtypes=(FLOAT32, FLOAT32)):
    gate, x = ((3 * torch.randn(shape, device=device)).to(dtype).requires_grad_() for dtype in dtypes)
    y = gated(gate, x, silu=silu)
    wide = [tensor.detach().double().requires_grad_() for tensor in (gate, x)]
    expected = formula(*wide, silu)
    d_y = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (gate, x), d_y)
    exact = torch.autograd.grad(expected, wide, d_y.double())
    assert y.dtype == torch.promote_types(*dtypes)
    for dtype, a, b in zip((y.dtype, *dtypes), (y, *gradients), (expected, *exact), strict=True):
        assert (a.dtype, a.shape) == (dtype, b.shape)
        assert (a.double() - b).norm() <= (1e-6 if dtype == FLOAT32 else 1.2e-2) * b.norm() + 1e-6


SHAPES = [(1,), (3, 7), (2, 5, 16), (4, 3, 2, 12)]


@interpreted
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_formula(shape, silu):
    check(shape, silu=silu)
    check(shape, silu=silu, dtypes=(BFLOAT16, BFLOAT16))
    check(shape, silu=silu, dtypes=(BFLOAT16, FLOAT32))


def check_halves(shape, *, silu, device="cpu", dtype=FLOAT32):
    """Against the formula in float64: one tensor's two halves, and its gradient."""
    both = (3 * torch.randn(*shape[:-1], 2 * shape[-1], device=device)).to(dtype).requires_grad_()
    y = gated_halves(both, silu=silu)
    wide = both.detach().double().requires_grad_()
    expected = formula(*wide.chunk(2, -1), silu)
    d_y = torch.randn_like(y)
    (d_both,), (exact,) = torch.autograd.grad(y, both, d_y), torch.autograd.grad(expected, wide, d_y.double())
    for a, b in ((y, expected), (d_both, exact)):
        assert (a.dtype, a.shape) == (dtype, b.shape)
        assert a.is_contiguous()
        assert (a.double() - b).norm() <= (1e-6 if dtype == FLOAT32 else 1.2e-2) * b.norm() + 1e-6


@interpreted
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_halves_of_one_tensor_are_the_formula(shape, silu):
    check_halves(shape, silu=silu)
    check_halves(shape, silu=silu, dtype=BFLOAT16)


def strided(shape):
    """Tensors of one shape [2, 5, 3, 8], differently laid out in memory."""
    wide = torch.randn(2, 5, 40)
    yield wide[..., 8:32].view(shape)
    yield torch.randn(5, 2, 40)[..., :24].transpose(0, 1).view(shape)
    yield torch.randn(2, 5, 3, 20)[..., 4:12]
    yield torch.randn(1, 5, 3, 8).expand(shape)
    yield torch.randn(2, 5, 3, 1).expand(shape)
    yield torch.randn(2, 5, 8, 3).mT
    yield torch.randn(2, 9, 40)[:, 2:7, :24].view(shape)
    yield torch.randn(2, 5, 3, 16)[..., ::2]
    yield torch.randn(shape)


@interpreted
def test_parts_of_wider_tensors():
    """Whatever way gate and x are laid out in memory, each alone and both."""
    shape = (2, 5, 3, 8)
    for gate in strided(shape):
        for x in strided(shape):
            inputs = [tensor.detach().requires_grad_() for tensor in (gate, x)]
            y, expected = gated(*inputs), formula(*inputs, silu=True)
            torch.testing.assert_close(y, expected)
            d_y = torch.randn(5, 2, 3, 8).transpose(0, 1)
            torch.testing.assert_close(torch.autograd.grad(y, inputs, d_y), torch.autograd.grad(expected, inputs, d_y))


@interpreted
def test_a_part_of_a_projection_is_not_copied():
    gate, x = torch.randn(2, 5, 40)[..., 8:32].view(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    for readable in (triton_gate._readable(gate, x), triton_gate._readable(x, gate)):
        assert {tensor.data_ptr() for tensor in readable[:2]} == {gate.data_ptr(), x.data_ptr()}
        assert readable[2] == 24


@interpreted
def test_replicas_of_halves():
    both = torch.randn(4, 3, 16, requires_grad=True)
    y, expected = vmap(gated_halves, 1)(both), formula(*both.chunk(2, -1), silu=True).transpose(0, 1)
    torch.testing.assert_close(y, expected)
    d_y = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, both, d_y), torch.autograd.grad(expected, both, d_y))


@interpreted
def test_more_numbers_than_a_program_has(monkeypatch):
    monkeypatch.setattr(triton_gate, "_NUMBERS", 32)
    check((5, 8, 24), silu=True)
    check_halves((5, 8, 24), silu=True)


@interpreted
def test_extreme_gates_have_finite_gradients():
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30], requires_grad=True)
    x = torch.ones(6, requires_grad=True)
    for silu in (True, False):
        y = gated(gate, x, silu=silu)
        expected = formula(gate, x, silu)
        torch.testing.assert_close(y, expected)
        d = torch.autograd.grad(y.sum(), (gate, x))
        torch.testing.assert_close(d[0], torch.tensor([0.0, 0.0, 0.0, 0.5 if silu else 0.25, silu, silu]))
        torch.testing.assert_close(d[1], expected.detach())


@interpreted
def test_a_tensor_that_is_its_own_gate_compiles():
    def loss(x):
        return gated(x, x).square().sum()

    x = torch.randn(3, 5, requires_grad=True)
    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, eager)


@interpreted
def test_nothing_gated_is_nothing():
    gate, x = (torch.randn(0, 8, requires_grad=True) for _ in range(2))
    y = gated(gate, x)
    assert y.shape == (0, 8)
    assert all(d.shape == (0, 8) for d in torch.autograd.grad(y.sum(), (gate, x)))
    assert torch.autograd.grad(gated_halves(gate).sum(), gate)[0].shape == (0, 8)


@interpreted
def test_replicas_and_what_they_share():
    gate, x = torch.randn(3, 4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y = vmap(gated, (0, None))(gate, x)
    expected = formula(gate, x, silu=True)
    torch.testing.assert_close(y, expected)
    d = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, (gate, x), d), torch.autograd.grad(expected, (gate, x), d))


@interpreted
@pytest.mark.parametrize("silu", [True, False])
def test_gradients_of_gradients(silu):
    inputs = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]

    def penalty(y):
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    expected = penalty(formula(*inputs, silu))
    torch.testing.assert_close(penalty(gated(*inputs, silu=silu)), expected, rtol=1e-4, atol=1e-4)
    halves = gated_halves(torch.cat(inputs, -1), silu=silu)
    torch.testing.assert_close(penalty(halves), expected, rtol=1e-4, atol=1e-4)


@interpreted
def test_the_operators_fakes_tell_the_truth():
    gate, x, d_y = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(3, 8)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton_gate._forward_op, (gate, x, True), test_utils=tests)
    torch.library.opcheck(triton_gate._backward_op, (gate, x, d_y, False), test_utils=tests)
    torch.library.opcheck(triton_gate._halves_forward_op, (gate, True), test_utils=tests)
    torch.library.opcheck(triton_gate._halves_backward_op, (gate, x[:, :4], False), test_utils=tests)


@interpreted
def test_a_gated_mlp_uses_them(monkeypatch):
    mlp, x = layers.GatedMLP(6, 10), torch.randn(2, 3, 6, requires_grad=True)
    inputs, calls = [x, *mlp.parameters()], []
    monkeypatch.setattr(triton_gate, "gated", lambda *args, **options: calls.append(1) or gated(*args, **options))
    y = mlp(x)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    assert calls == [1]
    monkeypatch.setattr(triton_gate, "PRIORITY", 0)
    torch.testing.assert_close(y, mlp(x))
    torch.testing.assert_close(gradients, torch.autograd.grad(mlp(x).square().sum(), inputs))
    assert calls == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (3000, 2816), (700, 8, 128), (999, 1001)])
def test_the_kernels_on_a_gpu(shape, silu):
    for dtypes in ((FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32)):
        check(shape, silu=silu, dtypes=dtypes, device="cuda")
    for dtype in (FLOAT32, BFLOAT16):
        check_halves(shape, silu=silu, dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_no_other_batch_compiles_a_kernel_again_on_a_gpu():
    kernels, counts = triton_gate._kernels(), []
    for rows in (1, 5, 16, 1000, 4096):
        gate, x = (torch.randn(rows, 96, device="cuda", requires_grad=True) for _ in range(2))
        gated(gate, x).sum().backward()
        counts.append([len(kernel.device_caches[0][0]) for kernel in (kernels.forward, kernels.backward)])
    assert counts == counts[:1] * len(counts)
