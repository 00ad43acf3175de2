"""UL2: one model trained on seven kinds of denoising at once, each announced by a token for its mode.

A denoiser hides spans of a text, of mean length mu at a rate r; the model is given what is left and writes what was
hidden. R hides short spans (mu 3 or 8, r 0.15), S the end of the text (a quarter of it in expectation), X much or long
spans (mu 3, 8 or 64 at r 0.5, and mu 64 at r 0.15). Each window of text draws one of them, 40 % R, 20 % S and 40 % X,
and the loss is the mean cross-entropy of all target tokens (``objectives.denoising``).

Departures from the paper, which trains models of 0.3 to 20 billion parameters on 32 billion to a trillion tokens:

- One decoder reads the input both ways and writes the target, in one sequence (the paper's prefix decoder; it finds an
  encoder and a decoder somewhat better). The architecture is the control's, Llama, with 2 layers of width 64.
- A window holds 65 tokens. Every objective reads as many: the text of a denoiser is cut so that mode token, input,
  sentinels and target fill the window. The control learns from 64 targets in it, R and X from 10 to 32 (9 to 30 hidden
  tokens, with all sentinels but the first and the end), S from 2 to 30, 16 in expectation.
- With windows so short, mu 8 at r 0.15 and mu 64 at r 0.15 both give one span of nine tokens. Spans may lie anywhere;
  in T5's code a text ends with a span, by which these two would be S.
- Tokens for modes and spans are those of the 13 bytes that UTF-8 never uses, so the models of all arms are of one size.
- The prefix of S ends in a sentinel, as in the released checkpoint's prompts, so that all denoisers share one format.
- The mode token is seen by all, and sees itself alone, as a window may hold several documents.
- The proportions of R and X are not in the paper, whose ablation settles the 20 % of S only.

Scores: the loss on the hidden tokens of held-out texts by kind, each model asked as suits it best, plain reading from
left to right among the ways (``measures.denoising``), and the largest of the three; how much a beginning helps to
predict its end, which is the one-shot measure at this size; and documents told apart by package after fine-tuning.

Arms: the mixture; ``span``, T5's span corruption alone (mu 3, r 0.15); and as sham the mixture with a mode token drawn
at random, which says nothing. Of the full record: no mode token, all denoisers equally often, prefix language modelling
alone, X alone, and half span corruption, half language modelling. Not arms: UniLM, and both kinds of R together. The
average rank over the kinds is no score.

Peak rates are powers of 2 times 0.0005, each arm's own best by ``worst_loss`` on pilot seed 1000, with 400, 600 and
1,000 steps: 0.004 for the control (600 steps: 4.01 at 0.002, 3.88 at 0.004; 400 and 1,000 steps as good or worse at
0.008) and 0.002 for the mixture (600 steps: 5.18 at 0.001, 4.87 at 0.002, 5.19 at 0.004). Span corruption fails
at S at every rate (6.2 to 6.7), so it takes the one that is best for R: 0.001 (5.95 at 0.0005, 5.90, 6.06 at 0.002).
The sham takes the mixture's, and so do the other arms of the full record.

The further questions were put when a first record was known, with the directions that the paper names.
"""

from perturbed.core.plan import Measure
from perturbed.evidence.study import AtMost, Contrast, PaperScale, Study
from perturbed.measures.denoising import DenoisingTable, LabelTransfer
from perturbed.objectives.denoising import MixtureOfDenoisers
from perturbed.optim.fine_tuning import StepDecay
from perturbed.plans.docstring_lm import DocstringLM

