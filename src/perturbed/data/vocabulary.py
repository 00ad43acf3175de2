"""A byte-level tokenizer trained on a corpus, and the corpus in its tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perturbed.core.keys import digest, versions
from perturbed.data import corpora
from perturbed.data.documents import Document, Tokens, concatenate, encode, held_out
from perturbed.errors import PlanError
from perturbed.home import home

END = "<|endoftext|>"
SMALLEST = 257  # every byte, and the end of a text


def train_bpe(texts: Iterable[str], vocab: int) -> Any:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2) as a Transformers tokenizer.

    Every digit is a token of its own, so numbers of equal length have equally many tokens and one digit's probability
    is one factor. Any text comes back unchanged from encoding and decoding.

    Args:
        texts: what merges are learnt from.
        vocab: most tokens, the 256 bytes and the end-of-text token included; a small corpus gives fewer.

    Raises:
        PlanError: ``vocab`` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < SMALLEST:
        raise PlanError(f"vocab={vocab} must be at least {SMALLEST}: 256 bytes and the end-of-text token")
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return _wrapped(bpe)


def _wrapped(bpe: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False)


def byte_lengths(tokenizer: Any) -> Tensor:
    """How many bytes of text each token of a byte-level tokenizer stands for [V]; special tokens stand for none."""
    lengths = torch.zeros(len(tokenizer), dtype=torch.long)
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if index in special else len(token)  # one printable character for each byte
    return lengths


@dataclass(frozen=True)
class Text:
    """A corpus with the tokenizer trained on it, split by document; made when first asked for, then cached.

    Args:
        data: see ``corpora.load``.
        column: entry that holds the text.
        vocab: most tokens of the vocabulary.
        held_out: share of the documents, by the hash of their text, that is never trained on.
    """

    data: str = corpora.HARVEST
    column: str = "text"
    vocab: int = 1024
    held_out: float = 0.05

    def tokenizer(self) -> Any:
        """The tokenizer, trained on the documents that are not held out."""
        return _tokenizer(self, str(home()))

    def train(self) -> Tokens:
        """The documents to train on, encoded.

        Raises:
            PerturbedError: see ``corpora.load``; or the split leaves none.
        """
        return _encoded(self, str(home()))[0]

    def test(self) -> Tokens:
        """The held-out documents, encoded."""
        return _encoded(self, str(home()))[1]

    def fingerprint(self) -> str:
        """Hash of the documents and of what is made of them."""
        text = corpora.load(self.data, self.column)
        return digest([text.hash, self.vocab, self.held_out, corpora.code(), versions()["tokenizers"]])


@functools.lru_cache(maxsize=4)
def _tokenizer(text: Text, where: str) -> Any:
    from tokenizers import Tokenizer

    store, key = corpora.cache(), f"{text.fingerprint()}-tokenizer"
    tree = store.get(key)
    if tree is None:
        documents = corpora.load(text.data, text.column).documents
        made = train_bpe((d.text for d in documents if not held_out(d.text, text.held_out)), text.vocab)
        tree = {"json": made.backend_tokenizer.to_str()}
        store.put(key, tree)
    return _wrapped(Tokenizer.from_str(tree["json"]))


@functools.lru_cache(maxsize=4)
def _encoded(text: Text, where: str) -> tuple[Tokens, Tokens]:
    store, key = corpora.cache(), f"{text.fingerprint()}-tokens"
    tree = store.get(key)
    if tree is None:
        parts: tuple[list[Document], list[Document]] = ([], [])
        for document in encode(corpora.load(text.data, text.column).documents, text.tokenizer()):
            parts[held_out(document.text, text.held_out)].append(document)
        for name, part in zip(("train on", "hold out"), parts, strict=True):
            if not part:
                share = f"a held-out share of {text.held_out:g}"
                raise PlanError(f"data: {text.data!r} leaves no document to {name} with {share}: give more documents")
        tree = {"train": concatenate(parts[0]).tree(), "test": concatenate(parts[1]).tree()}
        store.put(key, tree)
    return Tokens(**tree["train"]), Tokens(**tree["test"])
