"""A model over several processes, and in bf16: the same function and the same gradients, however they are spread.

With FSDP2 the weights of linear layers are gathered in the precision of the matrix products, a few blocks at a time;
all else, above all what decides on eigenvalues, is gathered in float32. So a run computes with the same numbers as on
one GPU, where autocast rounds the same weights and no others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from statetrack.mixers import Mixer
from statetrack.model import LanguageModel
from statetrack.pretraining.config import ExecutionConfig
from statetrack.pretraining.optimizers import local_parts
from statetrack.pretraining.processes import Processes

GROUP_PARAMETERS = 2**25
"""With FSDP neighbouring blocks are gathered together until they have so many parameters. Each group costs the host
some milliseconds a step, for which small blocks keep no GPU busy."""

_SMALL = 1 / 8
"""Up to this share of a block's parameters, those that are gathered in float32 have no group of their own."""


class ParallelModel:
    """A language model that all processes train together.

    Attributes:
        model: the model of this process. With FSDP its own parameters may be gathered: read `parameters`.
        parameters: its parameters by name, as the optimizer has them; with FSDP DTensors, of which it has a part.
        parallelism: "none", "ddp" or "fsdp".

    Args:
        model: the whole model in float32, the same one in all processes.
        processes: this process among all.
        execution: how it is computed.
        precision: "float32" or "bfloat16".
    """

    def __init__(self, model: LanguageModel, processes: Processes, execution: ExecutionConfig, precision: str) -> None:
        self.model, self.device, self._processes = model.to(processes.device), processes.device, processes
        self.parallelism = _parallelism(execution.parallelism, processes.size)
        self.bf16, self._reduces_always = precision == "bfloat16", execution.reduce_every_micro_batch
        if self.bf16:  # the sum over the blocks starts with the embeddings, and has their dtype
            model.embedding.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        if execution.activation_checkpointing:
            model.checkpoint_blocks(partial(checkpoint, use_reentrant=False), execution.activation_checkpointing)
        if execution.compile:
            for block in model.blocks:
                block.compile()
        if self.parallelism == "fsdp":
            # Left to itself FSDP takes the GPU where there is one, also in a run on the CPU.
            mesh = init_device_mesh(processes.device.type, (processes.size,))
            # Blocks that are computed again, or compiled, come one at a time, and so they do in float32.
            whole = execution.compile or execution.activation_checkpointing or not self.bf16
            shard = partial(fully_shard, mesh=mesh, reshard_after_forward=execution.reshard_after_forward)
            _shard(model, shard, torch.bfloat16 if self.bf16 else None, 0 if whole else GROUP_PARAMETERS)
        # FSDP puts gathered weights in the place of its parts, from a forward pass until the next backward pass.
        self.parameters = dict(model.named_parameters())
        self._module: nn.Module = model
        if self.parallelism == "ddp":
            # Without device_ids, with which it would move the boundaries of packed sequences to the GPU.
            self._module = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def __call__(
        self, ids: Tensor, cu_seqlens: Tensor | None, labels: Tensor | None = None, *, z_loss: float = 0.0
    ) -> Tensor:
        """Logits [B, T, vocab_size], or with labels [B, T] their mean loss: `LanguageModel.forward`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._module(ids, cu_seqlens, labels=labels, z_loss=z_loss)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """The forward and backward pass of a micro-batch; gradients are summed over the processes with the last one, or
        with each (`ExecutionConfig.reduce_every_micro_batch`)."""
        if isinstance(self._module, DistributedDataParallel) and not last:
            with self._module.no_sync():
                yield
            return
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(last or self._reduces_always)
        yield

    def clip_gradients(self, largest: float) -> Tensor:
        """The norm of the gradient over all processes; gradients longer than `largest` are shortened to it, if it
        isn't 0."""
        largest = largest or float("inf")
        if self.parallelism != "fsdp":
            return nn.utils.clip_grad_norm_(self.parameters.values(), largest)
        # The same from the parts: for DTensors it would be asked of each how it is spread, which takes the host longer.
        parts = local_parts(p.grad for p in self.parameters.values() if p.grad is not None)
        norm = self._processes.sum(nn.utils.get_total_norm(parts).square()).sqrt()
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(parts, scale)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights of the whole model on the CPU, in every process."""
        weights: dict[str, Tensor] = {}
        for name, value in self.model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            weights[name] = whole.detach().cpu().clone()
        return weights


def _parallelism(wanted: str, size: int) -> str:
    if wanted == "auto":
        return "fsdp" if size > 1 else "none"
    if wanted == "none" and size > 1:
        raise ValueError(f"parallelism = none is for one process, and there are {size}; say fsdp, ddp or auto")
    return wanted


def _shard(model: LanguageModel, shard: Callable[..., Any], compute: torch.dtype | None, group_parameters: int) -> None:
    # Blocks also return states, which may be views; nobody changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    # Autocast has the last word on the dtypes of inputs.
    products = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    layers = [layer for block in model.blocks for layer in (_linear_layers(block) if compute else [block])]
    of_products = {p for layer in layers for p in layer.parameters()}
    mostly_products: list[list[Any]] = []
    for group in gathered_together(model.blocks, group_parameters):
        mostly_products.append([block for block in group if _has_little_else(block, of_products)])
        _shard_layers([block for block in group if block not in mostly_products[-1]], shard, products, rest)
    # What is small stays with the embeddings, in one group of the whole model, which must be made before those of its
    # blocks to find it in them.
    gathered_by_block = {p for group in mostly_products for block in group for p in block.parameters()} & of_products
    # Their weights are wanted first by the backward pass: freed, they would be gathered again at once.
    shard(model, mp_policy=rest, ignored_params=gathered_by_block, reshard_after_forward=False)
    for group in filter(None, mostly_products):
        # With the hooks on blocks layers have none, and those of one input stay one product (`joined_product`).
        others = {p for block in group for p in block.parameters()} - of_products
        shard(group, mp_policy=products, ignored_params=others)


def _shard_layers(
    blocks: list[Any], shard: Callable[..., Any], products: MixedPrecisionPolicy, rest: MixedPrecisionPolicy
) -> None:
    """Blocks with much that isn't for products: a group of layers for all of them, and one of all else for each."""
    layers = [layer for block in blocks for layer in _linear_layers(block)]
    if layers:
        (first, *_) = shard(layers, mp_policy=products)
        # Some mixers look at a weight before its layer is called, for the dtype of their state.
        blocks[0].register_forward_pre_hook(partial(_gather, first))
    for block in blocks:
        shard(block, mp_policy=rest)


def _has_little_else(block: nn.Module, of_products: set[nn.Parameter]) -> bool:
    others = sum(p.numel() for p in block.parameters() if p not in of_products)
    return others <= _SMALL * sum(p.numel() for p in block.parameters())


def gathered_together(blocks: Iterable[nn.Module], parameters: int) -> list[list[nn.Module]]:
    """Neighbouring blocks in groups, each of which goes on until it has so many parameters."""
    groups: list[list[nn.Module]] = []
    count = parameters
    for block in blocks:
        if count >= parameters:
            groups.append([])
            count = 0
        groups[-1].append(block)
        count += sum(p.numel() for p in block.parameters())
    return groups


def _gather(group: FSDPModule, block: nn.Module, inputs: Any) -> None:
    group.unshard()


def _linear_layers(block: nn.Module) -> list[Any]:
    """The linear layers of a block that have nothing to do with its eigenvalues."""
    exempt = {p for module in block.modules() if isinstance(module, Mixer) for p in module.eigenvalue_parameters()}
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return [layer for layer in layers if exempt.isdisjoint(layer.parameters())]
