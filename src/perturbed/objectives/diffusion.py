"""Denoising diffusion: noising, the noise predictor of a Diffusers model, and its loss."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Facts
from perturbed.errors import PlanError

NOISY, TIMESTEPS, LABELS = "noisy", "timesteps", "labels"


@dataclass(frozen=True)
class NoiseSchedule:
    """How fast images turn into noise: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, images in [-1, 1].

    Args:
        kind: Diffusers' name: ``squaredcos_cap_v2`` (Nichol and Dhariwal 2021) or ``linear`` (Ho et al. 2020).
        steps: timesteps t = 0 … steps - 1.
    """

    kind: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2"
    steps: int = 1000

    def kept(self) -> Tensor:
        """The a_t [steps], falling from nearly 1 to nearly 0."""
        return _kept(self.kind, self.steps)

    def noised(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, C, H, W] at each image's timestep [B]."""
        kept = self.kept().to(images.device)[timesteps].view(-1, 1, 1, 1)
        return kept.sqrt() * images + (1 - kept).sqrt() * noise


@functools.cache
def _kept(kind: str, steps: int) -> Tensor:
    from diffusers import DDPMScheduler

    kept: Tensor = DDPMScheduler(num_train_timesteps=steps, beta_schedule=kind).alphas_cumprod
    return kept


def schedule_of(facts: Facts) -> NoiseSchedule:
    """The plan's fact ``schedule``.

    Raises:
        PlanError: there is none.
    """
    found = facts.get("schedule")
    if not isinstance(found, NoiseSchedule):
        raise PlanError(f"diffusion wants the fact schedule, a NoiseSchedule, and found {found!r}: set it in the facts")
    return found


def centred(pixels: Tensor, facts: Facts) -> Tensor:
    """Images moved from the fact ``input_range`` to [-1, 1]; as they are where the plan states none."""
    low, high = facts.input_range or (-1.0, 1.0)
    return (pixels - low) * (2 / (high - low)) - 1


def uncentred(images: Tensor, facts: Facts) -> Tensor:
    """The inverse of ``centred``, cut to the legal range."""
    low, high = facts.input_range or (-1.0, 1.0)
    return ((images + 1) * ((high - low) / 2) + low).clamp(low, high)


def unlabelled(like: Tensor, facts: Facts) -> Tensor:
    """Labels [B] that stand for no label: the number after the last class."""
    return torch.full((len(like),), facts.classes or 0, dtype=torch.long, device=like.device)


def takes_labels(model: Module) -> bool:
    """Whether a Diffusers model was built with class labels."""
    config: Any = getattr(getattr(model, "module", model), "config", {})
    return any(config.get(name) for name in ("num_class_embeds", "num_embeds_ada_norm"))


def denoise(model: Module, noisy: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """The noise [B, C, H, W] that a model sees in ``noisy`` [B, C, H, W] at ``timesteps`` [B].

    Args:
        model: called as Diffusers' UNet and DiT classes are; further output channels (a learned variance) are left.
        noisy: x_t, of images in [-1, 1].
        timesteps: whole numbers [B].
        labels: classes [B], given to models that take them.
    """
    given = {"class_labels": labels} if takes_labels(model) else {}
    output = model(noisy, timesteps, **given)
    found: Tensor = output if isinstance(output, Tensor) else output.sample
    return found[:, : noisy.shape[1]]


def predict_noise(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Predict slot: the noise [B, C, H, W] in ``noisy`` at ``timesteps``, for ``labels`` if the batch has them.

    A batch of clean images is read as it stands at timestep 0.
    """
    noisy = batch[NOISY] if NOISY in batch else centred(batch[_input(ctx)], ctx.facts)
    at_rest = torch.zeros(len(noisy), dtype=torch.long, device=noisy.device)
    labels = batch.get(LABELS, unlabelled(noisy, ctx.facts))
    return denoise(model, noisy, batch.get(TIMESTEPS, at_rest), labels)


def _input(ctx: Ctx) -> str:
    if ctx.facts.input is None:
        raise PlanError("diffusion wants the fact input, the batch entry that holds the images: set it in facts")
    return ctx.facts.input


@dataclass(frozen=True)
class NoiseLoss:
    """Loss slot: mean squared error of the predicted noise at timesteps drawn uniformly (Ho et al. 2020, equation 14).

    Args:
        label_drop: share of examples that are shown without their label, so that the model learns both.
    """

    label_drop: float = 0.1

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """The scalar."""
        images, schedule = centred(batch[_input(ctx)], ctx.facts), schedule_of(ctx.facts)
        timesteps = torch.randint(schedule.steps, (len(images),), generator=ctx.rng("timesteps")).to(images.device)
        noise = torch.randn(images.shape, generator=ctx.rng("noise")).to(images)
        none = unlabelled(images, ctx.facts)
        dropped = torch.rand(len(images), generator=ctx.rng("dropped labels")).to(images.device) < self.label_drop
        labels = torch.where(dropped, none, batch.get(LABELS, none))
        return F.mse_loss(denoise(model, schedule.noised(images, noise, timesteps), timesteps, labels), noise)
