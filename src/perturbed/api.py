"""The few calls that do the whole job: run a method's study, compare interventions on one plan."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from torch.nn import Module

from perturbed.core.plan import Intervention, Plan, apply
from perturbed.core.registry import Card, Method, card, load
from perturbed.core.run import accelerator
from perturbed.core.run import settings as settings_of_runs
from perturbed.errors import PlanError, nearest
from perturbed.evidence.pool import Place, Pool
from perturbed.evidence.progress import Bars
from perturbed.evidence.runner import Fixed, Record, Setting, add_interactions, check_seeds, default_store, run_study
from perturbed.evidence.settings import apply_settings, load_plan, plan_file
from perturbed.evidence.study import Direction, Recipe, Study
from perturbed.evidence.verdict import judge

PLAIN = {"processes": 1, "accumulate": 1, "precision": "no"}  # how registered studies are run
Seeds = int | Iterable[int]
Arm = Sequence[Intervention]


def _seeds(seeds: Seeds) -> tuple[int, ...]:
    if isinstance(seeds, str):
        raise PlanError(f"seeds={seeds!r}: give how many (8) or which ([0, 1, 2])")
    if isinstance(seeds, Iterable):
        return check_seeds(_whole(seed) for seed in seeds)
    return check_seeds(range(_whole(seeds)))


def _whole(seed: Any) -> int:
    try:
        return operator.index(seed)  # also of numpy and torch
    except TypeError as e:
        raise PlanError(f"seed {seed!r} is a {type(seed).__name__}; seeds are whole numbers from 0") from e


def _recipe(plan: object) -> Recipe:
    """The recipe behind what a caller may give as a plan.

    Raises:
        PlanError: it is nothing that gives a plan.
    """
    if isinstance(plan, str):
        return load_plan(plan)
    if isinstance(plan, Plan):
        return Fixed(plan)
    if callable(plan) and not isinstance(plan, Module | type):
        made = plan()
        if isinstance(made, Plan):
            return plan if dataclasses.is_dataclass(plan) else Fixed(made)
    raise PlanError(
        f"plan is a {type(plan).__name__}: give a Plan (pt.Plan.from_model makes one of a model), a built-in plan's "
        "name or dataclass, or FILE.py:NAME"
    )


def _texts(name: str, texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str | Mapping):
        raise PlanError(f"{name}={texts!r}: give a list of strings")
    return texts


def setting(
    slug: str,
    *,
    seeds: Seeds | None = None,
    scale: str = "laptop",
    arms: Sequence[str] = (),
    settings: Sequence[str] = (),
    plan: str | Plan | Recipe | None = None,
) -> Setting:
    """What ``run`` would carry out, with nothing run yet.

    Raises:
        PerturbedError: unknown slug, scale, arm, field or plan, or seeds that pair nothing.
    """
    method = load(slug)
    study: Study = method.study
    chosen, arms, settings = (
        _seeds(study.seeds if seeds is None else seeds),
        _texts("arms", arms),
        _texts("settings", settings),
    )
    at = study.at(scale)
    smoke: Study | None = study.at("smoke")
    if plan is not None:
        at = dataclasses.replace(at, plan=_recipe(plan))
        smoke = None  # one's own plan has no smoke length, so the gates that need one do not apply
    only_full = [a for a in arms if a in study.full_arms and a not in at.arms]
    if only_full:
        raise PlanError(f"arm {only_full[0]!r} belongs to the full record: add --scale full")
    at = _with_arms(apply_settings(at, settings), arms)
    smoke = _with_arms(apply_settings(smoke, _of_arms(settings, at)), arms) if smoke else None
    changed = bool(settings or arms) or plan is not None
    fixed = not changed and chosen == tuple(range(study.seeds)) and scale in ("laptop", "full")
    registered = fixed and PLAIN.items() <= settings_of_runs().items()
    typed = plan is None or isinstance(plan, str)  # a plan that lives in Python has no command
    command = _command("run", [slug], chosen, scale, arms, settings, plan) if typed else ""
    return Setting(at, scale, chosen, smoke, method.card, registered, command)


def _with_arms(study: Study, names: Sequence[str]) -> Study:
    if not names:
        return study
    unknown = [n for n in names if n not in study.arms and n != "control"]
    if unknown:
        raise PlanError(f"the study has no arm {unknown[0]!r}: {nearest(unknown[0], study.arms)}")
    wanted = {study.primary, study.reference, *names}
    sham = study.sham if study.sham in names else None
    kept = {n: a for n, a in study.arms.items() if n in wanted}
    asked = {n: c for n, c in study.contrasts.items() if c.weights.keys() <= {"control", *kept}}
    return dataclasses.replace(study, arms=kept, contrasts=asked, sham=sham)


def _of_arms(settings: Sequence[str], study: Study) -> list[str]:
    """The settings that change an arm and not the plan, whose sizes the smoke keeps."""
    plan_fields = {f.name for f in dataclasses.fields(study.plan)} | {"plan"}  # type: ignore[arg-type]
    return [s for s in settings if s.partition("=")[0].partition(".")[0] not in plan_fields]


def _command(
    verb: str,
    slugs: Sequence[str],
    seeds: tuple[int, ...],
    scale: str | None,
    arms: Sequence[str],
    settings: Sequence[str],
    plan: object,
) -> str:
    plain = seeds == tuple(range(len(seeds)))
    words = ["perturbed", verb, *slugs, "--seeds", str(len(seeds)) if plain else ",".join(map(str, seeds)) + ","]
    words += ["--scale", scale] if scale not in (None, "laptop") else []
    words += ["--arms", ",".join(arms)] if arms else []
    words += [w for s in settings for w in ("--set", s)]
    words += ["--plan", plan] if isinstance(plan, str) else []
    return shlex.join(words)


def run(
    slug: str,
    *,
    seeds: Seeds | None = None,
    scale: str = "laptop",
    arms: Sequence[str] = (),
    settings: Sequence[str] = (),
    plan: str | Plan | Recipe | None = None,
    workers: int | None = None,
    on: Place = "local",
) -> Record:
    """Run a method's study and judge it.

    Args:
        slug: of the method (``perturbed list``).
        seeds: how many (0, 1, …) or which; the study's own number if None.
        scale: ``smoke``, ``laptop`` or ``full``.
        arms: only these, with the primary and its reference.
        settings: ``FIELD=VALUE`` as ``--set`` takes them; the record is then not registered.
        plan: another control plan: a built-in name or recipe, ``FILE.py:NAME`` or a ``Plan``.
        workers: runs at once; one a core by default.
        on: ``local`` processes or ``ray`` tasks.

    Returns:
        The record: scores, effects with intervals, verdict, gates, cost.

    Raises:
        PerturbedError: bad input, with what to do about it.
        Interrupted: Ctrl-C; the same call goes on from there.
    """
    asked = setting(slug, seeds=seeds, scale=scale, arms=arms, settings=settings, plan=plan)
    return carry_out(asked, plan=plan, workers=workers, on=on)


def carry_out(asked: Setting, *, plan: object = None, workers: int | None = None, on: Place = "local") -> Record:
    """Run what ``setting`` described."""
    if on not in get_args(Place):
        raise PlanError(f"on={on!r}: it is one of {', '.join(get_args(Place))}")
    if workers is not None and workers < 1:
        raise PlanError(f"workers={workers}: at least 1 run at once, or None for one a core")
    if asked.scale == "paper":
        raise PlanError("the paper's own setting is priced, not run: --dry-run prices it; the largest to run is full")
    file = plan_file(plan) if isinstance(plan, str) else None
    launched = settings_of_runs()["processes"] > 1  # then every process takes part in every run
    if launched and on == "ray":
        raise PlanError("--on ray and accelerate launch each place the runs: choose one of the two")
    pool = Pool(default_store(), workers=1 if launched else workers, on=on, files=(file,) if file else ())
    name = asked.card.slug if asked.card else "compare"
    with Bars(name, quiet=not accelerator().is_main_process) as bars:
        return run_study(asked, pool, bars.listen)


def compare(
    plan: Plan | Recipe | str,
    arms: Mapping[str, Arm],
    *,
    seeds: Seeds = 8,
    metric: str | None = None,
    direction: Direction | None = None,
    epsilon: float | None = None,
    factorial: bool = False,
    workers: int | None = None,
    on: Place = "local",
    command: str = "",
) -> Record:
    """Run several interventions against one control on one plan, and say whether their effects add up.

    Args:
        plan: a ``Plan``, a recipe, a built-in plan's name or ``FILE.py:NAME``.
        arms: named sequences of interventions; the first named is the primary contrast, the others are Holm-adjusted.
        seeds: how many, or which.
        metric: the score that decides; the plan's first measure by default.
        direction: of the hoped-for change; as the measure of that name improves, by default.
        epsilon: smallest effect of interest; without it no null can be shown.
        factorial: also run every combination of two or more arms (applied in the order given, the last outermost),
            with the interaction d_ab - d_a - d_b of each pair.
        workers: runs at once.
        on: ``local`` or ``ray``.
        command: to be recorded as the one that reproduces this.

    Raises:
        PerturbedError: bad input, with what to do about it.
    """
    every = _arms(arms, factorial)
    recipe = _recipe(plan)
    name, towards = _main(recipe(), metric, direction)
    try:
        judge([0.0], [0.0], direction=towards, epsilon=epsilon)
    except (TypeError, ValueError) as e:  # what cannot be judged is not run
        raise PlanError(str(e)) from e
    pairs: dict[str, tuple[str, str]] = {}
    if factorial:
        for size in range(2, len(arms) + 1):
            for names in itertools.combinations(arms, size):
                every["+".join(names)] = tuple(i for n in names for i in arms[n])
                if size == 2:
                    pairs["+".join(names)] = (names[0], names[1])
    study = Study(
        plan=recipe, arms=every, primary=next(iter(arms)), metric=name, direction=towards,
        epsilon=epsilon, budget="reported",
    )  # fmt: skip
    for name, arm in study.arms.items():
        _explain(recipe(), name, arm)
    asked = Setting(study, "own", _seeds(seeds), command=command)
    record = carry_out(asked, plan=plan, workers=workers, on=on)
    return add_interactions(record, pairs) if factorial else record


def _arms(arms: Mapping[str, Arm], factorial: bool) -> dict[str, tuple[Intervention, ...]]:
    if not isinstance(arms, Mapping) or not arms:
        raise PlanError("compare needs at least one arm, as in {'noise': [pt.inputs.InputNoise(0.3)]}")
    found = {}
    for name, arm in arms.items():
        if factorial and "+" in name:
            raise PlanError(f"arm {name!r}: with factorial, names with + are those of combinations; choose another")
        if isinstance(arm, str) or not isinstance(arm, Iterable):
            raise PlanError(f"arm {name!r} is a {type(arm).__name__}: give a list of interventions")
        found[name] = tuple(arm)
        for one in found[name]:
            if isinstance(one, type) or not isinstance(one, Intervention):
                what = f"the class {one.__name__}: make one of it" if isinstance(one, type) else repr(one)
                raise PlanError(f"arm {name!r} holds {what}; wanted are interventions such as InputNoise(0.3)")
    return found


def _main(plan: Plan, metric: str | None, direction: Direction | None) -> tuple[str, Direction]:
    """The metric that decides and how it should go: as the plan's first measure says, unless one is named."""
    for measure in plan.measures:
        if metric in (None, measure.name):
            return measure.name, direction or measure.better
    if metric is None:
        raise PlanError(f"plan {plan.name!r} measures nothing: give it measures, or held_out= to Plan.from_model")
    if direction is None:
        known = ", ".join(m.name for m in plan.measures)
        raise PlanError(
            f"which way {metric!r} should go is not known (only of {known}): say the direction (--direction)"
        )
    return metric, direction


