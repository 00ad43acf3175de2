"""The cost meter against closed forms."""

import dataclasses
import time

import pytest
import torch
import toy
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from perturbed.core.meter import Cost, Meter
from perturbed.core.plan import Measure
from perturbed.core.run import Engine
from perturbed.core.store import Store


def counted(step, batch):
    meter = Meter()
    with meter.step(batch):
        step()
    return meter


@pytest.mark.parametrize(("b", "i", "o"), [(3, 5, 7), (8, 16, 4)])
def test_a_linear_layer_costs_two_operations_per_weight_and_example_each_way(b, i, o):
    """Forward 2bio; backward 2bio for the weights and 2bio for the input."""
    layer, x = nn.Linear(i, o), torch.randn(b, i, requires_grad=True)
    assert counted(lambda: layer(x), {"x": x}).cost.flops == 2 * b * i * o
    assert counted(lambda: layer(x).sum().backward(), {"x": x}).cost.flops == 6 * b * i * o
    leaf = x.detach()
    assert counted(lambda: layer(leaf).sum().backward(), {"x": x}).cost.flops == 4 * b * i * o


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_costs_two_products_forward_and_five_backward(heads):
    """QKᵀ and AV cost 2BHT²D each; the fused backward makes A anew and then dV, dA, dQ and dK."""
    b, t, d = 2, 16, 8
    q, k, v = (torch.randn(b, heads, t, d, requires_grad=True) for _ in range(3))
    product = 2 * b * heads * t * t * d
    assert counted(lambda: scaled_dot_product_attention(q, k, v), {"q": q}).cost.flops == 2 * product
    both = counted(lambda: scaled_dot_product_attention(q, k, v).sum().backward(), {"q": q})
    assert both.cost.flops == (2 + 5) * product


def test_a_counted_step_does_the_same_arithmetic():
    torch_model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x, y = torch.randn(8, 6), torch.zeros(8).long()

    def gradients():
        torch_model.zero_grad()
        cross_entropy(torch_model(x), y).backward()
        return [p.grad.clone() for p in torch_model.parameters()]

    plain, found = gradients(), []
    counted(lambda: found.extend(gradients()), {"x": x})
    assert all(map(torch.equal, plain, found))


def test_a_shape_is_counted_once_and_added_at_each_step():
    layer, meter = nn.Linear(4, 4), Meter()
    for rows in (2, 2, 3, 2):
        x = torch.randn(rows, 4)
        with meter.step({"x": x}):
            layer(x)
    assert meter.cost.flops == 2 * 16 * (2 + 2 + 3 + 2)
    assert meter.cost.examples == 9
    again = Meter()
    again.load_state_dict(meter.state_dict(layer))
    with again.step({"x": torch.randn(3, 4)}):
        pass  # known from before: not counted again
    assert again.cost.flops == 2 * 16 * (9 + 3)


def test_what_grows_on_the_way_is_counted_anew():
    def cost(steps, *, saved_after=None):
        layer, meter = nn.Linear(4, 4), Meter()
        for step in range(steps):
            if step == saved_after:
                state, meter = meter.state_dict(layer), Meter()
                meter.load_state_dict(state)
            with meter.step({"x": torch.randn(2, 4)}):
                for _ in range(1 if step == 0 else 3):  # as where a radius grows from 0
                    layer(torch.randn(2, 4))
        return meter.cost.flops / (2 * 16 * 2)

    assert cost(7) == 7  # as the first
    assert cost(100) == 7 + 3 * 93
    assert cost(100, saved_after=5) == cost(100, saved_after=50) == cost(100)


def test_tokens_are_counted_without_padding():
    ids, mask = torch.zeros(2, 5).long(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    assert counted(lambda: None, {"input_ids": ids}).cost.tokens == 10
    assert counted(lambda: None, {"input_ids": ids, "attention_mask": mask}).cost.tokens == 7
    assert counted(lambda: None, {"pixels": torch.zeros(3, 1, 2, 2)}).cost.examples == 3


def test_the_cost_of_a_run():
    result = Engine(toy.plan(), 0, Store(None)).run()
    forward = 2 * 8 * (6 * 16 + 16 * 2)
    assert result.cost.flops == 10 * (3 * forward - 2 * 8 * 6 * 16)  # no gradient for the input
    assert result.cost.examples == 80
    assert result.cost.grad_passes == 10
    assert result.cost.params_trained == result.cost.params_stored == 6 * 16 + 16 + 2 * 16 + 16 * 2 + 2
    assert result.cost.cpu_s > 0
    assert result.cost.peak_bytes > 1e7


def frozen_first(model, ctx):
    model.first.requires_grad_(False)
    return model


def test_frozen_parameters_are_stored_but_not_trained():
    cost = Engine(toy.one_stage(weights=frozen_first), 0, Store(None)).run().cost
    assert cost.params_stored - cost.params_trained == 6 * 16 + 16


def test_an_attack_is_charged_its_gradient_passes():
    def attack(batch, ctx):
        x = batch["x"].clone().requires_grad_()
        for _ in range(3):
            (grad,) = torch.autograd.grad(ctx.loss(ctx.model, {**batch, "x": x}, ctx), x)
        with torch.no_grad():
            ctx.loss(ctx.model, batch, ctx)  # looking costs no gradient pass
        return {**batch, "x": batch["x"] + 0.1 * grad.sign()}

    attacked, plain = (Engine(p, 0, Store(None)).run().cost for p in (toy.one_stage(inputs=attack), toy.one_stage()))
    assert (attacked.grad_passes, plain.grad_passes) == (24, 6)
    assert attacked.flops > 3.5 * plain.flops


def test_costs_add_up_but_memory_and_parameters_do_not():
    one, two = Cost(1, 2, 3, 4, 5, 6, 70, 8, 9, 10), Cost(1, 1, 1, 1, 1, 1, 10, 10, 1, 1)
    assert dataclasses.astuple(one + two) == (2, 3, 4, 5, 6, 7, 70, 10, 9, 11)


def test_what_is_measured_is_told_apart_from_what_is_trained():
    def slow(run):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return {"answer": 1.0}

    plan = dataclasses.replace(toy.plan(), measures=(Measure("answer", slow),))
    cost = Engine(plan, 0, Store(None)).run().cost
    assert cost.measuring_cpu_s >= 0.3 > cost.cpu_s
