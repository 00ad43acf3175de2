"""The command line. Every command imports what it needs when it runs, so that help and lists come at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from perturbed.errors import Interrupted, PerturbedError
from perturbed.feed.commands import feed, serve

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from perturbed.evidence.runner import Record

app = typer.Typer(
    help="Change one thing about how a model is trained, adapted or used, and see what happens.",
    epilog="--debug, with any command, shows the traceback of what fails.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache = typer.Typer(help="The checkpoint store.", no_args_is_help=True)
ledger = typer.Typer(help="The committed and your own evidence.", no_args_is_help=True)
app.add_typer(cache, name="cache")
app.add_typer(ledger, name="ledger")
app.add_typer(feed, name="feed")

Slug = Annotated[str, typer.Argument(help="Name of a method, as perturbed list tells it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the HTML report.")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="How many (8 means 0…7), or which: 0,1,2 (one: 5,).")]
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Runs at once; one a core by default.")]
On = Annotated[str, typer.Option("--on", help="local or ray.")]
Direction = Annotated[str | None, typer.Option("--direction", help="higher, lower or equal.")]
Epsilon = Annotated[float | None, typer.Option("--epsilon", help="Smallest effect of interest.")]


def fail(message: str) -> NoReturn:
    """End with a one-line reason."""
    raise PerturbedError(message)


def show_json(document: Any) -> None:
    """One JSON document on standard output."""
    json.dump(document, sys.stdout, ensure_ascii=False, allow_nan=False)
    print()


def parse_seeds(text: str | None) -> int | list[int] | None:
    """``8`` is how many, ``0,1,2`` are which."""
    if text is None:
        return None
    try:
        if "," not in text:
            return int(text)
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        fail(f"--seeds {text}: write how many (8) or which (0,1,2)")


def parse_arms(text: str | None) -> list[str]:
    """``A,B`` as a list; empty where the option is not given."""
    arms = [] if text is None else [arm.strip() for arm in text.split(",")]
    if not all(arms):
        fail(f"--arms {text}: write names of arms, as in --arms A,B; without the option all run")
    return arms


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``."""
    if value not in allowed:
        fail(f"{name} {value}: it is one of {', '.join(allowed)}")
    return value


def report_folder(out: Path | None) -> Path:
    """Where reports go, tried out before any work is done."""
    from perturbed.home import home

    folder = out or home() / "reports"
    with reporting(folder):
        try_out(folder)
    return folder


def try_out_store() -> None:
    """Fail before any work where the runs could not be kept."""
    from perturbed.home import home

    folder = home() / "store"
    try:
        try_out(folder)
    except OSError as e:
        fail(f"cannot write to the store {folder}: {e.strerror}; set PERTURBED_HOME to a folder of yours")


def try_out(folder: Path) -> None:
    """Make a folder, and a file in it that goes again."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()


@contextlib.contextmanager
def reporting(folder: Path) -> Iterator[None]:
    """Say in one line that a report cannot be written, and what to do."""
    try:
        yield
    except OSError as e:
        fail(f"cannot write reports to {folder}: {e.strerror}; make room, or choose another folder with --out")


@app.command("list")
def list_(
    query: Annotated[str | None, typer.Argument(help="Words in title, summary or tags.")] = None,
    site: Annotated[str | None, typer.Option("--site", help="Only methods that act there.")] = None,
    as_json: Json = False,
) -> None:
    """The methods, with the verdicts of their committed evidence."""
    from perturbed.core.registry import cards
    from perturbed.evidence.ledger import stored_verdict
    from perturbed.feed.papers import SITES

    if site is not None:
        choice("--site", site, SITES)
    rows = []
    for card in cards().values():
        text = " ".join([card.slug, card.title, card.summary, *card.tags]).lower()
        if (site is None or site in card.sites) and all(w in text for w in (query or "").lower().split()):
            fields = ("slug", "title", "arxiv", "year", "sites", "modality", "kind")
            rows.append({f: getattr(card, f) for f in fields} | {"verdict": stored_verdict(card.slug)})
    if as_json:
        return show_json(rows)
    if not rows:
        print("no method matches; `perturbed list` shows all", file=sys.stderr)
        return None
    table = new_table("method", "verdict here", "year", "acts on", "title", whole=slice(3))
    for row in rows:
        table.add_row(row["slug"], colour(row["verdict"]), str(row["year"]), ", ".join(row["sites"]), row["title"])
    print_table(console(), table)
    return None


@app.command()
def show(slug: Slug, as_json: Json = False) -> None:
    """A method's card, its claim and its evidence."""
    import dataclasses

    from perturbed.core.registry import card
    from perturbed.evidence.ledger import latest, recompute

    found, record = card(slug), latest(slug)
    if record is not None:
        recompute(record)
    if as_json:
        return show_json(dataclasses.asdict(found) | {"evidence": record})
    out = console()
    out.print(f"[bold]{found.title}[/] ({found.year}, arXiv {found.arxiv})", highlight=False)
    out.print(f"[dim]{found.slug} · {', '.join(found.sites)} · {found.modality} · {found.kind}[/]\n", highlight=False)
    out.print(found.summary + "\n", highlight=False, markup=False)
    if record is None:
        claim = f"claim      {found.claim['text']}\npaper      {found.claim['paper']}"
        out.print(f"{claim}\nevidence   none yet: perturbed run {slug}", highlight=False, markup=False)
    else:
        print_record(record)
    return None


