"""An optimiser with its schedule, as a stage holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Schedule = Callable[[int, int], float]


def constant(step: int, steps: int) -> float:
    """The schedule that never changes the rate."""
    return 1.0


def plain(accelerator: Any) -> bool:
    """Whether torch's own ``backward`` and ``step`` do: accelerate's wrappers then only cost 100 µs a step."""
    return accelerator.scaler is None and accelerator.distributed_type in ("NO", "MULTI_CPU", "MULTI_GPU")


class Optim:
    """A torch optimiser whose learning rates follow a stateless schedule.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        schedule: factor on each group's initial rate at (step, steps); a pure function, so nothing needs saving.
        clip: largest global gradient norm, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule = constant, clip: float | None = None):
        self.optimizer, self.schedule, self.clip = optimizer, schedule, clip
        self._clip: Callable[[list[torch.nn.Parameter], float], Any] = torch.nn.utils.clip_grad_norm_
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Every parameter of every group."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def prepare(self, accelerator: Any) -> None:
        """Hand the optimiser to accelerate where it has something to do (loss scaling, sharding)."""
        if plain(accelerator):
            return
        self.optimizer = accelerator.prepare_optimizer(self.optimizer)
        self._clip = accelerator.clip_grad_norm_

    def at(self, step: int, steps: int) -> None:
        """Set the learning rates of this step."""
        factor = self.schedule(step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self) -> None:
        """Clip the gradients, if so set, and take one update."""
        if self.clip is not None:
            self._clip(self.parameters, self.clip)
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's moments and groups."""
        return dict(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take moments and groups from ``state_dict``."""
        self.optimizer.load_state_dict(state)
