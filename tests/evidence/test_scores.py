"""Scores of runs made elsewhere: every form that is understood, and a clear word about every one that is not."""

import json
import math
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perturbed.evidence.scores import judge_files, judge_scores, read_scores
from perturbed.evidence.verdict import judge, judge_record

EXPECTED = {"base": {0: 0.5, 1: 0.25}, "new": {0: 0.75, 1: 1.5}}

LONG = "arm,seed,score\nbase,0,0.5\nbase,1,0.25\nnew,0,0.75\nnew,1,1.5\n"
KEYED = {a: {str(s): x for s, x in of.items()} for a, of in EXPECTED.items()}
ROWS = [{"arm": a, "seed": s, "score": x} for a, of in EXPECTED.items() for s, x in of.items()]
TRIPLES = [tuple(row.values()) for row in ROWS]

# What the "Export as CSV" of a W&B project table holds: run fields, then config, then summary.
WANDB = """\
"Name","State","Notes","User","Tags","Created","Runtime","Sweep","arm","lr","seed",\
"eval/accuracy","eval/loss"
"jolly-haze-4","finished","-","ann","","2025-11-03T10:00:00.000Z","61","","base","0.001","0","0.5","1.25"
"fresh-sun-3","finished","-","ann","","2025-11-03T10:00:00.000Z","62","","base","0.001","1","0.25","NaN"
"misty-oak-2","finished","-","ann","","2025-11-03T10:00:00.000Z","60","","new","0.001","0","0.75","0.5"
"noble-fog-1","finished","-","ann","","2025-11-03T10:00:00.000Z","64","","new","0.001","1","1.5","0.25"
"""

# What `api.runs(…)` gives in the script of W&B's guide: dictionaries as their repr in a CSV.
WANDB_SCRIPT = """,summary,config,name
0,"{'_step': 9, 'acc': 0.5, '_wandb': {'runtime': 3}, 'loss': nan}","{'seed': 0, 'arm': 'base', 'tag': None}",a
1,"{'_step': 9, 'acc': 0.25, 'loss': inf}","{'seed': 1, 'arm': 'base', 'tag': None}",b
2,"{'_step': 9, 'acc': 0.75, 'loss': 2.5}","{'seed': 0, 'arm': 'new', 'tag': None}",c
3,"{'_step': 9, 'acc': 1.5, 'loss': 1}","{'seed': 1, 'arm': 'new', 'tag': None}",d
"""

WANDB_CHART = """\
"Step","base-seed0 - acc","base-seed0 - acc__MIN","base-seed0 - acc__MAX","base-seed0 - _step",\
"base-seed1 - acc","base-seed1 - acc__MIN","base-seed1 - acc__MAX",\
"new_s0 - acc","new_s0 - acc__MIN","new_s0 - acc__MAX","new_s1 - acc","new_s1 - acc__MIN","new_s1 - acc__MAX"
"0","0.1","0.1","0.1","0","0.1","0.1","0.1","0.1","0.1","0.1","0.1","0.1","0.1"
"5","0.3","0.3","0.3","5","","","","0.4","0.4","0.4","0.5","0.5","0.5"
"9","0.5","0.5","0.5","9","0.25","0.25","0.25","0.75","0.75","0.75","1.5","1.5","1.5"
"""

# Written by mlflow 3.17: `mlflow.search_runs().to_csv(…)`; a NaN metric comes out empty.
MLFLOW = """run_id,experiment_id,status,start_time,end_time,metrics.acc,metrics.loss,params.lr,params.seed,\
tags.arm,tags.mlflow.runName
381f,0,FINISHED,2026-11-23 08:25:57.875+00:00,2026-11-23 08:25:57.880+00:00,1.5,,0.001,1,new,r1
9223,0,FINISHED,2026-11-23 08:25:57.870+00:00,2026-11-23 08:25:57.874+00:00,0.75,1.0,0.001,0,new,r2
84f9,0,FINISHED,2026-11-23 08:25:57.864+00:00,2026-11-23 08:25:57.868+00:00,0.25,0.5,0.001,1,base,r3
c590,0,FINISHED,2026-11-23 08:25:57.853+00:00,2026-11-23 08:25:57.862+00:00,0.5,2.0,0.001,0,base,r4
"""

# The download button of MLflow's page: no prefixes; arm and seed only in the run's name here.
MLFLOW_PAGE = """Start Time,Duration,Run ID,Name,Source Type,Source Name,User,Status,lr,acc
2026-11-23 08:25:57,1.2s,381f,new seed=1,LOCAL,train.py,ann,FINISHED,0.001,1.5
2026-11-23 08:25:57,1.2s,9223,new seed=0,LOCAL,train.py,ann,FINISHED,0.001,0.75
2026-11-23 08:25:57,1.2s,84f9,base seed=1,LOCAL,train.py,ann,FINISHED,0.001,0.25
2026-11-23 08:25:57,1.2s,c590,base seed=0,LOCAL,train.py,ann,FINISHED,0.001,0.5
"""