@app.command()
def run(
    slug: Slug,
    seeds: Seeds = None,
    scale: Annotated[str, typer.Option("--scale", help="smoke, laptop, full or paper.")] = "laptop",
    arms: Annotated[str | None, typer.Option("--arms", help="Only these arms: A,B.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE, again for more.")] = None,
    plan: Annotated[str | None, typer.Option("--plan", help="A built-in plan or FILE.py:NAME.")] = None,
    workers: Workers = None,
    on: On = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do and cost.")] = False,
    as_json: Json = False,
    out: Out = None,
    register: Annotated[bool, typer.Option("--register", help="Append to the package's ledger.")] = False,
) -> None:
    """Run a method's study: control and arms on paired seeds, then the verdict."""
    choice("--scale", scale, ("smoke", "laptop", "full", "paper"))
    choice("--on", on, ("local", "ray"))
    from perturbed.core.registry import card

    card(slug)  # a slip of the pen is said before torch is imported
    number, chosen = parse_seeds(seeds), parse_arms(arms)
    folder = None if dry_run else report_folder(out)
    if not dry_run:
        try_out_store()
    from perturbed import api
    from perturbed.evidence import dry

    asked = api.setting(slug, seeds=number, scale=scale, arms=chosen, settings=settings or [], plan=plan)
    if dry_run:
        estimate = dry.price(asked)
        return show_json(estimate) if as_json else print(dry.describe(estimate))
    if register and not asked.registered:
        fail("--register takes only what was fixed beforehand: the study's own seeds, arms, plan and fields")
    assert folder is not None
    record = api.carry_out(asked, plan=plan, workers=workers, on=on)
    if not speaks():
        return None
    return finish(record, folder, as_json, kept=scale in ("laptop", "full"), register=register)


def speaks() -> bool:
    """Whether this process tells the outcome: under ``accelerate launch`` every process has it."""
    from perturbed.core.run import accelerator

    return bool(accelerator().is_main_process)


def keep(record: Record, register: bool) -> Record:
    """The record as appended to the user's ledger, or to the package's."""
    from perturbed.evidence import ledger as ledgers

    folder = ledgers.package_folder() if register else ledgers.user_folder()
    return ledgers.append(ledgers.file_of(folder, record["slug"] or "compare"), record)


def finish(record: Record, folder: Path, as_json: bool, *, kept: bool, register: bool = False) -> None:
    """Keep a record in a ledger, show it, write its page, and end with exit code 3 if a gate failed."""
    from perturbed.evidence.report import write_study

    try:
        if kept:
            record = keep(record, register)
    finally:  # it is shown also where it cannot be kept: on a full disk, say
        show_json(record) if as_json else print_record(record)
    with reporting(folder):
        page = write_study(record, folder)
    if not as_json:
        console().print(f"report     {page}", highlight=False, soft_wrap=True)
    if any(g["pass"] is False for g in record["gates"].values()):
        raise typer.Exit(3)


