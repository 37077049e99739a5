"""Optimizers of pre-training, AdamW and Muon, and the learning rate's way over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from statetrack.weight_decay import by_weight_decay

# Where AdamW has one kernel for all parameters.
_FUSED_ON = ("cuda", "cpu", "mps", "xpu")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer. The learning rate, weight decay and betas are those of arXiv 2411.12537's language models.

    Attributes:
        name: "adamw" (arXiv 1711.05101); or "muon" (https://kellerjordan.github.io/posts/muon), which takes the
            nearest orthogonal matrix of each gradient of a hidden matrix; all other parameters have AdamW beside it.
        learning_rate: peak learning rate.
        beta1: AdamW's decay of the mean of the gradients.
        beta2: AdamW's decay of the mean of their squares.
        eps: AdamW's, added to the root of the mean square.
        weight_decay: of both, on the parameters that `by_weight_decay` says; it is multiplied by the learning rate.
        muon_momentum: Muon's decay of the mean of the gradients; it is Nesterov's momentum.
        muon_learning_rate_scale: Muon's learning rate over `learning_rate`. At 1 its updates have the root mean square
            of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    muon_momentum: float = 0.95
    muon_learning_rate_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"the optimizer must be adamw or muon, got {self.name!r}")
        for name in ("learning_rate", "eps", "muon_learning_rate_scale"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be 0 or positive, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a share of its peak: a linear rise, then one of two shapes.

    Attributes:
        warmup_steps: steps of the rise from 0.
        shape: "cosine" falls along half a cosine from the end of the rise on; "wsd" (warm-up, stable, decay: arXiv
            2404.06395) is constant and falls along a straight line at the end.
        decay_share: the share of all steps in which wsd falls.
        final_fraction: where the fall ends, as a share of the peak.
    """

    warmup_steps: int = 1000
    shape: Literal["cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or positive, got {self.warmup_steps}")
        if self.shape not in ("cosine", "wsd"):
            raise ValueError(f"the shape of the schedule must be cosine or wsd, got {self.shape!r}")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share must lie in (0, 1], got {self.decay_share}")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must lie in [0, 1], got {self.final_fraction}")


def learning_rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps` in all, as a share of the peak.

    The rise reaches 1 with its last step, and the fall would reach `final_fraction` with the step after the last. Of
    two that overlap the lower counts.
    """
    rise = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    fall = steps - schedule.warmup_steps if schedule.shape == "cosine" else schedule.decay_share * steps
    left = min(1.0, max(0.0, steps - step) / fall) if fall > 0 else 1.0
    height = (1 - math.cos(math.pi * left)) / 2 if schedule.shape == "cosine" else left
    return min(rise, schedule.final_fraction + (1 - schedule.final_fraction) * height)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a model, whose parameters may be sharded (FSDP2's DTensors).

    Every group of its parameters has its peak learning rate as `initial_lr`; see `set_learning_rate`. Muon has the
    hidden matrices: those of the mixers and MLPs that weight decay is for; not the output layer, nor convolutions.

    Raises:
        ValueError: if the model has nothing to train.
    """
    decayed, kept = by_weight_decay(model)
    if not decayed and not kept:
        raise ValueError("the model has no parameters that require a gradient: there is nothing to train")
    if config.name == "adamw":
        return _adamw(decayed, kept, config)
    outputs = {id(layer.weight) for layer in _output_layers(model)}
    matrices = [p for p in decayed if p.ndim == 2 and id(p) not in outputs]
    if not matrices:
        return _adamw(decayed, kept, config)
    hidden = {id(p) for p in matrices}
    return MuonWithAdamW(matrices, _adamw([p for p in decayed if id(p) not in hidden], kept, config), config)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of all groups to `factor` times their peaks."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class ShardedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that computes with each process's part of the DTensors that FSDP2 makes of parameters.

    What AdamW does is the same for every number, so the parts are all that it needs. Given DTensors it asks for every
    one of them how it is spread, which on the host takes longer than the step does on the GPU. The states are DTensors
    like the parameters, for checkpoints.
    """

    def _init_group(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, group: dict[str, Any], *lists: list[Tensor]
    ) -> bool:
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = local_parts(tensors)
        return is_complex


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts that this process has of DTensors, without a gradient; other tensors as they are."""
    with torch.no_grad():
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for hidden matrices and AdamW for all else, as one optimizer.

    The groups of both are its groups and the states of both are its state, so that schedules and checkpoints
    (also distributed ones, which name states after parameters) take it for any other optimizer.
    """

    def __init__(self, matrices: list[nn.Parameter], others: torch.optim.AdamW, config: OptimizerConfig) -> None:
        rate = config.learning_rate * config.muon_learning_rate_scale
        self._muon = torch.optim.Muon(
            matrices,
            lr=rate,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        for group in self._muon.param_groups:
            group["initial_lr"] = rate
        self._adamw = others
        super().__init__([*self._muon.param_groups, *others.param_groups], {})
        self._share()

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices that are Muon's."""
        return [p for group in self._muon.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Lets the two work on the groups and the state of this optimizer."""
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state


def _output_layers(model: nn.Module) -> Iterable[nn.Linear]:
    """The output layer of every language model inside `model`, which has none where embeddings are tied."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "head" and isinstance(module, nn.Linear):
            yield module


def _adamw(decayed: list[nn.Parameter], kept: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": parameters, "weight_decay": decay, "initial_lr": config.learning_rate}
        for parameters, decay in ((decayed, config.weight_decay), (kept, 0.0))
        if parameters
    ]
    return ShardedAdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.device.type in _FUSED_ON for p in (*decayed, *kept)),
    )