def _explain(plan: Plan, name: str, arm: Sequence[Intervention]) -> None:
    try:
        apply(plan, arm)
    except PlanError as e:
        raise PlanError(f"arm {name!r} does not fit: {e}") from e


def methods_as_arms(slugs: Sequence[str]) -> dict[str, Arm]:
    """The primary arm's interventions of each method's study, by identifier.

    Raises:
        PerturbedError: a method has no intervention to compare.
    """
    arms: dict[str, Arm] = {}
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise PlanError(f"{slug} is named twice: name each method once")
        method: Method = load(slug)
        study: Study = method.study
        if method.card.kind != "intervention" or study.primary is None:
            raise PlanError(f"{slug} is a {method.card.kind}, not an intervention: it changes nothing to compare")
        arms[slug.replace("-", "_")] = study.arms[study.primary]
    return arms


def compare_methods(
    slugs: Sequence[str], plan: str, *, seeds: Seeds = 8, factorial: bool = False, **how: Any
) -> Record:
    """``compare`` with the primary arms of methods, and the command that reproduces it."""
    words = [_command("compare", slugs, _seeds(seeds), None, (), (), plan)]
    words += ["--factorial"] if factorial else []
    decides = {name: how.get(name) for name in ("metric", "direction", "epsilon")}
    words += [f"--{name} {shlex.quote(str(value))}" for name, value in decides.items() if value is not None]
    command = " ".join(words)
    return compare(plan, methods_as_arms(slugs), seeds=seeds, factorial=factorial, command=command, **how)


__all__ = ["Card", "Method", "card", "compare", "compare_methods", "load", "run", "setting"]
