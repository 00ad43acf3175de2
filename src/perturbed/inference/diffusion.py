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

        Raises:
            PlanError: there are more steps than timesteps.
        """
        from diffusers import DDIMScheduler

        if not 1 <= self.steps <= schedule.steps:
            raise PlanError(f"DDIM: steps={self.steps} must be between 1 and the schedule's {schedule.steps}")
        scheduler = DDIMScheduler(
            num_train_timesteps=schedule.steps, beta_schedule=schedule.kind, timestep_spacing="trailing",
            clip_sample=self.clip,
        )  # fmt: skip
        scheduler.set_timesteps(self.steps)
        x = noise
        for time in scheduler.timesteps:
            at = torch.full((len(x),), int(time), dtype=torch.long, device=x.device)
            seen = predict({NOISY: x, TIMESTEPS: at, LABELS: labels})
            x = scheduler.step(seen, int(time), x, use_clipped_model_output=self.clip).prev_sample
        return x
