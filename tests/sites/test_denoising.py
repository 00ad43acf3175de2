"""Denoising: spans follow their laws, corruption loses nothing, no token sees what it must not, losses by hand."""

import collections
import dataclasses
import itertools
import math
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import perturbed as pt
from perturbed.core.plan import Facts, PlanError, apply
from perturbed.core.run import Engine, threads
from perturbed.core.store import Store
from perturbed.core.streams import Streams
from perturbed.data.vocabulary import Text, train_bpe
from perturbed.measures.denoising import DenoisingTable, LabelTransfer, held_out_documents, middle_windows
from perturbed.objectives.denoising import (
    DENOISERS,
    MODES,
    Denoised,
    Denoiser,
    MixtureOfDenoisers,
    Vocabulary,
    collate,
    composition,
    corrupt,
    denoising_losses,
    free_tokens,
    prefix_mask,
    random_spans,
    text_length,
)
from perturbed.objectives.language import next_token_loss
from perturbed.optim.optimisers import AdamW
from perturbed.plans.docstring_lm import DocstringLM, Llama

quick = settings(deadline=None, max_examples=60)
IDS = tuple(range(100, 113))
VOCABULARY = Vocabulary.of(IDS)
SMALL = {"width": 16, "layers": 1, "heads": 1, "batch": 8, "steps": 6}


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def llama():
    torch.manual_seed(0)
    model = Llama(width=16, layers=2, heads=2, vocab=128, length=65)(None).eval()
    for p in model.parameters():
        p.data.mul_(4)  # a new model's predictions hardly differ
    return model


def bert(vocab=128):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    for name, p in model.named_parameters():
        p.data.mul_(1 if "LayerNorm" in name or vocab > 128 else 8)
    return model


def context(seed=0):
    tokenizer = types.SimpleNamespace(get_vocab=dict)
    streams = Streams(seed)
    streams.tick("pretrain", 0)
    return types.SimpleNamespace(
        rng=streams.rng, facts=Facts(modality="language", target="next-token", classes=128, tokenizer=lambda: tokenizer)
    )  # fmt: skip


# spans


def spread(drawn, number):
    """Whether the drawn things are all of the ``number`` possible ones, about equally often."""
    counts, total = collections.Counter(drawn), len(drawn)
    mean = total / number
    return len(counts) == number and all(abs(n - mean) < 5 * math.sqrt(mean) for n in counts.values())


def test_every_composition_is_equally_likely():
    g = generator()
    assert spread([tuple(composition(6, 3, g)) for _ in range(3000)], math.comb(5, 2))


def test_every_arrangement_of_spans_is_equally_likely():
    def sizes(mask):
        return [len(list(run)) for hidden, run in itertools.groupby(mask) if hidden]

    possible = [m for m in itertools.product((0, 1), repeat=7) if sum(m) == 4 and len(sizes(m)) == 2]
    g = generator()
    drawn = [tuple(random_spans(7, 4, 2, g)) for _ in range(3000)]
    masks = [tuple(int(any(a <= i < b for a, b in spans)) for i in range(7)) for spans in drawn]
    assert set(masks) == set(possible)
    assert spread(masks, len(possible))
    # one span, which T5's order of kept and hidden parts would always put at the end
    assert spread([random_spans(10, 3, 1, g)[0] for _ in range(3000)], 8)


def test_counts_are_those_of_the_papers_settings():
    assert [d.count(512) for d in DENOISERS] == [26, 10, 1, 85, 32, 1, 4]
    assert [d.mode for d in DENOISERS] == ["R", "R", "S", "X", "X", "X", "X"]


def test_the_number_of_spans_is_that_of_the_whole_tokens_that_are_hidden():
    r, x = DENOISERS[0], DENOISERS[3]
    assert r.count(30) == 1  # 4 hidden tokens in spans of 3; of 30 * 0.15 = 4.5 there would be 2
    assert r.count(50) == 3  # 8 of 7.5, where 2.5 spans would be rounded to 2
    assert x.count(3) == 1  # 2 of 3 tokens
    assert x.count(5) == 1  # 2 of 5
    assert [Denoiser("X", 1, 0.9).count(n) for n in (4, 10)] == [2, 2]  # kept tokens must part the spans


