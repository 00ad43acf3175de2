"""Which library a docstring comes from, told by a fine-tuned MiniLM or by a small encoder trained from scratch."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.keys import digest, versions
from perturbed.core.plan import Batch, Facts, Measure, Plan, Stage, check_sizes
from perturbed.data import corpora
from perturbed.data.arrays import Epochs
from perturbed.data.documents import held_out
from perturbed.data.vocabulary import Text
from perturbed.errors import PlanError, nearest
from perturbed.home import home
from perturbed.inputs.text_attack import Words, neighbours, swaps
from perturbed.measures.text_robustness import mean_pooled
from perturbed.measures.vision import accuracy
from perturbed.optim.optimisers import AdamW
from perturbed.optim.schedules import WarmupCosine
from perturbed.weights import minilm

Kind = Literal["minilm", "scratch"]
MASK = "library"
NAMES = re.compile(
    r"\b(?:num\W?py|np|sci\W?py|sp|sci\W?kits?(?:\W?learn)?|sk\W?learn|c?python|pypi|pep)\b(?:\.\w+)*", re.IGNORECASE
)
FEWEST_WORDS = 10


def masked_words(text: str, most: int) -> Words:
    """The first ``most`` words of a docstring, with what would give its library away by name taken out.

    Names of the libraries, with the dotted path that follows them, become the word ``library``. Lines of examples
    (``>>>``, ``...``), of reStructuredText directives and the headings of numpydoc sections are left out. A word is a
    run of letters, in lower case; numbers and punctuation are not kept.
    """
    lines = [line.strip() for line in text.split("\n")]
    kept = [
        line
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if not line.startswith((">>>", "...", "..")) and not re.fullmatch(r"[-=~]{3,}", below)
    ]
    return tuple(re.findall(r"[a-z]+", NAMES.sub(f" {MASK} ", "\n".join(kept)).lower()))[:most]


@functools.lru_cache(maxsize=4)
def _topics(topics: Topics, where: str) -> dict[str, tuple[tuple[Words, int], ...]]:
    found: dict[str, dict[Words, None]] = {}
    seen: dict[Words, str] = {}
    for document in corpora.load(topics.data, topics.column).documents:
        name = document.metadata.get(topics.label)
        if name is None:
            known = ", ".join(sorted(document.metadata)) or "no entry but the text"
            raise PlanError(f"data: {topics.data!r} has no entry {topics.label!r} to classify by (it has {known})")
        words = masked_words(document.text, topics.words)
        if len(words) >= FEWEST_WORDS and seen.setdefault(words, name) == name:
            found.setdefault(name, {})[words] = None
    if len(found) != topics.classes:
        raise PlanError(f"data: {topics.data!r} has {len(found)} classes of texts, not {topics.classes}: set classes")
    split: dict[str, list[tuple[Words, int]]] = {"train": [], "test": []}
    for label, name in enumerate(sorted(found)):
        parts: dict[str, list[Words]] = {"train": [], "test": []}
        for words in sorted(found[name], key=lambda w: digest(list(w))):
            parts["test" if held_out(" ".join(words), 0.25) else "train"].append(words)
        for part, most in (("train", topics.train), ("test", topics.test)):
            if len(parts[part]) < most:
                raise PlanError(f"data: class {name!r} has {len(parts[part])} {part} texts of {most}: set {part} lower")
            split[part] += [(words, label) for words in parts[part][:most]]
    return {part: tuple(rows) for part, rows in split.items()}


@dataclass(frozen=True)
class Topics:
    """Texts as words, with the class that each belongs to; as many of every class, split by the hash of the text.

    A text that occurs in two classes counts for the first only, and two documents that begin alike count once.

    Args:
        data: ``docstrings`` or another source (``corpora.load``).
        column: entry that holds the text.
        label: entry that holds the class.
        classes: how many there are, in the order of their names.
        words: most words of a text.
        train: texts of each class to train on.
        test: texts of each class to test on.
    """

    data: str
    column: str
    label: str
    classes: int
    words: int
    train: int
    test: int

    def part(self, name: Literal["train", "test"]) -> tuple[tuple[Words, int], ...]:
        """The texts of one side with their labels.

        Raises:
            PlanError: the source has no such entry, another number of classes, or too few texts.
        """
        return _topics(self, str(home()))[name]

    def fingerprint(self) -> str:
        """Hash of the texts."""
        return digest([[list(words), label] for words, label in (*self.part("train"), *self.part("test"))])


@dataclass(frozen=True)
class Encode:
    """From texts as words to ``input_ids`` and ``attention_mask`` [B, T], padded on the right.

    Args:
        model: whose tokenizer: MiniLM's, or one trained on ``text``.
        text: the corpus of the latter.
        length: most tokens, the special ones included.
    """

    model: Kind
    text: Text
    length: int

    def __call__(self, texts: Sequence[Words]) -> Batch:
        """The batch, as long as its longest text."""
        rows = self.rows(texts)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    def rows(self, texts: Sequence[Words]) -> list[list[int]]:
        """Token ids of each text: MiniLM's own form, or the end-of-text token and then the words."""
        joined = [" ".join(words) for words in texts]
        if self.model == "minilm":
            found = minilm.tokenizer()(joined, truncation=True, max_length=self.length, return_attention_mask=False)
            return list(found["input_ids"])
        tokenizer = self.tokenizer()
        rows = tokenizer(joined, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[tokenizer.eos_token_id, *row][: self.length] for row in rows]

    def tokenizer(self) -> Any:
        """The Transformers tokenizer."""
        return minilm.tokenizer() if self.model == "minilm" else self.text.tokenizer()

    def fingerprint(self) -> str:
        """Hash of the tokenizer and the length."""
        about = minilm.fingerprint() if self.model == "minilm" else self.text.fingerprint()
        return digest([self.model, self.length, about, versions()["tokenizers"]])


