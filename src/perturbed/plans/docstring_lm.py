"""A small language model trained on the docstrings of the installed packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Facts, Measure, Plan, Stage, check_sizes
from perturbed.data.packing import PackedText
from perturbed.data.vocabulary import SMALLEST, Text
from perturbed.errors import PlanError
from perturbed.measures.language import HeldOut
from perturbed.objectives.language import next_token_loss, predict_tokens
from perturbed.optim.optimisers import AdamW
from perturbed.optim.schedules import WarmupCosine


@dataclass(frozen=True)
class Llama:
    """Build slot: Transformers' Llama class with random weights.

    Args:
        width: of the hidden states.
        layers: blocks.
        heads: attention heads, which divide ``width`` into even parts.
        vocab: rows of the embedding.
        length: longest context.
    """

    width: int
    layers: int
    heads: int
    vocab: int
    length: int

    def __call__(self, ctx: Ctx) -> Module:
        """A new model, from the stream of the build."""
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden = -(-8 * self.width // 24) * 8  # gated: 8/3 of the width, rounded up to a multiple of 8
        config = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, intermediate_size=hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=self.length,
            use_cache=False, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None,
            attn_implementation="sdpa",
        )  # fmt: skip
        model: Module = LlamaForCausalLM(config)
        return model


@dataclass(frozen=True)
class DocstringLM:
    """Next-token prediction with a small Llama on packed documents.

    AdamW with warm-up and cosine decay as usual for this class of model: betas 0.9 and 0.95, weight decay 0.1, gradient
    norm clipped at 1. Documents are held out by the hash of their text.

    Args:
        width: of the hidden states.
        layers: blocks.
        heads: attention heads.
        length: targets in a window; a window holds ``length + 1`` tokens.
        batch: windows in a step.
        steps: optimiser updates.
        lr: peak learning rate.
        vocab: most tokens of the vocabulary.
        data: ``docstrings``, the path of a text, JSON-lines or Parquet file, or a hub data set (``corpora.load``).
        column: entry that holds the text, in data that have several.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    batch: int = 16
    steps: int = 600
    lr: float = 4e-3
    vocab: int = 1024
    data: str = "docstrings"
    column: str = "text"

    NAME: ClassVar[str] = "docstring-lm"

    def __post_init__(self) -> None:
        check_sizes(self.NAME, self, ("width", "layers", "heads", "length", "batch"), ("lr",))
        if self.width % (2 * self.heads):
            raise PlanError(f"{self.NAME}: width={self.width} must be a multiple of 2 * heads={2 * self.heads}")
        if self.vocab < SMALLEST:
            raise PlanError(f"{self.NAME}: vocab={self.vocab} must be at least {SMALLEST}")

    def __call__(self) -> Plan:
        """The plan; text is collected and encoded when it is first run."""
        text = Text(self.data, self.column, self.vocab)
        stage = Stage(
            name="pretrain",
            steps=self.steps,
            data=PackedText(text, self.length, self.batch),
            loss=next_token_loss,
            optim=AdamW(self.lr, schedule=WarmupCosine()),
        )
        return Plan(
            name=self.NAME,
            build=Llama(self.width, self.layers, self.heads, self.vocab, self.length + 1),
            stages=(stage,),
            predict=predict_tokens,
            measures=(Measure("heldout_loss", HeldOut(text, self.length), better="lower"),),
            facts=Facts(
                modality="language", target="next-token", classes=self.vocab, input="input_ids",
                tokenizer=Tokenizer(text),
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """The fact ``tokenizer``: a corpus's own, trained when first asked for."""

    text: Text

    def __call__(self) -> Any:
        """A Transformers tokenizer."""
        return self.text.tokenizer()
