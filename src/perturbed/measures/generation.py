"""How good samples are: in the eyes of a classifier, and how their features lie to those of real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perturbed.core.plan import Facts
from perturbed.core.run import Run
from perturbed.errors import PlanError
from perturbed.inference.diffusion import DDIM
from perturbed.measures.vision import examples
from perturbed.objectives.diffusion import schedule_of, uncentred

Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From images [B, C, H, W] in the fact ``input_range`` to features [B, D] and logits [B, K]."""


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features [N, D] and [M, D].

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S unbiased, in double precision (Dowson and Landau 1982; the FID of
    Heusel et al. 2017 in other features). Biased upwards for few samples: compare it at equal numbers only.

    Raises:
        PlanError: a set has fewer than two rows.
    """
    for features in (one, two):
        if len(features) < 2:
            raise PlanError(f"frechet_distance wants at least 2 rows of features, got {len(features)}")
    one, two = one.double(), two.double()
    first, second = torch.cov(one.T).reshape(one.shape[1], -1), torch.cov(two.T).reshape(one.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    mean = (one.mean(0) - two.mean(0)).square().sum()
    return float((mean + first.trace() + second.trace() - 2 * cross).clamp(min=0))


def _radii(points: Tensor, k: int) -> Tensor:
    if len(points) <= k:
        raise PlanError(f"the distance to neighbour k={k} wants more than {k} points, got {len(points)}")
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """Shares of samples that lie among real ones, and of real ones among samples (Kynkäänniemi et al. 2019).

    A set's region is the union of balls around its points, each as large as the distance to its ``k``-th neighbour.
    ``precision`` is the share of ``fake`` [M, D] in the region of ``real`` [N, D], ``recall`` the reverse, and
    ``coverage`` the share of real balls that hold a sample (Naeem et al. 2020), which outliers among samples do not
    raise. All in [0, 1].

    Raises:
        PlanError: a set has no more than ``k`` points.
    """
    real, fake = real.double(), fake.double()
    between = torch.cdist(real, fake)
    near_real = between <= _radii(real, k).unsqueeze(1)
    near_fake = between <= _radii(fake, k)
    return {
        "precision": near_real.any(0).double().mean().item(),
        "recall": near_fake.any(1).double().mean().item(),
        "coverage": near_real.any(1).double().mean().item(),
    }


def confidence(logits: Tensor) -> float:
    """Mean of the largest class probability under logits [B, K], in (1/K, 1]."""
    return logits.softmax(-1).amax(-1).mean().item()


def class_spread(features: Tensor, classes: Tensor) -> float:
    """Mean over classes of the total variance of features [B, D] within the class [B], of classes with two or more."""
    held = [features[classes == c] for c in range(int(classes.max()) + 1)]
    spread = [rows.var(0).sum() for rows in held if len(rows) > 1]
    return torch.stack(spread).mean().item() if spread else 0.0


def judge_of(facts: Facts) -> Judge:
    """The plan's fact ``judge``, made.

    Raises:
        PlanError: there is none.
    """
    make = facts.get("judge")
    if make is None:
        raise PlanError("samples are judged by the fact judge: give the plan's facts a function that returns a Judge")
    found: Judge = make()
    return found


def sampled(run: Run, number: int, sampler: DDIM, *, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """Samples [number, C, H, W] in the plan's input range, and the classes [number] that were asked for, each in turn.

    The noise that they begin with, and the classes, are the same for every arm of a seed. Whether the model is told the
    class is for the plan's prediction to decide (``inference.guidance.Labels``).

    Args:
        run: of a diffusion plan.
        number: how many.
        sampler: makes them.
        chunk: most samples at a time.
    """
    facts, rng = run.ctx.facts, run.ctx.streams.once("samples begin", every="run")
    real = next(examples(run, "held_out"))[facts.input or ""]
    noise = torch.randn((number, *real.shape[1:]), generator=rng).to(real)
    classes = torch.arange(number, device=real.device) % (facts.classes or 1)
    parts = [
        sampler(run.predict, noise[low : low + chunk], classes[low : low + chunk], schedule_of(facts))
        for low in range(0, number, chunk)
    ]
    return uncentred(torch.cat(parts), facts), classes


@dataclass(frozen=True)
class Generation:
    """Measure: what a classifier of real images says of samples.

    Gives ``precision``, ``recall`` and ``coverage`` against the ``held_out`` images, ``frechet`` (the distance of the
    fitted normal distributions), ``confidence``, ``spread`` (diversity: the variance within the classes that the judge
    sees) and ``rightness``, the share that the judge takes for what was asked (at chance where no label is told).

    Args:
        number: samples; below 1,000 it depends on the noise which of two arms has the smaller Fréchet distance (8x8
            digits).
        sampler: makes them.
        k: neighbour of ``precision_recall``.
        suffix: put after each name.
    """

    number: int = 1000
    sampler: DDIM = field(default_factory=DDIM)
    k: int = 3
    suffix: str = ""

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """The numbers."""
        judge = judge_of(run.ctx.facts)
        images, classes = sampled(run, self.number, self.sampler)
        features, logits = judge(images)
        name = run.ctx.facts.input or ""
        real = torch.cat([judge(batch[name])[0] for batch in examples(run, "held_out")])
        scores = {
            **precision_recall(real, features, self.k),
            "frechet": frechet_distance(real, features),
            "confidence": confidence(logits),
            "spread": class_spread(features, logits.argmax(-1)),
            "rightness": (logits.argmax(-1) == classes).float().mean().item(),
        }
        return {f"{name}{self.suffix}": value for name, value in scores.items()}
