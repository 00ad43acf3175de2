"""Content keys: what a slot is, told by its class, fields and source, so that equal stages share one checkpoint."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
import sysconfig
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

_STDLIB = Path(sysconfig.get_path("stdlib"))


class Unkeyed(Exception):
    """A slot whose content cannot be told (a closure, an object without a fingerprint), so nothing is shared."""


def digest(description: Any) -> str:
    """SHA-256 of the canonical JSON of a description."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe(thing: Any) -> Any:
    """What ``thing`` is, as JSON that is equal in every process in which it would act equally.

    Raises:
        Unkeyed: its content cannot be told.
    """
    if thing is None or isinstance(thing, bool | int | str):
        return thing
    if isinstance(thing, float):
        return {"float": thing.hex()}
    if isinstance(thing, list | tuple):
        return [describe(item) for item in thing]
    if isinstance(thing, set | frozenset):
        return {"set": sorted(json.dumps(describe(item), sort_keys=True) for item in thing)}
    if isinstance(thing, Mapping):
        return {"map": sorted([json.dumps(describe(k)), describe(v)] for k, v in thing.items())}
    if hasattr(thing, "fingerprint") and not isinstance(thing, type):
        return {**_of_class(type(thing)), "fingerprint": thing.fingerprint()}
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {**_of_class(type(thing)), "fields": fields}
    return _describe_object(thing)


def _describe_object(thing: Any) -> Any:
    if isinstance(thing, enum.Enum):
        return {**_of_class(type(thing)), "value": thing.name}
    if isinstance(thing, functools.partial):
        return {"partial": describe(thing.func), "args": describe(thing.args), "keywords": describe(thing.keywords)}
    if isinstance(thing, types.MethodType):
        return {"method": thing.__func__.__qualname__, "of": describe(thing.__self__)}
    if isinstance(thing, types.FunctionType):
        if thing.__closure__:
            raise Unkeyed(f"{thing.__module__}.{thing.__qualname__} is a closure")
        return _of_class(thing)
    if isinstance(thing, types.BuiltinFunctionType | type):
        return _of_class(thing)
    if isinstance(thing, torch.dtype | torch.device):
        return str(thing)
    if isinstance(thing, Path):
        return {"path": str(thing)}
    if isinstance(thing, Tensor):
        return tensor_hash(thing)
    if isinstance(thing, Module):
        frozen = [name for name, p in thing.named_parameters() if not p.requires_grad]
        config: Any = getattr(thing, "config", None)
        told = config.to_dict() if hasattr(config, "to_dict") else config
        shape = {"repr": repr(thing), "config": json.dumps(told, sort_keys=True, default=describe), "frozen": frozen}
        return {**_of_class(type(thing)), **shape, "state": tensors_hash(thing.state_dict())}
    if hasattr(thing, "_fingerprint"):  # datasets.Dataset
        return {**_of_class(type(thing)), "fingerprint": thing._fingerprint}
    raise Unkeyed(f"{type(thing).__module__}.{type(thing).__qualname__} has no fingerprint()")


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    h = hashlib.sha256(f"{data.dtype}{list(data.shape)}".encode())
    h.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return h.hexdigest()


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """Hash of a state dict."""
    return digest({k: tensor_hash(v) if isinstance(v, Tensor) else describe(v) for k, v in tensors.items()})


def _of_class(thing: Any) -> dict[str, str]:
    name = f"{thing.__module__}.{thing.__qualname__}"
    module = sys.modules.get(thing.__module__)
    if "<" in name:
        raise Unkeyed(f"{name} is a closure, a lambda or a local class")
    typed_in = module is None or (thing.__module__ == "__main__" and not hasattr(module, "__file__"))
    if typed_in and not isinstance(thing, types.BuiltinFunctionType):
        raise Unkeyed(f"{name} has no source file")
    return {"name": name, "source": source_hash(thing.__module__)}


@functools.cache
def source_hash(module: str) -> str:
    """Hash of a module's source and of the modules of the same package or folder that it imports, and theirs.

    Modules of installed packages count by the version of their distribution, not by source.
    """
    seen: dict[str, str] = {}
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is not None:
        _collect(module, Path(file), seen)
    return digest(seen)


def _collect(name: str, file: Path, seen: dict[str, str]) -> None:
    top = name.split(".")[0]
    elsewhere = {"site-packages", "dist-packages"} & set(file.parts) or _STDLIB in file.parents
    if elsewhere and top != __package__.split(".")[0]:
        seen |= _distributions(top)
        return
    if name in seen or file.suffix != ".py":
        return
    text = file.read_text(encoding="utf-8")
    seen[name] = hashlib.sha256(text.encode()).hexdigest()
    for imported in _imports(ast.parse(text), name if file.name == "__init__.py" else name.rpartition(".")[0]):
        found = _file(imported, file)
        if found and (imported.split(".")[0] == top or file.parent in found.parents):
            _collect(imported, found, seen)
        else:
            seen |= _distributions(imported.split(".")[0])


@functools.cache
def _distributions(module: str) -> dict[str, str]:
    """Versions of the installed distributions that give a top-level module."""
    return {f"version of {name}": importlib.metadata.version(name) for name in _installed().get(module, ())}


@functools.cache
def _installed() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _imports(tree: ast.Module, package: str) -> set[str]:
    found: set[str] = set()
    parts = package.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            found |= {origin, *(f"{origin}.{alias.name}" for alias in node.names)}
    return found


def _file(name: str, near: Path) -> Path | None:
    """The file of a module, also of one that is only imported later, inside a function."""
    top, module = sys.modules.get(name.split(".")[0]), sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        return Path(file) if file else None
    root = Path(top.__path__[0]).parent if top and hasattr(top, "__path__") else near.parent
    path = root.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides a run's bits."""
    names = (
        "torch", "transformers", "tokenizers", "diffusers", "peft", "accelerate", "datasets", "numpy", "scipy",
        "scikit-learn", "perturbed",
    )  # fmt: skip
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def machine() -> dict[str, str]:
    """The machine type within which bit equality is promised."""
    return {
        "system": platform.system(), "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }  # fmt: skip
