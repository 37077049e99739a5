"""Steps that would do harm, and are left out: numbers that are not finite, and losses or gradients far out of line.

Everything is decided on the device, by numbers that all processes have alike. So they all leave out the same steps, and
a GPU need not be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statetrack.pretraining.config import PretrainingConfig


class StepGuard:
    """Decides step by step whether the optimizer may use the gradient.

    A step is left out if its loss or the norm of its gradient is not finite, or lies more than `spike_deviations`
    standard deviations above the mean of the last `spike_window` steps, once there are half as many.

    Attributes:
        state: what it remembers, for checkpoints: `history` [window, 2] of losses and norms, `seen` (how many finite
            ones), `skipped` steps so far, those `in_a_row` now and at `worst`.
    """

    def __init__(self, config: PretrainingConfig, device: torch.device | str) -> None:
        self.deviations, self.window = config.spike_deviations, config.spike_window
        self.state = {
            "history": torch.full((self.window, 2), torch.nan, device=device),
            **{name: torch.zeros(1, device=device) for name in ("seen", "skipped", "in_a_row", "worst")},
        }

    def accepts(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Whether a step is good, a bool tensor; it is remembered.

        Args:
            loss: of the whole batch, a number on the device.
            gradient_norm: of the whole batch, before clipping.
        """
        state, history = self.state, self.state["history"]
        now = torch.stack([loss.detach().float(), gradient_norm.detach().float()])
        good = finite = now.isfinite().all()
        if self.deviations:
            mean = history.nanmean(0)
            deviation = (history - mean).square().nanmean(0).sqrt()
            spike = (now > mean + self.deviations * deviation).any() & (state["seen"][0] >= self.window // 2)
            good = finite & ~spike
        # Spikes are remembered like the rest: where they are the new level, they soon are in line.
        place = torch.arange(self.window, device=history.device) == state["seen"] % self.window
        state["history"] = torch.where(place.unsqueeze(1) & finite, now, history)
        state["seen"] = state["seen"] + finite
        state["skipped"] = state["skipped"] + ~good
        state["in_a_row"] = torch.where(good, 0.0, state["in_a_row"] + 1)
        state["worst"] = torch.maximum(state["worst"], state["in_a_row"])
        return good


def guarded_step(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Does the optimizer's step where `good`, a bool tensor, is true."""
    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        # What gradient scalers use: the kernel itself looks at the number and leaves everything as it is.
        optimizer.found_inf = (~good).float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif bool(good):
        optimizer.step()