@app.command()
def compare(
    slugs: Annotated[list[str], typer.Argument(help="Names of methods, as perturbed list tells them.")],
    plan: Annotated[str, typer.Option("--plan", help="A built-in plan or FILE.py:NAME.")],
    factorial: Annotated[bool, typer.Option("--factorial", help="Also in combination.")] = False,
    seeds: Seeds = "8",
    direction: Direction = None,
    epsilon: Epsilon = None,
    metric: Annotated[str | None, typer.Option("--metric", help="The score that decides.")] = None,
    workers: Workers = None,
    on: On = "local",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Several methods against one control on one plan, and whether their effects add up."""
    if direction is not None:
        choice("--direction", direction, ("higher", "lower", "equal"))
    choice("--on", on, ("local", "ray"))
    number, folder = parse_seeds(seeds), report_folder(out)
    try_out_store()
    from perturbed import api

    how: dict[str, Any] = {"metric": metric, "direction": direction, "epsilon": epsilon, "workers": workers, "on": on}
    record = api.compare_methods(slugs, plan, seeds=8 if number is None else number, factorial=factorial, **how)
    if speaks():
        finish(record, folder, as_json, kept=True)


@app.command()
def judge(
    scores: Annotated[Path, typer.Argument(help="CSV, TSV, Parquet or JSON; exports of W&B and MLflow too.")],
    control: Annotated[str, typer.Option("--control", help="Name of the reference arm.")],
    treatment: Annotated[str, typer.Option("--treatment", help="Name of the arm that is judged.")],
    direction: Annotated[str, typer.Option("--direction", help="higher, lower or equal.")] = "higher",
    epsilon: Epsilon = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Which score, where there are several.")] = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Column of the arm.")] = None,
    seed: Annotated[str | None, typer.Option("--seed", help="Column of the seed.")] = None,
    transform: Annotated[str, typer.Option("--transform", help="raw or log.")] = "raw",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """The same verdict for runs made elsewhere."""
    choice("--direction", direction, ("higher", "lower", "equal"))
    choice("--transform", transform, ("raw", "log"))
    folder = report_folder(out)
    from perturbed.evidence.scores import judge_files

    try:
        how: dict[str, Any] = {"direction": direction, "epsilon": epsilon, "transform": transform}
        columns: dict[str, Any] = {"metric": metric, "arm": arm, "seed": seed}
        record = judge_files(scores, control=control, treatment=treatment, **how, **columns)
    except ValueError as e:
        raise PerturbedError(str(e)) from e
    finish(record | {"command": shlex.join(["perturbed", *sys.argv[1:]])}, folder, as_json, kept=False)


@app.command()
def power(
    sd: Annotated[float | None, typer.Option("--sd", help="Standard deviation of the paired differences.")] = None,
    effect: Annotated[float | None, typer.Option("--effect", help="True effect.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of pairs.")] = None,
    as_json: Json = False,
) -> None:
    """How many seeds an effect needs, or how small an effect so many seeds can show (80 % power)."""
    import dataclasses

    from perturbed.evidence import statistics

    try:
        found = statistics.power(sd=sd, effect=effect, seeds=seeds)
    except ValueError as e:
        named = re.sub(r"\b(sd|effect|seeds)(?=,| and | must)", r"--\1", str(e)).replace("and seeds", "and --seeds")
        raise PerturbedError(named) from e
    if as_json:
        return show_json(dataclasses.asdict(found))
    words = f"{found.seeds} seeds show a true effect of {found.effect:.4g} in 4 of 5 studies where paired differences"
    return print(f"{words} have a standard deviation of {found.sd:.4g}")


@app.command()
def plans(as_json: Json = False) -> None:
    """The built-in control plans and their fields."""
    import dataclasses

    from perturbed.evidence.settings import recipes

    rows = []
    for name, recipe in recipes().items():
        fields = {f.name: f.default for f in dataclasses.fields(recipe)}
        summary = (recipe.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "summary": summary, "fields": fields})
    if as_json:
        return show_json(rows)
    for row in rows:
        console().print(f"[bold]{row['name']}[/]  {row['summary']}", highlight=False)
        console().print("  " + ", ".join(f"{k}={v!r}" for k, v in row["fields"].items()) + "\n", style="dim")
    return None


@app.command()
def report(out: Out = None) -> None:
    """An HTML page for every study in the ledgers, and their index."""
    folder = report_folder(out)
    from perturbed.evidence import ledger as ledgers
    from perturbed.evidence.report import page_name, write_index, write_study

    pages: dict[str, list[Record]] = {}
    for source in (ledgers.user_folder(), ledgers.package_folder()):
        for file in sorted(source.glob("*.jsonl")):
            for record in ledgers.read(file):
                ledgers.recompute(record)
                pages.setdefault(page_name(record), []).append(record)
    for records in pages.values():
        records.sort(key=lambda r: r["started"])
        with reporting(folder):
            write_study(records[-1], folder, history=records[:-1])
    with reporting(folder):
        index = write_index([r[-1] for r in pages.values()], folder)
    console().print(f"report     {index}", highlight=False, soft_wrap=True)


@app.command()
def bench(as_json: Json = False) -> None:
    """What the engine costs beside a loop written by hand, and what sharing of stages saves, on this machine."""
    folder = Path(__file__).parents[2] / "bench"
    if not folder.is_dir():
        fail("the benches come with a checkout of the project: run this from an editable install")
    from perturbed.evidence.pool import load_file

    sys.path.insert(0, str(folder))  # a bench may build on another
    found = {file.stem: load_file(file).main() for file in sorted(folder.glob("*.py"))}
    if as_json:
        show_json(found)


@cache.command("ls")
def cache_ls(as_json: Json = False) -> None:
    """What the checkpoint store holds."""
    from perturbed.api import default_store
    from perturbed.core.store import Store

    entries = Store(default_store()).entries()
    if as_json:
        return show_json([{"key": e.key, "bytes": e.size, "used": e.used} for e in entries])
    size = sum(e.size for e in entries)
    return print(f"{len(entries)} checkpoints, {size / 2**20:.1f} MiB in {default_store()}")


@cache.command("prune")
def cache_prune(
    keep: Annotated[float, typer.Option("--keep", min=0, help="MiB to keep, the last used first.")] = 0.0,
) -> None:
    """Remove checkpoints; a later run computes them again."""
    from perturbed.api import default_store
    from perturbed.core.store import Store

    gone = Store(default_store()).prune(int(keep * 2**20))
    print(f"removed {len(gone)} checkpoints, {sum(e.size for e in gone) / 2**20:.1f} MiB")


@ledger.command("verify")
def ledger_verify(
    rerun: Annotated[str | None, typer.Option("--rerun", help="Run this study again ('rotate': today's).")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run every study's smoke again and compare.")] = False,
) -> None:
    """Check every ledger: hashes, statistics recomputed from raw scores; on demand also by running again."""
    from perturbed.core.registry import card
    from perturbed.evidence import ledger as ledgers

    if smoke and rerun is not None:
        fail("--rerun and --smoke: choose one")
    if rerun not in (None, "rotate"):
        card(rerun)
    for folder in (ledgers.package_folder(), ledgers.user_folder()):
        found = ledgers.verify(folder)
        if found.problems:
            fail("; ".join(found.problems))
        print(f"{folder}: {found.records} records, hashes and statistics hold")
    if smoke or rerun is not None:
        from perturbed.evidence import again

        print(again.smoke_all() if rerun is None else again.rerun(rerun))


app.command()(serve)


def console() -> Console:
    """A rich console on standard output."""
    from rich.console import Console

    return Console()


def new_table(*columns: str, whole: slice = slice(0)) -> Table:
    """A plain table; the columns ``whole`` are not broken into lines, the others rather into lines than cut off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in table.columns[whole]:
        column.no_wrap = True
    return table


def print_table(out: Console, table: Table) -> None:
    """Print a table 80 columns wide where the terminal has fewer: words and numbers cut to pieces cannot be read."""
    width = out.width
    out.width = max(width, 80)
    out.print(table)
    out.width = width


COLOURS = {"supported": "green", "contradicted": "red", "invalid": "red", "diverged": "red", "null": "cyan"}


def colour(verdict: str | None) -> str:
    """A verdict with its colour; a dash where there is none."""
    return f"[{COLOURS.get(verdict, 'yellow')}]{verdict}[/]" if verdict else "–"


def mean_of(scores: dict[str, float | None]) -> str:
    """The mean over seeds, or how many of them are finite: a mean of those that did not diverge would flatter."""
    finite = [v for v in scores.values() if v is not None]
    return f"{sum(finite) / len(finite):.4g}" if len(finite) == len(scores) else f"– ({len(finite)} of {len(scores)})"


def effect_cells(found: dict[str, Any], p: float | None) -> tuple[str, str, str]:
    """Effect, interval and p as cells of a table; a dash where there is none."""
    effect = "–" if found["effect"] is None else f"{found['effect']:+.3g}"
    interval = "–" if found["interval"] is None else "\\[{:+.3g}, {:+.3g}]".format(*found["interval"])
    return effect, interval, "–" if p is None else f"{p:.3g}"


def print_record(record: Record) -> None:
    """A record's verdict table."""
    from rich.markup import escape

    from perturbed.evidence.verdict import unspecific

    out = console()
    unit = f" in {record['unit']}" if record["unit"] else ""
    out.print(f"{record['metric']}{unit}", highlight=False, markup=False)
    table = new_table("arm", "mean", "effect", "95 % interval", "p", "verdict", whole=slice(1, None))
    for arm in sorted(record["scores"], key=lambda name: name != "control"):  # a ledger sorts arms by name
        mean = mean_of(record["scores"][arm])
        entry = record["arms"].get(arm)
        if entry is None:
            table.add_row(escape(arm), mean, "", "", "", "")
            continue
        against = "" if entry["reference"] == "control" else f" against {escape(entry['reference'])}"
        label = f"[bold]{escape(arm)}[/]{against}" if arm == record["primary"] else f"{escape(arm)}{against}"
        table.add_row(label, mean, *effect_cells(entry, entry["p"]), colour(entry["verdict"]))
    print_table(out, table)
    for pair, found in record.get("interaction", {}).items():
        if found["effect"] is not None:
            effect, interval, _ = effect_cells(found, found["p"])
            out.print(f"{pair}: together {effect} beyond the sum {interval}", highlight=False)
    if record.get("contrasts"):
        table = new_table("further question", "effect", "95 % interval", "Holm p", "verdict", whole=slice(1, None))
        for asked in record["contrasts"].values():
            table.add_row(escape(asked["asks"]), *effect_cells(asked, asked["p_holm"]), colour(asked["verdict"]))
        print_table(out, table)
    for name, gate in record["gates"].items():
        if gate["pass"] is False:
            out.print(f"[red]gate {name} failed[/]: {escape(gate['detail'])}", highlight=False)
    for what in ("text", "paper"):
        if said := record["claim"][what]:
            out.print(f"{'claim' if what == 'text' else 'paper':<11}{said}", highlight=False, markup=False)
    entry = record["arms"][record["primary"]]
    notes = [f"{len(record['seeds'])} paired seed{'s' * (len(record['seeds']) != 1)}"]
    notes += [f"detectable {entry['detectable']:.3g}"] if entry["detectable"] is not None else []
    notes += [f"smallest effect of interest {record['epsilon']:g}"] if record["epsilon"] is not None else []
    notes += ["smaller than that: trivial"] if record["trivial"] else []
    notes += ["not shown to exceed the sham"] if unspecific(record) else []
    out.print(f"here       {colour(record['verdict'])} at this scale ({'; '.join(notes)})", highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors are one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(_guarded(arguments, debug))


def _terminated(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


_STOPPED = "interrupted; the same command goes on from the last checkpoint"


def _guarded(arguments: list[str], debug: bool) -> int:
    from typer.exceptions import TyperException

    try:
        code = int(typer.main.get_command(app).main(arguments, prog_name="perturbed", standalone_mode=False) or 0)
        sys.stdout.flush()
        if code != Interrupted.code:
            return code
        return _say(_STOPPED, code)  # typer makes an exit code of Ctrl-C, and says nothing
    except (KeyboardInterrupt, typer.Abort):
        return _say(_STOPPED, Interrupted.code)
    except (BrokenPipeError, SystemExit) as e:
        if isinstance(e, BrokenPipeError) or isinstance(e.__context__, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the reader has gone; nothing may be flushed to it)
            return 0
        return _say(f"SystemExit: {e} (something that was imported or called ended the program{_where(e)})", 2)
    except TyperException as e:
        context = getattr(e, "ctx", None)
        said = getattr(e, "format_message", e.__str__)() or "a command is missing"
        return _say(f"{said} ({context.command_path if context else 'perturbed'} --help)", 2)
    except PerturbedError as e:
        if debug:
            raise
        return _say(str(e), e.code)
    except Exception as e:
        if debug:
            raise
        return _say(
            f"{type(e).__name__}: {e} (a defect of perturbed or of your plan{_where(e)}; --debug shows more)", 2
        )


def _where(error: BaseException) -> str:
    """Where an error came from: the last place in a file of the user's own, else the last; also of a worker's."""
    told = "".join(traceback.format_exception(error))  # a worker's traceback is text already
    places = re.findall(r'File "([^"<]+)", line (\d+)', told)
    ours = (str(Path(__file__).parent), *sysconfig.get_paths().values())
    own = [place for place in places if not place[0].startswith(ours)]
    return ", at {} line {}".format(*(own or places)[-1]) if places else ""


def _say(message: str, code: int) -> int:
    print(f"perturbed: error: {' '.join(message.split())}", file=sys.stderr)
    return code
