"""Fill the generated parts of the README from cards and ledgers; ``--check`` fails when they are stale."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from perturbed import cli
from perturbed.core.registry import cards
from perturbed.evidence.figures import paired_differences, standalone
from perturbed.evidence.ledger import latest, recompute
from perturbed.evidence.verdict import unspecific

ROOT = Path(__file__).parent.parent
SHOWN = "hubble"


def methods_table() -> str:
    """Every method with its verdict here, beside the paper's own figure."""
    rows = ["| method | acts on | claim | paper | here, at laptop scale |", "|---|---|---|---|---|"]
    for card in cards().values():
        link = f"[{card.slug}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.slug
        text, paper = card.claim["text"], card.claim["paper"]
        rows.append(
            f"| {link} | {', '.join(card.sites)} | {text} | {paper} | {outcome(latest(card.slug, own=False))} |"
        )
    return "\n".join(rows)


def outcome(record: dict[str, Any] | None) -> str:
    """The verdict with its effect and interval."""
    if record is None:
        return "no evidence yet"
    fresh = recompute(record)
    entry = fresh["arms"][record["primary"]]
    notes = ["trivial"] * fresh["trivial"] + ["not specific"] * unspecific(record)
    verdict = ", ".join([f"**{fresh['verdict']}**", *notes])
    if entry["interval"] is None:
        return verdict
    low, high = entry["interval"]
    unit = f" {record['unit']}" if record["unit"] else ""
    return f"{verdict}: {entry['effect']:+.3g} [{low:+.3g}, {high:+.3g}]{unit}, {len(record['seeds'])} seeds"


def output() -> str:
    """What ``perturbed run`` printed of the committed record."""
    record = latest(SHOWN, own=False)
    if record is None:
        return "no evidence yet"
    text = io.StringIO()
    console = Console(file=text, width=100, color_system=None)
    original, cli.console = cli.console, lambda: console
    cli.print_record(record)
    cli.console = original
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "```console\n$ perturbed run hubble\n" + "\n".join(lines) + "\n```"


def picture() -> str:
    """The figure of the same record, as a file of its own."""
    record = latest(SHOWN, own=False)
    return standalone(paired_differences(record)) if record else ""


def filled(text: str) -> str:
    """``text`` with each part between its markers made anew."""
    for name, made in {"methods": methods_table(), "output": output()}.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        text, number = pattern.subn(lambda m, made=made: m[1] + made + m[2], text)
        if number != 1:
            raise SystemExit(f"README.md needs one pair of markers <!-- {name} -->, with a line between them")
    return text


def main() -> int:
    """Write the README and its picture, or say that they are stale."""
    readme, image = ROOT / "README.md", ROOT / "docs" / "images" / f"{SHOWN}.svg"
    wanted = {readme: filled(readme.read_text(encoding="utf-8")), image: picture()}
    stale = [f for f, text in wanted.items() if not f.exists() or f.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is stale: run `make readme` and commit what it changes", file=sys.stderr)
        return 1 if stale else 0
    for file in stale:
        file.write_text(wanted[file], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