@quick
@given(st.sampled_from(DENOISERS), st.integers(2, 200), st.integers(0, 9))
def test_spans_hide_what_they_should(denoiser, length, seed):
    spans = denoiser.spans(length, generator(seed))
    assert len(spans) == denoiser.count(length)
    assert spans[0][0] >= 0
    assert spans[-1][1] <= length
    assert all(a < b for a, b in spans)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(spans))
    hidden = sum(b - a for a, b in spans)
    if denoiser.mode == "S":
        assert spans[0][1] == length
    else:
        assert hidden == min(max(round(length * denoiser.rate), 1), length - 1)


def test_the_end_that_s_hides_is_a_quarter_in_expectation():
    g = generator()
    drawn = [60 - DENOISERS[2].spans(60, g)[0][0] for _ in range(6000)]
    assert spread(drawn, 29)
    assert sum(drawn) / 6000 / 60 == pytest.approx(0.25, abs=0.01)


def test_corruption_by_example():
    source, target, *_ = corrupt([1, 2, 3, 4, 5, 6, 7, 8, 9], [(1, 3), (8, 9)], [50, 51], 99)
    assert source == [1, 50, 4, 5, 6, 7, 8, 51]
    assert target == [50, 2, 3, 51, 9, 99]


@quick
@given(st.sampled_from(DENOISERS), st.integers(2, 40), st.integers(0, 9), st.sampled_from([None, *MODES]))
def test_input_and_target_hold_the_text_and_nothing_else(denoiser, length, seed, mode):
    text = list(range(length))
    spans = denoiser.spans(length, generator(seed))
    example = VOCABULARY.example(text, [0] * length, spans, mode)
    ids = example.ids
    if mode is not None:
        assert ids[0] == IDS[MODES.index(mode)]
        assert example.segments[0] == -1
    source, target = ids[: example.inputs][mode is not None :], ids[example.inputs :]
    assert target[-1] == VOCABULARY.end
    parts = []
    for token in target[:-1]:
        if token in VOCABULARY.sentinels:
            parts.append([])
        else:
            parts[-1].append(token)
    restored = []
    for token in source:
        restored += parts.pop(0) if token in VOCABULARY.sentinels else [token]
    assert restored == text
    assert not parts
    assert all(p in (-1, t) for t, p in zip(ids, example.places, strict=True))
    assert sorted(p for p in example.places if p >= 0) == text


@pytest.mark.parametrize("room", [8, 20, 64, 512])
def test_the_text_is_the_longest_that_fits(room):
    for denoiser in DENOISERS:
        size = text_length(denoiser, room)
        needed = {n: n + 2 * denoiser.count(n) + 1 for n in range(2, room)}
        assert size == max(n for n, length in needed.items() if length <= room)
        spans = denoiser.spans(size, generator())
        assert len(VOCABULARY.example(range(size), [0] * size, spans, "R").ids) == 1 + needed[size] <= 1 + room
    with pytest.raises(PlanError, match="4 tokens hold no input and target"):
        text_length(DENOISERS[0], 4)


def test_no_sentinel_comes_twice_in_a_window_of_the_study():
    spans = [d.count(text_length(d, 64)) for d in DENOISERS]
    assert max(spans) <= len(VOCABULARY.sentinels) == 9
    source, *_ = corrupt(list(range(9)), [(0, 1), (3, 4), (6, 7)], [50, 51], 99)
    assert source == [50, 1, 2, 51, 4, 5, 50, 7, 8]


def test_tokens_that_no_text_has():
    tokenizer = Text().tokenizer()
    free = free_tokens(tokenizer)
    assert len(set(free)) == 13
    everything = "".join(map(chr, (*range(0, 0xD800, 11), *range(0xE000, 0x30000, 101), 0x10FFFF)))
    assert not set(free) & set(tokenizer.encode(everything))
    fallback = types.SimpleNamespace(get_vocab=lambda: {"À": 9, **{f"<0x{b:02X}>": b for b in range(256)}})
    assert free_tokens(fallback) == (0xC0, 0xC1, *range(0xF5, 0x100))
    assert free_tokens(types.SimpleNamespace(get_vocab=lambda: {"À": 9, "ÿ": 4})) == ()
    for wrong in ((), (1, 2, 3, 4), (1, 1, 2, 3, 4)):
        with pytest.raises(PlanError, match="at least 5 different tokens that no text uses"):
            Vocabulary.of(wrong)