@dataclass(frozen=True)
class Examples:
    """One side of the texts as ``input_ids``, ``attention_mask`` [N, T] and ``labels`` [N]."""

    topics: Topics
    encode: Encode
    part: Literal["train", "test"]

    def __call__(self) -> Batch:
        """The whole side, encoded."""
        rows = self.topics.part(self.part)
        return {**self.encode([words for words, _ in rows]), "labels": torch.tensor([label for _, label in rows])}


@dataclass(frozen=True)
class Texts:
    """The fact ``texts``: the held-out texts as words, with their labels."""

    topics: Topics

    def __call__(self) -> tuple[tuple[Words, int], ...]:
        """All of them."""
        return self.topics.part("test")


@dataclass(frozen=True)
class Substitutes:
    """The fact ``substitutes``: what a word may be replaced by, decided by no model that is trained here.

    For MiniLM the nearest whole words of its input embeddings as they came, for words of at least four letters that
    are single tokens; for the encoder from scratch, which has no such, the word with two neighbouring letters
    exchanged. Names of the libraries are never given.

    Args:
        model: which.
        number: neighbours of a word.
        similarity: smallest cosine of a neighbour.
    """

    model: Kind
    number: int = 8
    similarity: float = 0.4

    def __call__(self, word: str) -> tuple[str, ...]:
        """Substitutes, nearest first; empty for a word that is not to be touched."""
        if word == MASK or len(word) < 4:
            return ()
        return swaps(word) if self.model == "scratch" else _neighbours(word, self.number, self.similarity)

    def fingerprint(self) -> str:
        """Hash of what decides the substitutes."""
        about = minilm.fingerprint() if self.model == "minilm" else ""
        return digest([self.model, self.number, self.similarity, about, corpora.code()])


@functools.lru_cache(maxsize=100_000)
def _neighbours(word: str, number: int, similarity: float) -> tuple[str, ...]:
    names, vectors = minilm.words()
    found = neighbours(word, names, vectors, number=number, similarity=similarity)
    return tuple(other for other in found if not NAMES.fullmatch(other))


class TextClassifier(Module):
    """A BERT encoder, the mean of its real tokens' last states, and a linear head.

    Args:
        embed: from ``input_ids`` and ``attention_mask`` [B, T] to the states [B, T, D] that the encoder begins with.
        encoder: Transformers' ``BertEncoder``; its output is the glob ``*encoder`` of interventions.
        classes: K.
    """

    def __init__(self, embed: Any, encoder: Any, classes: int):
        super().__init__()
        self.embed, self.encoder = embed, encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, K] of ``input_ids`` [B, T], of which ``attention_mask`` [B, T] tells the real ones."""
        real = attention_mask != 0
        states = self.encoder(self.embed(input_ids, attention_mask), attention_mask=real[:, None, None])
        return self.head(mean_pooled(states[0], real))  # type: ignore[no-any-return]


class Embeddings(Module):
    """BERT's embeddings as the beginning of a ``TextClassifier`` all of which is trained."""

    def __init__(self, embeddings: Module):
        super().__init__()
        self.table = embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States [B, T, D]."""
        return self.table(input_ids=input_ids)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FrozenMiniLM:
    """The embeddings and first layers of MiniLM, no part of the model: neither trained, saved nor hashed with it.

    Args:
        layers: how many layers.
    """

    layers: int

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States [B, T, D]."""
        model = minilm.lower(self.layers).to(input_ids.device)
        return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Build:
    """Build slot: the classifier by its name.

    Args:
        model: ``minilm`` or ``scratch``.
        tuned: layers of MiniLM that are trained, from the top; all six take the embeddings with them.
        width: hidden size from scratch.
        layers: layers from scratch.
        vocab: rows of the embedding from scratch.
        length: most tokens from scratch.
        classes: K.
    """

    model: Kind
    tuned: int
    width: int
    layers: int
    vocab: int
    length: int
    classes: int

    def __call__(self, ctx: Ctx) -> Module:
        """The classifier, its head new."""
        bert: Any = minilm.load() if self.model == "minilm" else self._scratch()
        frozen = minilm.LAYERS - self.tuned if self.model == "minilm" else 0
        if not frozen:
            return TextClassifier(Embeddings(bert.embeddings), bert.encoder, self.classes)
        bert.encoder.layer = bert.encoder.layer[frozen:]
        return TextClassifier(FrozenMiniLM(frozen), bert.encoder, self.classes)

    def _scratch(self) -> Module:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=4,
            intermediate_size=4 * self.width, max_position_embeddings=self.length, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=self.width**-0.5, attn_implementation="sdpa",
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Hash of the sizes and of the weights that it begins with."""
        sizes = [self.tuned] if self.model == "minilm" else [self.width, self.layers, self.vocab, self.length]
        return digest([self.model, sizes, self.classes, minilm.fingerprint() if self.model == "minilm" else ""])


def predict_topic(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Predict slot: logits [B, K]."""
    return model(batch["input_ids"], batch["attention_mask"])  # type: ignore[no-any-return]


