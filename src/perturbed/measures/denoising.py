"""What a language model can do with a text that has holes, whichever objective it was trained on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.core.store import to_device
from perturbed.data import corpora
from perturbed.data.documents import Document, held_out
from perturbed.data.vocabulary import Text
from perturbed.errors import PerturbedError
from perturbed.objectives.denoising import DENOISERS, MODES, Example, Span, Vocabulary, collate, free_tokens
from perturbed.objectives.denoising import text_length as fitting
from perturbed.objectives.language import causal_logits
from perturbed.optim.optimisers import AdamW

Labelled = tuple[Tensor, Tensor]
READING = "reading"
WAYS = ("none", *MODES, READING)


@functools.cache
def held_out_documents(data: str, share: float = Text().held_out) -> tuple[Document, ...]:
    """The documents of a source that no plan trains on (``Text``)."""
    return tuple(d for d in corpora.load(data).documents if held_out(d.text, share))


def middle_windows(documents: Sequence[Document], tokenizer: Any, length: int, count: int) -> Tensor:
    """The middle ``length`` tokens of ``count`` documents that have as many, spread evenly over the source [N, T].

    Raises:
        PerturbedError: no document is long enough.
    """
    rows: list[list[int]] = []
    long = [d for d in documents if len(d.text) >= 3 * length]
    for document in long[:: max(1, len(long) // count)]:
        ids = tokenizer.encode(document.text, add_special_tokens=False)
        first = (len(ids) - length) // 2
        if first >= 0 and len(rows) < count:
            rows.append(ids[first : first + length])
    if not rows:
        raise PerturbedError(f"no held-out document has {length} tokens: choose a shorter length or other data")
    return torch.tensor(rows)


@torch.no_grad()
def hidden_losses(run: Run, examples: Sequence[Example], length: int) -> Tensor:
    """Nats of each hidden token of the text, sentinels and the text's first token left out, over all examples [N]."""
    batch = collate(examples, length)
    batch.pop("wanted")
    logits = run.predict(batch).cpu()
    places = torch.tensor([e.places + [-1] * (length - len(e.places)) for e in examples])
    target = torch.arange(length)[None, :] > torch.tensor([e.inputs for e in examples])[:, None]
    return _losses(logits, batch["input_ids"])[(target & (places > 0))[:, 1:]]


@torch.no_grad()
def read_losses(run: Run, texts: Tensor, spans: Sequence[Sequence[Span]]) -> Tensor:
    """Nats of the same tokens where a model reads the whole text from left to right, as a plain language model [N]."""
    wanted = torch.zeros(texts.shape, dtype=torch.bool)
    for row, of_row in enumerate(spans):
        for first, last in of_row:
            wanted[row, first:last] = True
    logits = run.predict({"input_ids": texts, "segment_ids": torch.zeros_like(texts)}).cpu()
    return _losses(logits, texts)[wanted[:, 1:]]


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


@dataclass(frozen=True)
class DenoisingTable:
    """The loss on the hidden tokens of held-out texts, of each kind of denoiser (the paper's comparison as a table).

    Every model is asked in five ways: as a denoiser with no mode token or one of three, and by plain reading from left
    to right, where a hidden token follows the true ones before it. Each kind is scored by the way that suits the model
    best, so that none is judged by a format that it never met. The same tokens are predicted in all five.

    Args:
        length: tokens of input and target.
        windows: texts, one of each held-out document.
        data: see ``corpora.load``.
        tokens: see ``MixtureOfDenoisers``.
    """

    length: int = 64
    windows: int = 64
    data: str = corpora.HARVEST
    tokens: tuple[int, ...] = ()

    def __call__(self, run: Run) -> dict[str, float]:
        """Nats per hidden token.

        Returns:
            ``r_loss``, ``s_loss``, ``x_loss`` and ``worst_loss``, the largest of them; ``own_mode_loss``,
            ``wrong_mode_loss`` and ``no_mode_loss``, means over the three kinds; and ``context_gain``, by how much the
            end of a text is predicted better from its own beginning than from another's (the best way of ``S``).
        """
        tokenizer = _tokenizer(run)
        vocabulary = Vocabulary.of(self.tokens or free_tokens(tokenizer))
        texts = middle_windows(held_out_documents(self.data), tokenizer, self.length, self.windows)
        rng = run.ctx.once("spans of held-out text", every="run")
        found: dict[tuple[str, str], list[Tensor]] = {(kind, way): [] for kind in MODES for way in WAYS}
        ends: list[list[Span]] = []
        for denoiser in DENOISERS:
            size = fitting(denoiser, self.length - 1)
            spans = [denoiser.spans(size, rng) for _ in texts]
            ends = spans if denoiser.mode == "S" else ends
            for way in WAYS:
                found[denoiser.mode, way].append(self._ask(run, texts[:, :size], spans, way, vocabulary))
        table = {at: float(torch.cat(parts).double().mean()) for at, parts in found.items()}
        best = {kind: min(WAYS, key=lambda way: table[kind, way]) for kind in MODES}
        scores = {f"{kind.lower()}_loss": table[kind, best[kind]] for kind in MODES}
        swapped = torch.stack([_with_end(other, text, end) for text, other, end in zip(
            texts, texts.roll(1, 0), ends, strict=True)])[:, : ends[0][0][1]]  # fmt: skip
        lost = self._ask(run, swapped, ends, best["S"], vocabulary).double().mean()
        wrong = [table[kind, way] for kind in MODES for way in MODES if way != kind]
        return {
            **scores,
            "worst_loss": max(scores.values()),
            "own_mode_loss": sum(table[kind, kind] for kind in MODES) / 3,
            "wrong_mode_loss": sum(wrong) / 6,
            "no_mode_loss": sum(table[kind, "none"] for kind in MODES) / 3,
            "context_gain": float(lost) - scores["s_loss"],
        }

    def _ask(self, run: Run, texts: Tensor, spans: Sequence[list[Span]], way: str, vocabulary: Vocabulary) -> Tensor:
        if way == READING:
            return read_losses(run, texts, spans)
        mode = None if way == "none" else way
        rows = zip(texts.tolist(), spans, strict=True)
        examples = [vocabulary.example(text, [0] * len(text), of_row, mode) for text, of_row in rows]
        return hidden_losses(run, examples, self.length)


