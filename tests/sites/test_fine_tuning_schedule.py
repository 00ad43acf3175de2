from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from vision_toys import restless_plan, run

from perturbed.core.optimiser import Optim
from perturbed.core.plan import apply
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.optim.fine_tuning import FromScratch, SlowStartFastDecay, StepDecay, slow_start_fast_decay, step_decay

N = 20_000
GRID = [(i + 0.5) / N for i in range(N)]


def integral(**settings: Any) -> float:
    return sum(slow_start_fast_decay(u, **settings) for u in GRID) / N


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("start", "u_peak", "decay"), [(0.01, 0.4, 6.0), (0.3, 0.1, 2.0), (0.0, 0.8, 10.0)])
def test_integral_is_that_of_the_two_pieces(power: float, start: float, u_peak: float, decay: float) -> None:
    rise = u_peak * (start + (1 - start) / (power + 1))
    fall = (1 - u_peak) * (1 - math.exp(-decay)) / decay
    found = integral(start=start, u_peak=u_peak, power=power, decay=decay)
    assert found == pytest.approx(rise + fall, rel=1e-4)
    assert found != pytest.approx(rise + (1 - math.exp(-decay)) / decay, rel=1e-2)  # decay counted from 0 to 1


def test_cosine_rise_has_the_integral_of_the_linear_one_and_flat_ends() -> None:
    settings: dict[str, Any] = {"start": 0.1, "u_peak": 0.4, "decay": 6.0}
    assert integral(rise="cosine", **settings) == pytest.approx(integral(rise="linear", **settings), rel=1e-4)
    early = [slow_start_fast_decay(0.04, rise=rise, **settings) - 0.1 for rise in ("linear", "cosine")]
    assert early[1] < 0.3 * early[0]
    assert slow_start_fast_decay(0.2, rise="cosine", **settings) == pytest.approx(0.55)


@pytest.mark.parametrize("rise", ["linear", "cosine"])
@pytest.mark.parametrize("u_peak", [0.0, 0.25, 0.4])
def test_the_peak_is_where_it_is_said(rise: Any, u_peak: float) -> None:
    schedule = SlowStartFastDecay(peak=3.0, u_peak=u_peak, rise=rise)
    rates = [schedule.factor(step, 200) for step in range(200)]
    top = rates.index(max(rates))
    assert top == round(u_peak * 200)
    assert rates[top] == 3.0
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    if u_peak:
        assert rates[0] == pytest.approx(0.03)
    assert schedule.factor(200, 200) == pytest.approx(3 * math.exp(-6))


def test_step_decay_cuts_at_its_milestones() -> None:
    assert [step_decay(u, (0.5, 0.75), 0.1) for u in (0.0, 0.49, 0.5, 0.74, 0.75, 0.99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    schedule = StepDecay(peak=2.0, milestones=(0.5,), gamma=0.5)
    assert [schedule.factor(step, 4) for step in range(4)] == [2.0, 2.0, 1.0, 1.0]
    assert {StepDecay(peak=2.0, milestones=()).factor(step, 9) for step in range(9)} == {2.0}


@pytest.mark.parametrize("kind", [SlowStartFastDecay, StepDecay])
def test_off_is_the_control_bit_for_bit(kind: Any) -> None:
    control = run(restless_plan()).weights
    assert run(apply(restless_plan(), [kind(**kind.OFF)])).weights == control
    assert run(apply(restless_plan(), [kind(**kind.STRONG)])).weights != control


def halving(step: int, steps: int) -> float:
    return 0.5**step


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Plain SGD on a halving schedule whose rates are kept."""

    rates: list[float] = dataclasses.field(default_factory=list)

    def __call__(self, model: Any, ctx: Any) -> Optim:
        optim = Optim(torch.optim.SGD(model.parameters(), lr=0.1), halving)
        optim.optimizer.register_step_pre_hook(lambda o, a, k: self.rates.append(o.param_groups[0]["lr"]))
        return optim


def test_it_multiplies_the_schedule_that_is_there_in_its_stage_only() -> None:
    kept = Recorded()
    plan = restless_plan(4).edit("*", lambda s: dataclasses.replace(s, optim=kept))
    run(apply(plan, [StepDecay(peak=2.0, milestones=(0.5,), stage="finetune")]))
    assert kept.rates == pytest.approx([0.1, 0.05, 0.2, 0.1, 0.005, 0.0025])


def test_from_scratch_keeps_one_stage_from_the_initial_weights() -> None:
    plan = restless_plan(4)
    found = apply(plan, [FromScratch(times=2.5)])
    assert [(s.name, s.steps) for s in found.stages] == [("finetune", 10)]
    assert [s.name for s in plan.stages] == ["pretrain", "finetune"]
    engines = [Engine(p, 0, Store(None)) for p in (plan, found)]
    first, second = (e.model_at("init").state_dict() for e in engines)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert run(found).cost.grad_passes == 10  # the stage that was dropped is not charged


def test_from_scratch_at_once_its_length_is_the_identity_of_a_single_stage() -> None:
    plan = restless_plan(4)
    single = plan.replace(stages=plan.stages[1:])
    assert run(apply(single, [FromScratch(times=1.0)])).weights == run(single).weights
    assert run(apply(plan, [FromScratch(times=1.0)])).weights != run(plan).weights


def test_bad_settings_are_refused() -> None:
    for make, told in [
        (lambda: SlowStartFastDecay(peak=0.0), "peak=0.0"),
        (lambda: SlowStartFastDecay(power=-1.0), "power=-1.0"),
        (lambda: SlowStartFastDecay(u_peak=1.0), "u_peak"),
        (lambda: SlowStartFastDecay(rise="cosin"), "did you mean 'cosine'"),  # type: ignore[arg-type]
        (lambda: StepDecay(milestones=(1.5,)), "milestones"),
        (lambda: FromScratch(times=0.0), r"times=0\.0"),
    ]:
        with pytest.raises(PlanError, match=told):
            make()
    with pytest.raises(PlanError, match="did you mean 'finetune'"):
        apply(restless_plan(), [FromScratch(stage="finetuning")])
