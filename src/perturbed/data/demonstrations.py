"""Demonstrations of a hand-written controller in Gymnasium's Pendulum-v1, and playing any policy there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbed.core.keys import tensors_hash
from perturbed.errors import PerturbedError

MAX_TORQUE = 2.0
UPRIGHT_ENERGY = 5.0
Policy = Callable[[Tensor], Tensor]


def environment() -> Any:
    """A new Pendulum-v1: episodes of 200 steps, observations (cos, sin, angular velocity), a torque in [-2, 2].

    Raises:
        PerturbedError: Gymnasium is not installed.
    """
    try:
        import gymnasium
    except ImportError as e:
        raise PerturbedError("the pendulum needs Gymnasium: pip install 'perturbed[tasks]'") from e
    return gymnasium.make("Pendulum-v1", disable_env_checker=True)  # which would cost as much as the physics


def play(policy: Policy, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Whole episodes of a policy, one from each start state, in lockstep.

    The environment draws its start states (any angle, up to 1 rad/s) from generators of its own: no global one moves.

    Args:
        policy: torques [N, 1] for observations [N, 3]; what is beyond [-2, 2] the environment clips.
        seeds: of the start states, N of them.

    Returns:
        ``observations`` [T, N, 3] as the policy saw them, ``actions`` [T, N, 1] as it chose them, and ``rewards``
        [T, N], float64, each in about [-16.3, 0].
    """
    envs = [environment() for _ in seeds]
    seen = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    log: dict[str, list[Tensor]] = {"observations": [], "actions": [], "rewards": []}
    over = False
    while not over:
        observations = torch.from_numpy(seen)
        actions = policy(observations).detach().cpu()
        steps = [env.step(action) for env, action in zip(envs, actions.numpy(), strict=True)]
        seen, over = np.stack([step[0] for step in steps]), steps[0][3]  # the time limit ends all at once
        rewards = torch.tensor([float(step[1]) for step in steps], dtype=torch.float64)
        for name, value in (("observations", observations), ("actions", actions), ("rewards", rewards)):
            log[name].append(value)
    for env in envs:
        env.close()
    return {name: torch.stack(values) for name, values in log.items()}


def swing_up(observations: Tensor) -> Tensor:
    """The controller: energy shaping, then a proportional-derivative law near the top.

    With angle t from upright, velocity w and energy E = w^2/6 + 5 cos t (a rod of mass 1, length 1, g = 10; upright at
    rest it is 5), the torque is::

        2 (5 - E) sign(w)       while cos t <= 0.8   (Astrom and Furuta 2000: it pumps energy, as dE/dt = u w)
        -(10 t + 2 w)           above

    clipped to [-2, 2], and sign(0) = 1 so that it also leaves the bottom.

    Args:
        observations: cos t, sin t, w [..., 3].

    Returns:
        Torques [..., 1].
    """
    cos, sin, speed = observations.unbind(-1)
    energy = speed.square() / 6 + UPRIGHT_ENERGY * cos
    pump = 2 * (UPRIGHT_ENERGY - energy) * torch.where(speed >= 0, 1.0, -1.0)
    hold = -(10 * torch.atan2(sin, cos) + 2 * speed)
    return torch.where(cos > 0.8, hold, pump).clamp(-MAX_TORQUE, MAX_TORQUE).unsqueeze(-1)


@functools.cache
def demonstrate(episodes: int) -> dict[str, Tensor]:
    """Episodes of ``swing_up`` from the start states of seeds 0, 1, …, flattened: one row a step.

    Returns:
        ``observations`` [200 * episodes, 3] and ``actions`` [200 * episodes, 1].
    """
    played = play(swing_up, range(episodes))
    return {name: played[name].flatten(0, 1) for name in ("observations", "actions")}


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations, played when first called for and kept in memory; the same for every training seed.

    Args:
        episodes: of 200 steps each.
    """

    episodes: int

    def __call__(self) -> dict[str, Tensor]:
        """``observations`` and ``actions``, as ``demonstrate`` gives them."""
        return demonstrate(self.episodes)

    def fingerprint(self) -> str:
        """Hash of the content, which tells another version of the environment too."""
        return tensors_hash(self())