# what sees what


def test_the_mask_by_brute_force():
    segments = torch.tensor([[-1, 0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 2, 2, 2]])
    inputs = torch.tensor([4, 2])
    mask = prefix_mask(inputs, segments)
    for row, i, j in itertools.product(range(2), range(7), range(7)):
        of_one = segments[row, i] == segments[row, j] or segments[row, j] == -1
        assert bool(mask[row, 0, i, j]) == bool(of_one and (j <= i or j < inputs[row]))


def examples_of(rows=6, length=40):
    g = generator(1)
    texts = torch.randint(100, (rows, length), generator=g)
    spans = [DENOISERS[i].spans(length, g) for i in range(rows)]
    made = [
        VOCABULARY.example(t, [0] * length, s, DENOISERS[i].mode)
        for i, (t, s) in enumerate(zip(texts.tolist(), spans, strict=True))
    ]
    return made, spans


@pytest.mark.parametrize("make", [llama, bert])
@torch.no_grad()
def test_losses_are_of_the_hidden_tokens_given_the_input_and_those_before(make):
    model = make()
    made, spans = examples_of()
    losses, wanted = denoising_losses(model, collate(made, 65))
    for row, (example, of_row) in enumerate(zip(made, spans, strict=True)):
        hidden = sum(b - a for a, b in of_row)
        assert int(wanted[row].sum()) == hidden + len(of_row), "hidden tokens, sentinels but the first, and the end"
        for at in (example.inputs, len(example.ids) - 2):  # one sequence, cut off after what is given
            ids = torch.tensor([example.ids[: at + 1]])
            seen = torch.zeros(at + 1, at + 1, dtype=torch.bool)
            for i, j in itertools.product(range(at + 1), range(at + 1)):
                seen[i, j] = (j <= i or j < example.inputs) and (i > 0 or j == 0)  # the mode token sees itself only
            alone = model(input_ids=ids, attention_mask=seen[None, None]).logits[0, at]
            expected = F.cross_entropy(alone, torch.tensor(example.ids[at + 1]))
            assert float(losses[row, at]) == pytest.approx(float(expected), abs=2e-4)
    # a plain causal reading of the same sequence differs: the input is read both ways
    batch = collate(made, 65)
    batch["attention_mask"] = torch.ones(65, 65, dtype=torch.bool).tril().expand(6, 1, -1, -1)
    assert (denoising_losses(model, batch)[0] - losses)[wanted].abs().max() > 1e-2


@torch.no_grad()
def test_one_document_tells_nothing_of_another():
    model, text = llama(), torch.randint(100, (40,), generator=generator()).tolist()
    marks, spans = [0] * 21 + [1] * 19, [(5, 9), (18, 24), (30, 33)]
    other = text[:21] + [(t + 1) % 100 for t in text[21:]]
    losses, wanted = [], []
    for row in (text, other):
        example = VOCABULARY.example(row, marks, spans, "X")
        found, which = denoising_losses(model, collate([example], 65))
        losses.append(found[0])
        wanted.append(which[0])
    segments = torch.tensor(example.segments + [9] * (65 - len(example.segments)))[1:]
    first, second = wanted[0] & (segments == 0), wanted[0] & (segments == 1)
    assert torch.equal(losses[0][first], losses[1][first])
    assert (losses[0][second] - losses[1][second]).abs().max() > 1e-2
    # the first token of the second document within the span that crosses the border has nothing before it
    border = example.places.index(21, example.inputs)
    assert not bool(wanted[0][border - 1])
    assert int(wanted[0].sum()) == 13 + 2 + 1 - 1, "hidden tokens, later sentinels, the end, without that token"


# the loss slot


def windows(rows=32, length=65):
    return {
        "input_ids": torch.randint(100, (rows, length), generator=generator(2)),
        "segment_ids": torch.zeros(rows, length, dtype=torch.long),
    }


def modes_of(batch):
    return [IDS.index(i) for i in batch["input_ids"][:, 0].tolist()]


def kind_of(row):
    """What a row tells of its denoiser, without its mode token: spans, and whether only the end is hidden."""
    ids = row.tolist()
    end = ids.index(VOCABULARY.end)
    sentinels = [i for i in range(1, end) if ids[i] in VOCABULARY.sentinels]
    return len(sentinels) // 2, sentinels[0] + 1 == sentinels[len(sentinels) // 2]


