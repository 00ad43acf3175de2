"""The pendulum's controller and environment: against the equations of motion, and without side effects."""

import random
import sys

import numpy as np
import pytest
import torch

from perturbed.data.demonstrations import Demonstrations, demonstrate, environment, play, swing_up
from perturbed.errors import PerturbedError


def states(number=400):
    g = torch.Generator().manual_seed(5)
    angle = (2 * torch.rand(number, generator=g) - 1) * torch.pi
    speed = (2 * torch.rand(number, generator=g) - 1) * 8
    return angle, speed


def observed(angle, speed):
    return torch.stack([angle.cos(), angle.sin(), speed], -1)


def energy(angle, speed, inertia=3):
    return speed.square() / (2 * inertia) + 5 * angle.cos()


def moved(angle, speed, torque, dt):
    """A small step of Gymnasium's equation: 3 g / (2 l) sin t + 3 u / (m l^2), with g = 10 and m = l = 1."""
    return angle + dt * speed, speed + dt * (15 * angle.sin() + 3 * torque)


def power(inertia):
    """Largest difference between the numerical dE/dt and torque times speed."""
    angle, speed = (x.double() for x in states())
    torque = torch.linspace(-2, 2, len(angle), dtype=torch.float64)
    rate = (energy(*moved(angle, speed, torque, 1e-6), inertia) - energy(angle, speed, inertia)) / 1e-6
    return float((rate - torque * speed).abs().max())


def test_only_the_torque_changes_the_energy_that_the_controller_shapes():
    assert power(3) < 1e-3
    assert power(1) > 1, "the moment of inertia of a point mass is the wrong one here"


def test_the_controller_pumps_energy_below_the_top_and_never_leaves_the_legal_range():
    angle, speed = states()
    torque = swing_up(observed(angle, speed)).squeeze(-1)
    assert torque.abs().max() <= 2
    below = angle.cos() <= 0.8
    lacking = below & (energy(angle, speed) < 5)
    assert lacking.sum() > 50
    assert (torque * speed)[lacking].min() >= 0
    assert (torque * speed)[below & (energy(angle, speed) > 5)].max() <= 0


def test_the_controller_at_points_worked_out_by_hand():
    angle = torch.tensor([0.0, torch.pi, 0.05, -0.05, 0.02])
    speed = torch.tensor([0.0, 0.0, 0.0, 0.0, -0.4])
    expected = torch.tensor([0.0, 2.0, -0.5, 0.5, 0.6])
    torch.testing.assert_close(swing_up(observed(angle, speed)).squeeze(-1), expected)


def test_the_controller_stands_upright_at_the_end_from_almost_anywhere():
    seen = play(swing_up, range(500, 540))["observations"]
    assert (seen[-20:, :, 0] > 0.99).all(0).float().mean() >= 0.9


def test_rewards_are_those_of_the_equation_with_the_torque_clipped():
    def wild(o):
        return 3 * o[:, 2:]

    played = play(wild, [3, 4])
    cos, sin, speed = played["observations"].double().unbind(-1)
    used = played["actions"].double().squeeze(-1).clamp(-2, 2)
    expected = -(torch.atan2(sin, cos).square() + 0.1 * speed.square() + 0.001 * used.square())
    assert played["actions"].abs().max() > 2
    assert played["rewards"].shape == (200, 2)
    torch.testing.assert_close(played["rewards"], expected, atol=1e-4, rtol=1e-4)


def test_episodes_begin_where_the_environment_says_and_do_not_touch_each_other():
    both, alone = play(swing_up, [8, 9]), play(swing_up, [9])
    np.testing.assert_array_equal(both["observations"][0, 1].numpy(), environment().reset(seed=9)[0])
    for name in both:
        assert torch.equal(both[name][:, 1:], alone[name])


def test_no_global_generator_moves():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    demonstrate.__wrapped__(2)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_demonstrations_come_out_the_same_and_their_hash_tells_them_apart():
    again = demonstrate.__wrapped__(2)
    assert all(torch.equal(again[name], values) for name, values in Demonstrations(2)().items())
    assert {name: tuple(v.shape) for name, v in again.items()} == {"observations": (400, 3), "actions": (400, 1)}
    assert torch.equal(again["actions"], swing_up(again["observations"]))
    assert Demonstrations(2)() is Demonstrations(2)()
    assert Demonstrations(2).fingerprint() == Demonstrations(2).fingerprint() != Demonstrations(3).fingerprint()


def test_without_gymnasium_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(PerturbedError, match=r"pip install 'perturbed\[tasks\]'"):
        environment()
