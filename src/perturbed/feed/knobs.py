"""What of a study the web page may set: the fields that the card bounds, of the arm that the claim is about.

Everything is read from the source files, without importing them: methods need torch, which the feed never loads.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from perturbed.core import registry
from perturbed.errors import PerturbedError, nearest
from perturbed.feed.papers import SITES


class KnobError(PerturbedError):
    """A setting that a card does not allow; the message says which and why."""


@dataclass(frozen=True)
class Field:
    """One number that may be set, from ``low`` to ``high``; ``whole`` where only integers make sense."""

    name: str
    low: float
    high: float
    whole: bool = False


@functools.cache
def fields(slug: str) -> tuple[Field, ...]:
    """What may be set of a method's study, in the order of its card.

    Raises:
        PerturbedError: No method has that slug.
    """
    card = registry.card(slug)
    if primary(slug) is None:
        return ()
    return tuple(Field(name, low, high, _whole(_file(slug), name)) for name, (low, high) in card.knobs.items())


@functools.cache
def primary(slug: str) -> str | None:
    """The arm that a method's claim is about; None where ``STUDY`` names none, or not literally.

    Raises:
        PerturbedError: No method has that slug.
    """
    registry.card(slug)
    for node in _tree(_file(slug)).body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["STUDY"]:
            for keyword in node.value.keywords if isinstance(node.value, ast.Call) else ():
                if keyword.arg == "primary" and isinstance(keyword.value, ast.Constant):
                    return keyword.value.value if isinstance(keyword.value.value, str) else None
    return None


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


def _whole(method: Path, name: str) -> bool:
    """Whether every class that the method takes from a site, or defines, declares its field ``name`` an integer."""
    hints = [hint for cls in _classes(method) for hint in _hints(cls, name)]
    return bool(hints) and all(hint in ("int", "int | None") for hint in hints)


def _classes(method: Path) -> Iterator[ast.ClassDef]:
    tree = _tree(method)
    yield from _defined(tree, {node.name for node in tree.body if isinstance(node, ast.ClassDef)})
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[1:2] in [[s] for s in SITES]:
            yield from _defined(_tree(_source(node.module)), {alias.name for alias in node.names})


def _defined(tree: ast.Module, names: set[str]) -> Iterator[ast.ClassDef]:
    """The classes of those names in a file, and those that they inherit from there."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            yield node
            yield from _defined(tree, {ast.unparse(base) for base in node.bases} - {node.name})


def _hints(cls: ast.ClassDef, name: str) -> Iterator[str]:
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            yield ast.unparse(node.annotation)


def _source(module: str) -> Path:
    folder = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
