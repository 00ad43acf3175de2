"""Masked inputs: what is hidden, how often, that targets stay, losses by hand, and models of one's own."""

import types

import pytest
import torch
import torch.nn.functional as F
import transformers

import perturbed as pt
from perturbed.core.plan import Facts, PlanError, apply
from perturbed.core.run import Engine, threads
from perturbed.core.store import Store
from perturbed.core.streams import Streams
from perturbed.data.worked_solutions import MASK, Problem, as_document, padded, tokenizer
from perturbed.inputs.masking import IGNORED, MaskedInputs, in_solution, replaced, targets_of, warmed
from perturbed.objectives.language import causal_logits, next_token_loss
from perturbed.plans.arithmetic_reasoning import ArithmeticReasoning
from perturbed.plans.docstring_lm import Llama

SMALL = ArithmeticReasoning(
    width=16, layers=1, heads=1, pretrain_problems=40, pretrain_batch=8, pretrain_steps=3, problems=16, batch=8,
    steps=6, held_out=8,
)  # fmt: skip
MASK_ID = tokenizer().mask_token_id


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*texts):
    return padded([as_document(Problem(*text.split("|")), solution_only=True) for text in texts])


BATCH = rows("7-3+2?|7-3=4;4+2=6;#6", "8*2?|8*2=16;#16")


def context(step=0, steps=10, seed=0):
    streams = Streams(seed)
    streams.tick("finetune", step)
    facts = Facts(modality="language", target="next-token", classes=len(tokenizer()), tokenizer=tokenizer)
    return types.SimpleNamespace(step=step, steps=steps, rng=streams.rng, streams=streams, facts=facts)


def hidden(batch=BATCH, ctx=None, **fields):
    masking = MaskedInputs(**{"rate": 1.0, "warmup": 0.0, **fields})
    return masking.perturb(batch, ctx or context())


def test_rate_rises_to_two_thirds_of_the_stage_and_stays():
    rates = [warmed(0.4, step, 300, 2 / 3) for step in range(300)]
    assert rates[0] == pytest.approx(0.4 / 201)
    assert rates[100] == pytest.approx(0.4 * 101 / 201)
    assert rates[200] == rates[299] == 0.4
    assert rates[199] < 0.4
    assert warmed(0.4, 0, 300, 0.0) == 0.4
    released = [min(0.4, 0.4 * step / (2 / 3 * 300 + 1)) for step in range(300)]
    assert rates[:-1] == pytest.approx(released[1:])  # theirs, one step earlier


def test_each_eligible_token_is_hidden_with_the_rate_and_no_other():
    ids = torch.arange(40_000).view(4, -1)
    eligible = ids % 2 == 0
    found = replaced(ids, eligible, 0.3, -1, generator())
    hit = found == -1
    assert not hit[~eligible].any()
    assert hit[eligible].double().mean() == pytest.approx(0.3, abs=0.01)  # standard deviation .0032
    assert torch.equal(found[~hit], ids[~hit])
    assert torch.equal(replaced(ids, eligible, 0.0, -1, generator()), ids)
    assert (replaced(ids, eligible, 1.0, -1, generator()) == -1)[eligible].all()


@pytest.mark.parametrize("hide", ["solution", "question", "everywhere"])
def test_only_what_is_asked_for_is_hidden(hide):
    found = hidden(hide=hide)["input_ids"] == MASK_ID
    solution = BATCH["loss_mask"]
    expected = {"solution": solution, "question": ~solution, "everywhere": torch.ones_like(solution)}[hide]
    assert torch.equal(found, expected)


def test_random_tokens_are_uniform_over_the_vocabulary():
    wide = {"input_ids": torch.zeros(200, 100, dtype=torch.long), "loss_mask": torch.ones(200, 100, dtype=torch.bool)}
    found = hidden(wide, by="random")["input_ids"]
    counts = found.flatten().bincount(minlength=len(tokenizer())).double() / found.numel()
    assert counts.tolist() == pytest.approx([1 / len(tokenizer())] * len(tokenizer()), abs=0.008)


def test_tokens_hidden_change_with_the_step_and_not_with_what_replaces_them():
    once, again, later = (hidden(rate=0.5, ctx=context(step))["input_ids"] == MASK_ID for step in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, later)
    random = hidden(rate=0.5, by="random", ctx=context(3))["input_ids"]
    assert torch.equal(random[~once], BATCH["input_ids"][~once])


def llama():
    torch.manual_seed(0)
    model = Llama(width=16, layers=2, heads=2, vocab=len(tokenizer()), length=64)(None).eval()
    for p in model.parameters():
        p.data.mul_(4)
    return model


def test_loss_is_of_the_original_tokens_each_read_after_the_hidden_ones():
    model, batch = llama(), hidden(rate=0.5)
    loss = float(next_token_loss(model, batch, None).detach())
    total, number = 0.0, 0
    for row, text in enumerate(("7-3+2?7-3=4;4+2=6;#6", "8*2?8*2=16;#16")):
        size, begin = len(text) + 1, text.index("?") + 1
        shown = batch["input_ids"][row : row + 1, :size]
        scores = model(input_ids=shown).logits[0].log_softmax(-1)
        for at in range(begin, size):  # the end included
            total -= float(scores[at - 1, BATCH["input_ids"][row, at]].detach())
            number += 1
    assert loss == pytest.approx(total / number, rel=1e-5)
    spoilt = float(next_token_loss(model, {k: v for k, v in batch.items() if k != "labels"}, None).detach())
    assert abs(spoilt - loss) > 0.1  # the mutation: labels that are masked too


