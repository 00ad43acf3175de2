"""Masked thought: hide random tokens of the worked solution in the input, and learn to write the whole of it.

While a language model w_1 … w_T is tuned on worked solutions of questions q, each token of the solution is hidden from
the input with probability p, anew each time, and the targets stay (``inputs.masking``):

    loss = - sum_t log P(w_t | q, m_1 … m_{t-1}),    m_i = [mask] with probability p, else w_i

so the model cannot lean on what it has just written and has to look to the question and to other steps. p rises over
the first two thirds of the training. Nothing is hidden when the model is used.

The plan (``plans.arithmetic_reasoning``): a Llama of 2 layers learns chains of two and three sums with results up to 20
from 25,000 worked problems, and is then tuned on 240 of three sums with results up to 99, which it comes to know by
heart. What counts is how many of 512 other problems of the latter kind it solves, writing the solution greedily. About
47 % of them have no result above 20, and are near what it knew; the others need sums of which it has seen some.

Where this departs from the paper, or had to choose:

- p = 0.2. The paper takes 0.4 for solutions in words (GSM8K) and 0.1 to 0.2 where formulas are dense (MATH); solutions
  here are nothing but formulas. The full record has 0.1 and 0.4 too.
- Chains of sums of a few dozen characters in place of word problems, and 0.1M weights in place of 7B.
- The mask token is an entry of the vocabulary that no text uses, so that the control has the same model. The paper adds
  one, and begins its input and output embedding with the mean of the others; here the input embedding does, as the
  token is never written.
- The rate rises by (step + 1) instead of step, so that without a warm-up the first step is masked too.
- That random tokens do as well (the released GSM8K script puts those, not masks) is the arm ``random``.

The sham arm hides tokens of the question in the same way and at the same rate (with it what rows are filled up with,
which no text sees): the paper reports no gain from that. Arms of the full record: ``rate_10``, ``rate_40``, ``random``,
``everywhere`` (question and solution), and two comparators of the paper that change all embeddings and hide nothing
(``features.embeddings``): ``embedding_noise`` (NEFTune with alpha = 5) and ``embedding_dropout`` (q = 0.1, of elements
as in the released code; the paper reports that it hurts). Not arms: scheduled sampling, synonyms, dropout of whole
tokens, noise on the hidden tokens alone, data sampled from the model. Beside accuracy, ``dependency_question`` and
``dependency_solution`` say how often changing one digit of the question, or of the solution so far, changes a later
number of the solution; the paper's explanation is that the former rises. ``accuracy_longer`` is of chains of four sums,
which no stage has shown and hardly any of which is solved.

The first registered study could not decide: its control solved between .14 and .71 of the problems by seed, and masked
less control was -.05 with the interval [-.16, +.06]. There the second stage had one sum more than the first, which 400
steps at 0.008 had not always taught. With 1,500 steps at 0.004 the loss of the first stage ends near 0 on every pilot
seed, and the scatter remained: tuned on 320 chains of six sums, the control solved .64 and .98 of the held-out ones on
two pilot seeds (of five sums, .52 and .97), as if going on with longer chains were found out all at once or not at all.
So now both stages have chains of one length, and the second has larger numbers: what it teaches is many sums, each
known or not, and the score is an average over them. Every arm was run again.

Sizes were chosen on pilot seeds 1000 to 1003 by the control alone, asking for a mean between .35 and .75 and a standard
deviation below .06. Of 512 problems, with 600 steps at 0.002, it solved .52 .57 .50 .56 when tuned on 160 (sd .03), and
.68 .69 .65 .71 when tuned on 240 (sd .03); before the second stage .43 .53 .42 .47 (of 128). So 240 were taken, since
with 160 the second stage adds little to the first.

Peak rate and length of the second stage were then chosen by a rule written down before, on one grid for control and
treatment, by the mean accuracy on 256 problems of pilot seeds 1000 and 1001 (standard error 0.02). The length is one
for all arms, so that budgets are equal: that at which the mean of both arms' best is highest, if by 0.01 or more over a
shorter one. At that length each arm has its own best rate; where that was at the edge, the grid was extended there.

    control / masked    300 steps    600 steps    1,200 steps
    0.0005                           .60 / .52
    0.001               .56 / .50    .60 / .59    .69 / .57
    0.002               .62 / .55    .69 / .57    .67 / .54
    0.004               .65 / .54    .67 / .55    .68 / .49
    mean of the best    .60          .64          .63

So all arms have 600 steps, the control 0.002 and the treatment 0.001. The arms that hide tokens take the treatment's
rate, so a comparison of theirs with the control is also one of rates (the sham is there to be compared with the
treatment); the two that change embeddings take the control's. The probability p was not tuned. The further questions
were put when a first record was known, with the directions that the paper names.
"""

