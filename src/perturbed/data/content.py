"""What an object holds, in full: models with their configuration, arrays, examples, tokenizers."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Module

from perturbed.core.keys import Unkeyed, describe, digest, tensor_hash

# Transformers' GenerationConfig keeps Python's hash of itself, which differs from process to process
_OF_THE_PROCESS = frozenset({"_original_object_hash"})


def content(thing: Any) -> Any:
    """``thing`` as JSON that is equal where its content is: what pickling would save of it, arrays by their hash.

    Of a model that is, per module, its class, plain attributes, hooks, parameters (and which are frozen) and buffers;
    not whether it is in training mode. Functions and classes count by name and source, as in ``core.keys.describe``.

    Raises:
        Unkeyed: some part cannot be told, such as a lambda, a file or a lock.
    """
    return _told(thing, ())


def _told(thing: Any, outer: tuple[int, ...]) -> Any:
    if id(thing) in outer:
        raise Unkeyed(f"{type(thing).__module__}.{type(thing).__qualname__} contains itself")
    inside = (*outer, id(thing))
    array = _numbers(thing)
    if array is not None:
        return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
    if isinstance(thing, Tensor):
        return [tensor_hash(thing), thing.requires_grad]
    if isinstance(thing, bytes | bytearray):
        return hashlib.sha256(thing).hexdigest()
    if isinstance(thing, Mapping):
        items = [(k, v) for k, v in thing.items() if k not in _OF_THE_PROCESS]
        return [describe(type(thing)), [[_told(k, inside), _told(v, inside)] for k, v in items]]
    if isinstance(thing, list | tuple):
        return [_told(v, inside) for v in thing]
    if isinstance(thing, Module):
        return [[name, describe(type(m)), _attributes(m, (*outer, id(m)))] for name, m in thing.named_modules()]
    if isinstance(thing, types.MethodType):
        return {"method": thing.__func__.__qualname__, "of": _told(thing.__self__, inside)}
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type) and not hasattr(thing, "fingerprint"):
        return _reduced(thing, inside)  # not by its fields alone: a Transformers configuration has more than those
    try:
        return describe(thing)
    except Unkeyed:
        return _reduced(thing, inside)


def _numbers(value: Any) -> np.ndarray | None:
    """Arrays, and lists of numbers that make one: hashing those whole is hundreds of times faster than by item."""
    in_list = isinstance(value, list) and value and isinstance(value[0], int | float | list | np.ndarray | np.generic)
    if not in_list and not isinstance(value, np.ndarray):
        return None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged, or of tensors that are no arrays
        return None
    return array if array.dtype.kind in "biuf" and array.ndim > 0 else None


def _attributes(module: Module, outer: tuple[int, ...]) -> Any:
    """What a module has beside its submodules; hooks that are not there leave empty containers of many names."""
    own = {k: v for k, v in vars(module).items() if k not in ("_modules", "training")}
    return {k: _told(v, outer) for k, v in own.items() if not (isinstance(v, dict | set | list) and not v)}


def _reduced(thing: Any, outer: tuple[int, ...]) -> Any:
    """An object by the parts that pickle would put it together from."""
    if isinstance(thing, types.FunctionType):
        raise Unkeyed(f"{thing.__module__}.{thing.__qualname__} is a closure or lambda")
    try:
        reduced = thing.__reduce_ex__(2)
    except Exception as e:
        raise Unkeyed(f"{type(thing).__module__}.{type(thing).__qualname__} cannot be told ({e})") from e
    if isinstance(reduced, str):
        return {"global": reduced, "of": describe(type(thing))}
    parts = [list(part) if hasattr(part, "__next__") else part for part in reduced]
    return [describe(type(thing)), *(_told(part, outer) for part in parts)]


def content_hash(*things: Any) -> str:
    """SHA-256 of the ``content`` of things.

    Raises:
        Unkeyed: some part cannot be told.
    """
    return digest(content(things))
