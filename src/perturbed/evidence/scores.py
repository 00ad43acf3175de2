"""Scores of runs made elsewhere: read them from a file, judge them like a study of ours.

Understood are CSV, TSV, Parquet, JSON and JSON lines in long form (columns for arm, seed and score), in wide form (a
seed column and one column an arm) and as JSON ``{arm: {seed: score}}`` or a record of ours; the runs tables that
Weights & Biases and MLflow export, and the CSV of a W&B line chart. Nothing is dropped or guessed: what cannot be
read is an error that names the row.
"""

from __future__ import annotations

import ast
import csv
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbed.evidence import verdict
from perturbed.evidence.verdict import judge_record

if TYPE_CHECKING:
    from perturbed.evidence.statistics import Direction, Transform

Scores = dict[str, dict[int, float | None]]

ARM_NAMES = ("arm", "group", "variant", "condition", "method")
SEED_NAMES = ("seed", "random_seed", "rng_seed", "random_state")
SCORE_NAMES = ("score", "value")
RUN_NAMES = ("name", "run name", "run_name", "runname", "mlflow.runname")
PREFIXES = ("params.", "tags.", "config.", "metrics.", "summary.")
# Columns that the trackers add to every run: never a score.
BOOKKEEPING = frozenset(
    [
        "", "_runtime", "_step", "_timestamp", "artifact_uri", "commit", "created", "description", "duration",
        "end time", "end_time", "entity", "epoch", "experiment_id", "github link", "hostname", "id", "index",
        "job type", "models", "notes", "project", "run id", "run_id", "runtime", "source name", "source type",
        "start time", "start_time", "state", "status", "step", "sweep", "tags", "unnamed: 0", "updated", "user",
        "version",
    ]
)  # fmt: skip
UNFINISHED = frozenset(["running", "pending", "scheduled", "crashed", "failed", "killed", "preempted", "preempting"])
SEED_IN_NAME = re.compile(r"(?P<arm>.+?)[-_ /.:,]+(?:seed|s)[-_ =:]?(?P<seed>\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class _Table:
    """Rows with their number in the file (the line for text, the count from 1 otherwise)."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]]

    def fail(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}")

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> _Table:
        return _Table(self.path, self.columns, [(number, row) for number, row in self.rows if wanted(row)])

    @property
    def tracked(self) -> bool:
        """Whether a tracker exported this table of runs."""
        names = {column.casefold().strip() for column in self.columns}
        return (
            {"name", "state"} <= names
            or {"run id", "status"} <= names
            or any(name.startswith(("params.", "metrics.", "summary.", "config.")) for name in names)
        )


def read_scores(
    path: str | Path, *, arm: str | None = None, seed: str | None = None, metric: str | None = None
) -> Scores:
    """Read scores by arm and seed from a file.

    A row without a finite score (empty, ``nan``, ``inf``, null) is a run that diverged: None. In the wide form an empty
    cell means that this arm has no run of that seed, so the seed stays out of that arm.

    Args:
        path: ``.csv``, ``.tsv``, ``.parquet``, ``.json``, ``.jsonl`` or ``.ndjson``.
        arm: Column of the arm; by default one with a usual name (arm, group, variant, condition, method, in any
            case, also as ``params.``, ``tags.`` or ``config.``), else the run's name where it ends in its seed
            (``control-seed3``).
        seed: Column of the seed; by default one with a usual name.
        metric: Column of the score, or a value of a column called ``metric``; needed where there are several.

    Returns:
        ``{arm: {seed: score or None}}`` in the order of the file.

    Raises:
        ValueError: The file cannot be understood; the message names file, row or columns, and what to do.
    """
    return _read(Path(path), arm, seed, metric)[0]


def judge_scores(
    scores: Mapping[str, Mapping[int, float | None]],
    *,
    control: str,
    treatment: str,
    direction: Direction = "higher",
    epsilon: float | None = None,
    alpha: float = 0.05,
    transform: Transform = "raw",
    bounds: Sequence[float | None] = (None, None),
    metric: str = "score",
) -> dict[str, Any]:
    """Judge one arm against another by the rules of a study and return a record of it.

    Args:
        scores: ``{arm: {seed: score or None}}``, as `read_scores` returns it.
        control: Name of the reference arm; the record calls it ``control``.
        treatment: Name of the arm that is judged.
        direction: What is claimed of the treatment's score.
        epsilon: Smallest effect of interest; ``equal`` needs it.
        alpha: Level of the sign-flip test.
        transform: ``log`` judges relative change.
        bounds: Floor and ceiling of the metric.
        metric: Its name, for display.

    Returns:
        A record in the schema of `perturbed run --json`, with null for what is not known of runs made elsewhere.

    Raises:
        ValueError: An arm does not exist, seeds are not in both arms (they are named), or `judge` refuses a setting.
    """
    for name in (control, treatment):
        if name not in scores:
            near = difflib.get_close_matches(name, list(scores), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no arm {name!r}, only {', '.join(map(repr, scores))}{hint}")
    if control == treatment or treatment == "control":
        raise ValueError(f"control is {control!r} and treatment {treatment!r}: the treatment needs a name of its own")
    seeds = sorted(scores[control].keys() | scores[treatment].keys())
    gaps = [
        f"{name!r} has no score at seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        for name in (control, treatment)
        if (missing := [seed for seed in seeds if seed not in scores[name]])
    ]
    if gaps:
        raise ValueError(
            f"unpaired: {'; '.join(gaps)}. Every seed needs both arms: run what is missing, give nan for a run that "
            "diverged, or take the seed out of both"
        )
    arms = {"control": scores[control], treatment: scores[treatment]}
    relation = {"higher": "above", "lower": "below", "equal": "equal to"}.get(direction, direction)
    record: dict[str, Any] = {
        "schema": 1,
        "slug": None,
        "title": f"{treatment} against {control}",
        "plan": None,
        "scale": None,
        "registered": False,
        "metric": metric,
        "unit": "",
        "transform": transform,
        "direction": direction,
        "primary": treatment,
        "reference": "control",
        "sham": None,
        "epsilon": epsilon,
        "why_epsilon": "",
        "alpha": alpha,
        "bounds": list(bounds),
        "seeds": seeds,
        "scores": {arm: {str(seed): _finite(of[seed]) for seed in seeds} for arm, of in arms.items()},
        "secondary": {},
        "curves": {},
        "gates": {},
        "cost": {},
        "versions": _versions(),
        "machine": {},
        "claim": {"text": f"{metric} of {treatment} is {relation} that of {control}", "paper": ""},
        "command": None,
        "started": None,
    }
    return record | judge_record(record)


def judge_pair(control: verdict.Scores, treatment: verdict.Scores, **setting: Any) -> dict[str, Any]:
    """Judge a treatment's scores against its control's, seed by seed: ``pt.judge(control, treatment)``.

    Args:
        control: Score by seed, or scores in the order of seeds.
        treatment: The same for the treatment.
        **setting: ``direction`` (``higher`` by default), ``epsilon`` and what else `judge_scores` takes.

    Returns:
        The record that ``perturbed judge --json`` prints, for ``pt.write_report`` too: ``verdict``, and under
        ``arms["treatment"]`` effect, interval, p and detectable effect.

    Raises:
        ValueError: Seeds are not in both arms, or a setting is refused.
    """
    arms = {"control": verdict.by_seed(control), "treatment": verdict.by_seed(treatment)}
    return judge_scores(arms, control="control", treatment="treatment", **setting)


def judge_files(
    path: str | Path,
    *,
    control: str,
    treatment: str,
    arm: str | None = None,
    seed: str | None = None,
    metric: str | None = None,
    direction: Direction = "higher",
    epsilon: float | None = None,
    alpha: float = 0.05,
    transform: Transform = "raw",
    bounds: Sequence[float | None] = (None, None),
) -> dict[str, Any]:
    """Read a file of scores and judge one of its arms against another: `read_scores`, then `judge_scores`.

    Raises:
        ValueError: As these two do.
    """
    scores, found = _read(Path(path), arm, seed, metric)
    return judge_scores(
        scores,
        control=control,
        treatment=treatment,
        direction=direction,
        epsilon=epsilon,
        alpha=alpha,
        transform=transform,
        bounds=bounds,
        metric=found,
    )


def _finite(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else float(score)


def _versions() -> dict[str, str]:
    from importlib.metadata import version
    from platform import python_version

    return {"python": python_version()} | {name: version(name) for name in ("perturbed", "numpy", "scipy")}


def _read(path: Path, arm: str | None, seed: str | None, metric: str | None) -> tuple[Scores, str]:
    """Return the scores and the name of their metric."""
    table = _load(path)
    if isinstance(table, tuple):
        return table
    if not table.rows:
        raise table.fail("there are no rows of scores in it")
    if any(column.endswith("__MIN") for column in table.columns):
        return _chart(table, metric)
    arm_column, seed_column = _find(table, ARM_NAMES, arm), _find(table, SEED_NAMES, seed)
    if arm_column is None and not table.tracked and seed_column is not None and metric is None:
        columns = [column for column in _numeric(table) if column != seed_column]
        if len(columns) > 1:
            return _wide(table, seed_column, columns), "score"
    run_column = _run_column(table, arm_column, seed_column)
    table, score_column, name = _of_metric(table, metric, {arm_column, seed_column})
    _all_finished(table, score_column)

    def entry(number: int, row: dict[str, Any]) -> tuple[int, str, int, Any]:
        match = SEED_IN_NAME.fullmatch(str(row[run_column]).strip()) if run_column else None
        of_arm = row[arm_column] if arm_column else match and match["arm"]
        of_seed = row[seed_column] if seed_column else match and match["seed"]
        if _empty(of_arm) or of_arm != of_arm:  # Parquet has NaN for a missing name
            raise table.fail(f"row {number} names no arm in column {arm_column!r}")
        return number, str(of_arm).strip(), _seed(table, number, of_seed), row[score_column]

    return _collect(table, (entry(number, row) for number, row in table.rows)), name


def _run_column(table: _Table, arm_column: str | None, seed_column: str | None) -> str | None:
    """Column of run names that tell what no column tells; None where both arm and seed have their own."""
    if arm_column is not None and seed_column is not None:
        return None
    column = _find(table, RUN_NAMES, None)
    if column is None or not all(SEED_IN_NAME.fullmatch(str(row[column]).strip()) for _, row in table.rows):
        what = "arm" if arm_column is None else "seed"
        raise table.fail(
            f"no column for the {what} among {', '.join(table.columns)}: say which it is with --{what} COLUMN"
        )
    return column


def _find(table: _Table, usual: Sequence[str], named: str | None) -> str | None:
    """Column that the caller named, else the first with a usual name that is not empty throughout."""
    if named is not None:
        return _resolve(table, named, table.columns)
    for name in usual:
        for column in table.columns:
            if _base(column) == name and any(not _empty(row[column]) for _, row in table.rows):
                return column
    return None


def _resolve(table: _Table, named: str, columns: Sequence[str]) -> str:
    """Column of that name: as written, else in any case, else but for a tracker's prefix."""
    for alike in (str, str.casefold, _base):
        found = [column for column in columns if alike(column) == alike(named)]
        if len(found) == 1:
            return found[0]
        if found:
            raise table.fail(f"{named!r} could be any of {', '.join(found)}: give the full name")
    raise table.fail(f"there is no column {named!r}, only {', '.join(columns)}")


def _base(column: str) -> str:
    name = column.casefold().strip()
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _is_number(cell: Any) -> bool:
    if isinstance(cell, bool):
        return False
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _numeric(table: _Table) -> list[str]:
    return [
        column
        for column in table.columns
        if _base(column) not in BOOKKEEPING and any(_is_number(row[column]) for _, row in table.rows)
    ]


def _score(table: _Table, number: int, cell: Any) -> float | None:
    if _empty(cell) or (isinstance(cell, str) and cell.strip().casefold() in ("none", "null", "na", "n/a")):
        return None
    if not _is_number(cell):
        raise table.fail(f"row {number}: the score {cell!r} is not a number; write nan for a run that diverged")
    return _finite(float(cell))


def _seed(table: _Table, number: int, cell: Any) -> int:
    if not _is_number(cell) or not float(cell).is_integer():
        raise table.fail(f"row {number}: the seed {cell!r} is not a whole number")
    return int(float(cell))


def _collect(table: _Table, entries: Iterable[tuple[int, str, int, Any]]) -> Scores:
    """Gather (row, arm, seed, score cell); the same arm and seed twice is an error."""
    scores: Scores = {}
    rows: dict[tuple[str, int], list[int]] = {}
    for number, arm, seed, cell in entries:
        rows.setdefault((arm, seed), []).append(number)
        scores.setdefault(arm, {})[seed] = _score(table, number, cell)
    twice = [
        f"arm {arm!r} seed {seed} in rows {', '.join(map(str, numbers))}"
        for (arm, seed), numbers in rows.items()
        if len(numbers) > 1
    ]
    if twice:
        raise table.fail(
            f"one score is wanted for each arm and seed, but there is {_some(twice)}: keep one row of each"
        )
    return scores


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _of_metric(table: _Table, metric: str | None, taken: set[str | None]) -> tuple[_Table, str, str]:
    """Rows of the wanted metric, the column of its scores and its name."""
    columns = [column for column in _numeric(table) if column not in taken]
    usual = [column for column in columns if _base(column) in SCORE_NAMES]
    kind = next((column for column in table.columns if _base(column) == "metric" and column not in columns), None)
    if kind is not None and len(usual) == 1:
        kinds = list(dict.fromkeys(str(row[kind]) for _, row in table.rows))
        metric = _only(table, kinds, metric)
        return table.keep(lambda row: str(row[kind]) == metric), usual[0], metric
    if metric is None:
        logged = [column for column in columns if column.startswith(("metrics.", "summary."))]
        column = _only(table, logged or usual or columns, None)
    else:
        column = _resolve(table, metric, [column for column in table.columns if column not in taken])
    prefix = next((prefix for prefix in PREFIXES if column.startswith(prefix)), "")
    return table, column, column.removeprefix(prefix)


def _only(table: _Table, metrics: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in metrics:
            raise table.fail(f"there is no metric {wanted!r}, only {', '.join(metrics)}")
        return wanted
    if not metrics:
        raise table.fail(f"no column of numbers for the score among {', '.join(table.columns)}: name it with --metric")
    if len(metrics) > 1:
        raise table.fail(f"there are several metrics, {', '.join(metrics)}: choose one with --metric")
    return metrics[0]


def _all_finished(table: _Table, column: str) -> None:
    """Refuse the scores of runs that a tracker calls unfinished: their last value is not their end value."""
    if not table.tracked:
        return
    state = next((name for name in table.columns if name.casefold().strip() in ("state", "status")), None)
    cut = [
        f"row {number} ({row[state]})"
        for number, row in table.rows
        if state and str(row[state]).strip().casefold() in UNFINISHED and _score(table, number, row[column]) is not None
    ]
    if cut:
        raise table.fail(
            f"unfinished runs have scores from before their end: {_some(cut)}. Finish them or run them again; clear "
            "the score of one that diverged"
        )


def _wide(table: _Table, seed_column: str, arms: Sequence[str]) -> Scores:
    scores: Scores = {arm: {} for arm in arms}
    rows: dict[int, int] = {}
    for number, row in table.rows:
        seed = _seed(table, number, row[seed_column])
        if seed in rows:
            raise table.fail(
                f"seed {seed} is in rows {rows[seed]} and {number}, and no column says which arm a row belongs to: "
                f"name that column with --arm, or keep one row a seed"
            )
        rows[seed] = number
        for arm in arms:
            if not _empty(row[arm]):
                scores[arm][seed] = _score(table, number, row[arm])
    return scores


def _chart(table: _Table, metric: str | None) -> tuple[Scores, str]:
    """Last values of the curves in the CSV of a W&B line chart: columns ``run - metric``, ``…__MIN``, ``…__MAX``."""
    axis, *rest = table.columns
    curves = [
        column
        for column in rest
        if " - " in column
        and not column.endswith(("__MIN", "__MAX"))
        and not column.rpartition(" - ")[2].startswith("_")
    ]
    name = _only(table, list(dict.fromkeys(column.rpartition(" - ")[2] for column in curves)), metric)
    ends: dict[str, tuple[int, Any, Any]] = {}
    for column in (column for column in curves if column.rpartition(" - ")[2] == name):
        filled = [(number, row[axis], row[column]) for number, row in table.rows if not _empty(row[column])]
        if filled:
            ends[column.rpartition(" - ")[0]] = filled[-1]
    averaged = [run for run in ends if run.startswith("Group: ") or not SEED_IN_NAME.fullmatch(run)]
    if averaged:
        raise table.fail(
            f"{', '.join(map(repr, averaged))}: these curves do not say of which arm and seed they are (names like "
            "control-seed0 do; a grouped chart holds averages over seeds): export the runs table instead"
        )
    if "time" not in axis.casefold() and len({step for _, step, _ in ends.values()}) > 1:
        last = [f"{run} at {step}" for run, (_, step, _) in ends.items()]
        raise table.fail(
            f"the curves end at different {axis} values, so their last points are not comparable: {_some(last)}. "
            "Finish these runs, or export the runs table with an empty score for one that diverged"
        )
    matches = {run: SEED_IN_NAME.fullmatch(run) for run in ends}
    entries = (
        (number, match["arm"], int(match["seed"]), cell)
        for (number, _, cell), match in zip(ends.values(), matches.values(), strict=True)
        if match
    )
    return _collect(table, entries), name


def _load(path: Path) -> _Table | tuple[Scores, str]:
    """Read a table, or the scores themselves from JSON that is keyed by arm and seed."""
    kind = path.suffix.lower()
    readers = {
        ".csv": _text, ".tsv": _text, ".parquet": _parquet, ".json": _json, ".jsonl": _json_lines,
        ".ndjson": _json_lines,
    }  # fmt: skip
    if kind not in readers:
        raise ValueError(
            f"{path}: scores are read from {', '.join(readers)}, not from {kind or 'a file without a suffix'}"
        )
    try:
        found = readers[kind](path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if isinstance(found, list):
        flat = [(number, _flatten(row)) for number, row in found]
        columns = list(dict.fromkeys(column for _, row in flat for column in row))
        return _Table(path, columns, [(number, dict.fromkeys(columns) | row) for number, row in flat])
    return found


Rows = list[tuple[int, dict[str, Any]]]


def _text(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = next((mark for mark in "\t,;" if mark in header), ",")
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        names = list(reader.fieldnames or ())
        rows: Rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}: row {reader.line_num} does not have the {len(row)} cells of the header")
                rows.append((reader.line_num, dict(row)))
        except csv.Error as error:
            raise ValueError(f"{path}: row {reader.reader.line_num} is damaged ({error})") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: more than one column is called {', '.join(map(repr, twice))}")
    return rows


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: this is not a Parquet file ({error})") from error
    return list(enumerate(table.to_pylist(), start=1))


def _json(path: Path) -> Rows | tuple[Scores, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: this is not JSON ({error})") from error
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return list(enumerate(content, start=1))
    metric = "score"
    if isinstance(content, dict) and isinstance(content.get("scores"), dict):
        content, metric = content["scores"], str(content.get("metric", metric))
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        return _keyed(path, content), metric
    raise ValueError(
        f"{path}: expected an array of {{arm, seed, score}} objects, or an object {{arm: {{seed: score}}}}"
    )


def _keyed(path: Path, content: Mapping[str, Mapping[str, Any]]) -> Scores:
    table = _Table(path, [], [])
    entries = ((arm, seed, score) for arm, of in content.items() for seed, score in of.items())
    numbered = enumerate(entries, start=1)
    return _collect(
        table, ((number, arm, _seed(table, number, seed), score) for number, (arm, seed, score) in numbered)
    )


def _json_lines(path: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: row {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is not an object with arm, seed and score")
        rows.append((number, row))
    return rows


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Spread nested objects over columns ``outer.inner``; so are those that a W&B script wrote as Python literals."""
    flat: dict[str, Any] = {}
    for name, cell in row.items():
        if name in ("config", "summary") and isinstance(cell, str):
            cell = _literal(cell)
        if isinstance(cell, Mapping):
            flat |= {f"{name}.{inner}": value for inner, value in _flatten(cell).items() if not inner.startswith("_")}
        else:
            flat[name] = cell
    return flat


def _literal(cell: str) -> Any:
    """A Python literal as `repr` writes it; bare nan and inf, which are none, become text."""
    try:
        return ast.literal_eval(re.sub(r"(?<=[\s:,\[{(])(-?(?:nan|inf))(?=[\s,}\])])", r"'\1'", cell))
    except (ValueError, SyntaxError):
        return cell
