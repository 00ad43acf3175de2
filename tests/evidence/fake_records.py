"""Records of every kind of verdict, made from drawn scores; their statistics come from scipy, not from the package."""

import copy
import itertools
import math

import numpy as np
from scipy import stats


def study(scores, *, primary, sham=None, references=None, direction="higher", transform="raw", verdict, **fields):
    """A whole record from scores {arm: [number or None, ...]} of seeds 0 to n - 1."""
    n = len(scores["control"])
    references = {arm: "control" for arm in scores if arm != "control"} | (references or {})
    arms = {
        arm: _contrast(scores[arm], scores[references[arm]], direction, transform) | {"reference": references[arm]}
        for arm in references
    }
    for arm, result in arms.items():
        result.update(verdict=verdict if arm == primary else "inconclusive", trivial=False, specific=None)
        result["p_holm"] = None if arm == primary or result["p"] is None else min(1.0, result["p"] * (len(arms) - 1))
    specific = None
    if sham and arms[primary]["effect"] is not None:
        contrast = _contrast(scores[primary], scores[sham], direction, transform)
        specific = bool(contrast["interval"][0] > 0 or contrast["interval"][1] < 0)
    arms[primary].update(specific=specific, trivial=fields.get("trivial", False))
    record = {
        "schema": 1, "slug": None, "title": None, "plan": "DocstringLM", "scale": "laptop", "registered": True,
        "metric": "accuracy", "unit": "", "transform": transform, "direction": direction, "primary": primary,
        "reference": references[primary], "sham": sham, "epsilon": 0.5, "why_epsilon": "fixed for the test",
        "alpha": 0.05, "bounds": [None, None], "seeds": list(range(n)),
        "scores": {arm: {str(i): x for i, x in enumerate(xs)} for arm, xs in scores.items()}, "arms": arms,
        "secondary": {}, "curves": {}, "gates": {}, "cost": {}, "verdict": verdict, "trivial": False,
        "specific": specific, "versions": {"python": "3.11.7", "torch": "2.13.0", "perturbed": "0.1.0"},
        "machine": {"cpu": "x86_64, AVX2", "threads": 1}, "claim": {"text": "", "paper": ""},
        "command": "perturbed run study", "started": "2026-11-20T10:00:00Z",
    }  # fmt: skip
    return copy.deepcopy(record | fields)


def _contrast(treatment, reference, direction, transform):
    pairs = [(t, c) for t, c in zip(treatment, reference, strict=True) if t is not None and c is not None]
    n = len(treatment)
    empty = {"effect": None, "interval": None, "p": None, "detectable": None, "finite": len(pairs), "n": n}
    if len(pairs) < n:
        return empty
    t, c = np.array(pairs).T
    d = (-1 if direction == "lower" else 1) * (np.log(t / c) if transform == "log" else t - c)
    if d.std(ddof=1) == 0:
        return empty | {"effect": float(d.mean())}
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    flips = np.array(list(itertools.product((1, -1), repeat=n))) @ d
    return empty | {
        "effect": float(d.mean()),
        "interval": [float(low), float(high)],
        "p": float(np.mean(np.abs(flips) >= abs(d.sum()) * (1 - 1e-12))),
        "detectable": float(1.16 * d.std(ddof=1)),
    }


