"""Measures of policies: how well they act in their environment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perturbed.core.run import Run
from perturbed.data.demonstrations import play


@dataclass(frozen=True)
class PendulumReturn:
    """Measure: the undiscounted return in Pendulum-v1, mean over whole episodes.

    The start states are drawn once a training seed, so every arm of a seed begins from the same ones.

    Args:
        episodes: start states.
    """

    episodes: int = 20

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """``return``, in about [-1,800, 0]: higher is better."""

        def policy(observations: Tensor) -> Tensor:
            return run.predict({"observations": observations})

        draws = torch.randint(2**31, (self.episodes,), generator=run.ctx.rng("start states", every="run"))
        rewards = play(policy, draws.tolist())["rewards"]
        return {"return": rewards.sum(0).mean().item()}
