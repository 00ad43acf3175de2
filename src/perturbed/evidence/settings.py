"""What a user may set from outside: fields of plans and arms, plans of their own."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perturbed.core.plan import Plan
from perturbed.errors import PlanError, nearest
from perturbed.evidence.pool import load_file
from perturbed.evidence.runner import Fixed
from perturbed.evidence.study import Recipe, Study


def recipes() -> dict[str, type[Any]]:
    """The built-in plans by name: the dataclasses with a ``NAME`` in ``perturbed.plans``."""
    import perturbed.plans

    found: dict[str, type[Any]] = {}
    for info in pkgutil.iter_modules(perturbed.plans.__path__):
        module = importlib.import_module(f"perturbed.plans.{info.name}")
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        found |= {vars(v)["NAME"]: v for v in own if "NAME" in vars(v)}
    return found


def plan_file(spec: str) -> Path | None:
    """The file of a ``FILE.py:NAME`` spec, or None for the name of a built-in plan."""
    file, colon, _ = spec.rpartition(":")
    return Path(file).resolve() if colon and file.endswith(".py") else None


def load_plan(spec: str) -> Recipe:
    """The recipe behind ``--plan``: a built-in name, or ``FILE.py:NAME`` (a plan, or a call or class that gives one).

    Raises:
        PlanError: there is no such plan, the file does not import, or what it names is no plan.
    """
    path = plan_file(spec)
    if path is None:
        known = recipes()
        if spec not in known:
            raise PlanError(f"no plan is called {spec!r}: {nearest(spec, known)}; your own is FILE.py:NAME")
        return typing.cast(Recipe, known[spec]())
    name = spec.rpartition(":")[2]
    if not path.exists():
        raise PlanError(f"no file {path} for --plan {spec}")
    try:
        module = load_file(path)
    except (Exception, SystemExit) as e:
        raise PlanError(f"{path} does not import: {_told(e, path)} (try `python {path.name}`)") from e
    if not hasattr(module, name):
        known = nearest(name, [n for n in vars(module) if not n.startswith("_")])  # type: ignore[assignment]
        raise PlanError(f"{path} has no {name!r}: {known}")
    return _recipe(getattr(module, name), spec)


def _recipe(found: Any, spec: str) -> Recipe:
    made = _called(found, spec) if isinstance(found, type) else found
    if isinstance(made, Plan):
        return Fixed(made)
    plan = _called(made, spec) if callable(made) else made
    if not isinstance(plan, Plan):
        raise PlanError(f"{spec} is {type(plan).__name__}, no Plan: name a Plan, or a call that returns one")
    return typing.cast(Recipe, made) if dataclasses.is_dataclass(made) else Fixed(plan)


def _called(found: Any, spec: str) -> Any:
    try:
        return found()
    except PlanError:
        raise
    except (Exception, SystemExit) as e:
        file = plan_file(spec)
        raise PlanError(f"{spec} gives no plan: {_told(e, file)}; it is called without arguments") from e


def _told(e: BaseException, file: Path | None) -> str:
    """What went wrong, and the last line of the user's file that led there."""
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(file)]
    return f"{type(e).__name__}: {e}" + (f", at {file} line {lines[-1]}" if lines else "")


def apply_settings(study: Study, settings: Sequence[str]) -> Study:
    """``study`` with each ``FIELD=VALUE`` set, where FIELD is ``plan.NAME``, ``ARM.NAME`` or a NAME found only once.

    Raises:
        PlanError: the field does not exist, is ambiguous, or the value is not of its type.
    """
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals:
            raise PlanError(f"--set {setting}: write FIELD=VALUE")
        study = _set(study, field.strip(), value.strip())
    return study


def _set(study: Study, field: str, value: str) -> Study:
    known = _settable(study)
    full = [name for name in known if name == field or name.partition(".")[2] == field]
    owners = {name.partition(".")[0] for name in full}
    if not full:
        raise PlanError(f"--set {field}: no such field: {nearest(field, known)}")
    if len(owners) > 1:
        raise PlanError(f"--set {field} is ambiguous: write one of {', '.join(f'{name}={value}' for name in full)}")
    owner, _, name = full[0].partition(".")
    if owner == "plan":
        plan: Any = dataclasses.replace(study.plan, **{name: parse(type(study.plan), name, value)})  # type: ignore[type-var]
        return dataclasses.replace(study, plan=plan)
    arm = tuple(
        dataclasses.replace(i, **{name: parse(type(i), name, value)}) if _has(i, name) else i  # type: ignore[type-var]
        for i in study.arms[owner]
    )
    return dataclasses.replace(study, arms={**study.arms, owner: arm})


def _has(thing: Any, name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(thing)}


def _settable(study: Study) -> list[str]:
    plan: Any = study.plan
    own = [f"plan.{f.name}" for f in dataclasses.fields(plan)] if not isinstance(plan, Fixed) else []
    arms = [f"{a}.{f.name}" for a, arm in study.arms.items() for i in arm for f in dataclasses.fields(i)]  # type: ignore[arg-type]
    return list(dict.fromkeys([*own, *arms]))


def parse(owner: type[Any], name: str, text: str) -> Any:
    """``text`` as a value of the type of a dataclass field.

    Raises:
        PlanError: it is not of that type.
    """
    from pydantic import TypeAdapter, ValidationError

    hint = typing.get_type_hints(owner)[name]
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    value: Any = None if text.lower() == "none" else text
    try:
        return adapter.validate_json(text) if text[:1] in "[{" else adapter.validate_python(value)
    except ValidationError as e:
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise PlanError(f"--set {name}={text}: {e.errors()[0]['msg'].lower()} (wanted {wanted})") from e
