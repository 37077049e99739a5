"""What a pre-training run needs, before it runs: memory and time on cards from 24 to 141 GiB, on 1 to 8 of them.

Nothing of the model is allocated. Its blocks are run with tensors that have shapes and no numbers, at the batch and the
length that are planned; what autograd saves for the backward pass is what it would save on a GPU, since the graph is
the same and "auto" chooses the same backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

from statetrack.mixers import MixerConfig
from statetrack.mixers.attention import AttentionConfig
from statetrack.model import Block, LanguageModel, ModelConfig
from statetrack.pretraining.flops import card_peak_flops, training_flops_per_token
from statetrack.pretraining.optimizers import MuonWithAdamW, OptimizerConfig, build_optimizer

GIB = 2**30
ASSUMED_MFU = 0.35
"""The share of a card's peak that a step is assumed to reach, at any size; small models stay below it."""
CONTEXT_BYTES = 1.5 * GIB
"""What CUDA, its libraries and NCCL take of a card before the first tensor."""
FRAGMENTATION = 1.05
"""What the allocator of PyTorch holds, over what tensors have."""

Precision = Literal["bf16", "float32"]
_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


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
    """Bytes on each GPU at the peak of a step, which is where the backward pass begins or in its largest block.

    Attributes:
        parameters: the float32 weights that the optimizer moves, this GPU's shard.
        gradients: theirs, float32.
        optimizer: its states, float32.
        gathered: whole weights of the blocks that are being computed, and their gradients before they are reduced;
            with one GPU, the weights in the precision of the computation.
        activations: what the blocks save for the backward pass.
        logits: what the output layer and the loss save.
        backward: gradients of activations on their way: of the logits, or of one block.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    backward: float

    @property
    def total(self) -> float:
        """What a card must have: all of these with `FRAGMENTATION`, and `CONTEXT_BYTES`."""
        return self.fixed + self.batch

    @property
    def fixed(self) -> float:
        """What does not depend on the batch, with the context."""
        parts = self.parameters + self.gradients + self.optimizer + self.gathered
        return CONTEXT_BYTES + FRAGMENTATION * parts

    @property
    def batch(self) -> float:
        """What is proportional to the sequences of a micro batch."""
        return FRAGMENTATION * (self.activations + self.logits + self.backward)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The run on some cards.

    Attributes:
        card: the cards.
        world_size: how many.
        checkpointing: whether the blocks' activations are computed again in the backward pass.
        memory: of each card.
        largest_micro_batch: the most sequences that fit a card at once; 0 if none does.
        tokens_per_second: of all cards together, at the assumed MFU.
    """

    card: Card
    world_size: int
    checkpointing: bool
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
    precision: Precision = "bf16",
    checkpointing: bool | None = None,
    world_sizes: Sequence[int] = WORLD_SIZES,
    cards: Sequence[Card] = CARDS,
    mfu: float = ASSUMED_MFU,
) -> Plan:
    """What a run needs on each of some cards, and how long it would take.

    Weights, gradients and optimizer states are float32 and sharded evenly over all cards (FSDP2); a block is gathered
    in `precision` while it is computed, and the next one beside it.

    Args:
        model: the model.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences that a card computes at once, before gradients are accumulated.
        optimizer: AdamW unless told otherwise.
        precision: of activations and gathered weights.
        checkpointing: whether every block's activations are computed again in the backward pass; None plans both.
        world_sizes: numbers of cards.
        cards: kinds of cards.
        mfu: the share of a card's peak that a step reaches. Checkpointing costs another forward pass on top.

    Raises:
        ValueError: for sizes below 1, an MFU outside (0, 1] or an unknown precision.
    """
    for name, value in (("sequence_length", sequence_length), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if any(size < 1 for size in world_sizes):
        raise ValueError(f"world_sizes must be at least 1, got {list(world_sizes)}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1], got {mfu}")
    if precision not in _DTYPES:
        raise ValueError(f"precision must be bf16 or float32, got {precision!r}")
    optimizer = optimizer or OptimizerConfig()
    dtype = _DTYPES[precision]
    with torch.device("meta"):
        whole = LanguageModel(model)
        states = _optimizer_bytes(whole, optimizer)
        counts = [sum(p.numel() for p in block.parameters()) for block in whole.blocks]
        parameters = whole.num_parameters()
    saved = saved_activations(model, sequence_length=sequence_length, micro_batch_size=micro_batch_size, dtype=dtype)
    flops = training_flops_per_token(model, sequence_length)
    placements = []
    for card in cards:
        for world_size in world_sizes:
            gathered = _gathered_bytes(parameters, counts, dtype, world_size)
            for again in (False, True) if checkpointing is None else (checkpointing,):
                memory = Memory(
                    parameters=4 * parameters / world_size,
                    gradients=4 * parameters / world_size,
                    optimizer=states / world_size,
                    gathered=gathered,
                    activations=saved.inputs if again else saved.activations,
                    logits=saved.logits,
                    backward=max(saved.logits_gradient, saved.largest_block * (2 if again else 1)),
                )
                per_sequence = memory.batch / micro_batch_size
                rate = card.peak_flops * mfu / flops * world_size
                placements.append(
                    Placement(
                        card=card,
                        world_size=world_size,
                        checkpointing=again,
                        memory=memory,
                        largest_micro_batch=max(0, int((card.memory - memory.fixed) / per_sequence)),
                        tokens_per_second=rate * (3 / 4 if again else 1),
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


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes that autograd saves in a forward pass, parameters not counted.

    Attributes:
        blocks: of each block, with its input.
        inputs: of the blocks' inputs alone, all together: what is left with checkpointing.
        logits: of the final norm, the output layer and the cross-entropy.
        logits_gradient: of the logits' gradient, in float32 and in the dtype of the activations.
    """

    blocks: tuple[int, ...]
    inputs: int
    logits: int
    logits_gradient: int

    @property
    def activations(self) -> int:
        return sum(self.blocks)

    @property
    def largest_block(self) -> int:
        return max(self.blocks)


def saved_activations(
    config: ModelConfig,
    *,
    sequence_length: int,
    micro_batch_size: int,
    dtype: torch.dtype = torch.bfloat16,
    device: Literal["cuda", "cpu"] = "cuda",
) -> SavedActivations:
    """What a training step of a model saves, by running each kind of block once without any numbers.

    Args:
        config: the model.
        sequence_length: T.
        micro_batch_size: B.
        dtype: of weights and activations.
        device: where the step would run; backends of the recurrence differ in what they save.
    """
    stream = torch.float32 if config.residual_in_float32 else dtype
    shape = (micro_batch_size, sequence_length, config.d_model)
    by_kind: dict[object, int] = {}
    blocks = []
    for index, mixer in enumerate(config.layer_mixers()):
        kind = (mixer, config.layer_norm_placements()[index])
        if kind not in by_kind:
            with torch.device("meta"):
                block = Block(config, index).to(dtype)
            with _without_numbers(mixer, device):
                weights = {
                    name: torch.empty(p.shape, dtype=dtype, requires_grad=True) for name, p in block.named_parameters()
                }
                inputs = (torch.empty(shape, dtype=stream, requires_grad=True), None, None)
                by_kind[kind] = saved_bytes(partial(functional_call, block, weights, inputs), weights.values())
        blocks.append(by_kind[kind])
    with torch.device("meta"):
        ends = LanguageModel(replace(config, num_layers=1, mixer=config.mixer_pattern[0], norm_placement="before")).to(
            dtype
        )
        x = torch.empty(shape, dtype=stream, requires_grad=True)
        targets = torch.empty(micro_batch_size, sequence_length, dtype=torch.long)
        logits = saved_bytes(lambda: language_model_loss(ends.logits(x), targets), ends.parameters())
    size = micro_batch_size * sequence_length * ends.output_size
    return SavedActivations(
        blocks=tuple(blocks),
        inputs=len(blocks) * x.nbytes,
        logits=logits + targets.nbytes,  # the embedding keeps its ids, as the loss keeps its targets
        logits_gradient=size * 4 + (0 if dtype == torch.float32 else size * dtype.itemsize),
    )


def _without_numbers(mixer: MixerConfig, device: Literal["cuda", "cpu"]) -> AbstractContextManager[object]:
    """Where new tensors have shapes and no numbers, and operations choose what they would choose on the device.

    On the device meta the recurrences' "auto" chooses as on a GPU. PyTorch's attention doesn't: it would save a matrix
    [T, T] there. Its fused kernel for CPUs saves what that for GPUs saves.
    """
    fake_cpu = device == "cpu" or isinstance(mixer, AttentionConfig)
    return FakeTensorMode() if fake_cpu else torch.device("meta")


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in float32 of logits [B, T, V] and the tokens that follow, [B, T]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


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


def _gathered_bytes(parameters: int, blocks: Sequence[int], dtype: torch.dtype, world_size: int) -> float:
    """Two blocks' whole weights, the current one's and the next one's, and one block's gradients before reduction.

    What is outside the blocks, embeddings and output layer, is a group of its own that stays gathered. With one card in
    float32 nothing is gathered: the weights themselves are used.
    """
    if world_size == 1 and dtype == torch.float32:
        return 0.0
    outside, largest = parameters - sum(blocks), max(blocks)
    weights = (outside + 2 * largest) * dtype.itemsize
    gradients = max(outside, largest) * (dtype.itemsize + 4)  # they are reduced in float32
    return float(weights + gradients)


def _tables(plan: Plan) -> Group:
    tokens = plan.micro_batch_size * plan.sequence_length
    title = Text(
        f"{plan.model.mixer_name}, {plan.parameters / 1e6:,.1f}M parameters, {plan.flops_per_token / 1e9:.2f} GFLOP a "
        f"token in training; {plan.micro_batch_size} x {plan.sequence_length} = {tokens:,} tokens a card at once, "
        f"{plan.precision}, {plan.optimizer}"
    )
    table = Table("card", "GPUs", "checkpointing", "weights", "optimizer", "activations", "logits", "peak", "fits")
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
            "yes" if placement.checkpointing else "no",
            *(
                f"{size / GIB:.1f}"
                for size in (
                    memory.parameters + memory.gradients + memory.gathered,
                    memory.optimizer,
                    memory.activations,
                    memory.logits + memory.backward,
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
        "GiB on each card. weights: float32 shards, their gradients, and the blocks gathered for computing. logits: "
        "with the gradients of activations. peak: all of it, "
        f"{FRAGMENTATION - 1:.0%} of fragmentation and {CONTEXT_BYTES / GIB:.1f} GiB for CUDA and NCCL. Speed: at an "
        f"assumed MFU of {plan.mfu:.0%} of the card's dense bf16 peak; checkpointing computes the forward pass twice.",
        style="dim",
    )
    return Group(title, table, notes)
