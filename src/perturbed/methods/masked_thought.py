"""Masked thought: hide random tokens of the worked solution in the input, and learn to write the whole of it.

While a language model w_1 … w_T is tuned on worked solutions of questions q, each token of the solution is hidden from
the input with probability p, anew each time, and the targets stay (``inputs.masking``):

    loss = - sum_t log P(w_t | q, m_1 … m_{t-1}),    m_i = [mask] with probability p, else w_i

so the model cannot lean on what it has just written and has to look to the question and to other steps. p rises over
the first two thirds of the training. Nothing is hidden when the model is used.

The plan (``plans.arithmetic_reasoning``): a Llama of 2 layers learns chains of two and three sums from 25,000 worked
problems, and is then tuned on 160 of four sums, which it comes to know by heart. What counts is how many of 512 other
problems of four sums it solves, writing the solution greedily.

Where this departs from the paper, or had to choose:

- p = 0.2. The paper takes 0.4 for solutions in words (GSM8K) and 0.1 to 0.2 where formulas are dense (MATH); solutions
  here are nothing but formulas. The full record has 0.1 and 0.4 too.
- Chains of sums of a few dozen characters in place of word problems, and 0.1M weights in place of 7B.
- The mask token is an entry of the vocabulary that no text uses, so that the control has the same model. The paper adds
  one, and begins its input and output embedding with the mean of the others; here the input embedding does, as the
  token is never written.
- The rate rises by (step + 1) instead of step, so that without a warm-up the first step is masked too.
- The paper's remark that random tokens do as well (the released GSM8K script puts those, not masks) is the arm
  ``random``.

The sham arm hides tokens of the question in the same way and at the same rate: the paper reports no gain from that.
Arms of the full record: ``rate_10``, ``rate_40``, ``random``, ``everywhere`` (question and solution). Comparators of
the paper that are not arms: noise on the embeddings, dropout of embeddings, scheduled sampling, synonyms, data sampled
from the model. Beside accuracy, ``dependency_question`` and ``dependency_solution`` say how often changing one digit of
the question, or of the solution so far, changes a later number; the paper's explanation is that the former rises.

Sizes were chosen on pilot seed 1000 (256 problems, standard error 0.03) so that the control solves about half. Peak
rates of the second stage, equally for control and treatment: at 300 steps 0.001, 0.002 and 0.004 gave the control .41,
.58 and .50 and the treatment .34, .36 and .40; at 600 steps 0.002, 0.004 and 0.008 gave the control .56, .54 and .57
and the treatment .49, .54 and .53. Masked training needs longer, as the paper says, and the control hardly minds: all
arms have 600 steps at 0.004, the treatment's best and within the noise of the control's. The treatment was tried once
with 900 steps (.45), the control was not. The rate p was not tuned.
"""

from perturbed.core.plan import Measure
from perturbed.evidence.study import AtLeast, PaperScale, Study
from perturbed.inputs.masking import MaskedInputs
from perturbed.measures.reasoning import Dependency, FinalAnswers
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

STUDY = Study(
    plan=ArithmeticReasoning(),
    scales={
        "smoke": {
            "width": 32, "layers": 1, "pretrain_problems": 400, "pretrain_batch": 16, "pretrain_steps": 8,
            "problems": 32, "batch": 8, "steps": 12, "held_out": 24,
        },
    },
    arms={
        "masked": (MaskedInputs(rate=0.2, stage=FINE),),
        "sham": (MaskedInputs(rate=0.2, hide="question", stage=FINE),),
    },
    full_arms={
        "rate_10": (MaskedInputs(rate=0.1, stage=FINE),),
        "rate_40": (MaskedInputs(rate=0.4, stage=FINE),),
        "random": (MaskedInputs(rate=0.2, by="random", stage=FINE),),
        "everywhere": (MaskedInputs(rate=0.2, hide="everywhere", stage=FINE),),
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
    sanity=AtLeast("accuracy", 0.3),
    paper=PaperScale(
        # 7,473 problems of about 200 tokens, ten times; three seeds of two arms
        model="meta-llama/Llama-2-7b-hf", data="openai/gsm8k", params=6.7e9, tokens=7_473 * 200 * 10, runs=6,
    ),
)  # fmt: skip
