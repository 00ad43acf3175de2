"""Sampling from a noise predictor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.errors import PlanError
from perturbed.objectives.diffusion import LABELS, NOISY, TIMESTEPS, NoiseSchedule


@dataclass(frozen=True)
class DDIM:
    """Deterministic sampling in few steps (Song et al. 2021, equation 12 with eta = 0).

    Timesteps are spaced evenly and end at the last one (``trailing``: Lin et al. 2024), where the image is pure noise.

    Args:
        steps: evaluations of the predictor.
        clip: cut the guess of x_0 to [-1, 1] at each step, and work out the noise anew from it.
    """

    steps: int = 20
    clip: bool = True

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The timesteps visited, from the last one down.

        Raises:
            PlanError: there are more steps than timesteps.
        """
        if not 1 <= self.steps <= schedule.steps:
            raise PlanError(f"DDIM: steps={self.steps} must be between 1 and the schedule's {schedule.steps}")
        return [round(schedule.steps * n / self.steps) - 1 for n in range(self.steps, 0, -1)]

    @torch.no_grad()
    def __call__(
        self, predict: Callable[[Batch], Tensor], noise: Tensor, labels: Tensor, schedule: NoiseSchedule
    ) -> Tensor:
        """Images [B, C, H, W] in about [-1, 1].

        Args:
            predict: the noise in ``noisy`` at ``timesteps``, for ``labels``.
            noise: what sampling begins with, standard normal [B, C, H, W].
            labels: classes [B].
            schedule: that of the training.
        """
        kept, times = schedule.kept().to(noise.device), self.timesteps(schedule)
        x = noise
        for time, following in zip(times, [*times[1:], -1], strict=True):
            now = kept[time]
            then = kept[following] if following >= 0 else torch.ones_like(now)
            at = torch.full((len(x),), time, dtype=torch.long, device=x.device)
            seen = predict({NOISY: x, TIMESTEPS: at, LABELS: labels})
            clean = (x - (1 - now).sqrt() * seen) / now.sqrt()
            if self.clip:
                clean = clean.clamp(-1, 1)
                seen = (x - now.sqrt() * clean) / (1 - now).sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * seen
        return x