@pytest.fixture
def write(tmp_path):
    def file(name, content):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return file


# --- forms


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", LONG),
        ("a.csv", "\ufeff" + LONG),
        ("a.csv", LONG.replace(",", ";")),
        ("a.csv", LONG.replace("\n", "\r\n") + "\r\n"),
        ("a.csv", LONG.replace("arm,seed,score", "Method,Random_Seed,Value")),
        ("a.csv", LONG.replace("arm,seed,score", "GROUP, Seed ,accuracy")),
        ("a.csv", LONG.replace(",0,", ",0.0,").replace("0.25", " 2.5e-1 ")),
        ("a.tsv", LONG.replace(",", "\t")),
        ("a.csv", "seed,base,new\n0,0.5,0.75\n1,0.25,1.5\n"),
        ("a.csv", "arm,seed,metric,value\n" + "".join(f"{r['arm']},{r['seed']},acc,{r['score']}\n" for r in ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"scores": KEYED, "metric": "m"})),
        ("a.json", json.dumps(KEYED)),
        ("a.json", json.dumps([{"seed": 0, "base": 0.5, "new": 0.75}, {"seed": 1, "base": 0.25, "new": 1.5}])),
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS) + "\n\n"),
        ("a.ndjson", "\n".join(json.dumps({"config": {"arm": a, "seed": s}, "acc": x}) for a, s, x in TRIPLES)),
        ("a.csv", MLFLOW_PAGE.replace(",lr,", ",epoch,")),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_scores(write, name, content):
    assert read_scores(write(name, content)) == EXPECTED


@pytest.mark.parametrize(
    ("content", "metric"),
    [
        (WANDB, "eval/accuracy"), (WANDB_SCRIPT, "acc"), (WANDB_SCRIPT, "summary.acc"), (MLFLOW, "acc"),
        (MLFLOW, "metrics.acc"), (MLFLOW_PAGE, "acc"), (WANDB_CHART, None), (WANDB_CHART, "acc"),
    ],
)  # fmt: skip
def test_tracker_exports_are_recognised(write, content, metric):
    assert read_scores(write("export.csv", content), metric=metric) == EXPECTED


def test_parquet_in_long_and_wide_form(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "long.parquet")
    assert read_scores(tmp_path / "long.parquet") == EXPECTED
    wide = {"seed": [0, 1], "base": [0.5, 0.25], "new": [0.75, 1.5]}
    pq.write_table(pa.table(wide), tmp_path / "wide.parquet")
    assert read_scores(tmp_path / "wide.parquet") == EXPECTED


def test_columns_can_be_named(write):
    text = "lr,run,loss,seed\n0.1,7,0.5,9\n0.1,8,0.25,9\n0.2,7,0.75,9\n0.2,8,1.5,9\n"
    found = read_scores(write("a.csv", text), arm="LR", seed="run", metric="loss")
    assert found == {"0.1": {7: 0.5, 8: 0.25}, "0.2": {7: 0.75, 8: 1.5}}


def test_a_control_called_treatment_and_control_in_wide_form(write):
    found = read_scores(write("a.csv", "seed,control,treatment\n0,1,2\n1,3,4\n"))
    assert found == {"control": {0: 1, 1: 3}, "treatment": {0: 2, 1: 4}}


def test_one_of_several_metrics_in_tidy_rows(write):
    text = "arm,seed,metric,value\nbase,0,acc,0.5\nbase,0,loss,9\nnew,0,acc,0.75\nnew,0,loss,8\n"
    assert read_scores(write("a.csv", text), metric="loss") == {"base": {0: 9}, "new": {0: 8}}


# --- diverged and missing


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "inf", "-Infinity", "None", "null", "N/A"])
def test_a_run_without_a_finite_score_diverged(write, cell):
    assert read_scores(write("a.csv", LONG.replace("0.25", cell)))["base"] == {0: 0.5, 1: None}


def test_json_null_and_nan_diverged_too(write):
    for text in ("null", "NaN"):
        found = read_scores(write("a.json", json.dumps(ROWS).replace("0.25", text)))
        assert found == EXPECTED | {"base": {0: 0.5, 1: None}}


def test_trackers_lose_the_nan_but_not_the_run(write):
    assert read_scores(write("a.csv", WANDB), metric="eval/loss")["base"] == {0: 1.25, 1: None}
    assert read_scores(write("a.csv", WANDB_SCRIPT), metric="loss") == {
        "base": {0: None, 1: None},
        "new": {0: 2.5, 1: 1},
    }
    assert read_scores(write("a.csv", MLFLOW), metric="loss")["new"] == {1: None, 0: 1.0}


