"""What a pre-training run needs, before it runs: memory and time on cards from 24 to 141 GiB, on 1 to 8 of them.

Nothing of the model is allocated. Its blocks are run with tensors that have shapes and no numbers, at the batch and the
length that are planned; what autograd saves for the backward pass is what it would save on a GPU, since the graph is
the same and "auto" chooses the same backend.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from statetrack.cross_entropy import peak_bytes
from statetrack.model import LanguageModel, ModelConfig
from statetrack.ops.triton_common import assuming_a_gpu
from statetrack.precision import Precision, check_precision
from statetrack.pretraining.flops import card_peak_flops, training_flops_per_token
from statetrack.pretraining.optimizers import MuonWithAdamW, OptimizerConfig, build_optimizer
from statetrack.pretraining.parallel import GROUP_PARAMETERS, gathered_together

GIB = 2**30
ASSUMED_MFU = 0.35
"""The share of a card's peak that a step is assumed to reach, at any size; small models stay below it."""
CONTEXT_BYTES = 1.5 * GIB
"""What CUDA, its libraries and NCCL take of a card before the first tensor."""
FRAGMENTATION = 1.05
"""What the allocator of PyTorch holds, over what tensors have."""
MOST_SEQUENCES = 2**20
"""Larger micro batches are not asked for."""