def test_weight_on_one_denoiser_gives_that_one_and_in_proportion_else():
    for at, denoiser in enumerate(DENOISERS):
        weights = tuple(float(i == at) for i in range(7))
        batch = MixtureOfDenoisers(weights, tokens=IDS).batch(windows(), context())
        double = MixtureOfDenoisers(tuple(3 * w for w in weights), tokens=IDS).batch(windows(), context())
        assert all(torch.equal(batch[k], double[k]) for k in batch)
        assert {MODES[m] for m in modes_of(batch)} == {denoiser.mode}
        size = text_length(denoiser, 64)
        for row, text in zip(batch["input_ids"], windows()["input_ids"], strict=True):
            spans, at_the_end = kind_of(row)
            assert spans == denoiser.count(size)
            assert at_the_end or denoiser.mode != "S"
            assert sorted(i for i in row.tolist()[: size + 2 * spans + 2] if i < 100) == sorted(text[:size].tolist())
    drawn = collections.Counter(modes_of(MixtureOfDenoisers(tokens=IDS).batch(windows(2000), context())))
    assert [drawn[m] / 2000 for m in range(3)] == pytest.approx([0.4, 0.2, 0.4], abs=0.05)


def test_modes_are_told_hidden_or_made_up():
    own, none, made_up = (MixtureOfDenoisers(mode=m, tokens=IDS) for m in ("own", "none", "random"))
    told = own.batch(windows(300), context())["input_ids"]
    silent = none.batch(windows(300), context())["input_ids"]
    shuffled = made_up.batch(windows(300), context())["input_ids"]
    assert torch.equal(told[:, 1:], shuffled[:, 1:]), "the sham differs in the mode token alone"
    assert torch.equal(told[:, 1:-1], silent[:, :-2]) or torch.equal(told[:, 1:], silent[:, :-1])
    assert not set(silent.flatten().tolist()) & set(IDS[:3])
    agree = (told[:, 0] == shuffled[:, 0]).float().mean()
    assert float(agree) == pytest.approx(1 / 3, abs=0.09)


@torch.no_grad()
def test_altered_inputs_are_read_and_the_true_tokens_asked_for():
    mixture, clean = MixtureOfDenoisers(tokens=IDS), windows(40)
    ids = clean["input_ids"]
    hidden = torch.rand(ids.shape, generator=generator(3)) < 0.3
    altered = {**clean, "input_ids": torch.where(hidden, 99, ids), "labels": ids}
    plain, made = mixture.batch(clean, context()), mixture.batch(altered, context())
    assert torch.equal(made["said"][made["wanted"]], plain["said"][plain["wanted"]])
    assert (made["input_ids"][made["wanted"]] == 99).float().mean() > 0.2, "what was hidden stays hidden as an input"
    unasked = {**altered, "labels": torch.full_like(ids, -100)}
    assert torch.equal(mixture.batch(unasked, context())["said"], made["input_ids"]), "no label: the text's own token"


@torch.no_grad()
def test_the_loss_weighs_windows_by_their_number():
    model, batch = llama(), windows(10)
    slot = Denoised(next_token_loss, MixtureOfDenoisers(share=0.4, tokens=IDS))
    hidden = torch.rand(10, generator=context().rng("denoised windows")) < 0.4
    assert 0 < int(hidden.sum()) < 10
    kept = {k: v[~hidden] for k, v in batch.items()}
    ctx = context()
    losses, wanted = denoising_losses(model, slot.mixture.batch({k: v[hidden] for k, v in batch.items()}, ctx))
    share = float(hidden.float().mean())
    expected = (1 - share) * next_token_loss(model, kept, ctx) + share * losses[wanted].mean()
    assert float(slot(model, batch, context())) == pytest.approx(float(expected), abs=1e-5)


def test_off_and_half_and_whole_on_a_plan():
    plan = DocstringLM(**SMALL)()
    runs = {
        share: Engine(apply(plan, [MixtureOfDenoisers(share=share)]), 0, Store(None)).run() for share in (0.0, 0.5, 1.0)
    }
    control = Engine(plan, 0, Store(None)).run()
    assert runs[0.0].weights == control.weights
    assert len({r.weights for r in runs.values()}) == 3
    assert runs[1.0].cost.tokens == control.cost.tokens
    assert runs[1.0].cost.flops == pytest.approx(control.cost.flops, rel=1e-3), "a denoiser reads as much"


