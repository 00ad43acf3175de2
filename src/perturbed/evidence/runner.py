"""Carrying out a study: every arm on every seed, the gates, and the record of what came out."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perturbed.core.keys import machine, source_hash, versions
from perturbed.core.meter import Cost
from perturbed.core.plan import Plan
from perturbed.core.registry import Card
from perturbed.core.run import Result, settings
from perturbed.errors import PlanError
from perturbed.evidence.pool import Job, Listener, Pool, cores
from perturbed.evidence.study import Study
from perturbed.evidence.verdict import judge_contrast, judge_record

Record = dict[str, Any]
Results = dict[str, dict[int, Result]]
OFF, AGAIN = "switched off", "same seed again"  # no arm has such a name
ListenerFor = Callable[[Sequence[Job]], Listener]


@dataclass(frozen=True)
class Setting:
    """How a study is run, as the record tells it.

    Args:
        study: already at its scale.
        scale: its name.
        seeds: training seeds.
        smoke: the same study at smoke scale, for the gates; None where there is no smoke.
        card: of the method, if it is one.
        registered: nothing that was fixed beforehand was changed.
        command: that reproduces the record.
    """

    study: Study
    scale: str
    seeds: tuple[int, ...]
    smoke: Study | None = None
    card: Card | None = None
    registered: bool = False
    command: str = ""


def check_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """The seeds as a tuple.

    Raises:
        PlanError: there is none, one is negative or occurs twice.
    """
    seeds = tuple(seeds)
    if not seeds:
        raise PlanError("a study needs at least one seed: --seeds 8, or a list such as --seeds 0,1,2")
    if min(seeds) < 0:
        raise PlanError(f"seed {min(seeds)} is negative; seeds are whole numbers from 0")
    doubles = sorted({s for s in seeds if seeds.count(s) > 1})
    if doubles:
        raise PlanError(f"seed {doubles[0]} is given twice; each pair of runs needs a seed of its own")
    return seeds


def run_study(setting: Setting, pool: Pool, listen: ListenerFor) -> Record:
    """Run every arm on every seed and judge.

    Raises:
        PlanError: an intervention does not fit the plan.
        Interrupted: Ctrl-C; the same call goes on from there.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    plans = setting.study.plans()
    jobs = [Job(f"{arm} · seed {seed}", plan, seed) for arm, plan in plans.items() for seed in setting.seeds]
    gate_jobs = _gate_jobs(setting.smoke) if setting.smoke else {}
    every = [*gate_jobs.values(), *jobs]
    found = pool.run(every, _Expecting(listen(every), setting.study.metrics()))
    checks = dict(zip(gate_jobs, found, strict=False))
    rest = iter(found[len(gate_jobs) :])
    results: Results = {arm: {seed: next(rest) for seed in setting.seeds} for arm in plans}
    record = _record(setting, results, started)
    record["gates"] = gates(setting, results, checks)
    if setting.smoke:
        record["smoke"] = {a: _score(checks[a], setting.study.metric) for a in plans if a in checks}
    record |= judge_record(record)
    return record


@dataclass
class _Expecting:
    """A listener that ends a study at the first run without one of its metrics, not after the last."""

    listener: Listener
    metrics: tuple[str, ...]

    def progress(self, job: int, done: int, of: int) -> None:
        self.listener.progress(job, done, of)

    def finished(self, job: int, result: Result) -> None:
        for metric in self.metrics:
            _score(result, metric)
        self.listener.finished(job, result)


def _gate_jobs(smoke: Study) -> dict[str, Job]:
    """One seed of every arm at smoke length without the store, the primary twice, and the primary switched off."""
    plans = smoke.plans()
    jobs = {arm: Job(f"gate: {arm}", plan, 0, fresh=True) for arm, plan in plans.items()}
    assert smoke.primary is not None
    jobs[AGAIN] = dataclasses.replace(jobs[smoke.primary], label="gate: same seed again")
    off = switched_off(smoke)
    if off is not None:
        jobs[OFF] = Job("gate: off", off, 0, fresh=True)
    return jobs