Parallelism = Literal["auto", "none", "ddp", "fsdp"]


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as `card_peak_flops` knows it.
        memory: bytes.
    """

    name: str
    memory: float

    @property
    def peak_flops(self) -> float:
        peak = card_peak_flops(self.name)
        if peak is None:
            raise ValueError(f"the peak of {self.name} is not known; name a card that `card_peak_flops` knows")
        return peak


CARDS = (Card("RTX 4090", 24 * GIB), Card("A100", 40 * GIB), Card("H100", 80 * GIB), Card("H200", 141 * GIB))
WORLD_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU at the peak of a step, which is in the loss or in the backward pass of the largest block.

    Gradients are those of micro batches before.

    Attributes:
        parameters: the float32 weights that the optimizer moves, this GPU's shard.
        gradients: theirs, float32.
        optimizer: its states, float32.
        gathered: whole weights, of all blocks or with `reshard_after_forward` of those that are being computed, and
            gradients before they are reduced; without shards, the weights in the precision of the computation.
        activations: what the blocks save for the backward pass.
        loss: what the final norm saves, and the output layer and the loss need at once (`cross_entropy.peak_bytes`).
        backward: gradients of activations on their way, of one block.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float
    backward: float

    @property
    def tensors(self) -> float:
        """All of these, of the loss and the backward pass the larger, as they are not at the same time."""
        fixed = self.parameters + self.gradients + self.optimizer + self.gathered
        return fixed + self.activations + max(self.loss, self.backward)

    @property
    def total(self) -> float:
        """What a card must have: the tensors with `FRAGMENTATION`, and `CONTEXT_BYTES`."""
        return CONTEXT_BYTES + FRAGMENTATION * self.tensors


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The run on some cards.

    Attributes:
        card: the cards.
        world_size: how many.
        checkpointing: the activations of every so manyth block are computed again in the backward pass; 0 for none.
        memory: of each card.
        largest_micro_batch: the most sequences that fit a card at once; 0 if none does.
        tokens_per_second: of all cards together, at the assumed MFU.
    """

    card: Card
    world_size: int
    checkpointing: int
    memory: Memory
    largest_micro_batch: int
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        """Whether the planned micro batch fits."""
        return self.memory.total <= self.card.memory

    @property
    def tokens_per_day(self) -> float:
        return 86_400 * self.tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` returns.

    Attributes:
        model: the model.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences that a card computes at once.
        optimizer: its name.
        precision: of the computation.
        parameters: how many.
        flops_per_token: of training, see `training_flops_per_token`.
        mfu: the share of the cards' peak that is assumed.
        placements: for each card, world size and way of checkpointing.
    """

    model: ModelConfig
    sequence_length: int
    micro_batch_size: int
    optimizer: str
    precision: Precision
    parameters: int
    flops_per_token: float
    mfu: float
    placements: tuple[Placement, ...]

    def step_seconds(self, placement: Placement) -> float:
        """Seconds of one micro batch on each card, forward and backward."""
        tokens = self.micro_batch_size * self.sequence_length * placement.world_size
        return tokens / placement.tokens_per_second

    def __rich__(self) -> Group:
        return _tables(self)


def plan(
    model: ModelConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    optimizer: OptimizerConfig | None = None,
    precision: Precision = "bfloat16",
    checkpointing: int | None = None,
    parallelism: Parallelism = "auto",
    reshard_after_forward: bool = False,
    batch_size: int | None = None,
    reduce_every_micro_batch: bool = False,
    world_sizes: Sequence[int] = WORLD_SIZES,
    cards: Sequence[Card] = CARDS,
    mfu: float = ASSUMED_MFU,
) -> Plan:
    """What a run needs on each of some cards, and how long it would take.

    Weights, gradients and optimizer states are float32 and, with FSDP2, sharded evenly over all cards; a few blocks
    are then gathered in `precision` while they are computed, and stay until their backward pass or are let go.

    Args:
        model: the model.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences that a card computes at once, before gradients are accumulated.
        optimizer: AdamW unless told otherwise.
        precision: of matrix products and activations, by autocast; weights are float32.
        checkpointing: compute the activations of every so manyth block again in the backward pass: 1 for all, 0 for
            none; None plans both.
        parallelism: "fsdp", shards also on one card; "ddp" or "none", a copy on each card; "auto" shards from two on.
        reshard_after_forward: with FSDP2, as in `ExecutionConfig`.
        batch_size: sequences of a step, of all cards together; None for one micro batch on each. With FSDP2 gradients
            that are accumulated are whole on each card.
        reduce_every_micro_batch: as in `ExecutionConfig`; then they are not.
        world_sizes: numbers of cards.
        cards: kinds of cards.
        mfu: the share of a card's peak that a step reaches. Checkpointing costs another forward pass on top.

    Raises:
        ValueError: for sizes below 1, an MFU outside (0, 1], an unknown precision, parallelism or card.
    """
    for name, value in (("sequence_length", sequence_length), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if any(size < 1 for size in world_sizes):
        raise ValueError(f"world_sizes must be at least 1, got {list(world_sizes)}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1], got {mfu}")
    check_precision(precision)
    if parallelism not in ("auto", "none", "ddp", "fsdp"):
        raise ValueError(f"parallelism must be auto, none, ddp or fsdp, got {parallelism!r}")
    if checkpointing is not None and checkpointing < 0:
        raise ValueError(f"checkpointing must be 0 (none) or positive, got {checkpointing}")
    optimizer = optimizer or OptimizerConfig()
    with torch.device("meta"):
        whole = LanguageModel(model)
        states = _optimizer_bytes(whole, optimizer)
    parameters = whole.num_parameters()
    saved = saved_activations(
        model, sequence_length=sequence_length, micro_batch_size=micro_batch_size, precision=precision
    )
    flops = training_flops_per_token(model, sequence_length)
    placements = []
    for card in cards:
        for world_size in world_sizes:
            sharded = parallelism == "fsdp" or (parallelism == "auto" and world_size > 1)
            shards = world_size if sharded else 1
            for every in (0, 1) if checkpointing is None else (checkpointing,):
                fixed = {
                    "parameters": 4 * parameters / shards,
                    "gradients": 4 * parameters / shards,
                    "optimizer": states / shards,
                }
                gathered = partial(
                    _gathered_bytes, whole, saved, every, precision, sharded=sharded, reshard=reshard_after_forward
                )
                alone, after_others = (
                    partial(_memory, saved, {**fixed, "gathered": gathered(accumulated=accumulated)}, every)
                    for accumulated in (False, True)
                )
                # Of several micro batches the gradients are accumulated, which may be kept whole.
                once = -(-batch_size // world_size) if batch_size and not reduce_every_micro_batch else 1
                fitting = _largest(alone, card)
                if fitting < once:
                    fitting = _largest(after_others, card)
                memory = alone if micro_batch_size >= once else after_others
                again = -(-model.num_layers // every) / model.num_layers if every else 0.0
                rate = card.peak_flops * mfu / flops * world_size
                placements.append(
                    Placement(
                        card=card,
                        world_size=world_size,
                        checkpointing=every,
                        memory=memory(micro_batch_size),
                        largest_micro_batch=fitting,
                        tokens_per_second=rate * 3 / (3 + again),
                    )
                )
    return Plan(
        model=model,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        optimizer=optimizer.name,
        precision=precision,
        parameters=parameters,
        flops_per_token=flops,
        mfu=mfu,
        placements=tuple(placements),
    )


def _largest(memory: Callable[[int], Memory], card: Card) -> int:
    return bisect_right(range(1, MOST_SEQUENCES), card.memory, key=lambda size: memory(size).total)


def _memory(saved: SavedActivations, fixed: dict[str, float], every: int, size: int) -> Memory:
    """With micro batches of another size than what was measured."""
    scale = size / saved.micro_batch_size
    return Memory(
        **fixed,
        activations=scale * saved.activations(every),
        loss=scale * saved.norm + saved.loss(size),
        backward=scale * max(saved.blocks) * (2 if every else 1),
    )


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes that autograd saves in a forward pass.

    Attributes:
        micro_batch_size: sequences of the pass.
        blocks: of each block, with its input; parameters not counted.
        inputs: of each block's input alone: what is left of it with checkpointing.
        norm: of the final norm, with ids and labels.
        output: of the output layer and the loss: the gradients of what they read and of the weight.
        block_weights: of the rounded copies of each block's weights that autocast makes.
        loss: what the output layer and the loss need at once, for so many sequences.
    """

    micro_batch_size: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    norm: int
    output: int
    block_weights: tuple[int, ...]
    loss: Callable[[int], int]

    def activations(self, checkpointing: int = 0) -> int:
        """Of all blocks, where every so manyth is checkpointed; 0 for none."""
        return sum(
            self.inputs[index] if checkpointing and index % checkpointing == 0 else saved
            for index, saved in enumerate(self.blocks)
        )


def saved_activations(
    config: ModelConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    precision: Precision = "bfloat16",
    device: Literal["cuda", "cpu"] = "cuda",
) -> SavedActivations:
    """What a training step of a model saves, by running each kind of block twice without any numbers.

    The copies of weights that autocast makes are what does not grow with the batch.

    Args:
        config: the model, in float32.
        sequence_length: T.
        micro_batch_size: B.
        precision: "bfloat16" is by autocast.
        device: where the step would run; backends of the recurrence differ in what they save.
    """
    stream = torch.float32 if precision == "float32" or config.residual_in_float32 else torch.bfloat16
    with torch.device("meta"):
        model = LanguageModel(config)

    def measured(module: nn.Module, call: Callable[[dict[str, Tensor], Tensor], object]) -> tuple[int, int]:
        """Bytes that are proportional to the batch, for the whole batch, and those that are not."""
        found = []
        for batch in (micro_batch_size, 2 * micro_batch_size):
            with FakeTensorMode(), assuming_a_gpu() if device == "cuda" else nullcontext():
                shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
                weights = {name: torch.empty(shape, requires_grad=True) for name, shape in shapes.items()}
                x = torch.empty(batch, sequence_length, config.d_model, dtype=stream, requires_grad=True)
                found.append(saved_bytes(partial(call, weights, x), weights.values()))
        return found[1] - found[0], 2 * found[0] - found[1]

    def run_block(block: nn.Module, weights: dict[str, Tensor], x: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return functional_call(block, weights, (x, None, None))

    def run_norm(weights: dict[str, Tensor], x: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return functional_call(model.norm, weights, (x,))

    by_kind: dict[object, tuple[int, int]] = {}
    blocks = []
    for index, block in enumerate(model.blocks):
        kind = (config.layer_mixers()[index], config.layer_norm_placements()[index])
        if kind not in by_kind:
            by_kind[kind] = measured(block, partial(run_block, block))
        blocks.append(by_kind[kind])
    tokens = micro_batch_size * sequence_length
    products = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def loss(size: int) -> int:
        return peak_bytes(size * sequence_length, model.output_size, config.d_model, products, device=device)

    return SavedActivations(
        micro_batch_size=micro_batch_size,
        blocks=tuple(saved for saved, _ in blocks),
        inputs=(tokens * config.d_model * stream.itemsize,) * len(blocks),
        norm=measured(model.norm, run_norm)[0] + 16 * tokens,
        output=tokens * config.d_model * products.itemsize + 4 * model.output_weight.numel(),
        # Without autocast there are no copies; a mixer may keep a few numbers of its own.
        block_weights=tuple(copies if precision == "bfloat16" else 0 for _, copies in blocks),
        loss=loss,
    )


def saved_bytes(function: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """The bytes of what autograd saves while `function` runs: every storage once, those of `parameters` left out."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # kept alive, so that no other takes its address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # noqa: F841 (the graph lives as long as its result)
    weights = {p.untyped_storage()._cdata for p in parameters}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)


def _optimizer_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """Two float32 numbers for each parameter of AdamW, one for each of Muon's."""
    optimizer = build_optimizer(model, config)
    count = sum(p.numel() for p in model.parameters())
    muon = optimizer.muon_parameters() if isinstance(optimizer, MuonWithAdamW) else []
    return 8 * count - 4 * sum(p.numel() for p in muon)


def _gathered_bytes(
    model: LanguageModel, saved: SavedActivations, every: int, precision: Precision,
    *, sharded: bool, reshard: bool, accumulated: bool,
) -> float:  # fmt: skip
    """Weights beside the shards, and gradients before they are reduced.

    Without shards these are autocast's copies. With shards the weights of all blocks, or with `reshard` those of the
    current group of blocks and of the next one, are whole, in the precision of the computation, and what is outside
    the blocks is whole in float32 from the forward pass on; the gradients of one such group are whole before they are
    reduced in float32, and those that are `accumulated` until the last micro batch.
    """
    if not sharded:
        return float(sum(saved.block_weights))
    one_by_one = every or precision != "bfloat16"
    groups = gathered_together(model.blocks, 0 if one_by_one else GROUP_PARAMETERS)
    sizes = [sum(p.numel() for block in group for p in block.parameters()) for group in groups]
    outside = model.num_parameters() - sum(sizes)
    largest = max(sizes)
    # Without autocast there are no copies: the gathered weights are float32.
    itemsize = 2 if precision == "bfloat16" else 4
    gradients = max(4 * outside, (itemsize + 4) * largest)
    if accumulated:
        gradients = 4 * model.num_parameters() + itemsize * largest
    blocks = min(2 * largest, sum(sizes)) if reshard else sum(sizes)
    return float(4 * outside + itemsize * blocks + gradients)


def _tables(plan: Plan) -> Group:
    tokens = plan.micro_batch_size * plan.sequence_length
    title = Text(
        f"{plan.model.mixer_name}, {plan.parameters / 1e6:,.1f}M parameters, {plan.flops_per_token / 1e9:.2f} GFLOP a "
        f"token in training; {plan.micro_batch_size} x {plan.sequence_length} = {tokens:,} tokens a card at once, "
        f"{plan.precision}, {plan.optimizer}"
    )
    table = Table("card", "GPUs", "checkpointing", "weights", "optimizer", "activations", "peak", "sum", "fits")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("largest batch", "s / micro batch", "tokens / s", "tokens / day"):
        table.add_column(name, justify="right")
    for placement in plan.placements:
        memory = placement.memory
        first = placement.world_size == plan.placements[0].world_size
        new_card = first and placement.checkpointing == plan.placements[0].checkpointing
        if new_card and placement is not plan.placements[0]:
            table.add_section()
        table.add_row(
            f"{placement.card.name} {placement.card.memory / GIB:.0f} GiB" if new_card else "",
            str(placement.world_size),
            {0: "no", 1: "yes"}.get(placement.checkpointing, f"1 in {placement.checkpointing}"),
            *(
                f"{size / GIB:.1f}"
                for size in (
                    memory.parameters + memory.gradients + memory.gathered,
                    memory.optimizer,
                    memory.activations,
                    max(memory.loss, memory.backward),
                    memory.total,
                )
            ),
            "yes" if placement.fits else "no",
            str(placement.largest_micro_batch),
            f"{plan.step_seconds(placement):.3f}",
            f"{placement.tokens_per_second:,.0f}",
            f"{placement.tokens_per_day / 1e9:.2f}e9",
            style=None if placement.fits else "dim",
        )
    notes = Text(
        "GiB on each card. weights: float32 shards, their gradients, and the blocks gathered for computing. "
        "peak: what the loss needs, or the backward pass of one block. sum: all of it, "
        f"{FRAGMENTATION - 1:.0%} of fragmentation and {CONTEXT_BYTES / GIB:.1f} GiB for CUDA and NCCL. Speed: at an "
        f"assumed MFU of {plan.mfu:.0%} of the card's dense bf16 peak; checkpointing computes the forward pass twice.",
        style="dim",
    )
    return Group(title, table, notes)