def letters_tokenizer():
    return train_bpe(["some words"], 257)


def test_bert_as_a_prefix_language_model_learns_from_rows_of_unequal_length():
    model, data = bert(257), []
    for i in range(8):
        n = 16 + 4 * i
        start = torch.randint(97, 110, (1,), generator=generator(i)).item()
        ids = [start + j % 13 for j in range(n)]
        data.append({"input_ids": ids + [0] * (48 - n), "attention_mask": [1] * n + [0] * (48 - n)})
    plan = pt.Plan.from_model(
        model, data=data, steps=60, batch=8, loss=next_token_loss, optim=AdamW(1e-2),
        facts={"tokenizer": letters_tokenizer, "modality": "language"},
    )  # fmt: skip
    result = Engine(apply(plan, [MixtureOfDenoisers()]), 0, Store(None)).run()
    losses = [value for _, value in result.curves["loss"]]
    assert result.diverged is None
    assert losses[0] > 5
    assert sum(losses[-5:]) / 5 < 3


def test_padding_is_no_text():
    batch = windows(12)
    lengths = torch.arange(12) * 4 + 20
    mask = (torch.arange(65)[None] < lengths[:, None]).long()
    batch = {"input_ids": batch["input_ids"].where(mask.bool(), 113), "attention_mask": mask}
    made = MixtureOfDenoisers(tokens=IDS).batch(batch, context())
    assert not bool((made["input_ids"] == 113).any())


def test_bad_settings_are_named():
    for make, match in (
        (lambda: MixtureOfDenoisers(weights=(1.0, 2.0)), "must be 7 numbers"),
        (lambda: MixtureOfDenoisers(weights=(0.0,) * 7), "not all 0"),
        (lambda: MixtureOfDenoisers(mode="onw"), "no mode 'onw': did you mean 'own'"),
        (lambda: MixtureOfDenoisers(share=1.5), "share=1.5 must be in 0"),
        (lambda: apply(DocstringLM(**SMALL)(), [MixtureOfDenoisers(stage="pretain")]), "no stage 'pretain'"),
    ):
        with pytest.raises(PlanError, match=match):
            make()


@pytest.mark.parametrize("wrong", [128, -1])
def test_tokens_that_the_model_does_not_have_are_named(wrong):
    mixture = MixtureOfDenoisers(tokens=(*IDS, wrong))
    with pytest.raises(PlanError, match=rf"{wrong} is not in the model's vocabulary of 128"):
        mixture.batch(windows(2), context())


# measures


def run_of(predict, model=None):
    text, streams = Text(), Streams(0)
    facts = types.SimpleNamespace(tokenizer=text.tokenizer)
    ctx = types.SimpleNamespace(once=streams.once, facts=facts, bare=model, device=torch.device("cpu"))
    return types.SimpleNamespace(predict=predict, ctx=ctx)


def test_held_out_windows_are_the_middles_of_documents_nobody_trains_on():
    tokenizer = Text().tokenizer()
    documents = held_out_documents("docstrings")
    texts = middle_windows(documents, tokenizer, 65, 20)
    assert texts.shape == (20, 65)
    assert len(documents) > 100
    train = Text().train().ids.numpy().astype("<i4").tobytes()
    whole = [tokenizer.decode(row) for row in texts]
    assert all(any(text in d.text for d in documents) for text in whole)
    assert sum(row.numpy().astype("<i4").tobytes() in train for row in texts) <= 1, "boilerplate may occur twice"


def test_a_model_that_knows_nothing_scores_the_vocabulary():
    scores = DenoisingTable(windows=6)(run_of(lambda batch: torch.zeros(*batch["input_ids"].shape, 1024)))
    for name in ("r_loss", "s_loss", "x_loss", "worst_loss", "own_mode_loss", "wrong_mode_loss", "no_mode_loss"):
        assert scores[name] == pytest.approx(math.log(1024), abs=1e-5)
    assert scores["context_gain"] == pytest.approx(0, abs=1e-5)


