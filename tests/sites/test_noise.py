from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from vision_toys import ctx_of, move, restless_plan, run

from perturbed.core.plan import apply
from perturbed.errors import PlanError
from perturbed.inputs.adversarial import PGDTraining
from perturbed.inputs.noise import InputNoise, noisy

MIDDLE = torch.full((64, 1, 8, 8), 0.5)
OPEN = (-10.0, 10.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_noise_fills_its_radius_and_no_more() -> None:
    noise = noisy(MIDDLE, 0.2, rng(), distribution="uniform", bounds=OPEN) - MIDDLE
    assert noise.abs().max() <= 0.2 + 1e-6
    assert noise.abs().max() > 0.199
    assert noise.var().item() == pytest.approx(0.2**2 / 3, rel=0.06)  # 4096 draws: SE of the variance 1.4 %
    assert abs(noise.mean().item()) < 4 * 0.2 / 3**0.5 / 64


def test_normal_noise_has_the_scale_as_its_deviation() -> None:
    noise = noisy(MIDDLE, 0.2, rng(), distribution="normal", bounds=OPEN) - MIDDLE
    assert noise.std().item() == pytest.approx(0.2, rel=0.06)
    assert noise.abs().max() > 0.5  # unlike uniform noise of that scale, or of that deviation


def test_noise_stays_in_the_legal_range() -> None:
    x = torch.rand(64, 1, 8, 8, generator=rng())
    found = noisy(x, 0.9, rng(1), distribution="uniform", bounds=(0.0, 1.0))
    assert found.min() == 0
    assert found.max() == 1


@pytest.mark.parametrize(("redraw", "moves"), [("step", True), ("stage", False), ("run", False)])
def test_redraw_says_when_noise_is_new(redraw: str, moves: bool) -> None:
    ctx, noise = ctx_of(), InputNoise(redraw=redraw)  # type: ignore[arg-type]
    one = noise.perturb({"pixels": MIDDLE}, ctx)["pixels"]
    two = noise.perturb({"pixels": MIDDLE}, move(ctx, 1))["pixels"]
    assert torch.equal(one, two) is not moves
    other = noise.perturb({"pixels": MIDDLE}, ctx_of(stage="pretrain"))["pixels"]
    assert torch.equal(one, other) is (redraw == "run")


def test_only_the_input_entry_changes() -> None:
    batch = {"pixels": MIDDLE, "labels": torch.arange(64)}
    found = InputNoise().perturb(batch, ctx_of())
    assert found["labels"] is batch["labels"]
    assert batch["pixels"] is MIDDLE
    assert not torch.equal(found["pixels"], MIDDLE)


@pytest.mark.parametrize("intervention", [InputNoise(), PGDTraining()])
def test_token_ids_have_nothing_near(intervention: Any) -> None:
    facts = dataclasses.replace(ctx_of().facts, input_range=(0.0, 100.0))
    batch = {"pixels": torch.arange(4), "labels": torch.arange(4)}
    with pytest.raises(PlanError, match=r"'pixels' is int64, .* floating-point numbers"):
        intervention.perturb(batch, ctx_of(facts=facts))


def test_scale_zero_is_the_control_bit_for_bit() -> None:
    control, off = run(restless_plan()), run(apply(restless_plan(), [InputNoise(scale=0.0)]))
    assert off.weights == control.weights
    assert run(apply(restless_plan(), [InputNoise(scale=1e-3)])).weights != control.weights


def test_unknown_distributions_and_negative_scales_are_refused() -> None:
    with pytest.raises(PlanError, match="did you mean 'uniform'"):
        InputNoise(distribution="unifrom")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"scale=-0\.1"):
        InputNoise(scale=-0.1)
