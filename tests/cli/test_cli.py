"""What a user types, and what bad input says: one line that tells what is wrong and what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from answers import refused
from loky.process_executor import _ExceptionWithTraceback

import perturbed as pt
from perturbed import cli
from perturbed.evidence import ledger as ledgers
from perturbed.inputs.noise import InputNoise
from perturbed.optim.fine_tuning import StepDecay

PLANS = Path(__file__).parent / "own_plans.py"
SLUG = "adversarial-fine-tuning"
SMOKE = ["run", SLUG, "--scale", "smoke", "--workers", "1"]


def test_unknown_slug_names_the_nearest(perturbed):
    refused(perturbed("run", "hubbel"), "hubbel", "hubble", "perturbed list")
    refused(perturbed("show", "adversarial-finetuning"), SLUG)


def test_unknown_command_and_option(perturbed):
    refused(perturbed("rnu"), "rnu")
    refused(perturbed("run", SLUG, "--sclae", "smoke"), "--sclae")
    refused(perturbed("run", SLUG, "--scale", "tiny"), "smoke, laptop, full, paper")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("plan.widht=3", ["widht", "plan.width"]),
        ("plan.width=abc", ["width", "abc", "int"]),
        ("plan.width", ["FIELD=VALUE"]),
        ("eps=0.1", ["ambiguous", "slow_fast.eps=0.1"]),
        ("metric=accuracy", ["no such field"]),
    ],
)
def test_settings_that_do_not_fit(perturbed, setting, words):
    refused(perturbed(*SMOKE, "--set", setting), *words)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [("0", ["at least one seed"]), ("1,1,2", ["seed 1", "twice"]), ("-1,2", ["negative"]), ("x", ["which (0,1,2)"])],
)
def test_seeds_that_pair_nothing(perturbed, seeds, words):
    refused(perturbed(*SMOKE, "--seeds", seeds), *words)


def test_plan_files(perturbed, tmp_path):
    broken = tmp_path / "broken_plan.py"
    broken.write_text("import no_such_module\n")
    refused(perturbed(*SMOKE, "--plan", f"{broken}:plan"), "broken_plan.py", "does not import", "no_such_module")
    refused(perturbed(*SMOKE, "--plan", f"{PLANS}:not_a_plan"), "no Plan")
    refused(perturbed(*SMOKE, "--plan", f"{PLANS}:wants"), "wants gives no plan", "missing 1", "without arguments")
    ends = tmp_path / "plan_that_ends.py"
    ends.write_text("raise SystemExit(1)\n")
    refused(perturbed(*SMOKE, "--plan", f"{ends}:plan"), "does not import: SystemExit: 1")
    falls = tmp_path / "plan_that_falls.py"
    falls.write_text("def plan():\n    return 1 / 0\n")
    refused(perturbed(*SMOKE, "--plan", f"{falls}:plan"), "ZeroDivisionError", "plan_that_falls.py line 2;")
    refused(perturbed(*SMOKE, "--plan", f"{PLANS}:palns"), "palns", "plan")
    refused(perturbed(*SMOKE, "--plan", f"{tmp_path}/nowhere.py:plan"), "no file")
    refused(perturbed(*SMOKE, "--plan", "digit"), "did you mean 'digits'")


def test_a_missing_fact_is_named(perturbed):
    answer = perturbed(*SMOKE, "--seeds", "2", "--plan", f"{PLANS}:without_range")
    refused(answer, "input_range", "perturbed plans")


def test_own_plan_runs_and_is_not_registered(perturbed, tmp_path):
    options = ["--seeds", "2", "--arms", "slow_fast", "--json", "--out", tmp_path / "r"]
    code, out, _ = perturbed(*SMOKE, "--plan", f"{PLANS}:made", *options)
    record = json.loads(out)
    assert code == 0
    assert record["registered"] is False
    assert set(record["scores"]) == {"control", "scratch", "slow_fast"}


def test_divergence_stops_that_run_only(perturbed, tmp_path):
    options = ["--seeds", "3", "--json", "--out", tmp_path / "r"]
    code, out, _ = perturbed(*SMOKE, "--plan", f"{PLANS}:exploding", *options)
    record = json.loads(out)
    assert record["scores"]["control"]["1"] is None
    assert record["scores"]["control"]["0"] is not None
    entry = record["arms"]["slow_fast"]
    assert (entry["verdict"], entry["finite"], entry["n"]) == ("diverged", 2, 3)
    assert "at step 0" in record["diverged"]["control"]["1"]
    assert code == 0


def test_smoke_prints_one_json_object_and_a_page(perturbed, tmp_path):
    code, out, err = perturbed(*SMOKE, "--seeds", "2", "--json", "--out", tmp_path / "reports")
    record = json.loads(out)
    assert code == 0
    assert err
    assert record["gates"]["off_equals_control"]["pass"] is True
    assert record["gates"]["same_seed"]["pass"] is True
    assert record["verdict"] == "screening"
    assert record["seeds"] == [0, 1]
    again = json.loads(perturbed(*SMOKE, "--seeds", "2", "--json", "--out", tmp_path / "reports")[1])
    assert again["scores"] == record["scores"]
    (page,) = (tmp_path / "reports").glob("*.html")
    assert SLUG in page.read_text()


def test_workers_give_the_same_bits(perturbed, tmp_path, monkeypatch):
    wanted = ["run", SLUG, "--scale", "smoke", "--seeds", "2", "--json", "--out", tmp_path / "r", "--workers"]
    code, out, err = perturbed(*wanted, "1")
    assert code == 0, err
    one = json.loads(out)
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "elsewhere"))
    code, out, err = perturbed(*wanted, "2")
    assert code == 0, err
    two = json.loads(out)
    assert one["scores"] == two["scores"]
    assert one["secondary"] == two["secondary"]
    assert one["curves"] == two["curves"]


def test_out_that_cannot_be_written_is_said_before_any_work(perturbed, tmp_path):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    refused(perturbed(*SMOKE, "--out", tmp_path / "file" / "reports"), "--out")
    assert time.monotonic() - began < 1


def test_a_store_that_cannot_be_used_is_said(perturbed, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "store").write_text("")
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "taken"))
    refused(perturbed(*SMOKE, "--seeds", "1"), "store", "PERTURBED_HOME")


def test_an_edited_ledger_is_refused(perturbed, tmp_path, monkeypatch):
    source = ledgers.file_of(ledgers.package_folder(), SLUG)
    *older, newest = source.read_text().splitlines()
    score = re.search(r'"control":\{"0":([0-9.]+)', newest)
    assert score is not None
    copy = ledgers.file_of(tmp_path, SLUG)
    edited = newest.replace(score[0], score[0].replace(score[1], "0.123"), 1)
    copy.write_text("\n".join([*older, edited, ""]))
    monkeypatch.setattr(ledgers, "package_folder", lambda: tmp_path)
    refused(perturbed("show", SLUG), f"{SLUG}.jsonl", f"line {len(older) + 1}")
    refused(perturbed("ledger", "verify"), f"{SLUG}.jsonl", f"line {len(older) + 1}")
    shutil.copy(source, copy)
    assert perturbed("ledger", "verify")[0] == 0


def test_an_empty_data_set_is_said(perturbed, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(perturbed("run", "hubble", "--scale", "smoke", "--set", f"data={tmp_path}/empty.txt"), "empty")


def test_a_missing_extra_says_what_to_install(perturbed, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(perturbed(*SMOKE, "--seeds", "2", "--on", "ray"), "perturbed[ray]")


def test_gate_failure_is_exit_code_three(perturbed, tmp_path):
    options = ["--seeds", "1", "--plan", f"{PLANS}:plan", "--workers", "1", "--out", tmp_path / "r"]
    code, out, _ = perturbed("run", SLUG, *options)
    assert code == 3
    assert "sanity" in out


def test_judge_and_power(perturbed, tmp_path):
    rows = ["arm,seed,score"] + [
        f"{a},{s},{s + d + 0.01 * s * (a == 'b')}" for a, d in (("a", 0), ("b", 1)) for s in range(8)
    ]
    (tmp_path / "scores.csv").write_text("\n".join(rows))
    asked = ["judge", tmp_path / "scores.csv", "--control", "a", "--treatment", "b", "--out", tmp_path / "r", "--json"]
    record = json.loads(perturbed(*asked)[1])
    assert record["verdict"] == "supported"
    assert record["arms"]["b"]["effect"] == pytest.approx(1 + 0.01 * 3.5)
    (tmp_path / "scores.csv").write_text("\n".join(rows[:-1]))
    refused(perturbed(*asked), "seed 7", "'b'")
    assert json.loads(perturbed("power", "--sd", "1", "--effect", "1.3", "--json")[1])["seeds"] == 8
    refused(perturbed("power", "--sd", "1"), "exactly two")


def test_list_show_plans_dry_run(perturbed):
    rows = json.loads(perturbed("list", "--json")[1])
    assert {"slug", "title", "arxiv", "year", "sites", "modality", "kind", "verdict"} == set(rows[0])
    assert [r["slug"] for r in json.loads(perturbed("list", "memorisation", "--json")[1])] == ["hubble"]
    assert SLUG in [r["slug"] for r in json.loads(perturbed("list", "--site", "optim", "--json")[1])]
    assert "claim" in perturbed("show", "hubble")[1]
    names = [p["name"] for p in json.loads(perturbed("plans", "--json")[1])]
    assert {"docstring-lm", "digits", "pendulum-cloning"} <= set(names)
    bill = json.loads(perturbed("run", "hubble", "--scale", "paper", "--dry-run", "--json")[1])
    assert bill["paper"]["gpu_hours"] > 100


def test_compare_names_the_method_that_does_not_fit(perturbed):
    refused(perturbed("compare", SLUG, "hubble", "--plan", f"{PLANS}:plan"), "'hubble'", "modality", "language")


def test_compare_in_combination(perturbed, tmp_path):
    arms = {"noise": [InputNoise(scale=0.3)], "decay": [StepDecay(stage="finetune")]}
    record = pt.compare(f"{PLANS}:plan", arms, seeds=6, factorial=True, workers=1)
    assert list(record["scores"]) == ["control", "noise", "decay", "noise+decay"]
    d = {
        arm: np.array([record["scores"][arm][str(s)] - record["scores"]["control"][str(s)] for s in range(6)])
        for arm in record["arms"]
    }
    found = record["interaction"]["noise+decay"]
    assert found["effect"] == pytest.approx((d["noise+decay"] - d["noise"] - d["decay"]).mean())
    assert found["interval"][0] <= found["effect"] <= found["interval"][1]
    assert pt.write_report(record, tmp_path).read_text().count("<svg") >= 2


@pytest.mark.slow
def test_workers_do_not_outlive_a_command_that_was_killed(tmp_path):
    command = [sys.executable, "-m", "perturbed", "run", SLUG, "--seeds", "2", "--workers", "2", "--json"]
    command += ["--out", str(tmp_path / "r"), "--set", "plan.pretrain_steps=100000", "--arms", "slow_fast"]
    env = {**os.environ, "PERTURBED_HOME": str(tmp_path / "home3")}
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 120
    while len(workers := workers_of(child.pid)) < 2 and time.monotonic() < patience:
        time.sleep(0.1)
    child.kill()
    child.wait()
    patience = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < patience:
        time.sleep(0.5)
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for one in children if b"LokyProcess" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.slow
def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "perturbed", "run", SLUG, "--seeds", "1", "--workers", "2", "--json"]
    command += ["--out", str(tmp_path / "r"), "--set", "plan.pretrain_steps=3000", "--arms", "slow_fast"]
    command += ["--set", "plan.finetune_steps=20"]
    env = {**os.environ, "PERTURBED_HOME": str(tmp_path / "home2")}
    child = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    locks, patience = tmp_path / "home2" / "store" / "locks", time.monotonic() + 120
    while not (locks.is_dir() and any(locks.iterdir())) and time.monotonic() < patience:
        time.sleep(0.1)  # until a run of the study itself has begun
    time.sleep(2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=90)
    assert child.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    partial = list((tmp_path / "home2" / "store").rglob("*.safetensors"))
    assert partial, "nothing was kept"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    whole = subprocess.run(
        command, env={**env, "PERTURBED_HOME": str(tmp_path / "home3")}, capture_output=True, text=True, timeout=240
    )
    assert json.loads(done.stdout)["scores"] == json.loads(whole.stdout)["scores"]


def test_a_metric_whose_direction_is_unknown_is_refused_before_anything_runs(perturbed):
    options = ["--plan", f"{PLANS}:plan", "--metric", "accuracy_wider", "--workers", "1"]
    refused(perturbed("compare", SLUG, *options), "accuracy_wider", "--direction")


def test_sizes_that_make_no_run_and_arms_of_the_full_record_are_named(perturbed):
    refused(perturbed(*SMOKE, "--set", "plan.width=0"), "width=0", "at least 1")
    refused(perturbed(*SMOKE, "--set", "plan.lr=nan"), "lr=nan", "above 0")
    refused(perturbed("run", "hubble", "--arms", "diluted"), "diluted", "--scale full")


def test_the_paper_scale_is_never_run(perturbed):
    refused(perturbed("run", "hubble", "--scale", "paper"), "--dry-run")
    with pytest.raises(pt.PerturbedError, match="dry-run"):
        pt.run("hubble", scale="paper")


def test_the_recorded_command_of_a_compare_says_what_decided(perturbed, tmp_path):
    decides = ["--metric", "accuracy", "--direction", "higher", "--epsilon", "0.05"]
    options = ["--seeds", "2", "--workers", "1", "--json", "--out", tmp_path / "r"]
    code, out, _ = perturbed("compare", SLUG, "--plan", f"{PLANS}:plan", *decides, *options)
    assert code == 0
    command = json.loads(out)["command"]
    assert command.endswith("--metric accuracy --direction higher --epsilon 0.05")


def test_the_table_shows_units_and_no_mean_of_an_arm_that_diverged(capsys):
    record = pt.judge([1.0, 2.0, 3.0], [2.0, None, 4.0]) | {"unit": "bits", "metric": "exposure"}
    record["claim"] = {"text": "more [of] it", "paper": "by [much]"}
    cli.print_record(record)
    out = capsys.readouterr().out
    assert "exposure in bits" in out
    assert "– (2 of 3)" in out
    assert "more [of] it" in out
    assert "by [much]" in out


def test_pt_judge_is_perturbed_judge(perturbed, tmp_path):
    control, treatment = [0.81, 0.79, 0.83, 0.80, 0.82, 0.78], [0.84, 0.83, 0.85, 0.84, 0.83, 0.82]
    record = pt.judge(control, treatment, epsilon=0.01)
    rows = [f"{a},{i},{x}" for a, of in (("c", control), ("t", treatment)) for i, x in enumerate(of)]
    (tmp_path / "scores.csv").write_text("\n".join(["arm,seed,score", *rows]))
    options = ["--control", "c", "--treatment", "t", "--epsilon", "0.01", "--json", "--out", tmp_path / "r"]
    told = json.loads(perturbed("judge", tmp_path / "scores.csv", *options)[1])
    assert told["arms"]["t"] == record["arms"]["treatment"]
    assert told["verdict"] == record["verdict"] == "supported"
    page = pt.write_report(record, tmp_path).read_text()
    assert page.count("<svg") >= 2
    assert "standard deviations of the paired differences" in page
    with pytest.raises(ValueError, match="seed 5"):
        pt.judge(control, treatment[:5])


@pytest.mark.slow
def test_launched_in_two_processes_one_of_them_tells_the_outcome(tmp_path):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--scale", "smoke", "--seeds", "2", "--json", "--out", str(tmp_path / "r")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PERTURBED_HOME": str(tmp_path / "h")}
    done = subprocess.run(
        [sys.executable, *several, "-m", "perturbed", "run", SLUG, *options],
        env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["machine"]["processes"] == 2
    assert record["registered"] is False
    assert done.stderr.count("[1/") == 1


@pytest.mark.parametrize("group", [[], ["cache"], ["ledger"], ["feed"]])
def test_a_missing_command_is_said_under_the_help(perturbed, group):
    code, out, err = perturbed(*group)
    assert code == 2
    assert "Commands" in out
    assert err == f"perturbed: error: a command is missing ({' '.join(['perturbed', *group])} --help)\n"


def test_a_wrong_option_points_to_the_help_of_its_command(perturbed):
    refused(perturbed("run", SLUG, "--workers", "x"), "--workers", "(perturbed run --help)")
    refused(perturbed("cache", "prune", "--keep", "x"), "--keep", "(perturbed cache prune --help)")


def test_an_empty_list_of_arms_does_not_mean_all(perturbed):
    refused(perturbed(*SMOKE, "--arms", ""), "--arms", "without the option all run")
    refused(perturbed(*SMOKE, "--arms", "slow_fast,"), "--arms")


def test_a_slip_of_the_pen_is_said_before_torch_is_imported():
    for words in (
        ["run", "hubbel"],
        ["run", "hubble", "--seeds", "x"],
        ["compare", "hubble", "--plan", "p", "--seeds", "x"],
    ):
        script = (
            f"import sys\nfrom perturbed import cli\ntry: cli.main({words})\nexcept SystemExit as e: code = e.code\n"
        )
        script += "sys.exit((code, 'torch' in sys.modules) != (2, False))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_ledger_verify_names_a_study_that_does_not_exist(perturbed):
    refused(perturbed("ledger", "verify", "--rerun", "hubbel"), "did you mean 'hubble'")
    refused(perturbed("ledger", "verify", "--rerun", "hubble", "--smoke"), "choose one")


def test_power_speaks_of_its_options(perturbed):
    refused(perturbed("power", "--sd", "0", "--effect", "1"), "--sd must be a positive number")
    refused(perturbed("power", "--sd", "1", "--seeds", "0"), "--seeds must be a positive number")


def test_names_of_arms_are_no_markup(perturbed, tmp_path):
    rows = ["arm,seed,score", "lora[r=8],0,1", "[/nope],0,2"]
    (tmp_path / "scores.csv").write_text("\n".join(rows))
    options = ["--control", "lora[r=8]", "--treatment", "[/nope]", "--out", tmp_path / "r"]
    code, out, _ = perturbed("judge", tmp_path / "scores.csv", *options)
    assert code == 0
    assert re.search(r"^ \[/nope\] +2 ", out, re.MULTILINE), out
    assert "(1 paired seed)" in out
    record = pt.judge([1.0], [2.0])
    record["scores"]["lora[r=8]"] = record["scores"].pop("control")
    record["arms"]["treatment"]["reference"] = "lora[r=8]"
    cli.print_record(record)


@pytest.mark.parametrize(
    "words", [["list"], ["list", "--json"], ["plans"], ["show", "hubble"], ["show", "hubble", "--json"]]
)
def test_a_reader_that_has_gone_is_no_error(words):
    child = subprocess.Popen(
        [sys.executable, "-m", "perturbed", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")


def test_ctrl_c_outside_a_run_is_said_too(perturbed, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ledgers, "stored_verdict", interrupted)
    code, out, err = perturbed("list")
    assert (code, out) == (130, "")
    assert err.startswith("perturbed: error: interrupted; the same command goes on")


def test_a_plan_file_that_fails_is_told_with_its_line(perturbed, tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit('usage: leaves.py FILE')\n")
    refused(perturbed(*SMOKE, "--plan", f"{tmp_path}/leaves.py:plan"), "usage: leaves.py FILE", "leaves.py line 3")
    (tmp_path / "fails.py").write_text("def plan():\n    raise RuntimeError('no data\\nhere')\n")
    refused(perturbed(*SMOKE, "--plan", f"{tmp_path}/fails.py:plan"), "no data here", "fails.py line 2")


def test_what_fails_in_a_worker_is_told_with_its_line(tmp_path):
    (tmp_path / "fails.py").write_text("def loss():\n    {}['lables']\n")
    spec = importlib.util.spec_from_file_location("fails", tmp_path / "fails.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(KeyError) as raised:
        module.loss()
    sent = pickle.loads(pickle.dumps(_ExceptionWithTraceback(raised.value)))
    with pytest.raises(KeyError) as received:
        raise sent
    received.value.__traceback__ = None  # what is left is the text that the worker sent
    assert cli._where(received.value) == f", at {tmp_path}/fails.py line 2"


def test_a_report_that_does_not_fit_on_the_disk_hides_no_verdict(tmp_path):
    rows = ["arm,seed,score"] + [f"{a},{s},{s + (a == 'b')}" for a in "ab" for s in range(8)]
    (tmp_path / "scores.csv").write_text("\n".join(rows))
    words = ["judge", str(tmp_path / "scores.csv"), "--control", "a", "--treatment", "b", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "perturbed", *words, "--out", str(tmp_path / "r")], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)), check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert json.loads(done.stdout)["verdict"] == "deterministic"
    assert done.stderr.startswith(
        f"perturbed: error: cannot write reports to {tmp_path / 'r'}: File too large; make room"
    )
    assert list((tmp_path / "r").glob("*.html")) == []


def test_a_record_that_cannot_be_kept_is_shown_all_the_same(perturbed, home, tmp_path):
    (home / "ledger").write_text("")
    options = ["--seeds", "1", "--plan", f"{PLANS}:plan", "--workers", "1", "--json", "--out", tmp_path / "r"]
    code, out, err = perturbed("run", SLUG, *options)
    assert code == 2
    assert json.loads(out)["scores"]["control"]["0"] is not None
    assert "ledger" in err.splitlines()[-1]


def test_a_store_that_cannot_be_used_is_said_before_any_work(perturbed, home, monkeypatch):
    monkeypatch.setattr("perturbed.api.setting", lambda *_, **__: pytest.fail("the study was made"))
    monkeypatch.setattr("perturbed.api.compare_methods", lambda *_, **__: pytest.fail("the study was run"))
    (home / "store").write_text("")
    refused(perturbed(*SMOKE), "store", "PERTURBED_HOME")
    refused(perturbed("compare", SLUG, "--plan", "digits"), "store", "PERTURBED_HOME")


def test_the_control_heads_the_table(capsys):
    record = pt.judge({0: 1.0, 1: 2.0}, {0: 2.0, 1: 4.0})
    record["scores"] = {"a": record["scores"]["treatment"], **record["scores"]}
    cli.print_record(record)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[4:7]]
    assert rows == ["control", "a", "treatment"]


def test_a_narrow_terminal_breaks_no_name_and_no_number(perturbed, monkeypatch, capsys):
    for columns in ("40", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        out = perturbed("list")[1]
        assert re.search(rf"^ {SLUG} +contradicted +2020 ", out, re.MULTILINE), out
        cli.print_record(pt.judge([1.0, 2.0, 3.0], [2.0, 3.5, 3.75]))
        row = next(line for line in capsys.readouterr().out.splitlines() if "treatment" in line)
        assert row.split()[:6] == ["treatment", "3.083", "+1.08", "[+0.135,", "+2.03]", "0.25"]
