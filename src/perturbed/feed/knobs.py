"""What of a study the web page may set: the fields that the card bounds, of the arm that the claim is about.

Everything is read from the source files, without importing them: methods need torch, which the feed never loads.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perturbed.core import registry
from perturbed.errors import PerturbedError, nearest
from perturbed.feed.papers import SITES, spaced


class KnobError(PerturbedError):
    """A setting that a card does not allow; the message says which and why."""


@dataclass(frozen=True)
class Field:
    """One number that may be set.

    Args:
        name: Of the field.
        low: Smallest value.
        high: Largest value.
        whole: Only integers make sense.
        about: What it does, in the words of the class that declares it; None where that says nothing.
    """

    name: str
    low: float
    high: float
    whole: bool = False
    about: str | None = None


@functools.cache
def fields(slug: str) -> tuple[Field, ...]:
    """What may be set of a method's study, in the order of its card.

    Raises:
        PerturbedError: No method has that slug.
    """
    card = registry.card(slug)
    if primary(slug) is None:
        return ()
    declaring = {name: [cls for cls in _classes(slug) if _hint(cls, name)] for name in card.knobs}
    return tuple(
        Field(name, low, high, _whole(declaring[name], name), _about(declaring[name], name))
        for name, (low, high) in card.knobs.items()
    )


@functools.cache
def primary(slug: str) -> str | None:
    """The arm that a method's claim is about; None where ``STUDY`` names none, or not literally.

    Raises:
        PerturbedError: No method has that slug.
    """
    registry.card(slug)
    told = _of_study(slug, "primary")
    return told.value if isinstance(told, ast.Constant) and isinstance(told.value, str) else None


def checked(slug: str, settings: Mapping[str, object]) -> dict[str, float]:
    """``settings`` as the numbers that they are, in the order of the card.

    Raises:
        PerturbedError: No method has that slug.
        KnobError: A field is none that the card bounds, or a value is no finite number, out of bounds, or broken
            where the field is whole.
    """
    known = {field.name: field for field in fields(slug)}
    for name in settings:
        if name not in known:
            what = nearest(name, known) if known else "nothing of it may be"
            raise KnobError(f"{name[:40]!r} of {slug} cannot be set here: {what}")
    return {name: _value(field, settings[name]) for name, field in known.items() if name in settings}


def _value(field: Field, given: object) -> float:
    allowed = f"{'a whole number' if field.whole else 'a number'} from {field.low:g} to {field.high:g}"
    refusal = KnobError(f"{field.name} is {allowed}, not {str(given)[:40]!r}")
    if isinstance(given, bool) or not isinstance(given, int | float) or not field.low <= given <= field.high:
        raise refusal  # nan is within no bounds
    if field.whole and given != int(given):
        raise refusal
    return int(given) if field.whole else float(given)


def _file(slug: str) -> Path:
    return registry.FOLDER / f"{slug.replace('-', '_')}.py"


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _whole(declaring: Sequence[ast.ClassDef], name: str) -> bool:
    """Whether every class of the arm that declares the field ``name`` declares it an integer."""
    return bool(declaring) and all(_hint(cls, name) in ("int", "int | None") for cls in declaring)


def _about(declaring: Sequence[ast.ClassDef], name: str) -> str | None:
    """What the first of the classes to say so says of its field, in the section ``Args:`` of its docstring."""
    entry = rf"^Args:\n(?:(?: .*)?\n)*? {{4}}{re.escape(name)}: (.+(?:\n {{5,}}.+)*)"
    found = (re.search(entry, ast.get_docstring(cls) or "", re.MULTILINE) for cls in declaring)
    return next((spaced(told[1]) for told in found if told), None)


def _classes(slug: str) -> Iterator[ast.ClassDef]:
    """The classes that the primary arm uses, of the method's file or a site, and those that they inherit from there."""
    tree = _tree(_file(slug))
    used = _used(tree, _arm(slug) or tree)
    yield from _defined(tree, used)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[1:2] in [[s] for s in SITES]:
            yield from _defined(_tree(_source(node.module)), used & {alias.name for alias in node.names})


def _arm(slug: str) -> ast.expr | None:
    """What stands for the primary arm in ``STUDY``; None where it is not written literally."""
    arms, name = _of_study(slug, "arms"), primary(slug)
    if not isinstance(arms, ast.Dict):
        return None
    written = zip(arms.keys, arms.values, strict=True)
    return next((value for key, value in written if isinstance(key, ast.Constant) and key.value == name), None)


def _of_study(slug: str, name: str) -> ast.expr | None:
    """An argument of the call that makes ``STUDY``."""
    for node in _tree(_file(slug)).body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["STUDY"]:
            told = node.value.keywords if isinstance(node.value, ast.Call) else []
            return next((keyword.value for keyword in told if keyword.arg == name), None)
    return None


def _used(tree: ast.Module, part: ast.AST) -> set[str]:
    """The names that a part of a file uses, and those used by what the file says under these names."""
    said: dict[str, ast.AST] = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            said |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
    used: set[str] = set()
    waiting = [part]
    while waiting:
        names = {node.id for node in ast.walk(waiting.pop()) if isinstance(node, ast.Name)} - used
        waiting += [said[name] for name in names if name in said]
        used |= names
    return used


def _defined(tree: ast.Module, names: set[str]) -> Iterator[ast.ClassDef]:
    """The classes of those names in a file, and those that they inherit from there."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            yield node
            yield from _defined(tree, {ast.unparse(base) for base in node.bases} - {node.name})


def _hint(cls: ast.ClassDef, name: str) -> str | None:
    """The type that a class declares its field ``name`` to have, or None where it declares none of that name."""
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return ast.unparse(node.annotation)
    return None


def _source(module: str) -> Path:
    folder = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
