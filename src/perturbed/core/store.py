"""The checkpoint store: one hash-verified safetensors file a key, written atomically, shared by processes."""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from perturbed.core.keys import digest, tensors_hash
from perturbed.errors import PlanError, StoreError

Tree = Any  # nested dicts, lists and tuples of tensors and JSON values


def flatten(tree: Tree) -> tuple[dict[str, Tensor], Any]:
    """Split a tree into its tensors and a JSON skeleton that names them; ``unflatten`` is the inverse.

    Raises:
        PlanError: a leaf is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Tree, path: str) -> Any:
        if isinstance(node, Tensor):
            name = f"{len(tensors)}{path}"
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[plain(k, path), walk(v, f"{path}/{k}")] for k, v in node.items()]}
        if isinstance(node, list | tuple):
            return {("tuple", "list")[isinstance(node, list)]: [walk(v, f"{path}/{i}") for i, v in enumerate(node)]}
        return plain(node, path)

    def plain(value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        kind = type(value).__name__
        raise PlanError(f"{path.lstrip('/')} holds a {kind}: only tensors and JSON values can be saved in a checkpoint")

    return tensors, walk(tree, "")


def unflatten(tensors: dict[str, Tensor], skeleton: Any) -> Tree:
    """The tree that ``flatten`` took apart."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unflatten(tensors, v) for k, v in content}
    items = [unflatten(tensors, v) for v in content]
    return tuple(items) if kind == "tuple" else items


@dataclass(frozen=True)
class Entry:
    """One file of the store."""

    key: str
    path: Path
    size: int
    used: float


class Store:
    """Checkpoints by content key under ``root``; with ``root=None`` they live in memory and go with the object.

    A file is written beside its place and moved there, so readers see all or nothing. Its hash is checked when it is
    read: a damaged or foreign file is reported, removed, and counts as absent.
    """

    def __init__(self, root: Path | None):
        self.root = root
        self._memory: dict[str, tuple[dict[str, Tensor], Any]] = {}
        if root is not None:
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise StoreError(
                    f"cannot make the store {root}: {e.strerror}; set PERTURBED_HOME to a folder of yours"
                ) from e

    def path(self, key: str) -> Path:
        """The file of ``key``."""
        assert self.root is not None
        return self.root / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tree | None:
        """The tree stored under ``key``, or None.

        Raises:
            StoreError: the file exists but may not be read.
        """
        if self.root is None:
            return unflatten(*copy.deepcopy(self._memory[key])) if key in self._memory else None
        path = self.path(key)
        try:
            tree = _parse(path.read_bytes(), key)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreError(f"cannot read {path}: {e.strerror}; mend that or set PERTURBED_HOME") from e
        except (SafetensorError, ValueError, KeyError) as e:
            print(f"perturbed: warning: checkpoint {path} is damaged ({e}): computing it again", file=sys.stderr)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # a file of somebody else's can be read all the same
            os.utime(path)
        return tree

    def put(self, key: str, tree: Tree) -> None:
        """Store ``tree`` under ``key``; what was there is replaced.

        Raises:
            PlanError: ``tree`` holds what is neither a tensor nor JSON.
            StoreError: the disk is full or the folder not writable; the store stays as it was.
        """
        tensors, skeleton = flatten(tree)
        if self.root is None:
            self._memory[key] = tensors, skeleton
            return
        body = json.dumps(skeleton)
        meta = {"key": key, "tree": body, "sha256": digest([key, body, tensors_hash(tensors)])}
        path = self.path(key)
        temporary = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
            os.close(handle)
            save_file(tensors, temporary, metadata=meta)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as e:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            raise StoreError(f"cannot write {path}: {_reason(e)}") from e

    def drop(self, key: str) -> None:
        """Forget ``key``."""
        if self.root is None:
            self._memory.pop(key, None)
        else:
            self.path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold ``key`` against other processes (the lock goes with the process, also when it is killed)."""
        if self.root is None:
            yield
            return
        path = self.root / "locks" / key
        try:
            path.parent.mkdir(exist_ok=True)
            handle = open(path, "w")  # noqa: SIM115
        except OSError as e:
            raise StoreError(f"cannot write {path}: {_reason(e)}") from e
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def entries(self) -> list[Entry]:
        """The files of the store, least recently used first."""
        files = sorted(self.root.glob("??/*.safetensors")) if self.root else []
        stats = []
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # a running study replaces and drops files
                stats.append((file, file.stat()))
        return sorted((Entry(f.stem, f, s.st_size, s.st_mtime) for f, s in stats), key=lambda e: e.used)

    def prune(self, keep_bytes: int) -> list[Entry]:
        """Remove the least recently used files until ``keep_bytes`` are left, and old remains of killed writers."""
        assert self.root is not None
        for stray in self.root.glob("??/.writing-*"):
            if stray.stat().st_mtime < time.time() - 3600:
                stray.unlink(missing_ok=True)
        entries = self.entries()
        size, gone = sum(e.size for e in entries), []
        for entry in entries:
            if size <= keep_bytes:
                break
            entry.path.unlink(missing_ok=True)
            size -= entry.size
            gone.append(entry)
        return gone


def _parse(data: bytes, key: str) -> Tree:
    """The tree in a file's bytes, read at once: safetensors opens a path again, by then perhaps another file."""
    tensors = load(data)
    meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if meta["key"] != key:
        raise ValueError("it belongs to another key")
    if meta["sha256"] != digest([key, meta["tree"], tensors_hash(tensors)]):
        raise ValueError("its hash does not match")
    return unflatten(tensors, json.loads(meta["tree"]))


def _reason(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error) or "File too large" in str(error):
        return "the disk is full; free space (`perturbed cache prune`) or set PERTURBED_HOME, then run again"
    return f"{getattr(error, 'strerror', None) or error}; mend that or set PERTURBED_HOME, then run again"


def to_device(tree: Tree, device: torch.device) -> Tree:
    """A tree with its tensors on ``device``."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {k: to_device(v, device) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(to_device(v, device) for v in tree)
    return tree
