"""Sharpness-aware steps: the gradient of elsewhere, the weights of here."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from vision_toys import ctx_of, restless_plan, run

from perturbed.core.context import ScopedLoss
from perturbed.core.optimiser import Optim
from perturbed.core.plan import apply, one_step
from perturbed.errors import PlanError
from perturbed.optim.sharpness import DisplacedUpdate, SharpnessAware, ascent

TARGET = torch.tensor([3.0, -1.0])
CURVATURE = torch.tensor([2.0, 0.5])


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self):
        self.calls += 1
        return self.w


def quadratic(model, batch, ctx):
    return (CURVATURE * (model() - TARGET) ** 2).sum() / 2


def one_update(rho, direction="gradient"):
    model, ctx = Point(), ctx_of()
    optim = Optim(torch.optim.SGD(model.parameters(), lr=0.1))
    ctx.model, ctx.loss = model, ScopedLoss(quadratic)
    value = DisplacedUpdate(one_step, rho, direction, "finetune")(model, {}, ctx.loss, optim, ctx)
    return model, float(value), ctx


def test_a_step_on_a_quadratic_in_closed_form():
    start = torch.tensor([1.0, 1.0])
    gradient = CURVATURE * (start - TARGET)
    elsewhere = start + 0.3 * gradient / gradient.norm()
    model, value, ctx = one_update(0.3)
    assert torch.allclose(model.w.detach(), start - 0.1 * CURVATURE * (elsewhere - TARGET))
    assert value == pytest.approx(float((CURVATURE * (elsewhere - TARGET) ** 2).sum() / 2))
    per_tensor_sign = start - 0.1 * CURVATURE * (start + 0.3 * gradient.sign() - TARGET)
    assert not torch.allclose(model.w.detach(), per_tensor_sign)
    assert ctx.grad_passes == 2
    assert model.calls == 1, "the first pass leaves running statistics as they were"


def test_the_sham_goes_as_far_in_another_direction():
    by_gradient, random = one_update(0.3)[0].w, one_update(0.3, "random")[0].w
    assert not torch.allclose(by_gradient, random)
    plain = one_update(0.0)[0].w
    # through a quadratic a displacement d of the weights moves the step by 0.1 * curvature * d
    moved = [((w - plain).detach() / (0.1 * CURVATURE)).norm().item() for w in (by_gradient, random)]
    assert moved == pytest.approx([0.3, 0.3], rel=1e-4)
    assert one_update(0.3, "random")[2].grad_passes == 1


def test_the_norm_is_over_all_tensors_together():
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(4, 3, generator=g), torch.randn(7, generator=g)]
    found = ascent(directions, 0.2)
    assert math.sqrt(sum(float(d.square().sum()) for d in found)) == pytest.approx(0.2)
    ratios = torch.cat([(f / d).flatten() for f, d in zip(found, directions, strict=True)])
    assert torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-5), "one scale for all, not one a tensor"
    assert ascent([torch.zeros(3)], 0.2)[0].norm() == 0


def test_off_equals_the_control_under_dropout_and_batch_norm():
    plan = restless_plan()
    off = run(apply(plan, [SharpnessAware(rho=0.0)]))
    assert off.weights == run(plan).weights
    assert run(apply(plan, [SharpnessAware(rho=0.1)])).weights != off.weights


@dataclass(frozen=True)
class Frozen:
    def __call__(self, model, ctx):
        next(iter(model.parameters())).requires_grad_(False)
        return model


def test_frozen_weights_stay():
    plan = restless_plan().add_weights("*", Frozen())
    for direction in ("gradient", "random"):
        run(apply(plan, [SharpnessAware(rho=0.1, direction=direction)]))


def test_bad_fields_are_named():
    with pytest.raises(PlanError, match="rho=-1"):
        SharpnessAware(rho=-1)
    with pytest.raises(PlanError, match="random"):
        SharpnessAware(direction="randm")
