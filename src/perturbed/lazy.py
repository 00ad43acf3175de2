"""The public names of a package's files, found where they are defined and imported when they are asked for."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perturbed.errors import nearest


@functools.cache
def defined(package: str) -> dict[str, str]:
    """The module of each public class and function of a package's files, which are read and not imported.

    A name that a file has too means the file.
    """
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    folder, found = Path(spec.origin).parent, {}
    for path in sorted(folder.glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                found[node.name] = f"{package}.{path.stem}"
    return {name: module for name, module in found.items() if not (folder / f"{name}.py").exists()}


def getter(package: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package: its files, and what they define."""

    def get(name: str) -> Any:
        if not name.startswith("_"):
            if name in defined(package):
                return getattr(importlib.import_module(defined(package)[name]), name)
            if find_spec(f"{package}.{name}"):
                return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"{package} has no {name!r}: {nearest(name, defined(package))}")

    return get


def lister(package: str) -> Callable[[], list[str]]:
    """``__dir__`` of a package: what its files define."""
    return lambda: sorted(defined(package))