from perturbed.core.plan import Measure
from perturbed.evidence.study import AtLeast, Contrast, PaperScale, Study
from perturbed.features.embeddings import EmbeddingDropout, EmbeddingNoise
from perturbed.inputs.masking import MaskedInputs
from perturbed.measures.reasoning import Dependency, FinalAnswers
from perturbed.optim.fine_tuning import StepDecay
from perturbed.plans.arithmetic_reasoning import ArithmeticReasoning

CARD = {
    "slug": "masked-thought",
    "title": "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of "
    "Language Models",
    "arxiv": "2403.02178",
    "year": 2024,
    "authors": 9,
    "sites": ["inputs", "weights"],
    "modality": "language",
    "kind": "intervention",
    "summary": "While tuning on worked solutions, random tokens of the solution are hidden from the input and still "
    "asked for, so that a model fitting few examples must look further than at what it has just written.",
    "claim": {
        "text": "hiding random tokens of the solution while fine-tuning makes more held-out problems come out right",
        "paper": "Llama-2-7B on GSM8K: 41.6 -> 47.1 % right; on MATH 7.6 -> 8.9 %; Llama-2-13B on GSM8K 52.7 -> 56.2 %",
    },
    "requires": {"modality": "language", "target": "next-token", "classes": ...},
    "tags": ["masking", "fine-tuning", "reasoning", "regularisation"],
    "knobs": {"rate": [0, 1], "warmup": [0, 1]},
}

FINE = "finetune"
SLOWER = StepDecay(peak=0.5, milestones=(), stage=FINE)

STUDY = Study(
    plan=ArithmeticReasoning(),
    scales={
        "smoke": {
            "width": 32, "layers": 1, "pretrain_problems": 400, "pretrain_batch": 16, "pretrain_steps": 8,
            "problems": 32, "batch": 8, "steps": 12, "held_out": 24,
        },
    },
    arms={
        "masked": (MaskedInputs(rate=0.2, stage=FINE), SLOWER),
        "sham": (MaskedInputs(rate=0.2, hide="question", stage=FINE), SLOWER),
    },
    full_arms={
        "rate_10": (MaskedInputs(rate=0.1, stage=FINE), SLOWER),
        "rate_40": (MaskedInputs(rate=0.4, stage=FINE), SLOWER),
        "random": (MaskedInputs(rate=0.2, by="random", stage=FINE), SLOWER),
        "everywhere": (MaskedInputs(rate=0.2, hide="everywhere", stage=FINE), SLOWER),
        "embedding_noise": (EmbeddingNoise(alpha=5.0, stage=FINE),),
        "embedding_dropout": (EmbeddingDropout(rate=0.1, stage=FINE),),
    },
    contrasts={
        "question": Contrast(
            weights={"masked": 1, "control": -1}, metric="dependency_question", direction="higher", epsilon=0.02,
            asks="another number in the question changes more of the numbers that follow",
        ),
        "far": Contrast(
            weights={"masked": 1, "control": -1}, metric="dependency_question_far", direction="higher", epsilon=0.02,
            asks="another number in the question changes more of the numbers far from it",
        ),
        "longer": Contrast(
            weights={"masked": 1, "control": -1}, metric="accuracy_longer", direction="higher", epsilon=0.03,
            asks="accuracy is higher on chains longer than those of the training",
        ),
    },
    measures=(
        Measure("accuracy, longer", FinalAnswers(64, longer=1, suffix="_longer")),
        Measure("dependency_question", Dependency()),
    ),
    primary="masked",
    sham="sham",
    metric="accuracy",
    direction="higher",
    epsilon=0.03,
    why_epsilon="the paper's gains are between 1 and 6 points",
    bounds=(0.0, 1.0),
    sanity=AtLeast("accuracy", 0.55),
    paper=PaperScale(
        # 7,473 problems of about 200 tokens, ten times; three seeds of two arms
        model="meta-llama/Llama-2-7b-hf", data="openai/gsm8k", params=6.7e9, tokens=7_473 * 200 * 10, runs=6,
    ),
)  # fmt: skip
