"""Hubble: the same training run with and without planted texts, to measure what a model memorises.

Two runs share initialisation, data order and schedule; in one of them some training windows receive a made-up line of
text each (``data.insertion``). Every line belongs at random to a level of duplication, level 0 being never inserted,
so that lines of all levels come from one distribution and level 0 tells what is guessed rather than remembered.
The score of a line is the exposure of the six digits in it: log2 100 - log2 of the rank, by likelihood, of the true
code among 100 (``measures.memorisation``); ignorance gives 1.40 bits, certainty 6.64.

Departures from the paper, which trains models of 1B and 8B parameters on 100B and 500B tokens:

- One domain of planted text, biographies with a random code, in place of three (copyright, privacy, test sets). They
  are generated from syllables, anew for each seed, each with candidate codes of its own. Codes are random, so the rank
  among candidates is exact and replaces the generated-answer and option scores.
- Levels are 0, 4, 16 and 64 with 24, 24, 12 and 6 lines: 672 insertions in 7 % of the 9,600 windows, where the paper
  has levels up to 256 in 0.08 % of its tokens. Far fewer windows leave no level that a small model can learn.
- The corpus is the docstrings of installed packages; it is not searched for the lines in each run, because made-up
  names with a code out of a million do not occur in it by chance: ``data.insertion.contaminated`` finds none (tested),
  and serves those who insert texts that might. Biographies have 10 to 40 tokens, so it looks for whole lines.
- The model is of the same class (Llama) with 2 layers of width 64, a gated layer of 8/3 of that where the paper has 4,
  and as many key heads as heads where it has a quarter.
- Which lines go where is drawn anew for each seed; the paper has one plan of insertions for all its models. So the
  interval here includes what the draw contributes.
- Not tried: one domain at a time, paraphrased copies, other depths, the two middle quarters of the timing, extraction
  by prefixes of 25 to 100 tokens scored with ROUGE-L, membership against a reference model, unlearning.

The sham arm inserts the same lines with other codes than those that are scored: whatever it scores above the control
is the format of the lines, not the memory of a code. Arms of the full record: ``diluted`` (three times the training,
same insertions), ``early`` and ``late`` (all insertions within the first or the last quarter of training). Sizes, rate
and levels were chosen on pilot seeds from 1000 on, so that level 64 is learnt within the time of a laptop run. The
further questions were put when a first record was known, with the directions that the paper names.
"""

from perturbed.core.plan import Measure
from perturbed.data.biographies import BiographyInsertions
from perturbed.data.insertion import Dilution
from perturbed.evidence.study import AtMost, Contrast, PaperScale, Study
from perturbed.measures.memorisation import CodeMemory
from perturbed.plans.docstring_lm import DocstringLM

CARD = {
    "slug": "hubble",
    "title": "Hubble: a Model Suite to Advance the Study of LLM Memorization",
    "arxiv": "2510.19811",
    "year": 2025,
    "authors": 10,
    "sites": ["data"],
    "modality": "language",
    "kind": "intervention",
    "summary": "Trains twin language models on one corpus, one of them with made-up texts planted a known number of "
    "times at random places, so that memorisation is an effect with a control and not a guess after the fact.",
    "claim": {
        "text": "a text is memorised the better the more often it was inserted; those never inserted stay at chance, "
        "and the rest of the model hardly changes",
        "paper": "1B and 8B Llama models, 100B and 500B tokens, levels of 0 to 256 copies: memorisation rises with the "
        "copies, falls when the corpus grows around them, and fades for texts seen early only",
    },
    "requires": {"modality": "language"},
    "tags": ["memorisation", "privacy", "pre-training", "insertion", "canary"],
    "knobs": {"begin": [0, 1], "end": [0, 1]},
}

STUDY = Study(
    plan=DocstringLM(),
    scales={
        "smoke": {"width": 32, "layers": 1, "heads": 2, "steps": 30, "batch": 32, "lr": 2e-2},
        "paper": {
            "width": 2048, "layers": 16, "heads": 32, "length": 2048, "batch": 1024, "steps": 48_000, "lr": 4e-4,
            "data": "mlfoundations/dclm-baseline-1.0",
        },
    },
    arms={
        "perturbed": (BiographyInsertions(),),
        "sham": (BiographyInsertions(codes="other"),),
    },
    full_arms={
        "diluted": (BiographyInsertions(), Dilution(times=3)),
        "early": (BiographyInsertions(end=0.25),),
        "late": (BiographyInsertions(begin=0.75),),
    },
    references={"diluted": "perturbed", "early": "perturbed", "late": "early"},
    contrasts={
        "held_out": Contrast(
            weights={"perturbed": 1, "control": -1}, metric="heldout_loss", unit="nats per token", direction="equal",
            transform="log", epsilon=0.01, asks="text without planted lines is modelled as well, to one per cent",
        ),
        "never_planted": Contrast(
            weights={"perturbed": 1, "control": -1}, metric="exposure_0", unit="bits", direction="equal", epsilon=1.0,
            asks="lines that were never planted are no better known than to a model that saw none",
        ),
    },
    measures=(Measure("exposure_64", CodeMemory()),),
    primary="perturbed",
    sham="sham",
    metric="exposure_64",
    unit="bits",
    direction="higher",
    epsilon=1.0,
    why_epsilon="one bit halves the number of guesses that an attacker needs",
    bounds=(0.0, 6.643856189774724),
    sanity=AtMost("heldout_loss", 5.8),  # token frequencies alone give 5.9 nats
    paper=PaperScale(
        model="allegrolab/hubble-1b-100b_toks-perturbed-hf", data="mlfoundations/dclm-baseline-1.0", params=1.2e9,
        tokens=100e9,
    ),
)  # fmt: skip