def _with_end(beginning: Tensor, text: Tensor, end: Sequence[Span]) -> Tensor:
    """``text`` with all before its hidden end replaced by ``beginning``."""
    return torch.cat([beginning[: end[0][0]], text[end[0][0] :]])


def _tokenizer(run: Run) -> Any:
    assert run.ctx.facts.tokenizer is not None
    return run.ctx.facts.tokenizer()


@dataclass(frozen=True)
class LabelTransfer:
    """Fine-tune a copy of the model to tell where a document comes from, text to text, and test it on held-out ones.

    The input is the mode token R, the text and a sentinel; the answer is one letter. A copy that sees the input both
    ways and one that reads from left to right are tuned, and the better one counts, so that no model is judged by a
    kind of attention that it never met.

    Args:
        key: entry of the metadata that is the label.
        length: tokens of a text.
        train: documents to tune on, of each label.
        test: held-out documents, of each label at most.
        steps: updates.
        batch: documents in an update.
        lr: learning rate of AdamW.
        data: see ``corpora.load``.
        tokens: see ``MixtureOfDenoisers``.
    """

    key: str = "package"
    length: int = 48
    train: int = 200
    test: int = 60
    steps: int = 40
    batch: int = 16
    lr: float = 1e-3
    data: str = corpora.HARVEST
    tokens: tuple[int, ...] = ()

    def __call__(self, run: Run) -> dict[str, float]:
        """``label_accuracy`` in 0 … 1 and ``label_loss`` in nats, on the held-out documents."""
        tokenizer = _tokenizer(run)
        vocabulary = Vocabulary.of(self.tokens or free_tokens(tokenizer))
        train, test, labels = _labelled(self, tokenizer)
        names = [chr(ord("A") + i) for i in range(labels)]
        letters = torch.tensor([tokenizer.encode(name, add_special_tokens=False)[0] for name in names])
        train, test = ((_asked(ids, vocabulary), classes) for ids, classes in (train, test))
        found = [self._tuned(run, train, test, letters, both_ways) for both_ways in (True, False)]
        loss, accuracy = min(found)
        return {"label_accuracy": accuracy, "label_loss": loss}

    def _tuned(
        self, run: Run, train: Labelled, test: Labelled, letters: Tensor, both_ways: bool
    ) -> tuple[float, float]:
        """Loss and accuracy of one copy."""
        model, ctx = copy.deepcopy(run.ctx.bare).train(), run.ctx
        optim = AdamW(self.lr)(model, ctx)
        rng = ctx.once("batches of labelled documents", every="run")
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = torch.randint(len(train[0]), (self.batch,), generator=rng)
                batch = to_device(_seen(train[0][rows], both_ways), ctx.device)
                logits = causal_logits(model, batch)[:, -1]
                F.cross_entropy(logits, letters[train[1][rows]].to(ctx.device)).backward()  # type: ignore[no-untyped-call]
                optim.step()
                optim.zero_grad()
        model.eval()
        with torch.no_grad():
            batch = to_device(_seen(test[0], both_ways), ctx.device)
            logits = causal_logits(model, batch)[:, -1].cpu()
        loss = float(F.cross_entropy(logits, letters[test[1]]))
        return loss, float((logits[:, letters].argmax(-1) == test[1]).double().mean())


def _asked(ids: Tensor, vocabulary: Vocabulary) -> Tensor:
    first, last = (torch.full((len(ids), 1), t) for t in (vocabulary.modes[0], vocabulary.sentinels[0]))
    return torch.cat([first, ids, last], 1)


def _seen(ids: Tensor, both_ways: bool) -> Batch:
    rows, length = ids.shape
    seen = torch.ones(length, length, dtype=torch.bool)
    return {
        "input_ids": ids, "position_ids": torch.arange(length).expand(rows, -1),
        "attention_mask": (seen if both_ways else seen.tril()).expand(rows, 1, -1, -1),
    }  # fmt: skip


def _labelled(of: LabelTransfer, tokenizer: Any) -> tuple[Labelled, Labelled, int]:
    """Beginnings of documents and their classes, to train and to test on, and how many classes there are."""
    documents = [d for d in corpora.load(of.data).documents if of.key in d.metadata and len(d.text) >= 3 * of.length]
    names = sorted({d.metadata[of.key] for d in documents})
    sets = []
    for testing, most in ((False, of.train), (True, of.test)):
        rows, classes = [], []
        for label, name in enumerate(names):
            own = [d for d in documents if d.metadata[of.key] == name and held_out(d.text, Text().held_out) == testing]
            for document in own[:: max(1, len(own) // most)][:most]:
                ids = tokenizer.encode(document.text, add_special_tokens=False)[: of.length]
                if len(ids) == of.length:
                    rows.append(ids)
                    classes.append(label)
        sets.append((torch.tensor(rows), torch.tensor(classes)))
    return sets[0], sets[1], len(names)
