"""Whether committed evidence still comes out: smoke scores of every study, and whole studies run again in rotation."""

from __future__ import annotations

import datetime
import math
import tempfile
from pathlib import Path
from typing import Any

from perturbed.core.keys import machine, versions
from perturbed.core.registry import card, cards, load
from perturbed.errors import StaleError
from perturbed.evidence.ledger import latest
from perturbed.evidence.pool import Job, Pool
from perturbed.evidence.progress import Bars
from perturbed.evidence.runner import Setting, run_study
from perturbed.evidence.study import Study

TOLERANCE = 1e-4


def committed(slug: str) -> dict[str, Any]:
    """The newest laptop record of a study in the package's ledger.

    Raises:
        StaleError: there is none.
    """
    record = latest(slug, own=False)
    if record is None:
        raise StaleError(f"{slug} has no committed evidence: perturbed run {slug} --register")
    return record


def smoke_all() -> str:
    """Run the smoke of every method and compare it with the stored 1-seed scores.

    They are compared where versions and machine type are those of the record; elsewhere a run is only seen to end.

    Raises:
        StaleError: a method has no ledger, or a score moved by more than 1e-4 of itself.
    """
    elsewhere = []
    with tempfile.TemporaryDirectory() as folder, Bars("smoke") as bars:
        for slug in cards():
            record = committed(slug)
            found = _smoke(slug, Pool(Path(folder)), bars)
            if _comparable(record):
                _compare_smoke(slug, record["smoke"], found)
            else:
                elsewhere.append(slug)
    note = f"; made with other versions or on another type of machine, so not compared: {', '.join(elsewhere)}"
    told = f"{len(cards())} smokes ran, scores of {len(cards()) - len(elsewhere)} come out as stored"
    return told + (note if elsewhere else "")


def _smoke(slug: str, pool: Pool, bars: Bars) -> dict[str, float | None]:
    study: Study = load(slug).study.at("smoke")
    plans = study.plans()
    jobs = [Job(f"{slug}: {arm}", plan, 0, fresh=True) for arm, plan in plans.items()]
    results = pool.run(jobs, bars.listen(jobs))
    return {arm: result.scores.get(study.metric) for arm, result in zip(plans, results, strict=True)}


def _comparable(record: dict[str, Any]) -> bool:
    return bool(record["versions"] == versions() and record["machine"] | machine() == record["machine"])


def _compare_smoke(slug: str, stored: dict[str, float | None], found: dict[str, float | None]) -> None:
    for arm in sorted(stored.keys() | found.keys()):
        if not _close(stored.get(arm), found.get(arm)):
            raise StaleError(
                f"the ledger of {slug} is stale: smoke score of {arm} is {found.get(arm)}, stored is "
                f"{stored.get(arm)}; run `perturbed run {slug} --register` and say in the commit what changed"
            )


def _close(stored: float | None, score: float | None) -> bool:
    if stored is None or score is None:
        return stored is score
    return math.isclose(stored, score, rel_tol=TOLERANCE)


def rerun(slug: str) -> str:
    """Run one committed study again from nothing (``rotate``: the one whose turn it is today).

    Raises:
        StaleError: there is no committed record, another verdict, or an effect outside the committed interval.
    """
    if slug == "rotate":
        every = list(cards())
        slug = every[datetime.date.today().toordinal() % len(every)]
    record = committed(slug)
    study: Study = load(slug).study.at(record["scale"])
    asked = Setting(study, record["scale"], tuple(record["seeds"]), card=card(slug))
    with tempfile.TemporaryDirectory() as folder, Bars(slug) as bars:
        fresh = run_study(asked, Pool(Path(folder)), bars.listen)
    _compare(slug, record, fresh)
    effect = fresh["arms"][fresh["primary"]]["effect"]
    return f"{slug} run again: {fresh['verdict']}, as committed" + ("" if effect is None else f", effect {effect:.4g}")


def _compare(slug: str, record: dict[str, Any], fresh: dict[str, Any]) -> None:
    if fresh["verdict"] != record["verdict"]:
        raise StaleError(f"{slug} run again is {fresh['verdict']}, committed is {record['verdict']}")
    found = {**fresh["arms"], **fresh.get("contrasts", {})}
    for name, entry in {**record["arms"], **record.get("contrasts", {})}.items():
        effect, interval = found.get(name, {}).get("effect"), entry["interval"]
        if interval is not None and (effect is None or not interval[0] <= effect <= interval[1]):
            raise StaleError(f"{slug} run again: the effect of {name} is {effect}, outside {interval}")
