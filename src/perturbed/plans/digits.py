"""Handwritten digits classified by a small network: pre-training, then fine-tuning, both on clean images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.keys import tensors_hash
from perturbed.core.plan import Facts, Measure, Plan, Stage, check_sizes
from perturbed.data.arrays import Epochs
from perturbed.errors import PlanError, nearest
from perturbed.measures.vision import accuracy
from perturbed.objectives.classification import cross_entropy, predict_class
from perturbed.optim.optimisers import SGD

SIDE, CLASSES = 8, 10
Network = Literal["cnn", "vit", "mlp"]


@functools.cache
def load(data: str, held_out: int) -> dict[str, dict[str, Tensor]]:
    """Images and labels, split into ``train`` and ``test`` once for all seeds, each class in its share.

    Args:
        data: ``digits`` (scikit-learn's 1,797 handwritten digits of 8x8 pixels), or the path of an ``.npz`` file with
            ``pixels`` [N, 1, 8, 8] in [0, 1] and ``labels`` [N] in 0…9.
        held_out: test examples.

    Returns:
        Per split ``pixels`` [N, 1, 8, 8], float32 in [0, 1], and ``labels`` [N].

    Raises:
        PlanError: no such file, another content than said, or too few examples.
    """
    from sklearn.model_selection import train_test_split

    pixels, labels = _scikit_digits() if data == "digits" else _from_file(Path(data))
    if not CLASSES <= held_out <= len(labels) - CLASSES:
        raise PlanError(f"held_out={held_out} of {len(labels)} examples: each side needs at least {CLASSES}")
    rows = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=0)
    return {
        split: {"pixels": torch.tensor(pixels[at], dtype=torch.float32), "labels": torch.tensor(labels[at]).long()}
        for split, at in zip(("train", "test"), rows, strict=True)
    }


def _scikit_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images[:, None] / 16, found.target


def _from_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as held:
            pixels, labels = held["pixels"], held["labels"]
    except FileNotFoundError:
        raise PlanError(f"no data {str(path)!r}: give 'digits' or the path of an .npz file") from None
    except (KeyError, ValueError, OSError) as e:
        raise PlanError(f"{path}: want an .npz file with arrays pixels and labels ({e})") from e
    if pixels.shape != (len(labels), 1, SIDE, SIDE) or not 0 <= pixels.min() <= pixels.max() <= 1:
        raise PlanError(f"{path}: pixels must be [N, 1, {SIDE}, {SIDE}] in [0, 1], got {list(pixels.shape)}")
    if not np.isin(labels, np.arange(CLASSES)).all():
        raise PlanError(f"{path}: labels must be whole numbers in 0…{CLASSES - 1}")
    return pixels, labels


@dataclass(frozen=True)
class Split:
    """The examples of one split, loaded when first called for.

    Args:
        data: as ``load`` takes it.
        held_out: test examples.
        part: ``train`` or ``test``.
        at_most: the first so many; 0 for all.
    """

    data: str
    held_out: int
    part: Literal["train", "test"]
    at_most: int = 0

    def __call__(self) -> dict[str, Tensor]:
        """``pixels`` and ``labels``."""
        whole = load(self.data, self.held_out)[self.part]
        return {name: values[: self.at_most or None] for name, values in whole.items()}

    def fingerprint(self) -> str:
        """Hash of the content."""
        return tensors_hash(self())


@dataclass(frozen=True)
class Build:
    """Build slot: the network by its name."""

    model: Network
    width: int

    def __call__(self, ctx: Ctx) -> Module:
        """A network with new weights."""
        return BUILDERS[self.model](self.width)


def cnn(width: int) -> Module:
    """Two 3x3 convolutions of ``width`` and twice ``width`` channels, a hidden layer of as many, 10 logits."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * width * (SIDE // 2) ** 2, 2 * width), nn.ReLU(), nn.Linear(2 * width, CLASSES),
    )  # fmt: skip


def vit(width: int) -> Module:
    """Transformers' image classifier: patches of 2x2, two layers of ``2 * width`` with four heads.

    Weights begin at a deviation of one over the root of the hidden size: at Transformers' own 0.02, which suits
    hundreds of channels, SGD does not leave chance in 300 steps.
    """
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIDE, patch_size=2, num_channels=1, hidden_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=4 * width, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_labels=CLASSES, initializer_range=(2 * width) ** -0.5,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return ViTForImageClassification(config)  # type: ignore[no-any-return]


def mlp(width: int) -> Module:
    """Two hidden layers of ``4 * width``, 10 logits."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width), nn.ReLU(),
        nn.Linear(4 * width, CLASSES),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[int], Module]] = {"cnn": cnn, "vit": vit, "mlp": mlp}
CLIP: dict[str, float | None] = {
    "cnn": None,
    "vit": 1.0,
    "mlp": None,
}  # unclipped, some seeds of the vit never leave chance


@dataclass(frozen=True)
class Digits:
    """The plan: stages ``pretrain`` and ``finetune``, both clean, with SGD at a constant rate; clean test accuracy.

    Gradients of the vit are clipped at norm 1.

    Its facts also give the test examples (``held_out``) and as many training examples (``seen``) to measures.

    Args:
        model: ``cnn`` (22k weights at width 16), ``vit`` (Transformers' class) or ``mlp`` (9k weights).
        width: channels of the first convolution; half the hidden size of the transformer; a quarter of that of the mlp.
        batch: examples in a batch.
        pretrain_steps: updates of the first stage; 21 are an epoch at the default batch.
        finetune_steps: updates of the second stage.
        lr: learning rate of the first stage.
        finetune_lr: learning rate of the second stage.
        momentum: of SGD.
        weight_decay: of SGD.
        data: ``digits``, or the path of an ``.npz`` file with ``pixels`` and ``labels``.
        held_out: test examples, the same for every seed.
    """

    model: Network = "cnn"
    width: int = 16
    batch: int = 64
    pretrain_steps: int = 420
    finetune_steps: int = 168
    lr: float = 0.1
    finetune_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    data: str = "digits"
    held_out: int = 450

    NAME: ClassVar[str] = "digits"

    def __post_init__(self) -> None:
        if self.model not in BUILDERS:
            raise PlanError(f"digits: no model {self.model!r}: {nearest(self.model, get_args(Network))}")
        check_sizes(self.NAME, self, ("width", "batch"), ("lr", "finetune_lr"))
        if self.model == "vit" and self.width % 2:
            raise PlanError(f"digits: width={self.width} must be even for the vit, which has four heads")

    def __call__(self) -> Plan:
        """The plan; data are loaded when it runs."""
        train, test = (Split(self.data, self.held_out, part) for part in ("train", "test"))
        seen = Split(self.data, self.held_out, "train", at_most=self.held_out)
        return Plan(
            name=self.NAME,
            build=Build(self.model, self.width),
            stages=(
                self._stage("pretrain", self.pretrain_steps, self.lr, train),
                self._stage("finetune", self.finetune_steps, self.finetune_lr, train),
            ),
            predict=predict_class,
            measures=(Measure("accuracy", accuracy),),
            facts=Facts(
                modality="vision", target="class", classes=CLASSES, input="pixels", input_range=(0.0, 1.0),
                more={"held_out": test, "seen": seen},
            ),
        )  # fmt: skip

    def _stage(self, name: str, steps: int, lr: float, train: Split) -> Stage:
        optim = SGD(lr, self.momentum, self.weight_decay, CLIP[self.model])
        return Stage(name=name, steps=steps, data=Epochs(train, self.batch), loss=cross_entropy, optim=optim)
