"""AdamW and its schedule: the update by hand, decay of matrices only, warm-up and cosine at their corners."""

import math
from itertools import pairwise

import pytest
import torch

from perturbed.errors import PlanError
from perturbed.optim.optimisers import AdamW
from perturbed.optim.schedules import WarmupCosine


def test_schedule_at_its_corners():
    schedule = WarmupCosine(warmup=0.1, floor=0.2)
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[9] == pytest.approx(10 / 11)
    assert max(factors) == factors[10] == 1
    assert factors[55] == pytest.approx(0.6)  # half-way down
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[99] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 89 / 90)) / 2)
    assert schedule(100, 100) == pytest.approx(0.2)
    assert [WarmupCosine(0, 1)(s, 5) for s in range(5)] == [1] * 5
    assert WarmupCosine()(0, 1) == 1
    for bad in ({"warmup": 1.0}, {"floor": 1.5}):
        with pytest.raises(PlanError, match="warmup must be in"):
            WarmupCosine(**bad)


def test_updates_by_the_formula():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    weight, gain = model[0].weight, model[1].weight
    w, g1 = weight.detach().double().clone(), gain.detach().double().clone()
    slot = AdamW(lr=0.1, betas=(0.8, 0.9), weight_decay=0.5, clip=None, schedule=WarmupCosine(0.5, 0.5))
    optim = slot(model, None)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    m1, v1 = torch.zeros_like(g1), torch.zeros_like(g1)
    for t in range(1, 4):
        grads = [torch.randn(p.shape) for p in model.parameters()]
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.clone()
        optim.at(t - 1, 4)
        optim.step()
        lr = 0.1 * WarmupCosine(0.5, 0.5)(t - 1, 4)
        for grad, moment, square, value, decay in (
            (grads[0].double(), m, v, w, 0.5), (grads[2].double(), m1, v1, g1, 0.0)
        ):  # fmt: skip
            moment.mul_(0.8).add_(0.2 * grad)
            square.mul_(0.9).add_(0.1 * grad**2)
            value.mul_(1 - lr * decay)
            value.sub_(lr * (moment / (1 - 0.8**t)) / ((square / (1 - 0.9**t)).sqrt() + 1e-8))
    torch.testing.assert_close(weight.detach().double(), w, atol=1e-6, rtol=0)
    torch.testing.assert_close(gain.detach().double(), g1, atol=1e-6, rtol=0)


def test_gradients_are_clipped_and_frozen_parameters_left_out():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optim = AdamW(lr=0.1)(model, None)
    assert [len(g["params"]) for g in optim.optimizer.param_groups] == [1]
    model.weight.grad = torch.full((2, 3), 100.0)
    optim.step()
    assert float(model.weight.grad.norm()) == pytest.approx(1, abs=1e-4)