def curves(arms, seeds, steps=600, every=20, seed=0, top=6.2):
    rng = np.random.default_rng(seed)
    lines = {}
    for k, arm in enumerate(arms):
        lines[arm] = {}
        for i in seeds:
            wobble = np.cumsum(rng.normal(0, 0.01, steps // every))
            xs = range(every, steps + 1, every)
            lines[arm][str(i)] = [
                [x, round(float(2.4 + 0.08 * k + (top - 2.4) * math.exp(-x / 130) + w + 0.02 * i), 4)]
                for x, w in zip(xs, wobble, strict=True)
            ]
    return lines


def costs(arms, extra=1.0):
    base = {
        "wall_s": 24.8, "cpu_s": 24.1, "flops": 3.42e12, "tokens": 1_228_800, "examples": 9600, "grad_passes": 600,
        "peak_bytes": 412 * 2**20, "params_trained": 213_440, "params_stored": 213_440,
    }  # fmt: skip
    return {arm: {k: v * (1 if arm == "control" else extra) for k, v in base.items()} for arm in arms}


GATES = {
    "off_equals_control": {"pass": True, "detail": "41 tensors and the score are bit for bit the same"},
    "same_seed": {"pass": True, "detail": "d = 0 on seed 0"},
    "budgets": {"pass": True, "detail": "steps, tokens and parameters are equal in all arms"},
    "sanity": {"pass": True, "detail": "validation loss of the control 2.41, at most 3.2"},
}


def supported(seeds=8):
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.5, seeds)
    scores = {
        "control": (1.1 + shared + rng.normal(0, 0.25, seeds)).tolist(),
        "perturbed": (6.9 + shared + rng.normal(0, 0.9, seeds)).tolist(),
        "other_codes": (1.2 + shared + rng.normal(0, 0.3, seeds)).tolist(),
    }
    arms = list(scores)

    def around(mean, sd):
        return {a: {str(i): float(x) for i, x in enumerate(rng.normal(mean, sd, seeds))} for a in arms}

    return study(
        scores, primary="perturbed", sham="other_codes", verdict="supported", slug="hubble", metric="exposure",
        unit="bits", title="Hubble: what a model memorises when text is inserted again and again", epsilon=1.0,
        why_epsilon="one bit halves the candidates that an attacker has to try", bounds=[0.0, 13.3],
        claim={"text": "memorisation of inserted sequences grows with how often they are repeated",
               "paper": "8B, 500B tokens: passages duplicated 64 times are recalled; once: hardly"},
        curves={"validation loss": curves(arms, range(seeds)), "exposure": curves(arms, range(seeds), seed=1, top=0.1)},
        secondary={"exposure, level 0": around(1, 0.3), "validation loss": around(2.4, 0.02)},
        gates=GATES, cost=costs(arms, 1.02), command="perturbed run hubble --seeds 8 --scale laptop", hash="3f9a" * 16,
        verdict_version=1, source_sha="a1b2c3", arxiv="2510.19811",
    )  # fmt: skip


def null():
    rng = np.random.default_rng(1)
    control = rng.normal(0.842, 0.012, 8)
    scores = {
        "control": control.tolist(),
        "noise": (control + rng.normal(0.0004, 0.004, 8)).tolist(),
        "frozen_noise": (control + rng.normal(0, 0.004, 8)).tolist(),
    }
    return study(
        scores, primary="noise", sham="frozen_noise", verdict="null", slug="neftune", epsilon=0.02, metric="accuracy",
        title="NEFTune: Noisy Embeddings Improve Instruction Finetuning", bounds=[0.0, 1.0], trivial=True,
        why_epsilon="two points are what a user would change a recipe for",
        claim={"text": "fine-tuning with noise answers better than without",
               "paper": "AlpacaEval win rate 29.8 -> 64.7 (LLaMA-2-7B, Alpaca)"},
        gates=GATES | {"off_equals_control": {"pass": None, "detail": "the method has no off"}},
        cost=costs(list(scores), 1.31), command="perturbed run neftune --seeds 8", started="2026-11-21T09:00:00Z",
    )  # fmt: skip


def contradicted():
    rng = np.random.default_rng(2)
    control = np.exp(rng.normal(3.0, 0.05, 8))
    scores = {
        "control": control.tolist(),
        "warm_restart": (control * np.exp(rng.normal(0.062, 0.012, 8))).tolist(),
        "shuffled_restart": (control * np.exp(rng.normal(0.058, 0.012, 8))).tolist(),
    }
    return study(
        scores, primary="warm_restart", sham="shuffled_restart", verdict="contradicted", slug="momentum-reset",
        direction="lower", transform="log", metric="perplexity", epsilon=0.01,
        title="Resetting the momentum now and then",
        why_epsilon="one per cent of perplexity is what a width step buys", bounds=[1.0, None],
        claim={"text": "clearing Adam's moments now and then helps", "paper": "perplexity 17.9 -> 17.2 (350M)"},
        gates=GATES, cost=costs(list(scores)), curves={"perplexity": curves(scores, range(8), top=900.0)},
        command="perturbed run momentum-reset --seeds 8",
    )  # fmt: skip


def diverged():
    rng = np.random.default_rng(3)
    control = rng.normal(71, 2, 8)
    treated = (control + rng.normal(3, 1, 8)).tolist()
    treated[2] = treated[5] = None
    scores = {"control": control.tolist(), "high_rate": treated, "cooled": (control + rng.normal(1, 1, 8)).tolist()}
    return study(
        scores, primary="high_rate", verdict="diverged", slug="edge-of-stability", metric="clean accuracy", unit="%",
        title="Learning rates at the edge", epsilon=1.0, bounds=[0.0, 100.0], gates=GATES, cost=costs(list(scores)),
        claim={"text": "a rate just under the edge trains best", "paper": "74.1 → 76.0 % (ResNet-50)"},
        command="perturbed run edge-of-stability",
    )  # fmt: skip


def judged():
    rng = np.random.default_rng(4)
    base = rng.normal(0.71, 0.03, 6)
    record = study(
        {"control": base.tolist(), "ours": (base + rng.normal(0.008, 0.02, 6)).tolist()}, primary="ours",
        verdict="inconclusive", registered=False, plan="scores.csv", epsilon=None, why_epsilon="", metric="score",
        command="perturbed judge scores.csv --control control --treatment ours",
    )  # fmt: skip
    for absent in ("cost", "gates", "curves", "secondary", "claim", "scale", "machine"):
        del record[absent]
    return record


def factorial():
    rng = np.random.default_rng(5)
    control = rng.normal(2.41, 0.03, 8)
    a, b = rng.normal(-0.05, 0.008, 8), rng.normal(-0.04, 0.008, 8)
    both = a + b + rng.normal(0.03, 0.008, 8)
    scores = {
        "control": control.tolist(),
        "sltrain": (control + a).tolist(),
        "hubble": (control + b).tolist(),
        "sltrain+hubble": (control + both).tolist(),
    }
    contrast = _contrast(both.tolist(), (a + b).tolist(), "lower", "raw")
    return study(
        scores, primary="sltrain+hubble", verdict="supported", direction="lower", metric="validation loss", unit="nats",
        registered=False, epsilon=0.01, why_epsilon="given on the command line", cost=costs(list(scores)), gates=GATES,
        interaction={"sltrain+hubble": {k: contrast[k] for k in ("effect", "interval", "p")}},
        command="perturbed compare sltrain hubble --plan DocstringLM --factorial",
    )  # fmt: skip


def screening():
    record = study(
        {"control": [0.1, 0.2, 0.3], "arm": [0.2, 0.4, 0.35]}, primary="arm", verdict="screening", slug="quick"
    )
    record["arms"]["arm"]["detectable"] = None
    return record


def invalid():
    gates = GATES | {"off_equals_control": {"pass": False, "detail": "3 tensors differ with alpha = 0"}}
    return supported() | {"verdict": "invalid", "slug": "leaky", "gates": gates}


def large():
    """Ten arms, eight seeds, two curves of 100 points for each run, six secondary metrics."""
    rng = np.random.default_rng(6)
    control = rng.normal(0.5, 0.05, 8)
    scores = {"control": control.tolist()}
    scores |= {f"arm_number_{k}": (control + rng.normal(0.01 * k, 0.02, 8)).tolist() for k in range(9)}
    return study(
        scores, primary="arm_number_0", sham="arm_number_1", verdict="inconclusive", slug="large", scale="full",
        secondary={f"metric {m}": {a: {str(i): float(i * m) for i in range(8)} for a in scores} for m in range(6)},
        curves={m: curves(scores, range(8), steps=2000, every=20, seed=k) for k, m in enumerate(("loss", "accuracy"))},
        cost=costs(list(scores)), gates=GATES, epsilon=0.02,
    )  # fmt: skip


ALL = (supported, null, contradicted, diverged, judged, factorial, screening, invalid, large)
