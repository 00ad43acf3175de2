"""The ledger: one append-only file a study, one record a line, each sealed by the hash of its content.

A line is the canonical JSON of a record with its ``hash``. Two folders hold such files: the one that ships with the
package (the committed evidence) and the user's own under `perturbed.home.home`. Importing this module and reading
stored verdicts need the standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from perturbed.errors import PerturbedError
from perturbed.evidence.verdict import VERDICT_VERSION, judge_record
from perturbed.home import home

Record = dict[str, Any]

SCHEMA = 1
REQUIRED = (
    "schema", "slug", "scale", "registered", "metric", "transform", "direction", "primary", "reference", "sham",
    "epsilon", "alpha", "bounds", "seeds", "scores", "arms", "gates", "verdict", "trivial", "specific",
)  # fmt: skip


class LedgerError(PerturbedError, ValueError):
    """A ledger holds something that cannot be believed; the message says where, what, and what to do."""


class TornLineWarning(UserWarning):
    """The last line of a ledger was cut off by a crash while it was written; the records before it stand."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found in a folder: how many records hold, and a message for each thing that does not."""

    records: int
    problems: tuple[str, ...]


def canonical(record: Mapping[str, Any]) -> str:
    """Return the canonical JSON of a record: keys sorted, no spaces, UTF-8.

    Raises:
        LedgerError: The record holds NaN, an infinity or something that JSON has no form for.
    """
    try:
        # Keys that are not strings sort otherwise once they are read back, so they are made strings first.
        plain = json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LedgerError(f"a record must be plain JSON ({error}): write what is undefined as null") from error
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def record_hash(record: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of the canonical JSON of everything in the record but its ``hash``."""
    rest = {key: value for key, value in record.items() if key != "hash"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def package_folder() -> Path:
    """Return the folder of the committed evidence, which ships with the package."""
    return Path(__file__).resolve().parent.parent / "ledger"


def user_folder() -> Path:
    """Return the folder of the user's own records, which need not exist yet."""
    return home() / "ledger"


def file_of(folder: Path, slug: str) -> Path:
    """Return the ledger file of a study.

    Raises:
        LedgerError: ``slug`` is not made of lower-case letters, digits and single hyphens.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise LedgerError(f"{slug!r} is not a slug: those are lower-case letters, digits and single hyphens")
    return folder / f"{slug}.jsonl"


def append(path: Path, record: Mapping[str, Any]) -> Record:
    """Seal a record and add it to a ledger as its last line.

    The file is locked against other writers, earlier bytes are not touched, and the line is on the disk when this
    returns; if it cannot be written whole, what was written of it is taken back. The torn line of an earlier crash,
    which never was a record, gives way with a warning.

    Args:
        path: The ledger; it and its folder are made where missing.
        record: A record whose derived fields `judge_record` of this version has computed.

    Returns:
        The record as stored, with ``verdict_version`` and ``hash``.

    Raises:
        LedgerError: Fields are missing, the record is not plain JSON, or the file cannot be written.
    """
    if missing := [name for name in REQUIRED if name not in record]:
        raise LedgerError(f"a record for {path} lacks {', '.join(missing)}")
    stored: Record = json.loads(canonical({**record, "verdict_version": VERDICT_VERSION}))
    stored["hash"] = record_hash(stored)
    line = (canonical(stored) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_last(descriptor, path, line)
        finally:
            os.close(descriptor)
        _sync_folder(path.parent)
    except OSError as error:
        raise LedgerError(
            f"{path}: the record could not be written ({error}); make room or choose a writable folder"
        ) from error
    return stored


def read(path: Path) -> list[Record]:
    """Return the records of a ledger, oldest first, each checked against its hash.

    A last line that a crash cut off is left out with a `TornLineWarning`.

    Raises:
        LedgerError: The file does not exist, or a line is not JSON, has an unknown schema, lacks fields or does not
            hash to what it says (something in it was edited).
    """
    return [_checked(path, number, line) for number, line in _lines(path)]


def latest(slug: str, scale: str = "laptop", *, own: bool = True) -> Record | None:
    """Return the newest registered record of a study at a scale, or None.

    The committed evidence goes first; the user's ``own`` record of the registered study may stand in where there is
    none.

    Raises:
        LedgerError: A line that had to be read is damaged.
    """
    for folder in (package_folder(), user_folder())[: 1 + own]:
        path = file_of(folder, slug)
        if not path.exists():
            continue
        for number, line in reversed(list(_lines(path))):
            record = _parsed(path, number, line)
            if record.get("scale") == scale and record.get("registered") is True:
                return _sealed(path, number, line, record)
    return None


def stored_verdict(slug: str, scale: str = "laptop") -> str | None:
    """Return the verdict of `latest`, or None without a record: for lists and the feed, which cannot wait.

    The stored verdict is taken as it is when the record's hash holds and its rules are those of this version; under
    other rules it is recomputed from the raw scores.

    Raises:
        LedgerError: The record is damaged.
    """
    record = latest(slug, scale)
    if record is None:
        return None
    current = record.get("verdict_version") == VERDICT_VERSION
    return str(record["verdict"] if current else recompute(record)["verdict"])


def recompute(record: Mapping[str, Any]) -> Record:
    """Recompute a record's statistics and verdicts from its raw scores and compare them with the stored ones.

    Numbers may differ by 1e-9 of themselves, or by rounding of the scores they come from. A record of another
    ``verdict_version`` was judged by other rules, so nothing is compared.

    Returns:
        What `judge_record` returns.

    Raises:
        LedgerError: Stored and recomputed values disagree (the first is named), or the scores cannot be judged.
    """
    try:
        fresh = judge_record(record)
    except ValueError as error:
        raise LedgerError(f"the record of {record['slug']!r} cannot be judged again: {error}") from error
    if record.get("verdict_version", VERDICT_VERSION) != VERDICT_VERSION:
        return fresh
    magnitudes = [abs(x) for arm in record["scores"].values() for x in arm.values() if x is not None]
    rounding = 1e-12 * max(magnitudes, default=0.0)
    for name, value in fresh.items():
        if difference := _difference(name, record[name], value, rounding):
            raise LedgerError(
                f"the record of {record['slug']!r} does not follow from its scores: {difference}. Run the study again "
                "and discard this record"
            )
    return fresh


def verify(folder: Path) -> Verification:
    """Check every line of every ledger in a folder: JSON, schema, hash, file name, and statistics recomputed.

    Nothing is raised: each line that does not hold is one message in ``problems``. A folder that does not exist
    holds no records.
    """
    good, problems = 0, []
    for path in sorted(folder.glob("*.jsonl")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TornLineWarning)
            lines = list(_lines(path))
        problems += [str(warning.message) for warning in caught]
        for number, line in lines:
            try:
                record = _checked(path, number, line)
                if (record["slug"] or "compare") != path.stem:
                    _reject(
                        path, number, f"this is a record of {record['slug']!r}", "move it to the ledger of that name"
                    )
                recompute(record)
            except LedgerError as error:
                message = str(error)
                problems.append(message if message.startswith(str(path)) else f"{path}, line {number}: {message}")
            else:
                good += 1
    return Verification(records=good, problems=tuple(problems))


def _write_last(descriptor: int, path: Path, line: bytes) -> None:
    end = os.lseek(descriptor, 0, os.SEEK_END)
    tail = _after_last_newline(descriptor, end)
    if tail and not _is_json(tail):
        _warn_torn(path, len(tail), "the new record takes its place")
        end -= len(tail)
        os.ftruncate(descriptor, end)
    elif tail:
        line = b"\n" + line
    os.lseek(descriptor, end, os.SEEK_SET)
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            raise OSError(f"only {written} of {len(line)} bytes fitted")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def _after_last_newline(descriptor: int, end: int) -> bytes:
    return os.pread(descriptor, end, 0).rpartition(b"\n")[2]


def _sync_folder(folder: Path) -> None:
    """Make a file's name in its folder as durable as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _warn_torn(path: Path, size: int, outcome: str) -> None:
    warnings.warn(
        f"{path}: a crash cut off its last line after {size} bytes; the records before it stand, {outcome}",
        TornLineWarning,
        stacklevel=3,
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of each whole line; warn about a torn last one."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # else a line that is just being written would look torn
            content = file.read()
    except OSError as error:
        raise LedgerError(
            f"{path}: the ledger cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    *whole, tail = content.split(b"\n")
    if tail and _is_json(tail):
        whole.append(tail)
    elif tail:
        _warn_torn(path, len(tail), "and run the study again for the lost one")
    yield from enumerate(whole, start=1)


def _reject(path: Path, number: int, what: str, remedy: str) -> NoReturn:
    raise LedgerError(f"{path}, line {number}: {what}; {remedy}")


def _parsed(path: Path, number: int, line: bytes) -> Record:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        record = json.loads(line, parse_constant=constant)
    except ValueError as error:
        _reject(path, number, f"the line is not JSON ({error})", "restore it from version control or a backup")
    if not isinstance(record, dict):
        _reject(path, number, "the line is not a record", "restore it from version control or a backup")
    return record


def _sealed(path: Path, number: int, line: bytes, record: Record) -> Record:
    if record.get("schema") != SCHEMA:
        what = f"schema {record.get('schema')!r} is unknown here, where it is {SCHEMA}"
        _reject(path, number, what, "read it with the perturbed that wrote it")
    if missing := [name for name in (*REQUIRED, "hash", "verdict_version") if name not in record]:
        _reject(path, number, f"the record lacks {', '.join(missing)}", "restore it from version control or a backup")
    # Taking the hash out of a canonical line leaves the canonical rest: no need to write it anew to check it.
    rest = line.replace(f'"hash":"{record["hash"]}",'.encode(), b"", 1)
    if record["hash"] != hashlib.sha256(rest).hexdigest() and record["hash"] != record_hash(record):
        what = "the record does not match its hash, so a score or another field was edited after the run"
        _reject(path, number, what, "restore the line from version control or a backup, or run the study again")
    return record


def _checked(path: Path, number: int, line: bytes) -> Record:
    return _sealed(path, number, line, _parsed(path, number, line))


def _difference(where: str, stored: Any, fresh: Any, rounding: float) -> str | None:
    """Say where a stored value and the recomputed one first differ, or None."""
    if isinstance(fresh, dict) and isinstance(stored, Mapping):
        if stored.keys() != fresh.keys():
            return f"{where} has {', '.join(sorted(stored))}, recomputed {', '.join(sorted(fresh))}"
        inner = (_difference(f"{where}.{key}", stored[key], fresh[key], rounding) for key in fresh)
    elif isinstance(fresh, list) and isinstance(stored, list) and len(stored) == len(fresh):
        inner = (_difference(f"{where}[{i}]", stored[i], x, rounding) for i, x in enumerate(fresh))
    elif isinstance(fresh, float) and isinstance(stored, int | float) and not isinstance(stored, bool):
        close = math.isclose(stored, fresh, rel_tol=1e-9, abs_tol=rounding)
        return None if close else f"{where} is stored as {stored!r} and recomputed as {fresh!r}"
    else:
        same = type(stored) is type(fresh) and stored == fresh
        return None if same else f"{where} is stored as {stored!r} and recomputed as {fresh!r}"
    return next((found for found in inner if found), None)
