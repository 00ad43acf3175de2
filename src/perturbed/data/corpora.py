"""Real text: the docstrings of installed packages, or a file or hub data set of one's own."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perturbed.core.keys import digest
from perturbed.core.store import Store
from perturbed.data.documents import Document
from perturbed.errors import PerturbedError
from perturbed.home import home

HARVEST = "docstrings"
PACKAGES = {"numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn"}
SHORTEST = 200
HUB_BYTES = 64_000_000
FORMATS = (".txt", ".md", ".jsonl", ".parquet")
_NOT_PROSE = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__", "_vendor"}


@dataclass(frozen=True)
class Corpus:
    """Documents and the hash of their content."""

    documents: tuple[Document, ...]
    hash: str

    def __len__(self) -> int:
        return len(self.documents)


def cache() -> Store:
    """Where harvests, tokenizers and encoded corpora are kept; a damaged file is reported and made again."""
    return Store(home() / "cache")


@functools.cache
def code() -> str:
    """Hash of the sources that decide what is cached here."""
    files = [Path(__file__).with_name(name) for name in ("corpora.py", "documents.py", "vocabulary.py")]
    return digest([file.read_text(encoding="utf-8") for file in files])


def load(data: str = HARVEST, column: str = "text") -> Corpus:
    """The documents of a source.

    Args:
        data: ``docstrings`` (or empty) for the harvest; the path of a ``.txt`` or ``.md`` file (documents end at blank
            lines), ``.jsonl`` or ``.parquet`` file, or of a folder that ``datasets`` reads; else the name of a hub data
            set, with ``name:configuration`` where it needs one (its training split, at most ``HUB_BYTES`` of text).
        column: entry that holds the text, in formats that have several; other entries that are texts become metadata.

    Raises:
        PerturbedError: missing file, unknown format, absent column, no document, or a data set that cannot be had.
    """
    return _load(data, column, str(home()))


@functools.lru_cache(maxsize=4)
def _load(data: str, column: str, where: str) -> Corpus:
    if data in ("", HARVEST):
        return _kept("harvest", [_versions()], harvest)
    path = Path(data).expanduser()
    looks_local = data.startswith((".", "/", "~")) or path.suffix in FORMATS
    if path.is_file():
        corpus = _corpus(read_file(path, column))
    elif path.is_dir():
        corpus = _corpus(read_hub(str(path.absolute()), column))
    elif looks_local:
        raise PerturbedError(f"data: there is no file {data!r} (looked in {Path.cwd()}): check the path")
    else:
        corpus = _kept("hub", [data, column], lambda: read_hub(data, column))
    if not corpus.documents:
        raise PerturbedError(
            f"data: {data!r} holds no text (column {column!r}): an empty data set cannot be trained on"
        )
    return corpus


def harvest() -> Iterator[Document]:
    """Docstrings of the standard library and of ``PACKAGES``, each at most once.

    A document is the cleaned docstring of a module, class or function of at least ``SHORTEST`` characters; its metadata
    are ``package``, ``module`` and ``object``. The order is that of these three names and of the line, so it depends on
    the installed versions only. Nothing is imported: sources are parsed.
    """
    seen: set[str] = set()
    for package, root in _roots():
        for file in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
            parts = file.relative_to(root).with_suffix("").parts
            if _NOT_PROSE.isdisjoint(parts):
                module = ".".join([*([package] if package != "stdlib" else []), *parts]).removesuffix(".__init__")
                for name, text in _docstrings(file):
                    if len(text) >= SHORTEST and text not in seen:
                        seen.add(text)
                        yield Document(text, {"package": package, "module": module, "object": name})


def read_file(path: Path, column: str = "text") -> Iterator[Document]:
    """Documents of a text, JSON-lines or Parquet file; empty ones are left out.

    Raises:
        PerturbedError: unknown format, a line that is not JSON, text that is not UTF-8, or no such column.
    """
    if path.suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise PerturbedError(
            f"data: {str(path)!r} has the unknown format {path.suffix!r}: convert it to one of {known}"
        )
    if path.suffix == ".parquet":
        rows = _parquet(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise PerturbedError(f"data: {str(path)!r} is not UTF-8 at byte {e.start}: convert it") from e
        if path.suffix != ".jsonl":
            blocks = "\n".join(line.rstrip() for line in text.split("\n")).split("\n\n")
            return (Document(block.strip("\n"), {"file": path.name}) for block in blocks if block.strip())
        rows = _json_lines(path, text)
    return _documents(rows, column, str(path))


def read_hub(name: str, column: str = "text") -> Iterator[Document]:
    """Documents of the training split of a hub data set (or local folder), through ``datasets``.

    Raises:
        PerturbedError: it cannot be had, with the reason; or it has no such column.
    """
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train", streaming=True)
        yield from _documents(_first_bytes(rows, column, name), column, name)
    except PerturbedError:
        raise
    except Exception as e:  # datasets raises whatever its readers and the network raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise PerturbedError(
            f"data: no file and no loadable hub data set {name!r}: {reason} (give a path, a hub name, or {HARVEST!r})"
        ) from e


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(distribution) for name, distribution in PACKAGES.items()}
    return {"python": platform.python_version(), "packages": json.dumps(found, sort_keys=True)}


def _roots() -> Iterator[tuple[str, Path]]:
    yield "stdlib", Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(PACKAGES):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            yield name, Path(next(iter(spec.submodule_search_locations)))


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Dotted object name and docstring of everything in a source file, in the order of lines."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and samples of broken code are not documents
    yield from _walk(tree, "")


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield name, _encodable(text).strip()
        for child in node.body:
            inner = getattr(child, "name", "")
            yield from _walk(child, f"{name}.{inner}".lstrip(".") if inner else name)
    elif isinstance(node, ast.If | ast.Try | ast.With):
        for child in [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]:
            inner = getattr(child, "name", "")
            yield from _walk(child, f"{name}.{inner}".lstrip(".") if inner else name)


def _json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise PerturbedError(f"data: {str(path)!r} line {number} is not JSON ({e.msg}): mend or drop it") from e
            yield row if isinstance(row, dict) else {"text": row}


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as e:
        raise PerturbedError(f"data: {str(path)!r} is not a Parquet file ({e}): write it again") from e


def _first_bytes(rows: Iterable[dict[str, Any]], column: str, name: str) -> Iterator[dict[str, Any]]:
    size = 0
    for row in rows:
        if size > HUB_BYTES:
            print(f"perturbed: note: of {name!r} the first {size / 1e6:.0f} MB of text are used", file=sys.stderr)
            return
        size += len(str(row.get(column, "")).encode())
        yield row


def _documents(rows: Iterable[dict[str, Any]], column: str, name: str) -> Iterator[Document]:
    for row in rows:
        if column not in row:
            known = ", ".join(sorted(row))
            raise PerturbedError(f"data: {name!r} has no column {column!r}: set column to one of {known}")
        if isinstance(row[column], str) and row[column].strip():
            yield Document(
                _encodable(row[column]), {k: v for k, v in row.items() if k != column and isinstance(v, str)}
            )


def _encodable(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8, replaced."""
    return text.encode("utf-8", "replace").decode()


def _corpus(documents: Iterable[Document]) -> Corpus:
    found = tuple(documents)
    return Corpus(found, hashlib.sha256(_to_lines(found)).hexdigest())


def _to_lines(documents: Iterable[Document]) -> bytes:
    rows = ([d.text, dict(d.metadata)] for d in documents)
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()


def _kept(kind: str, about: list[Any], make: Callable[[], Iterable[Document]]) -> Corpus:
    """The corpus kept in the cache, made where it is missing or damaged."""
    store = cache()
    key = f"{digest([kind, about, code()])}-{kind}"
    tree = store.get(key)
    if tree is None:
        print(f"perturbed: collecting {'the docstrings of installed packages' if kind == 'harvest' else about[0]} …",
              file=sys.stderr)  # fmt: skip
        corpus = _corpus(make())
        if corpus.documents:
            store.put(key, {"lines": torch.frombuffer(bytearray(_to_lines(corpus.documents)), dtype=torch.uint8)})
        return corpus
    lines = tree["lines"].numpy().tobytes()
    documents = tuple(Document(text, metadata) for text, metadata in map(json.loads, lines.decode().splitlines()))
    return Corpus(documents, hashlib.sha256(lines).hexdigest())