CARD = {
    "slug": "ul2",
    "title": "UL2: Unifying Language Learning Paradigms",
    "arxiv": "2205.05131",
    "year": 2022,
    "authors": 14,
    "sites": ["objectives"],
    "modality": "language",
    "kind": "intervention",
    "summary": "Pre-trains one model on a mixture of denoising tasks, from short holes to whole continuations, with a "
    "token that says which, so that it need not be chosen beforehand what the model will be good at.",
    "claim": {
        "text": "a model trained on the mixture is good at all kinds of task, where one trained on a single objective "
        "is good at its own: its worst loss is the lowest",
        "paper": "T5-base size on C4: on the Pareto front of supervised (SuperGLUE) and one-shot (GEM) scores against "
        "language modelling, prefix language modelling, span corruption and UniLM, decoder and encoder-decoder",
    },
    "requires": {"modality": "language", "tokenizer": "any"},
    "tags": ["pre-training", "denoising", "span corruption", "prefix language model", "mode switching"],
    "knobs": {"share": [0, 1]},
}

SPAN = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
HALF, QUARTER = (StepDecay(peak=times, milestones=(), stage="pretrain") for times in (0.5, 0.25))

STUDY = Study(
    plan=DocstringLM(steps=600, lr=4e-3),
    scales={
        "smoke": {"width": 32, "layers": 1, "heads": 2, "steps": 20, "batch": 16, "lr": 2e-2},
        "paper": {
            "width": 768, "layers": 12, "heads": 12, "length": 1024, "batch": 128, "steps": 500_000, "lr": 1e-2,
            "vocab": 32_000, "data": "allenai/c4:en",
        },
    },
    arms={
        "mixture": (MixtureOfDenoisers(), HALF),
        "span": (MixtureOfDenoisers(weights=SPAN), QUARTER),
        "sham": (MixtureOfDenoisers(mode="random"), HALF),
    },
    full_arms={
        "no_mode": (MixtureOfDenoisers(mode="none"), HALF),
        "uniform": (MixtureOfDenoisers(weights=(1.0,) * 7), HALF),
        "prefix": (MixtureOfDenoisers(weights=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)), HALF),
        "extreme": (MixtureOfDenoisers(weights=(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)), HALF),
        "span_and_lm": (MixtureOfDenoisers(weights=SPAN, share=0.5), HALF),
    },
    references={"no_mode": "mixture", "uniform": "mixture"},
    contrasts={
        "labels": Contrast(
            weights={"mixture": 1, "control": -1}, metric="label_accuracy", direction="higher", epsilon=0.03,
            asks="fine-tuned, the mixture tells packages apart better than language modelling",
        ),
        "labels_span": Contrast(
            weights={"mixture": 1, "span": -1}, metric="label_accuracy", direction="higher", epsilon=0.03,
            asks="fine-tuned, the mixture tells packages apart better than span corruption",
        ),
        "context": Contrast(
            weights={"mixture": 1, "control": -1}, metric="context_gain", unit="nats per token", direction="higher",
            epsilon=0.05, asks="a beginning helps the mixture more with its end than it helps language modelling",
        ),
        "context_span": Contrast(
            weights={"mixture": 1, "span": -1}, metric="context_gain", unit="nats per token", direction="higher",
            epsilon=0.05, asks="a beginning helps the mixture more with its end than it helps span corruption",
        ),
        "own_task": Contrast(
            weights={"span": 1, "mixture": -1}, metric="r_loss", unit="nats per token", direction="lower",
            epsilon=0.05, asks="span corruption is better than the mixture at short spans, its own task",
        ),
    },
    measures=(
        Measure("denoising", DenoisingTable(), better="lower"),
        Measure("labels", LabelTransfer()),
    ),
    primary="mixture",
    sham="sham",
    metric="worst_loss",
    unit="nats per token",
    direction="lower",
    epsilon=0.05,
    why_epsilon="five per cent of perplexity; for less nobody would change what a model is pre-trained on",
    bounds=(0.0, None),
    sanity=AtMost("heldout_loss", 5.8),  # token frequencies alone give 5.9 nats
    paper=PaperScale(
        model="UL2 decoder of T5-base size (own code)", data="allenai/c4:en", params=0.3e9, tokens=32e9, runs=2,
    ),
)  # fmt: skip
