"""The cross-entropy's Triton kernel: under the interpreter, and on a GPU (marked `gpu`)."""

import pytest
import torch
from torch.nn import functional as F
from triton_cases import interpreted

from statetrack.cross_entropy import IGNORE, linear_cross_entropy
from statetrack.ops import triton_cross_entropy
from statetrack.ops.triton_common import CHECKED_ON_A_CARD, ON_REQUEST
from statetrack.ops.triton_cross_entropy import replace_by_gradient


def check(rows, size, z_loss, device="cpu", dtype=torch.float32, scale=3.0):
    """Against PyTorch's cross-entropy in float64, losses and gradients."""
    logits = (scale * torch.randn(rows, size, device=device)).to(dtype)
    labels = torch.randint(size, (rows,), device=device)
    labels[1::3] = IGNORE
    shares = torch.where(labels == IGNORE, 0, torch.rand(rows, device=device))
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none")
    losses = losses + z_loss * torch.logsumexp(exact, 1).square() * (labels != IGNORE)
    (gradient,) = torch.autograd.grad((shares.double() * losses).sum(), exact)
    before = logits.clone()
    alone = replace_by_gradient(logits, labels, None, z_loss=z_loss)
    assert torch.equal(logits, before)
    found = replace_by_gradient(logits, labels, shares, z_loss=z_loss)
    assert torch.equal(found, alone)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    assert logits.dtype == dtype
    assert (logits.double() - gradient).norm() <= (
        1e-5 if dtype == torch.float32 else 8e-3
    ) * gradient.norm()  # the interpreter cuts off


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "size"), [(1, 7), (5, 64), (4, 131)])
def test_the_kernel_is_the_cross_entropy_of_pytorch(rows, size, z_loss, dtype, monkeypatch):
    monkeypatch.setattr(triton_cross_entropy, "_LOGITS", 32)  # rows of one block and of several
    check(rows, size, z_loss, dtype=dtype)


@interpreted
def test_a_first_block_of_minus_infinity_adds_nothing(monkeypatch):
    monkeypatch.setattr(triton_cross_entropy, "_LOGITS", 32)
    logits, labels = torch.randn(2, 70), torch.tensor([40, 69])
    logits[:, :32] = float("-inf")
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(replace_by_gradient(logits, labels, None).double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_large_logits_do_not_overflow():
    check(4, 50, 0.0, scale=1e4)


@interpreted
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_chunked_loss_is_the_same_with_and_without_it(z_loss, monkeypatch):
    x, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    labels = torch.randint(31, (2, 9))
    labels[0, 3] = IGNORE
    monkeypatch.setattr(triton_cross_entropy, "PRIORITY", ON_REQUEST)
    expected = linear_cross_entropy(x, weight, labels, z_loss=z_loss)
    gradients = torch.autograd.grad(expected, (x, weight))
    calls = []
    monkeypatch.setattr(triton_cross_entropy, "PRIORITY", CHECKED_ON_A_CARD)
    monkeypatch.setattr(
        triton_cross_entropy,
        "replace_by_gradient",
        lambda *args, **options: calls.append(1) or replace_by_gradient(*args, **options),
    )
    found = linear_cross_entropy(x, weight, labels, z_loss=z_loss)
    assert calls
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (x, weight)), gradients)


@interpreted
@pytest.mark.parametrize("shares", [None, torch.tensor([0.5, 0.0, 0.5])], ids=["losses", "gradient"])
def test_the_operators_fake_tells_the_truth(shares):
    arguments = (torch.randn(3, 7), torch.tensor([2, IGNORE, 6]), shares, 0.1, IGNORE)
    torch.library.opcheck(triton_cross_entropy._op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize(("rows", "size"), [(1, 7), (64, 4096), (300, 32_000), (128, 50_257)])
def test_the_kernel_on_a_gpu(rows, size, z_loss, dtype):
    check(rows, size, z_loss, device="cuda", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_on_a_gpu(dtype, monkeypatch):
    """With the kernel and without, in several chunks, beside the plain computation in float64."""
    monkeypatch.setattr("statetrack.cross_entropy.LOGITS", 2**22)
    x = torch.randn(1000, 256, device="cuda", requires_grad=True)
    weight = (0.1 * torch.randn(32_000, 256, device="cuda")).requires_grad_()
    labels = torch.randint(32_000, (1000,), device="cuda")
    exact = F.cross_entropy(x.double() @ weight.double().T, labels)
    gradients = torch.autograd.grad(exact, (x, weight))
    for priority in (0, CHECKED_ON_A_CARD):
        monkeypatch.setattr(triton_cross_entropy, "PRIORITY", priority)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = linear_cross_entropy(x, weight, labels)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
        for found, expected in zip(torch.autograd.grad(loss, (x, weight)), gradients, strict=True):
            assert found.dtype == torch.float32
            assert (found - expected).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-3) * expected.norm()