def test_an_empty_cell_of_the_wide_form_is_a_missing_run_and_nan_a_diverged_one(write):
    found = read_scores(write("a.csv", "seed,base,new\n0,0.5,\n1,nan,1.5\n"))
    assert found == {"base": {0: 0.5, 1: None}, "new": {1: 1.5}}
    with pytest.raises(ValueError, match=r"unpaired: 'new' has no score at seed 0\. Every seed needs both arms"):
        judge_scores(found, control="base", treatment="new")


# --- bad input


@pytest.mark.parametrize(
    ("name", "content", "asked", "message"),
    [
        ("a.csv", LONG.replace("0.25", "good"), {}, "row 3: the score 'good' is not a number; write nan"),
        ("a.csv", LONG.replace("base,1,", "base,one,"), {}, "row 3: the seed 'one' is not a whole number"),
        ("a.csv", LONG.replace("base,1,", "base,1.5,"), {}, r"row 3: the seed '1\.5' is not a whole number"),
        ("a.csv", LONG.replace("base,1,", ",1,"), {}, "row 3 names no arm in column 'arm'"),
        ("a.csv", LONG + "base,1,0.3\nnew,0,9\n", {}, "'base' seed 1 in rows 3, 6; arm 'new' seed 0 in rows 4, 7"),
        ("a.csv", LONG + "base,2\n", {}, "row 6 does not have the 3 cells of the header"),
        ("a.csv", LONG + "base,2,1,1\n", {}, "row 6 does not have"),
        ("a.csv", LONG + '"base,2,1\n', {}, "row 6 is damaged"),
        ("a.csv", LONG.replace("score", "seed"), {}, "more than one column is called 'seed'"),
        ("a.csv", "", {}, "there are no rows"),
        ("a.csv", "arm,seed,score\n", {}, "there are no rows"),
        ("a.csv", LONG, {"arm": "colour"}, "no column 'colour', only arm, seed, score"),
        ("a.csv", LONG, {"metric": "acc"}, "no column 'acc'"),
        ("a.csv", LONG.replace("seed", "try"), {}, "for the seed among arm, try, score: say which it is with --seed"),
        ("a.csv", LONG.replace("arm", "who"), {}, "for the arm among who, seed, score: say which it is with --arm"),
        ("a.csv", "arm,seed,score\na,0,x\n", {}, "no column of numbers for the score"),
        ("a.csv", "arm,seed,acc,loss\na,0,1,2\n", {}, "several metrics, acc, loss: choose one with --metric"),
        ("a.csv", "arm,seed,metric,value\na,0,acc,1\na,0,f1,2\n", {}, "several metrics, acc, f1: choose"),
        ("a.csv", "arm,seed,metric,value\na,0,acc,1\na,0,f1,2\n", {"metric": "f2"}, "no metric 'f2', only acc, f1"),
        ("a.csv", "seed,base,new\n0,1,2\n0,1,2\n", {}, "seed 0 is in rows 2 and 3, and no column says which arm"),
        ("a.csv", "seed,base,new\n0,1,x\n1,1,2\n", {}, "row 2: the score 'x' is not a number"),
        ("a.csv", MLFLOW, {}, r"several metrics, metrics\.acc, metrics\.loss: choose"),
        ("a.csv", MLFLOW, {"metric": "lr", "arm": "params.lr"}, r"no column 'lr'"),
        ("a.csv", MLFLOW.replace("params.lr", "params.acc"), {"metric": "acc"}, "any of metrics.acc, params.acc"),
        ("a.csv", MLFLOW.replace("84f9,0,FINISHED", "84f9,0,FAILED"), {"metric": "acc"}, "unfinished .*row 4 .FAILED"),
        ("a.csv", WANDB.replace('"finished"', '"crashed"'), {"metric": "eval/loss"}, "row 2 .crashed.; row 4 .*row 5"),
        ("a.csv", WANDB.replace(',"arm",', ',"depth",'), {}, "no column for the arm .*--arm"),
        ("a.csv", WANDB_CHART.replace("base-seed0 - ", "Group: base-seed0 - "), {}, "a grouped chart holds averages"),
        ("a.csv", WANDB_CHART.replace("base-seed0 - ", "jolly-haze-4 - "), {}, "'jolly-haze-4': these curves do"),
        ("a.csv", WANDB_CHART.replace('"9","0.5"', '"9",""'), {}, "different Step values.*base-seed0 at 5; base-"),
        ("a.csv", WANDB_CHART, {"metric": "loss"}, "no metric 'loss', only acc"),
        ("a.json", "{", {}, "this is not JSON"),
        ("a.json", "3", {}, "expected an array of"),
        ("a.json", '{"base": [1, 2]}', {}, "expected an array of"),
        ("a.json", '{"base": {"zero": 1}}', {}, "the seed 'zero' is not a whole number"),
        ("a.json", '{"base": {"0": true}}', {}, "the score True is not a number"),
        ("a.jsonl", '{"arm": 1}\n{oops\n', {}, "row 2 is not JSON"),
        ("a.jsonl", "[1]\n", {}, "row 1 is not an object"),
        ("a.parquet", "PAR?", {}, "this is not a Parquet file"),
        ("a.xlsx", "", {}, r"scores are read from \.csv, \.tsv, \.parquet, .*, not from \.xlsx"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(write, name, content, asked, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=f"(?s){name}: .*{message}") as caught:
        read_scores(path, **asked)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: No such file"):
        read_scores(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("arm,seed,score\nBär,0,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_scores(tmp_path / "latin.csv")


# --- judging

BASE = {seed: 0.5 + 0.01 * (seed % 3) for seed in range(8)}
NEW = {seed: score + 0.1 + 0.003 * seed for seed, score in BASE.items()}


def test_the_record_is_that_of_a_study(write):
    found = judge_scores({"base": BASE, "new": NEW, "other": {0: 1.0}}, control="base", treatment="new", epsilon=0.02)
    direct = judge(NEW, BASE, direction="higher", epsilon=0.02)
    assert found["verdict"] == direct.verdict == "supported"
    arm = found["arms"]["new"]
    assert (arm["effect"], tuple(arm["interval"]), arm["p"], arm["detectable"]) == (
        direct.effect, direct.interval, direct.p, direct.detectable,
    )  # fmt: skip
    assert found["scores"] == {
        "control": {str(s): x for s, x in BASE.items()},
        "new": {str(s): x for s, x in NEW.items()},
    }
    assert (found["slug"], found["plan"], found["scale"], found["registered"], found["gates"]) == (
        None,
        None,
        None,
        False,
        {},
    )
    assert found["seeds"] == list(range(8))
    assert judge_record(found) == {name: found[name] for name in ("arms", "verdict", "trivial", "specific")}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_file_is_judged_with_its_metric(write):
    rows = "".join(f"{a},{s},{x},0\n" for a, of in (("base", BASE), ("new", NEW)) for s, x in of.items())
    path = write("runs.csv", "arm,seed,loss,lr\n" + rows)
    found = judge_files(path, control="base", treatment="new", metric="loss", direction="lower")
    assert (found["verdict"], found["metric"], found["direction"]) == ("contradicted", "loss", "lower")
    assert found["claim"]["text"] == "loss of new is below that of base"
    again = write("record.json", json.dumps(found))
    assert judge_files(again, control="control", treatment="new", direction="lower")["arms"] == found["arms"]


def test_a_diverged_run_is_shown_and_no_pair_dropped(write):
    found = judge_scores({"base": BASE, "new": NEW | {3: math.nan}}, control="base", treatment="new")
    assert found["verdict"] == "diverged"
    assert (found["arms"]["new"]["finite"], found["arms"]["new"]["n"]) == (7, 8)
    assert found["scores"]["new"]["3"] is None


def test_unpaired_seeds_are_named_with_their_arms():
    fewer = {seed: score for seed, score in NEW.items() if seed not in (2, 5)}
    with pytest.raises(
        ValueError, match=r"'base' has no score at seed 11; 'new' has no score at seeds 2, 5\. Every seed"
    ):
        judge_scores({"base": BASE, "new": fewer | {11: 1.0}}, control="base", treatment="new")


@pytest.mark.parametrize(
    ("control", "treatment", "message"),
    [
        ("bass", "new", "no arm 'bass', only 'base', 'new', 'control'; did you mean 'base'?"),
        ("base", "xyz", "no arm 'xyz', only 'base', 'new', 'control'$"),
        ("base", "base", "needs a name of its own"),
        ("base", "control", "needs a name of its own"),
    ],
)
def test_arms_that_cannot_be_judged(control, treatment, message):
    with pytest.raises(ValueError, match=message):
        judge_scores({"base": BASE, "new": NEW, "control": BASE}, control=control, treatment=treatment)


def test_judging_a_file_needs_no_torch_and_no_scipy_stats(write):
    path = write("runs.csv", "seed,base,new\n" + "".join(f"{s},{BASE[s]},{NEW[s]}\n" for s in BASE))
    program = (
        "import sys; from perturbed.evidence.scores import judge_files; "
        "assert judge_files(sys.argv[1], control='base', treatment='new')['verdict'] == 'supported'; "
        "heavy = {'torch', 'scipy.stats', 'pandas', 'pyarrow', 'perturbed.core'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
