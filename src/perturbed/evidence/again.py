"""Whether committed evidence still comes out: smoke scores of every study, and whole studies run again in rotation."""

from __future__ import annotations

import datetime
import math
import tempfile
from pathlib import Path
from typing import Any

from perturbed.core.registry import card, cards, load
from perturbed.errors import GateError
from perturbed.evidence.ledger import file_of, latest, package_folder
from perturbed.evidence.pool import Job, Pool
from perturbed.evidence.progress import Bars
from perturbed.evidence.runner import Setting, run_study
from perturbed.evidence.study import Study

TOLERANCE = 1e-4


def committed() -> list[str]:
    """Slugs with a ledger file in the package."""
    return [slug for slug in cards() if file_of(package_folder(), slug).exists()]


def smoke_all() -> str:
    """Run the smoke of every study with committed evidence and compare with the stored 1-seed scores.

    Raises:
        GateError: a score moved by more than 1e-4 of itself under the same versions: the ledger is stale.
    """
    with tempfile.TemporaryDirectory() as folder, Bars("smoke") as bars:
        for slug in committed():
            _smoke(slug, Pool(Path(folder)), bars)
    return f"smoke scores of {len(committed())} studies come out as stored"


def _smoke(slug: str, pool: Pool, bars: Bars) -> None:
    record = latest(slug)
    assert record is not None
    study: Study = load(slug).study.at("smoke")
    jobs = [Job(f"{slug}: {arm}", plan, 0, fresh=True) for arm, plan in study.plans().items()]
    found = zip(study.plans(), pool.run(jobs, bars.listen(jobs)), strict=True)
    for arm, result in found:
        stored, score = record["smoke"].get(arm), result.scores.get(study.metric)
        if not _close(stored, score):
            raise GateError(
                f"the ledger of {slug} is stale: smoke score of {arm} is {score}, stored is {stored}; "
                f"run `perturbed run {slug} --register` and say in the commit what changed"
            )


def _close(stored: float | None, score: float | None) -> bool:
    if stored is None or score is None:
        return stored is score
    return math.isclose(stored, score, rel_tol=TOLERANCE)


def rerun(slug: str) -> str:
    """Run one committed study again from nothing (``rotate``: the one whose turn it is today).

    Raises:
        GateError: another verdict, or an effect outside the committed interval.
    """
    if slug == "rotate":
        every = committed()
        slug = every[datetime.date.today().toordinal() % len(every)]
    record = latest(slug)
    if record is None:
        raise GateError(f"{slug} has no committed evidence to compare with: perturbed run {slug} --register")
    study: Study = load(slug).study.at(record["scale"])
    asked = Setting(study, record["scale"], tuple(record["seeds"]), card=card(slug))
    with tempfile.TemporaryDirectory() as folder, Bars(slug) as bars:
        fresh = run_study(asked, Pool(Path(folder)), bars.listen)
    _compare(slug, record, fresh)
    return f"{slug} run again: {fresh['verdict']}, effect {fresh['arms'][fresh['primary']]['effect']:.4g}, as committed"


def _compare(slug: str, record: dict[str, Any], fresh: dict[str, Any]) -> None:
    if fresh["verdict"] != record["verdict"]:
        raise GateError(f"{slug} run again is {fresh['verdict']}, committed is {record['verdict']}")
    for arm, entry in record["arms"].items():
        effect = fresh["arms"][arm]["effect"]
        if entry["interval"] is not None and not entry["interval"][0] <= effect <= entry["interval"][1]:
            raise GateError(f"{slug} run again: effect of {arm} is {effect:.4g}, outside {entry['interval']}")
