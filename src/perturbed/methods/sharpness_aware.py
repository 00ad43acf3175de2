"""Sharpness-aware minimisation: take each step by the gradient found a little way up the hill.

A minimum that is good in a whole neighbourhood is said to generalise better than one that is good at a point. The step
at w is therefore taken by the gradient at ``w + rho * g / ||g||``, where g is the gradient at w
(``optim.sharpness``). That costs two gradient passes a step, so the comparison that matters is with the same training
twice as long, the arm ``longer``: equal passes, twice the updates.

The sham arm goes as far in a random direction: what it gains is due to noise on the weights, not to the ascent. The
full record adds half and twice the radius.

Departures from the paper: digits of 8x8 pixels, of which only 300 are trained on so that there is something to
generalise, in place of CIFAR, ImageNet and fine-tuning of larger models; gradients are averaged over data-parallel
processes before the ascent (the paper's experiments ascend on each accelerator by itself).

On pilot seeds 1000 and 1001 ordinary training, of either length, was best at rate 0.1 among 0.05, 0.1 and 0.2 (the
longer: .9152, .9165, .5660); at that rate the radius 0.1 was best among 0.05, 0.1, 0.2 and 0.5 (.9289, .9312, .9292,
.0999).
"""

from perturbed.evidence.study import AtLeast, PaperScale, Study
from perturbed.optim.fine_tuning import FromScratch
from perturbed.optim.sharpness import SharpnessAware
from perturbed.plans.digits import Digits

CARD = {
    "slug": "sharpness-aware",
    "title": "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    "arxiv": "2010.01412",
    "year": 2020,
    "authors": 4,
    "sites": ["optim"],
    "modality": "vision",
    "kind": "intervention",
    "summary": "Each update uses the gradient at the worst nearby weights instead of at the weights themselves, so "
    "that training ends in a region where the loss is low all around.",
    "claim": {
        "text": "sharpness-aware steps generalise better than ordinary ones at equal gradient passes",
        "paper": "CIFAR, ImageNet and fine-tuning: lower test error than SGD, also where SGD trains twice as many "
        "epochs (abstract and section 3; the tables were not checked)",
    },
    "requires": {},
    "tags": ["flatness", "optimiser", "generalisation"],
    "knobs": {"rho": [0, 1]},
}

STAGE = "finetune"

STUDY = Study(
    plan=Digits(pretrain_steps=0, finetune_steps=300, held_out=1497),
    scales={"smoke": {"finetune_steps": 8, "held_out": 60}},
    arms={
        "longer": (FromScratch(times=2, stage=STAGE),),
        "aware": (SharpnessAware(rho=0.1, stage=STAGE),),
        "sham": (SharpnessAware(rho=0.1, direction="random", stage=STAGE),),
    },
    full_arms={
        "half_radius": (SharpnessAware(rho=0.05, stage=STAGE),),
        "twice_radius": (SharpnessAware(rho=0.2, stage=STAGE),),
    },
    references={"half_radius": "longer", "twice_radius": "longer"},
    primary="aware",
    reference="longer",
    sham="sham",
    metric="accuracy",
    direction="higher",
    epsilon=0.01,
    why_epsilon="one point is what a change of optimiser must bring to be worth a second gradient",
    bounds=(0.0, 1.0),
    sanity=AtLeast("accuracy", 0.85),
    budget="reported",
    paper=PaperScale(
        # an image of 32x32 pixels is counted as 144 tokens: each weight of a wide ResNet serves about as many positions
        model="WideResNet-28-10", data="uoft-cs/cifar100", params=36.5e6, tokens=50_000 * 144 * 400, precision="fp32",
        runs=2,
    ),
)  # fmt: skip