def test_hiding_everything_leaves_a_solution_that_only_the_question_tells():
    other = rows("7-3+2?|1*9=8;8-5=3;#3", "8*2?|9+5=31;#42")
    model = llama()
    one, two = (causal_logits(model, hidden(batch)) for batch in (BATCH, other))
    assert torch.equal(one, two)
    one, two = (causal_logits(model, batch) for batch in (BATCH, other))
    assert not torch.allclose(one, two)


def test_solution_is_told_by_the_loss_mask_or_by_labels():
    ids = torch.tensor([[4, 5, 6, 0]])
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED]])
    assert in_solution({"input_ids": ids, "labels": labels}).tolist() == [[False, True, True, False]]
    shown = torch.tensor([[1, 1, 1, 0]])
    assert targets_of({"input_ids": ids, "attention_mask": shown}).tolist() == [[4, 5, 6, IGNORED]]
    assert in_solution({"input_ids": ids, "attention_mask": shown}).tolist() == [[True, True, True, False]]
    assert targets_of({"input_ids": ids}) is ids


def test_mask_embedding_begins_as_the_mean_of_the_others_unless_it_is_also_the_output():
    model = llama()
    weight = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    MaskedInputs().mean_embedding(model, context())
    others = [i for i in range(len(tokenizer())) if i != MASK_ID]
    changed = model.get_input_embeddings().weight.detach()
    assert torch.allclose(changed[MASK_ID], weight[others].mean(0), atol=1e-6)
    assert torch.equal(changed[others], weight[others])
    assert torch.equal(model.get_output_embeddings().weight, head)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    before = changed.clone()
    MaskedInputs(token=3).mean_embedding(model, context())
    assert torch.equal(model.get_input_embeddings().weight, before)


def run(plan):
    return Engine(plan, 1, Store(None)).run()


def test_off_has_the_loss_of_the_control_at_every_step_and_on_does_not():
    plan = SMALL()
    control = run(plan).curves["loss"]
    assert run(apply(plan, [MaskedInputs(rate=0.0, stage="finetune")])).curves["loss"] == control
    masked = run(apply(plan, [MaskedInputs(rate=0.5, stage="finetune")])).curves["loss"]
    assert masked[:3] == control[:3]  # pre-training
    assert masked[5:] != control[5:]


def test_nothing_is_hidden_when_the_model_is_used():
    engine = Engine(apply(SMALL(), [MaskedInputs(rate=1.0, warmup=0.0)]), 1, Store(None))
    engine.run()
    model = engine.model_at("finetune").eval()
    with engine.finished("finetune") as held, torch.no_grad():
        found = held.predict(BATCH)
        assert torch.equal(found, causal_logits(model, BATCH))
        assert not torch.equal(found, causal_logits(model, hidden()))


def test_a_model_that_names_no_embeddings_is_told_so():
    bare = torch.nn.Sequential(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40))
    with pytest.raises(PlanError, match=r"Sequential does not name its embeddings.*by='random'"):
        MaskedInputs(token=39).mean_embedding(bare, context())


def gpt2(tied):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def examples(labels):
    g, found = generator(), []
    for _ in range(8):
        ids = torch.randint(1, 38, (9,), generator=g).tolist()
        example = {"input_ids": [*ids, 0], "attention_mask": [1] * 9 + [0]}
        found.append({**example, "labels": [-100] * 4 + ids[4:] + [-100]} if labels else example)
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_works_on_a_model_and_data_of_ones_own(labels, tied):
    plan = pt.Plan.from_model(gpt2(tied), data=examples(labels), steps=3, batch=4)
    masking = MaskedInputs(rate=1.0, warmup=0.0, token=39)
    arms = ([], [masking], [MaskedInputs(rate=0.0, token=39)])
    control, treated, off = (Engine(apply(plan, arm), 0, Store(None)) for arm in arms)
    losses = [e.run().curves["loss"] for e in (control, treated, off)]
    assert losses[0] == losses[2]
    model = treated.model_at("init")
    masking.mean_embedding(model, types.SimpleNamespace(facts=plan.facts))
    batch = next(plan.stages[0].data(_clock(control)))
    ids, attended = batch["input_ids"], batch["attention_mask"]
    target = batch["labels"] if labels else ids.masked_fill(attended == 0, IGNORED)
    shown = torch.where(target != IGNORED, 39, ids)
    logits = model(input_ids=shown, attention_mask=attended).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=IGNORED)
    assert losses[1][0][1] == pytest.approx(float(expected.detach()), rel=1e-5)


def _clock(engine):
    return engine._ctx(engine.plan.stages[0], engine.plan.stages[0].steps)


def test_random_tokens_need_no_tokenizer_and_masks_say_what_they_need():
    plan = pt.Plan.from_model(gpt2(True), data=examples(True), steps=2, batch=4)
    with pytest.raises(PlanError, match=r"fact tokenizer.*token=.*random"):
        apply(plan, [MaskedInputs()])
    run(apply(plan, [MaskedInputs(by="random")]))
    with pytest.raises(PlanError, match="not in the model's vocabulary of 40"):
        run(apply(plan, [MaskedInputs(token=40)]))
    bare = types.SimpleNamespace(mask_token_id=None)
    with pytest.raises(PlanError, match="has no mask token"):
        MaskedInputs().mask_token(Facts(modality="language", target="next-token", tokenizer=lambda: bare))
    assert tokenizer().convert_ids_to_tokens(MaskedInputs().mask_token(SMALL().facts)) == MASK


@pytest.mark.parametrize("wrong", [{"rate": 1.1}, {"warmup": -0.1}, {"by": "noise"}, {"hide": "answer"}])
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(PlanError):
        MaskedInputs(**wrong)
