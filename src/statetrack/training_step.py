"""One optimizer step of a run, or of several that differ in seed and learning rate alone: data, loss, gradients, AdamW.

Several runs are one model whose parameters have one more axis, `torch.func.vmap` over it, so that a small model's step,
which is bound by the number of its operations, costs less for all of them than one after the other. Each has its own
gradient clip and learning rate, so that it is trained as it would be alone, to float rounding.

On a GPU a step is replayed from CUDA graphs, and the host waits for nothing but a device that is some steps behind: see
`statetrack.graphs`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from statetrack import seeds
from statetrack.config import RunConfig, TrainingConfig
from statetrack.graphs import Graphs, Lead, Side
from statetrack.model import LanguageModel
from statetrack.ops.vmapped import LinearLayersTogether
from statetrack.precision import autocast, products
from statetrack.tasks import IGNORE, Batch, Task, get_task
from statetrack.transition import accumulated
from statetrack.weight_decay import by_weight_decay

LENGTHS = 4
"""On a GPU batches are padded to multiples of so many tokens, so that few graphs serve all lengths."""

MOST_ONE_HOT = 1024
"""Embeddings of up to so many tokens are looked up by a matrix product where steps are captured: the gradient of
`torch.nn.Embedding` makes the host wait for the device (pytorch issue 82886). With TF32 that product rounds them."""


class TrainingStep:
    """The optimizer steps of R runs at once.

    A batch depends on its run's seed and the step alone. Batches of different lengths are padded with tokens that have
    no label, behind the last of their own, which changes no loss: models are causal.

    Args:
        configs: of the runs; alike but for seed and learning rate.
        models: one for each, on the device. Their parameters become views of stacked ones where there are several.
        optimizers: one for each, from `make_optimizer`; those of several runs have a state in common afterwards.
        fixed: keep batches and learning rates in the same memory at every step, as graphs need it. The numbers are the
            same, but for the padding and, with TF32, for embeddings (`MOST_ONE_HOT`).
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        models: Sequence[LanguageModel],
        optimizers: Sequence[torch.optim.AdamW],
        *,
        fixed: bool,
    ) -> None:
        task = get_task(configs[0].task)
        self._task = task.with_parts() if configs[0].training.part_labels else task
        self._options = [config.training for config in configs]
        self._fitting = fitting_lengths(self._task, self._options[0])
        self._optimizers = optimizers_together(optimizers, self._options)
        self._replicas = Replicas(models, fixed=fixed, precision=self._options[0].precision)
        self._lengths: dict[int, list[int]] = {}
        self._fixed = (
            _Fixed(self._options, self._task, max(self._fitting), self._replicas, self._optimizers) if fixed else None
        )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Takes step number `step` (from 0); returns each run's loss and share of right labels, [R] each.

        With fixed memory they are overwritten by the next step.
        """
        lengths = self.lengths(step)
        rates = [learning_rate_at(step, options) for _, options in self._optimizers]
        if self._fixed is not None:
            return self._fixed.step(step, lengths, rates, self.lengths(step + 1))
        for (optimizer, _), rate in zip(self._optimizers, rates, strict=True):
            set_learning_rate(optimizer, rate)
        batches = [
            draw_batch(self._task, options, length, data_generator(options, step, self._replicas.device))
            for options, length in zip(self._options, lengths, strict=True)
        ]
        ids = torch.stack([pad(batch.ids, max(lengths), 0) for batch in batches])
        labels = torch.stack([pad(batch.labels, max(lengths), IGNORE) for batch in batches])
        return update(self._replicas, [optimizer for optimizer, _ in self._optimizers], self._options[0], ids, labels)

    def lengths(self, step: int) -> list[int]:
        """The length of each run's batch in a step."""
        if step not in self._lengths:
            drawn = [draw_length(options, self._fitting, step) for options in self._options]
            before = {known: lengths for known, lengths in self._lengths.items() if known == step - 1}
            self._lengths = before | {step: drawn}
        return self._lengths[step]

    def context(self) -> AbstractContextManager[Any]:
        """What steps, and everything that reads models or optimizers between them, must happen in."""
        return contextlib.nullcontext() if self._fixed is None else self._fixed.context()

    def turn(self) -> AbstractContextManager[Any]:
        """As `context`, for one step among those of others: nothing outside waits for what is inside, or is waited for.

        So the steps of several models are computed side by side. Who reads a model afterwards enters `context`.
        """
        return contextlib.nullcontext() if self._fixed is None else self._fixed.turn()


