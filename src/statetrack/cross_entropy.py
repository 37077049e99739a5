"""The cross-entropy of an output layer, without the logits of all tokens in memory at once.

With a vocabulary of 32,000 the float32 logits of 65,536 tokens are 8 GB, and as much again for their gradient; a small
model has nothing larger. Here a chunk of tokens is taken at a time: its logits, their gradient, and from it the
gradients of what the layer reads and of its weight, all in the forward pass. The backward pass then only scales them.
So nothing is computed twice, and what is kept is as large as those gradients are: as in Liger Kernel (2410.10989).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from statetrack.ops import triton_cross_entropy
from statetrack.ops.backend import differentiable_once, wants_gradient
from statetrack.ops.triton_common import CHECKED_ON_A_CARD
from statetrack.precision import product_dtype
from statetrack.transition import accumulation_dtype

IGNORE = -100
"""The label of tokens that have no loss, as PyTorch and transformers have it."""

LOGITS = 2**27
"""Logits that are in memory at once, at most: 4,096 tokens with a vocabulary of 32,768. Every chunk passes once over
the gradient of the weight, which costs little beside three products of a chunk of that size."""

_LOGITS_ON_CPU = 2**22
"""On a CPU, where shorter products are as fast and more of a chunk stays in the caches."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The cross-entropy of the logits `x weight^T + bias`, in nats, chunk by chunk.

    `loss_i = lse_i - logits_i[labels_i] + z_loss lse_i^2` with `lse_i = logsumexp(logits_i)`; the last term, the z-loss
    of PaLM (arXiv 2204.02311), keeps the logits from drifting. Products are computed in the dtype of autocast where it
    is on, else in that of the weight; all else, and the sum of the weight's gradient over the chunks, in float32 or
    better.

    The weight is read while this function runs. With FSDP it must therefore be called inside the forward of the module
    that gathers it, as `LanguageModel.forward` does.

    Args:
        x: what the output layer reads, [..., D].
        weight: [V, D]; of tied embeddings the embedding's.
        labels: integers [...] in 0..V-1, or `IGNORE` for tokens that have no loss.
        bias: [V].
        z_loss: weight of the squared logsumexp.
        reduction: "mean" over the tokens that have a loss, NaN if there is none; "none" for the loss of each token, 0
            where it is ignored, which has no gradient.

    Returns:
        The mean, a scalar, or the losses [...]; float32 or better.

    Raises:
        ValueError: for shapes that don't fit together, another reduction, or "none" with inputs that want a gradient.
        RuntimeError: for labels out of range, on a CPU.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be mean or none, got {reduction!r}")
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x [..., D], weight [V, D] and bias [V] don't fit together: {tuple(x.shape)}, {tuple(weight.shape)}"
            + ("" if bias is None else f", {tuple(bias.shape)}")
        )
    if labels.shape != x.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers [...] = {tuple(x.shape[:-1])}, got {labels.dtype} {tuple(labels.shape)}"
        )
    rows, targets = x.reshape(-1, x.shape[-1]).to(product_dtype(weight)), labels.reshape(-1).long()
    gradient = wants_gradient(x, weight, bias)
    if gradient and reduction == "none":
        raise ValueError("the losses of single tokens have no gradient here: call this under torch.no_grad()")
    if gradient:
        return _MeanCrossEntropy.apply(rows, weight, targets, bias, z_loss)
    losses, *_ = _forward(rows, weight, targets, bias, z_loss)
    return losses.view(labels.shape) if reduction == "none" else _mean(losses, targets)


def peak_bytes(tokens: int, vocab_size: int, d_model: int, dtype: torch.dtype, *, device: str = "cuda") -> int:
    """The most that `linear_cross_entropy` needs at once to give the gradients of x and of a float32 weight.

    That is a chunk of logits with its softmax, or with its part of the weight's gradient; the gradients of the chunks
    before; and where `dtype` is shorter than float32 the copies in it of the weight and in float32 of the logits.

    Args:
        tokens: of x.
        vocab_size: V.
        d_model: D.
        dtype: of the products.
        device: "cuda" or "cpu".
    """
    rows, size, wide = min(tokens, _most_tokens(vocab_size, device)), dtype.itemsize, max(4, dtype.itemsize)
    logits, weight, short = rows * vocab_size, vocab_size * d_model, size < 4
    gradients = weight * wide + tokens * d_model * size
    # The kernel needs no memory of its own.
    beside = 0 if device == "cuda" and triton_cross_entropy.PRIORITY == CHECKED_ON_A_CARD else wide + short * wide
    softmax = logits * (size + beside) + (gradients if rows < tokens else 0)
    products = logits * size + gradients + (weight * size if short else 0)
    return max(softmax, products) + (weight * size if short else 0)