def switched_off(study: Study) -> Plan | None:
    """The plan of the primary arm with every intervention at its OFF setting; None where one has no off."""
    assert study.primary is not None
    arm = study.arms[study.primary]
    if any(getattr(i, "OFF", None) is None for i in arm):
        return None
    off: Any = tuple(dataclasses.replace(i, **i.OFF) for i in arm)  # type: ignore[attr-defined, type-var]
    return dataclasses.replace(study, arms={**study.arms, study.primary: off}).plans()[study.primary]


def gates(setting: Setting, results: Results, checks: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """What must hold for the scores to judge anything; ``pass`` is None where a gate does not apply."""
    study = setting.study
    sanity = (
        _gate(None, "not asked at smoke length") if setting.scale == "smoke" else _sanity(study, results["control"])
    )
    found = {"budgets": _budgets(study, results), "sanity": sanity}
    if checks:
        off, again = checks.get(OFF), _same(checks[AGAIN], checks[study.primary or ""])
        found["same_seed"] = _gate(again, "the primary arm twice on seed 0 at smoke length")
        found["off_equals_control"] = (
            _gate(_same(off, checks["control"]), "the primary arm switched off, against the control, at smoke length")
            if off is not None
            else _gate(None, "the method has no off setting")
        )
    return found


def _gate(passed: bool | None, detail: str) -> dict[str, Any]:
    outcome = "" if passed is None else ": bit for bit the same" if passed else ": DIFFERENT"
    return {"pass": passed, "detail": detail + outcome}


def _same(one: Result, two: Result) -> bool:
    return one.scores == two.scores and one.curves["loss"] == two.curves["loss"] and one.diverged == two.diverged


def _budgets(study: Study, results: Results) -> dict[str, Any]:
    arm, reference = study.primary or next(iter(study.arms)), study.reference
    whole = [s for s in results[arm] if not (results[arm][s].diverged or results[reference][s].diverged)]
    if not whole:
        return _gate(None, "no seed ended in both arms")
    costs = [_mean_cost([results[name][s] for s in whole]) for name in (arm, reference)]
    differing = [
        f"{what} {costs[0][what]:,.0f} against {costs[1][what]:,.0f}"
        for what in ("tokens", "examples", "grad_passes")
        if costs[0][what] != costs[1][what]
    ]
    if not differing:
        return {"pass": True, "detail": f"{arm} and {reference} spend the same"}
    told = f"{arm} against {reference}: {'; '.join(differing)}"
    return {"pass": study.budget == "reported", "detail": told}


def _sanity(study: Study, control: Mapping[int, Result]) -> dict[str, Any]:
    if study.sanity is None:
        return {"pass": None, "detail": "no sanity metric is named"}
    metric = study.sanity.metric
    values = [_score(result, metric) for result in control.values()]
    finite = [v for v in values if v is not None]
    if not finite:
        return _gate(None, f"the control has no finite {metric}")
    mean = math.fsum(finite) / len(finite)
    wanted = f"wanted {study.sanity.relation} {study.sanity.value:g}"
    return {"pass": study.sanity(mean), "detail": f"control {metric} {mean:.4g}, {wanted}"}


def _score(result: Result, metric: str) -> float | None:
    """A run's score; None where it diverged.

    Raises:
        PlanError: no measure gives it.
    """
    if result.diverged is not None:
        return None
    if metric not in result.scores:
        raise PlanError(f"no measure gives the metric {metric!r}; there is {', '.join(sorted(result.scores))}")
    return result.scores[metric]


def _mean_cost(results: Iterable[Result]) -> dict[str, Any]:
    costs = [dataclasses.asdict(r.cost) for r in results]
    fields = [f.name for f in dataclasses.fields(Cost)]
    return {f: max(c[f] for c in costs) if f == "peak_bytes" else sum(c[f] for c in costs) / len(costs) for f in fields}


def _by_seed(results: Mapping[int, Result], metric: str) -> dict[str, float | None]:
    return {str(seed): r.scores.get(metric) for seed, r in results.items()}


def _record(setting: Setting, results: Results, started: str) -> Record:
    study, card = setting.study, setting.card
    every = [r for arm in results.values() for r in arm.values()]
    others = sorted({name for r in every for name in r.scores} - {study.metric})
    curves = sorted({name for r in every for name in r.curves})
    return {
        "schema": 1,
        "slug": card.slug if card else None,
        "title": card.title if card else None,
        "plan": repr(study.plan),
        "scale": setting.scale,
        "registered": setting.registered,
        "metric": study.metric,
        "unit": study.unit,
        "transform": study.transform,
        "direction": study.direction,
        "primary": study.primary,
        "reference": study.reference,
        "sham": study.sham,
        "epsilon": study.epsilon,
        "why_epsilon": study.why_epsilon,
        "alpha": 0.05,
        "bounds": list(study.bounds),
        "seeds": list(setting.seeds),
        "scores": {a: {str(s): _score(r, study.metric) for s, r in of.items()} for a, of in results.items()},
        "secondary": {name: {arm: _by_seed(of, name) for arm, of in results.items()} for name in others},
        "curves": {name: {arm: _curves(of, name) for arm, of in results.items()} for name in curves},
        "diverged": {a: {str(s): r.diverged for s, r in of.items() if r.diverged} for a, of in results.items()},
        "cost": {arm: _mean_cost(of.values()) for arm, of in results.items()},
        "claim": card.claim if card else {"text": "", "paper": ""},
        "arxiv": card.arxiv if card else None,
        "versions": versions(),
        "machine": {**machine(), **settings(), "cores": cores()},
        "artifacts": {a: {str(s): r.artifacts for s, r in of.items()} for a, of in results.items()},
        "references": dict(study.references),
        "contrasts": {
            n: dataclasses.asdict(c) for n, c in study.contrasts.items() if c.weights.keys() <= results.keys()
        },
        "source_sha": source_hash(f"perturbed.methods.{card.slug.replace('-', '_')}") if card else None,
        "command": setting.command,
        "started": started,
    }


def _curves(results: Mapping[int, Result], name: str) -> dict[str, list[list[float | None]]]:
    def point(step: int, value: float) -> list[float | None]:
        return [step, float(f"{value:.6g}") if math.isfinite(value) else None]

    return {str(s): [point(*p) for p in _thin(r.curves.get(name, []))] for s, r in results.items()}


def _thin(curve: Sequence[tuple[int, float]], points: int = 40) -> Sequence[tuple[int, float]]:
    """At most about ``points`` of a curve, its last among them: a picture needs no more."""
    stride = max(1, math.ceil(len(curve) / points))
    return [p for i, p in enumerate(curve) if i % stride == 0 or i == len(curve) - 1]


def add_interactions(record: Record, pairs: Mapping[str, tuple[str, str]]) -> Record:
    """The record with, for each combined arm, how far it is from the sum of its two parts."""
    found = {}
    for both, (one, two) in pairs.items():
        asked = {name: record[name] for name in ("metric", "direction", "epsilon", "transform")}
        told = judge_contrast(record, {**asked, "weights": {both: 1, one: -1, two: -1, "control": 1}})
        found[both] = {"effect": told.effect, "interval": told.interval and list(told.interval), "p": told.p}
    return {**record, "interaction": found}


@dataclass(frozen=True)
class Fixed:
    """A plan made elsewhere, as a recipe."""

    plan: Plan

    def __call__(self) -> Plan:
        """The plan."""
        return self.plan

    def __repr__(self) -> str:
        """The plan's name."""
        return self.plan.name


def default_store() -> Path:
    """The user's checkpoint store."""
    from perturbed.home import home

    return home() / "store"