def topic_loss(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """Loss slot: mean cross-entropy in nats against ``labels`` [B]."""
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])


@dataclass(frozen=True)
class DocstringTopics:
    """The plan: one stage ``finetune`` of classifying the opening words of docstrings by library; test accuracy.

    Library names are masked (``masked_words``), classes are of equal size. AdamW with warm-up and cosine decay. Its
    facts also give what word attacks need: ``texts``, ``encode`` and ``substitutes``.

    Args:
        model: ``minilm`` (pre-trained weights, extra ``minilm``) or ``scratch`` (a small encoder with new weights, and
            a tokenizer trained on the corpus; it wants some 400 steps of 16 texts and a rate of 3e-3).
        tuned: layers of MiniLM that are trained, from the top, 1 to 6; the others are frozen and not in snapshots.
        width: hidden size from scratch, a multiple of 4.
        layers: layers from scratch.
        vocab: most tokens from scratch.
        words: most words of a text.
        length: most tokens of a text.
        train: texts of each class to train on.
        test: texts of each class to test on.
        batch: texts in a step.
        steps: optimiser updates.
        lr: peak learning rate.
        data: ``docstrings``, or another source whose documents tell their class (``corpora.load``).
        column: entry that holds the text.
        label: entry that holds the class.
        classes: how many classes the source has.
    """

    model: Kind = "minilm"
    tuned: int = 2
    width: int = 64
    layers: int = 2
    vocab: int = 1024
    words: int = 20
    length: int = 32
    train: int = 200
    test: int = 50
    batch: int = 8
    steps: int = 200
    lr: float = 5e-4
    data: str = "docstrings"
    column: str = "text"
    label: str = "package"
    classes: int = 4

    NAME: ClassVar[str] = "docstring-topics"

    def __post_init__(self) -> None:
        if self.model not in get_args(Kind):
            raise PlanError(f"{self.NAME}: no model {self.model!r}: {nearest(self.model, get_args(Kind))}")
        if not 1 <= self.tuned <= minilm.LAYERS:
            raise PlanError(f"{self.NAME}: tuned={self.tuned} must be from 1 to {minilm.LAYERS}")
        check_sizes(self.NAME, self, ("width", "layers", "train", "test", "batch"), ("lr",))
        if self.width % 4:
            raise PlanError(f"{self.NAME}: width={self.width} must be a multiple of its 4 heads")
        if self.words < FEWEST_WORDS:
            raise PlanError(f"{self.NAME}: words={self.words} must be at least {FEWEST_WORDS}")
        if self.length < 4 or self.classes < 2:
            raise PlanError(f"{self.NAME}: length={self.length} must be at least 4, classes={self.classes} at least 2")

    def __call__(self) -> Plan:
        """The plan; texts are collected, and weights loaded, when it runs."""
        topics = Topics(self.data, self.column, self.label, self.classes, self.words, self.train, self.test)
        encode = Encode(self.model, Text(self.data, self.column, self.vocab), self.length)
        stage = Stage(
            name="finetune",
            steps=self.steps,
            data=Epochs(Examples(topics, encode, "train"), self.batch),
            loss=topic_loss,
            optim=AdamW(self.lr, betas=(0.9, 0.999), weight_decay=0.01, schedule=WarmupCosine(warmup=0.1, floor=0.0)),
        )
        return Plan(
            name=self.NAME,
            build=Build(self.model, self.tuned, self.width, self.layers, self.vocab, self.length, self.classes),
            stages=(stage,),
            predict=predict_topic,
            measures=(Measure("accuracy", accuracy),),
            facts=Facts(
                modality="language", target="class", classes=self.classes, input="input_ids",
                tokenizer=encode.tokenizer,
                more={
                    "held_out": Examples(topics, encode, "test"), "texts": Texts(topics), "encode": encode,
                    "substitutes": Substitutes(self.model),
                },
            ),
        )  # fmt: skip
