"""SLTrain: train each linear weight as a low-rank product plus a sparse matrix on a fixed random support.

Every linear layer of the blocks has, from the first step to the last, the weight

    W = s * B A + S,    B [out, r], A [r, in], S with floor(delta * out * in) trained entries at places drawn once

(``weights.sparse_low_rank``); embeddings, norms and head stay as they are. Adam's moments are needed for B, A and the
entries alone, W is built for each product and dropped, and what is stored besides are the places, in int64. B starts
at 0, so that training begins from the sparse part.

The claim under test is that the few sparse entries are worth more than the rank that they cost. So low rank has rank
14 against r = 12 and delta = 0.03: 1.3 % more trained numbers in the blocks than ``sltrain`` (25,536 a block against
25,203, of 110,592 in the full matrices). Both its factors begin random. In the paper's low rank, the arm ``low_rank``,
s is 1 and the weights begin three times as large as SLTrain's (sd 0.034 against 0.010); the reference,
``low_rank_small``, has SLTrain's s = 0.25 and so about its size (sd 0.009), and reaches a loss lower by 0.9 nats on
the pilot seeds. Two earlier registered runs had weaker references, and their gains were those of the start: +0.86 nats
over ``low_rank``, and +0.36 over a low rank begun at B = 0 without entries, in which no block ever trains, since of
weights that are all 0 no gradient comes. The reference was changed and every arm run again.

The control is full rank, ``sparse`` has entries alone, as many as SLTrain trains numbers. The sham ``frozen`` has the
same sparse entries untrained, and the low rank's 14: what it gains comes of a full-rank random part beside the product,
not of training the entries.

The full record adds ``same_rank`` (rank 12 alone, s = 0.25), ``denser`` (delta = 0.1), ``wider`` (r = 24, a quarter of
the width as in the paper's models) and ``paper_start`` (all entries, no product: a dense layer that begins with the
draws of SLTrain in place of the model's own, which are three times smaller here, sd 0.02 against 0.059).

Departures from the paper:

- r is an eighth of the width, in place of a quarter: at a quarter and this size a low-rank model has hardly anything
  left to gain. Steps are 400 of 1,024 tokens, the model has 2 layers of width 96 and half of its numbers in embeddings.
- s = 0.25, that of the paper's smallest model; in its script s falls to 0.008 at 7B.
- The plan's weight decay of 0.1, clipping at norm 1 and cosine are used for all arms; the scripts have no decay. Decay
  acts on B, A and entries as on the matrices that they stand for.
- ReLoRA, GaLore, 8-bit Adam, updates layer by layer and places of the largest entries of a trained matrix are no arms.
- The paper's table is quoted from memory of it, see the sheet; rows of SLTrain were not checked.

Peak rates are powers of 2 times 0.001, each arm's own best by the held-out loss of pilot seed 1000, the sweep being
extended until the best lay within it. For the low ranks, whose best two were close, seed 1001 was added, and the mean
of both decided.

    rate           0.001  0.002  0.004  0.008  0.016  0.032  0.064
    control         4.44   4.16   4.53   4.62   4.81   4.99
    low_rank        4.94   4.87   4.82   4.79   5.35   5.73
    low_rank_small                4.01   3.94   3.94   3.94   4.04
    sltrain                       4.02   3.92   3.87   3.88
    frozen                        4.04   3.96   3.93   3.97
    sparse                               3.92   3.91   3.96
    paper_start            4.52   4.36   4.48

The other arms of the full record take the rate of the arm that they vary. The further questions were put when a
first record was known: the first has the paper's direction, the second is our own.
"""

from perturbed.core.plan import Measure
from perturbed.evidence.study import AtMost, Contrast, PaperScale, Study
from perturbed.measures.parameters import Ranks, Storage
from perturbed.optim.fine_tuning import StepDecay
from perturbed.plans.docstring_lm import DocstringLM
from perturbed.weights.sparse_low_rank import SparseLowRank

CARD = {
    "slug": "sltrain",
    "title": "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    "arxiv": "2406.02214",
    "year": 2024,
    "authors": 7,
    "sites": ["weights"],
    "modality": "language",
    "kind": "intervention",
    "summary": "A language model is trained from scratch with each weight matrix held as a low-rank product plus a few "
    "entries at random, fixed places: about the parameters of a low-rank model, but matrices of full rank.",
    "claim": {
        "text": "at equal parameters a low-rank product plus a sparse matrix reaches a lower loss than low rank alone, "
        "close to that of full rank",
        "paper": "LLaMA 60M / 130M / 350M / 1B on C4, perplexity: full rank 34.06 / 24.36 / 18.80 / 15.56, low rank "
        "78.18 / 45.51 / 37.41 / 142.5, SLTrain 34.15 / 26.04 / 19.42 / 16.14 (SLTrain's row unverified)",
    },
    "requires": {},
    "tags": ["pre-training", "low rank", "sparse", "memory", "parameters"],
    "knobs": {"rank": [0, 128], "density": [0, 1], "scale": [0, 4]},
}


def rate(times: float) -> StepDecay:
    """The plan's learning rate times a number."""
    return StepDecay(peak=times, milestones=(), stage="pretrain")


STUDY = Study(
    plan=DocstringLM(width=96, steps=400, lr=2e-3),
    scales={"smoke": {"width": 32, "layers": 1, "heads": 2, "steps": 30, "batch": 32, "lr": 5e-3}},
    arms={
        "low_rank": (SparseLowRank(rank=14, density=0.0, scale=1.0), rate(2.0)),
        "low_rank_small": (SparseLowRank(rank=14, density=0.0), rate(8.0)),
        "sltrain": (SparseLowRank(rank=12, density=0.03), rate(8.0)),
        "frozen": (SparseLowRank(rank=14, density=0.03, train_sparse=False), rate(8.0)),
        "sparse": (SparseLowRank(rank=0, density=0.228), rate(8.0)),
    },
    full_arms={
        "same_rank": (SparseLowRank(rank=12, density=0.0), rate(8.0)),
        "denser": (SparseLowRank(rank=12, density=0.1), rate(8.0)),
        "wider": (SparseLowRank(rank=24, density=0.03), rate(8.0)),
        "paper_start": (SparseLowRank(rank=0, density=1.0), rate(2.0)),
    },
    references={"same_rank": "low_rank_small", "denser": "sltrain", "wider": "sltrain"},
    contrasts={
        "full_rank": Contrast(
            weights={"sltrain": 1, "control": -1}, metric="heldout_loss", unit="nats per token", direction="equal",
            epsilon=0.05, asks="the loss is that of full rank",
        ),
        "sparse_alone": Contrast(
            weights={"sltrain": 1, "sparse": -1}, metric="heldout_loss", unit="nats per token", direction="lower",
            epsilon=0.05, asks="the loss is below that of as many sparse entries without a product",
        ),
    },
    measures=(
        Measure("storage", Storage(), better="lower"),
        Measure("ranks", Ranks()),
    ),
    primary="sltrain",
    reference="low_rank_small",
    sham="frozen",
    metric="heldout_loss",
    unit="nats per token",
    direction="lower",
    epsilon=0.05,
    why_epsilon="five per cent of perplexity; a tenth more training of the control gained eight on a pilot seed",
    sanity=AtMost("heldout_loss", 5.0),
    paper=PaperScale(
        model="LLaMA of 60M parameters (not on the hub)", data="allenai/c4:en", params=58e6, tokens=11_000 * 512 * 256,
        runs=3,
    ),
)  # fmt: skip