def test_each_model_is_asked_as_suits_it_best():
    free = free_tokens(Text().tokenizer())

    def only_when_asked_by(test):
        def predict(batch):
            size, logits = batch["input_ids"].shape[1] - 1, torch.zeros(*batch["input_ids"].shape, 1024)
            known = torch.tensor([test(batch, row) for row in range(len(logits))])
            logits[:, :-1].scatter_(2, batch["input_ids"][:, 1:, None], 20.0 * known[:, None, None].expand(-1, size, 1))
            return logits

        return predict

    table, ignorant = DenoisingTable(windows=4), math.log(1024)
    by_mode = table(run_of(only_when_asked_by(lambda batch, row: int(batch["input_ids"][row, 0]) == free[1])))
    assert by_mode["worst_loss"] < 1e-4
    assert by_mode["own_mode_loss"] == pytest.approx(2 / 3 * ignorant, abs=1e-3)
    assert by_mode["wrong_mode_loss"] == pytest.approx(4 / 6 * ignorant, abs=1e-3)
    assert by_mode["no_mode_loss"] == pytest.approx(ignorant, abs=1e-3)
    reader = table(run_of(only_when_asked_by(lambda batch, row: "segment_ids" in batch)))
    assert reader["worst_loss"] < 1e-4
    assert reader["own_mode_loss"] == pytest.approx(ignorant, abs=1e-3)


def test_a_beginning_helps_by_what_another_text_s_would_not_do():
    """Of a reader who knows the texts by heart, and is lost where the beginning is that of another."""
    texts = middle_windows(held_out_documents("docstrings"), Text().tokenizer(), 64, 4)
    asked = []

    def predict(batch):
        ids, logits = batch["input_ids"], torch.zeros(*batch["input_ids"].shape, 1024)
        if "segment_ids" in batch:
            asked.append(ids)
            known = torch.tensor([any(torch.equal(row, text[: len(row)]) for text in texts) for row in ids])
            logits[:, :-1].scatter_(2, ids[:, 1:, None], 20.0 * known[:, None, None].expand(-1, ids.shape[1] - 1, 1))
        return logits

    scores = DenoisingTable(windows=4)(run_of(predict))
    assert scores["s_loss"] < 1e-4
    assert scores["context_gain"] == pytest.approx(math.log(1024), abs=1e-3)
    for i, row in enumerate(asked[-1]):  # the beginning of the text before, then its own end
        same = (row == texts[i][: len(row)]).long()
        border = len(row) - int(same.flip(0).cumprod(0).sum())
        assert 0 < border < len(row)
        assert torch.equal(row[:border], texts[i - 1][:border])


def test_of_two_ways_of_fine_tuning_the_one_of_lower_loss_counts(monkeypatch):
    for better in (True, False):
        monkeypatch.setattr(
            LabelTransfer, "_tuned", lambda *args, better=better: (0.5, 0.7) if args[-1] is better else (0.9, 0.8)
        )
        assert LabelTransfer(train=4, test=2)(run_of(None)) == {"label_loss": 0.5, "label_accuracy": 0.7}


def test_all_ways_of_asking_predict_the_same_tokens():
    seen = []

    def predict(batch):
        seen.append(batch["input_ids"])
        return torch.zeros(*batch["input_ids"].shape, 1024)

    table = DenoisingTable(windows=5)
    run = run_of(predict)
    texts = middle_windows(held_out_documents("docstrings"), Text().tokenizer(), 64, 5)
    vocabulary = Vocabulary.of(free_tokens(Text().tokenizer()))
    spans = [DENOISERS[3].spans(40, generator(i)) for i in range(4)] + [[(0, 5), (9, 12)]]
    asked = [table._ask(run, texts[:, :40], spans, way, vocabulary) for way in ("none", "R", "reading")]
    hidden = sum(b - max(a, 1) for row in spans for a, b in row)
    assert [len(a) for a in asked] == [hidden] * 3


def test_fine_tuning_tells_documents_apart_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = Llama(width=32, layers=1, heads=2, vocab=1024, length=65)(None).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = run_of(None, model)
    measure = LabelTransfer(train=60, test=25, lr=5e-3, steps=40)
    scores = measure(run)
    assert measure(run) == scores
    assert scores["label_accuracy"] > 0.4
    assert scores["label_loss"] < math.log(4)
    untouched = dataclasses.replace(measure, steps=0)(run)
    assert untouched["label_accuracy"] < 0.4
    assert untouched["label_loss"] > 5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