class Replicas:
    """R models of one config as one.

    Args:
        models: of the same config, on the same device. If there are several, their parameters become views of stacked
            ones: what is done to one is done to the other.
        fixed: do nothing that no CUDA graph can hold.
        precision: of the products in the models, as `TrainingConfig` has it.
    """

    def __init__(self, models: Sequence[LanguageModel], *, fixed: bool = False, precision: str = "float32") -> None:
        self.models, self._fixed, self._precision = models, fixed, precision
        self.device = models[0].embedding.weight.device
        self._stacked: dict[str, Tensor] = {}
        self._identity = self._linear = None
        weight = models[0].embedding.weight
        if fixed and len(weight) <= MOST_ONE_HOT:
            self._identity = torch.eye(len(weight), dtype=weight.dtype, device=self.device)
        if len(models) == 1:
            if precision == "bfloat16":
                self._linear = {
                    f"{name}.weight": module.weight
                    for name, module in models[0].named_modules()
                    if isinstance(module, nn.Linear) and module.weight.dtype == torch.float32
                }
            return
        for name, _ in models[0].named_parameters():
            members = [model.get_parameter(name) for model in models]
            stacked = torch.stack([member.detach() for member in members]).requires_grad_()
            for index, member in enumerate(members):
                member.data = stacked.detach()[index]
            self._stacked[name] = stacked

    def losses(self, ids: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        """Each model's loss and share of right labels, [R] each, on batches of its own, [R, B, T]."""
        if len(self.models) == 1:
            loss, correct = loss_and_accuracy(self._alone, ids[0], labels[0], z_loss)
            return loss.unsqueeze(0), correct.unsqueeze(0)

        def one(parameters: dict[str, Tensor], ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            # Embeddings in place of ids, as the model can't look at the ids of replicas.
            def model(ids: Tensor) -> Tensor:
                x = self._embed(ids, parameters["embedding.weight"])
                with autocast(self._precision, self.device):
                    return functional_call(self.models[0], parameters, (x,))  # type: ignore[no-any-return]

            return loss_and_accuracy(model, ids, labels, z_loss)

        with LinearLayersTogether():
            return vmap(one)(self._stacked, ids, labels)  # type: ignore[no-any-return]

    def _alone(self, ids: Tensor) -> Tensor:
        model = self.models[0]
        # The sum over the blocks starts with the embeddings, and has their dtype.
        x = self._embed(ids, model.embedding.weight) if self._fixed else ids
        with autocast(self._precision, self.device):
            if not self._linear:
                return model(x)  # type: ignore[no-any-return]
            return functional_call(model, rounded_together(self._linear), (x,))  # type: ignore[no-any-return]

    def _embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        if not self._fixed:
            return F.embedding(ids, weight)
        if self._identity is None:
            return weight[ids]
        return F.embedding(ids, self._identity) @ weight

    def backward(self, losses: Tensor, gradient_clip: float) -> None:
        """Puts the gradients of each model's loss [R] in the place of those before, no longer than `gradient_clip`.

        Nothing is added to zeros: that would be one more operation for every parameter.
        """
        leaves = self._stacked or dict(self.models[0].named_parameters())
        for leaf in leaves.values():
            leaf.grad = None
        losses.backward(torch.ones_like(losses))
        if self._stacked:
            self._hand_out(leaves, gradient_clip)
        elif gradient_clip:
            nn.utils.clip_grad_norm_(leaves.values(), gradient_clip)

    def _hand_out(self, leaves: Mapping[str, Tensor], gradient_clip: float) -> None:
        """Clips each model's part of stacked gradients, all at once, and gives it to the model."""
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        gradients = torch.cat([gradient.flatten(1) for gradient in found.values()], 1)
        if gradient_clip:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients *= (gradient_clip / (norms + 1e-6)).clamp(max=1.0)  # as nn.utils.clip_grad_norm_
        pieces = gradients.split([gradient[0].numel() for gradient in found.values()], 1)
        for (name, leaf), piece in zip(found.items(), pieces, strict=True):
            leaves[name].grad = None
            for model, gradient in zip(self.models, piece, strict=True):
                model.get_parameter(name).grad = gradient.view(leaf.shape[1:])


def update(
    replicas: Replicas,
    optimizers: Sequence[torch.optim.Optimizer],
    options: TrainingConfig,
    ids: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Forward, backward, clipping and AdamW on a batch [R, B, T]; the losses and shares of right labels, [R] each."""
    with products(options.precision):
        losses, correct = replicas.losses(ids, labels, options.z_loss)
        replicas.backward(losses, options.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()
    return losses.detach(), correct


class _Fixed:
    """Steps in memory that stays where it is, from graphs on a GPU.

    The batches of the next step are drawn on streams of their own while the model learns from those of this one.
    """

    def __init__(
        self,
        options: Sequence[TrainingConfig],
        task: Task,
        longest: int,
        replicas: Replicas,
        optimizers: Sequence[tuple[torch.optim.Optimizer, TrainingConfig]],
    ) -> None:
        self._options, self._longest = options, longest
        self._replicas, self._optimizers = replicas, [optimizer for optimizer, _ in optimizers]
        shape = (2, len(options), options[0].batch_size, self._longest)
        self._batch = torch.zeros(shape, dtype=torch.int64, device=replicas.device)
        self._results = torch.zeros(2, len(options), device=replicas.device)
        self._samplers = [_Sampler(own, task, self._longest, replicas.device) for own in options]
        self._drawn: int | None = None
        for optimizer in self._optimizers:
            fix_learning_rate(optimizer, replicas.device)
        self._side = Side(replicas.device)
        self._graphs = Graphs(replicas.device, self._side)
        self._lead = Lead(replicas.device)

    def turn(self) -> AbstractContextManager[Any]:
        return self._side.context()

    @contextmanager
    def context(self) -> Iterator[None]:
        """The stream of the steps; whatever comes after it also waits for batches that were drawn in vain."""
        with self._graphs.context():
            yield
            for sampler in self._samplers:
                sampler.end()

    def step(
        self, step: int, lengths: Sequence[int], rates: Sequence[float], lengths_after: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Step number `step` with batches of these lengths and the learning rate of each optimizer.

        The batches of the step after it will have other lengths.
        """
        if self._drawn != step:
            self._draw(step, lengths)
        for index, sampler in enumerate(self._samplers):
            sampler.hand_over(self._batch[:, index])
        self._draw(step + 1, lengths_after)
        for optimizer, rate in zip(self._optimizers, rates, strict=True):
            set_learning_rate(optimizer, rate)
        length = padded_length(max(lengths), self._longest)
        self._graphs.run(length, lambda: self._update(length))
        self._lead.step()
        return self._results[0], self._results[1]

    def _draw(self, step: int, lengths: Sequence[int]) -> None:
        for sampler, length in zip(self._samplers, lengths, strict=True):
            sampler.draw(step, length)
        self._drawn = step

    def _update(self, length: int) -> None:
        # PyTorch wants to be told, and warns where a step that could be captured is not.
        capturing = self._batch.is_cuda and torch.cuda.is_current_stream_capturing()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["capturable"] = capturing
        ids, labels = self._batch[..., :length]
        losses, correct = update(self._replicas, self._optimizers, self._options[0], ids, labels)
        self._results[0].copy_(losses)
        self._results[1].copy_(correct)


class _Sampler:
    """Draws the batches of one run into memory that stays where it is."""

    def __init__(self, options: TrainingConfig, task: Task, longest: int, device: torch.device) -> None:
        self._options, self._task = options, task
        self._generator = torch.Generator(device)
        self._drawn = torch.zeros(2, options.batch_size, longest, dtype=torch.int64, device=device)
        self._side = Side(device)
        self._graphs = Graphs(device, self._side)

    def draw(self, step: int, length: int) -> None:
        def sample() -> None:
            batch = draw_batch(self._task, self._options, length, self._generator)
            ids, labels = self._drawn
            ids[:, :length].copy_(batch.ids)
            ids[:, length:].zero_()
            labels[:, :length].copy_(batch.labels)
            labels[:, length:].fill_(IGNORE)

        seed = data_seed(self._options, step)
        with self._side.context():
            self._graphs.run(length, sample, before=lambda: self._generator.manual_seed(seed), random=self._generator)
        self._side.finished()

    def hand_over(self, target: Tensor) -> None:
        """Copies the batch that was drawn to `target`, once it is there."""
        with self._side.handing_over():
            target.copy_(self._drawn)

    def end(self) -> None:
        """The current stream waits until nothing is written to the memory of this sampler."""
        with self._side.handing_over():
            pass


def learning_rate_at(step: int, options: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (from 0): a linear rise, a constant part, a fall to 0.

    In a curriculum it may fall with the length as well.
    """
    warmup, decay = options.warmup * options.steps, options.decay * options.steps
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = min(1.0, (options.steps - step) / decay) if decay else 1.0
    fall = left if options.decay_shape == "linear" else (1 - math.cos(math.pi * left)) / 2
    of_length = (options.min_length / longest_length(step, options)) ** options.curriculum_learning_rate_power
    return options.learning_rate * rise * fall * of_length


def longest_length(step: int, options: TrainingConfig) -> int:
    """The longest length that a batch of a step may have, whatever the task."""
    shortest, longest = options.min_length, options.max_length
    if not options.curriculum:
        return longest
    share = min(1.0, step / (options.curriculum * options.steps))
    if options.curriculum_shape == "linear":
        return int(shortest + share * (longest - shortest))
    stages = 1 + (-(-longest // shortest) - 1).bit_length()  # the smallest n with shortest 2^(n - 1) >= longest
    return min(longest, shortest << min(stages - 1, int(stages * share)))


def fitting_lengths(task: Task, options: TrainingConfig) -> list[int]:
    """The lengths that training draws from, each as often as the others: those within its bounds that the task has.

    Raises:
        ValueError: if there are none.
    """
    fitting = [length for length in range(options.min_length, options.max_length + 1) if task.fits(length)]
    if not fitting:
        raise ValueError(
            f"the task {task.name} has no sequences of {options.min_length} to {options.max_length} tokens; "
            "choose another min_length and max_length"
        )
    return fitting


def padded_length(length: int, longest: int) -> int:
    """The length that a batch is padded to where graphs replay the steps."""
    return min(longest, -(-length // LENGTHS) * LENGTHS)


def draw_length(options: TrainingConfig, fitting: Sequence[int], step: int) -> int:
    """The length of the batch of a step; in a curriculum long ones come later."""
    longest = max(longest_length(step, options), fitting[0])
    fitting = [length for length in fitting if length <= longest]
    if options.curriculum_shape == "doubling":
        return fitting[-1]
    generator = seeds.generator("training length", options.seed, step)
    return fitting[int(torch.randint(len(fitting), (), generator=generator))]


def data_seed(options: TrainingConfig, step: int) -> int:
    """The seed of the batch of a step."""
    return seeds.number("training data", options.seed, step)


def data_generator(options: TrainingConfig, step: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(data_seed(options, step))


def draw_batch(task: Task, options: TrainingConfig, length: int, generator: torch.Generator) -> Batch:
    """The batch of a step, on the generator's device."""
    batch = task.sample(options.batch_size, length, generator)
    if options.last_label_only:
        batch.labels[:, :-1] = IGNORE
    return batch


def rounded_together(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in bfloat16, as autocast would round them one by one: in two operations for all, forward and backward."""
    return dict(zip(weights, _Rounded.apply(*weights.values()), strict=True))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return _converted(weights, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return _converted(grad_outputs, torch.float32)


def _converted(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    converted = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
    torch._foreach_copy_(converted, tensors)  # type: ignore[reportPrivateImportUsage]
    return converted


def pad(x: Tensor, length: int, value: int) -> Tensor:
    """Tokens or labels [B, T] with padding up to a length."""
    return x if x.shape[1] == length else F.pad(x, (0, length - x.shape[1]), value=value)


def loss_and_accuracy(
    model: Callable[[Tensor], Tensor], ids: Tensor, labels: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The mean loss of the labels, and the share of them that is right."""
    logits, answers = accumulated(model(ids).flatten(0, 1)), labels.flatten()
    asked = answers != IGNORE
    loss = F.cross_entropy(logits, answers, ignore_index=IGNORE)
    if z_loss:
        loss = loss + z_loss * (torch.logsumexp(logits, -1).square() * asked).sum() / asked.sum()
    correct = (logits.detach().argmax(-1) == answers).sum() / asked.sum()
    return loss, correct


def make_optimizer(model: LanguageModel, options: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices but for embeddings and what decides on eigenvalues."""
    decayed, kept = by_weight_decay(model)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)


def optimizers_together(
    optimizers: Sequence[torch.optim.AdamW], options: Sequence[TrainingConfig]
) -> list[tuple[torch.optim.AdamW, TrainingConfig]]:
    """One optimizer for all runs of a learning rate, as a fused step takes few operations for many parameters.

    The optimizers given share its state from now on, so that they can be saved; they are not to take steps.
    """
    alike: dict[float, list[int]] = {}
    for index, own in enumerate(options):
        alike.setdefault(own.learning_rate, []).append(index)
    together = []
    for members in alike.values():
        chosen = [optimizers[index] for index in members]
        whole = chosen[0]
        if len(chosen) > 1:
            groups = zip(*(optimizer.param_groups for optimizer in chosen), strict=True)
            whole = torch.optim.AdamW(
                [{**same[0], "params": [p for group in same for p in group["params"]]} for same in groups], fused=True
            )
            for optimizer in chosen:
                whole.state.update(optimizer.state)
                optimizer.state = whole.state
        together.append((whole, options[members[0]]))
    return together


def fix_learning_rate(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keeps the learning rate of an optimizer in a tensor, which `set_learning_rate` then fills."""
    rate = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
            return
        group["lr"] = rate
