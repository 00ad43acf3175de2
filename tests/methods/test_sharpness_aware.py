"""The study compares equal gradient passes, and every arm trains on the same few examples."""

from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.methods.sharpness_aware import STUDY


def test_primary_and_reference_spend_the_same_gradient_passes():
    spent = {arm: Engine(plan, 0, Store(None)).run().cost for arm, plan in STUDY.at("smoke").plans().items()}
    assert spent["aware"].grad_passes == spent["longer"].grad_passes == 2 * spent["control"].grad_passes
    assert spent["longer"].examples == 2 * spent["aware"].examples
    assert spent["sham"].grad_passes == spent["control"].grad_passes
