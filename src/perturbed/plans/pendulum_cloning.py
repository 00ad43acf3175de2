"""A controller of Gymnasium's pendulum cloned by a small network, which then acts in the environment itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Facts, Measure, Plan, Stage, check_sizes
from perturbed.data.arrays import Epochs
from perturbed.data.demonstrations import Demonstrations
from perturbed.measures.control import PendulumReturn
from perturbed.objectives.control import cloning_loss, predict_action
from perturbed.optim.optimisers import AdamW
from perturbed.optim.schedules import WarmupCosine


@dataclass(frozen=True)
class Network:
    """Build slot: two hidden layers of ``width`` from an observation (3 numbers) to a torque."""

    width: int

    def __call__(self, ctx: Ctx) -> Module:
        """A network with new weights."""
        return nn.Sequential(
            nn.Linear(3, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU(), nn.Linear(self.width, 1)
        )


@dataclass(frozen=True)
class PendulumCloning:
    """Behaviour cloning of ``swing_up`` on Pendulum-v1, judged by the return of the clone in the environment.

    Returns to hold it against, mean over 100 start states (whose standard error is 10 for the controller and 30 for
    chance): the controller itself -160, torques uniform in [-2, 2] -1,274, no torque -1,277. At the default sizes the
    clone comes within a few points of the controller on the same start states; at 600 steps it does not yet hold the
    top. Needs Gymnasium (``pip install 'perturbed[tasks]'``).

    Args:
        width: of the two hidden layers.
        episodes: demonstrations, of 200 steps each.
        batch: steps of demonstrations in a batch.
        steps: optimiser updates.
        lr: peak learning rate of AdamW, with warm-up and cosine decay.
        evaluations: episodes that the clone plays.
    """

    width: int = 64
    episodes: int = 40
    batch: int = 128
    steps: int = 1500
    lr: float = 3e-3
    evaluations: int = 20

    NAME: ClassVar[str] = "pendulum-cloning"

    def __post_init__(self) -> None:
        check_sizes(self.NAME, self, ("width", "episodes", "batch", "evaluations"), ("lr",))

    def __call__(self) -> Plan:
        """The plan; demonstrations are played when it runs."""
        stage = Stage(
            name="clone",
            steps=self.steps,
            data=Epochs(Demonstrations(self.episodes), self.batch),
            loss=cloning_loss,
            optim=AdamW(self.lr, weight_decay=0.0, schedule=WarmupCosine()),
        )
        return Plan(
            name=self.NAME,
            build=Network(self.width),
            stages=(stage,),
            predict=predict_action,
            measures=(Measure("return", PendulumReturn(self.evaluations)),),
            facts=Facts(modality="control", target="action", output="action", input="observations"),
        )
