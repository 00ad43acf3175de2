"""Handwritten digits drawn by a small diffusion model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Facts, Measure, Plan, Site, Stage, check_sizes
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.arrays import Epochs
from perturbed.errors import PlanError, nearest
from perturbed.inference.diffusion import DDIM
from perturbed.inference.guidance import Unlabelled
from perturbed.measures.generation import Generation, Judge
from perturbed.objectives.diffusion import NoiseLoss, NoiseSchedule, predict_noise
from perturbed.optim.optimisers import AdamW
from perturbed.optim.schedules import WarmupCosine
from perturbed.plans.digits import CLASSES, SIDE, Digits, Split

Network = Literal["unet", "dit"]


@dataclass(frozen=True)
class Build:
    """Build slot: Diffusers' UNet or DiT class, with labels 0…9 and 10 for none."""

    model: Network
    width: int

    def __call__(self, ctx: Ctx) -> Module:
        """A model with new weights."""
        return BUILDERS[self.model](self.width)


def unet(width: int) -> Module:
    """``width`` channels at 8x8 and twice as many, with self-attention, at 4x4."""
    from diffusers import UNet2DModel

    model: Module = UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, block_out_channels=(width, 2 * width), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8, num_class_embeds=CLASSES + 1,
    )  # fmt: skip
    return model


def dit(width: int) -> Module:
    """Four blocks of four heads, ``4 * width`` wide, on the 16 patches of 2x2 pixels."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    model: Module = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=width, in_channels=1, out_channels=1, num_layers=4,
        sample_size=SIDE, patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # labels are dropped by the loss, for both networks alike
    return model


BUILDERS = {"unet": unet, "dit": dit}


def _check_network(where: str, model: str) -> None:
    if model not in BUILDERS:
        raise PlanError(f"{where}: no model {model!r}: {nearest(model, get_args(Network))}")


@dataclass(frozen=True)
class OtherNetwork:
    """Train another of the plan's networks, at the same ``width``, on the same data, noise and number of steps.

    Args:
        model: as for the plan.
    """

    model: Network = "dit"

    SITES: ClassVar[tuple[Site, ...]] = ("weights",)
    REQUIRES: ClassVar = {"modality": "diffusion"}
    OFF: ClassVar = {"model": "unet"}
    STRONG: ClassVar = {"model": "dit"}

    def __post_init__(self) -> None:
        _check_network("OtherNetwork", self.model)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with this network.

        Raises:
            PlanError: the plan builds a model of another kind.
        """
        if not isinstance(plan.build, Build):
            name = DigitsDiffusion.NAME
            raise PlanError(f"OtherNetwork knows the networks of {name}, and plan {plan.name!r} builds {plan.build!r}")
        return plan.replace(build=replace(plan.build, model=self.model))


@dataclass(frozen=True)
class DigitsJudge:
    """The fact ``judge``: the classifier of the plan ``digits``, trained once with seed 0 whatever the run's seed.

    Args:
        data: as for the plan.
        held_out: test examples, which it has not seen.
        steps: updates; at 420 it is right on 97 of 100 test images.
    """

    data: str
    held_out: int
    steps: int

    def __call__(self) -> Judge:
        """Features are the inputs of the last layer."""
        return _judge(self)


@functools.cache
def _judge(of: DigitsJudge) -> Judge:
    plan = Digits(data=of.data, held_out=of.held_out, pretrain_steps=of.steps, finetune_steps=0)()
    classifier = Engine(plan, 0, Store(None)).model_at("pretrain").eval().requires_grad_(False)
    *body, last = classifier.children()
    trunk = torch.nn.Sequential(*body)

    def judge(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = trunk(pixels.cpu())
        return features, last(features).cpu()

    return judge


@dataclass(frozen=True)
class DigitsDiffusion:
    """Denoising diffusion on the digits at their own 8x8 pixels, sampled by DDIM.

    The labels are dropped for a share of the examples, so that one model samples with and without them. Samples are
    judged against the held-out images in the features of a classifier (``measures.generation``).

    Args:
        model: ``unet`` (178k weights at width 16) or ``dit`` (393k), Diffusers' classes.
        width: channels of the UNet at full resolution; size of a head of the DiT.
        batch: images in a batch.
        steps: optimiser updates.
        lr: peak learning rate of AdamW, with warm-up and cosine decay.
        label_drop: share of examples shown without label.
        data: ``digits``, or the path of an ``.npz`` file as for the plan ``digits``.
        held_out: test images.
        samples: how many are judged.
        sampling_steps: of DDIM.
        labelled: judge samples of classes that the model is told, each in turn; else it samples without labels.
        judge_steps: updates of the classifier that judges.
    """

    model: Network = "unet"
    width: int = 16
    batch: int = 64
    steps: int = 1000
    lr: float = 4e-3
    label_drop: float = 0.5
    data: str = "digits"
    held_out: int = 450
    samples: int = 1000
    sampling_steps: int = 20
    labelled: bool = False
    judge_steps: int = 420

    NAME: ClassVar[str] = "digits-diffusion"

    def __post_init__(self) -> None:
        _check_network(self.NAME, self.model)
        if self.width < 4 or self.width % 4:
            raise PlanError(f"{self.NAME}: width={self.width} must be a multiple of 4")
        check_sizes(self.NAME, self, ("batch", "samples", "sampling_steps", "judge_steps"), ("lr",))
        if not 0 <= self.label_drop <= 1:
            raise PlanError(f"{self.NAME}: label_drop={self.label_drop} must be in [0, 1]")

    def __call__(self) -> Plan:
        """The plan; data are loaded, and the judge is trained, when it runs."""
        train, test = (Split(self.data, self.held_out, part) for part in ("train", "test"))
        measure = Generation(self.samples, DDIM(self.sampling_steps))
        stage = Stage(
            name="pretrain",
            steps=self.steps,
            data=Epochs(train, self.batch),
            loss=NoiseLoss(self.label_drop),
            optim=AdamW(self.lr, betas=(0.9, 0.999), weight_decay=0.0, schedule=WarmupCosine()),
        )
        return Plan(
            name=self.NAME,
            build=Build(self.model, self.width),
            stages=(stage,),
            predict=predict_noise if self.labelled else Unlabelled(predict_noise),
            measures=(Measure("precision", measure),),
            facts=Facts(
                modality="diffusion", target="noise", output="noise", classes=CLASSES, input="pixels",
                input_range=(0.0, 1.0),
                more={
                    "held_out": test, "schedule": NoiseSchedule(),
                    "judge": DigitsJudge(self.data, self.held_out, self.judge_steps),
                },
            ),
        )  # fmt: skip
