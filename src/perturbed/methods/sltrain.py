"""SLTrain: train each linear weight as a low-rank product plus a sparse matrix on a fixed random support.

Every linear layer of the blocks has, from the first step to the last, the weight

    W = s * B A + S,    B [out, r], A [r, in], S with floor(delta * out * in) trained entries at places drawn once

(``weights.sparse_low_rank``); embeddings, norms and head stay as they are. Adam's moments are needed for B, A and the
entries alone, W is built for each product and dropped, and what is stored besides are the places, in int64. B starts
at 0, so that training begins from the sparse part.

The claim under test is that the few sparse entries are worth more than the rank that they cost. So the reference is
``low_rank``, W = B A with both factors random at the start, of rank 14 against r = 12 and delta = 0.03: 1.3 % more
trained numbers in the blocks than ``sltrain`` (25,536 a block against 25,203, of 110,592 in the full matrices). The
control is full rank. The sham ``frozen`` has the same sparse entries untrained, and the low rank's 14: what it gains
over low rank comes of a start with a full-rank random part, not of training it.

The full record adds ``same_rank`` (rank 12 alone), ``sparse`` (entries alone, as many as SLTrain trains numbers),
``denser`` (delta = 0.1), ``wider`` (r = 24, a quarter of the width as in the paper's models) and ``paper_start`` (all
entries, no product: a dense layer that begins with the draws of SLTrain in place of the model's own, which are three
times smaller here, sd 0.02 against 0.059; it tells what of SLTrain's distance from full rank is the start).

Departures from the paper:

- r is an eighth of the width, in place of a quarter: at a quarter and this size a low-rank model has hardly anything
  left to gain. Steps are 400 of 1,024 tokens, the model has 2 layers of width 96 and half of its numbers in embeddings.
- s = 0.25, that of the paper's smallest model; in its script s falls to 0.008 at 7B.
- The plan's weight decay of 0.1, clipping at norm 1 and cosine are used for all arms; the scripts have no decay. Decay
  acts on B, A and entries as on the matrices that they stand for.
- Low rank is compared at its own best rate; ReLoRA, GaLore, 8-bit Adam and updates layer by layer are no arms.
- The paper's table is quoted from memory of it, see the sheet; rows of SLTrain were not checked.

@SWEEP@
"""

from perturbed.core.plan import Measure
from perturbed.evidence.study import AtMost, PaperScale, Study
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


LOW_RANK = SparseLowRank(rank=14, density=0.0, scale=1.0)

STUDY = Study(
    plan=DocstringLM(width=96, steps=400, lr=8e-3),
    scales={"smoke": {"width": 32, "layers": 1, "heads": 2, "steps": 30, "batch": 32, "lr": 2e-2}},
    arms={
        "low_rank": (LOW_RANK, rate(1.0)),
        "sltrain": (SparseLowRank(rank=12, density=0.03), rate(1.0)),
        "frozen": (SparseLowRank(rank=14, density=0.03, train_sparse=False), rate(1.0)),
    },
    full_arms={
        "same_rank": (SparseLowRank(rank=12, density=0.0, scale=1.0), rate(1.0)),
        "sparse": (SparseLowRank(rank=0, density=0.228), rate(1.0)),
        "denser": (SparseLowRank(rank=12, density=0.1), rate(1.0)),
        "wider": (SparseLowRank(rank=24, density=0.03), rate(1.0)),
        "paper_start": (SparseLowRank(rank=0, density=1.0), rate(1.0)),
    },
    measures=(
        Measure("storage", Storage(), better="lower"),
        Measure("ranks", Ranks()),
    ),
    primary="sltrain",
    reference="low_rank",
    sham="frozen",
    metric="heldout_loss",
    unit="nats per token",
    direction="lower",
    epsilon=0.02,
    why_epsilon="two per cent of perplexity is what a tenth more training gains at this length",
    sanity=AtMost("heldout_loss", 5.0),
    paper=PaperScale(model="LLaMA 60M to 1B (unverified sizes)", data="allenai/c4", params=58e6, tokens=11_000 * 512 * 256, runs=3),
)  # fmt: skip