def _most_tokens(vocab_size: int, device: str) -> int:
    return max(1, (_LOGITS_ON_CPU if device == "cpu" else LOGITS) // vocab_size)


class _MeanCrossEntropy(torch.autograd.Function):
    """The mean loss of rows [N, D], which are in the dtype of products already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, z_loss: float) -> Tensor:
        of_rows, of_weight, _, of_bias, _ = ctx.needs_input_grad
        losses, *gradients = _forward(
            rows, weight, targets, bias, z_loss, of_rows=of_rows, of_weight=of_weight, of_bias=of_bias
        )
        ctx.save_for_backward(*gradients)
        return _mean(losses, targets)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        # A scalar does not widen a tensor.
        d_rows, d_weight, d_bias = (None if d is None else d * grad_outputs[0] for d in ctx.saved_tensors)
        return d_rows, d_weight, None, d_bias, None


def _mean(losses: Tensor, targets: Tensor) -> Tensor:
    return losses.sum() / (targets != IGNORE).sum()


def _forward(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    z_loss: float,
    *,
    of_rows: bool = False,
    of_weight: bool = False,
    of_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The losses [N], and the gradients of their mean that are asked for."""
    with torch.no_grad():
        wide = accumulation_dtype(rows)
        product_weight = weight.to(rows.dtype)
        product_bias = None if bias is None else bias.to(rows.dtype)
        asked = targets != IGNORE
        shares = torch.where(asked, 1 / asked.sum(dtype=wide), 0) if of_rows or of_weight or of_bias else None
        # Chunks of one size but for the last, which is hardly shorter.
        # No rows are one chunk too, of which there is nothing to add up.
        count = max(1, -(-len(rows) // _most_tokens(len(weight), rows.device.type)))
        size = max(1, -(-len(rows) // count))
        losses: list[Tensor] = []
        d_rows: list[Tensor] = []
        d_weight: Tensor | None = None
        d_bias: Tensor | None = None
        for start in range(0, max(1, len(rows)), size):
            chunk = slice(start, start + size)
            logits = F.linear(rows[chunk], product_weight, product_bias)
            losses.append(
                _replace_by_gradient(logits, targets[chunk], z_loss, None if shares is None else shares[chunk])
            )
            if of_rows:
                d_rows.append(logits @ product_weight)
            if of_weight:
                if d_weight is None:
                    d_weight = (logits.mT @ rows[chunk]).to(wide)
                elif d_weight.dtype == logits.dtype:
                    d_weight.addmm_(logits.mT, rows[chunk])
                else:
                    d_weight.add_(logits.mT @ rows[chunk])
            if of_bias:
                part = logits.sum(0, dtype=wide)
                d_bias = part if d_bias is None else d_bias.add_(part)
            del logits  # before the next chunk has its own
        return (
            torch.cat(losses),
            torch.cat(d_rows) if of_rows else None,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )


def _replace_by_gradient(logits: Tensor, labels: Tensor, z_loss: float, shares: Tensor | None) -> Tensor:
    """The losses [n] of logits [n, V], which become the gradient of `sum(shares * losses)` where there are shares [n].

    With p = softmax(logits) that is `shares ((1 + 2 z_loss lse) p - onehot(label))`. Few passes over memory: the
    largest of p is 1 / sum(exp(logits - largest logit)), which gives the logsumexp without another pass.
    """
    if not torch.compiler.is_compiling() and triton_cross_entropy.serves(logits):
        return triton_cross_entropy.replace_by_gradient(logits, labels, shares, z_loss=z_loss, ignore=IGNORE)
    wide = accumulation_dtype(logits)
    asked = (labels != IGNORE).unsqueeze(1)
    index = torch.where(asked, labels.unsqueeze(1), 0)
    target = logits.gather(1, index).to(wide)
    largest, where = logits.max(1, keepdim=True)
    p = torch.softmax(logits, 1, dtype=wide)
    lse = largest.to(wide) - p.gather(1, where).log()
    losses = lse - target
    if z_loss:
        losses = losses + z_loss * lse.square()
    if shares is not None:
        shares = shares.unsqueeze(1)
        scale = shares * (1 + 2 * z_loss * lse)
        at_label = p.gather(1, index) * scale - shares
        torch.mul(p, scale, out=logits)
        logits.scatter_(1, index, at_label.to(logits.dtype))
    return torch.where(asked, losses, 0).squeeze(1)
