import math

import pytest
import torch

from distmoe.config import ScheduleSection
from distmoe.training.schedule import build_schedule, learning_rate_factor


def factors(total: int, **settings) -> list[float]:
    return [learning_rate_factor(ScheduleSection(**settings), step, total) for step in range(total)]


def test_constant_after_a_linear_warm_up():
    # 0.4 of 10 steps warm up: 1/4, 2/4, 3/4, 4/4.
    assert factors(10, name="constant", warmup_share=0.4) == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert factors(3) == [1.0, 1.0, 1.0]


def test_linear_decay():
    # 8 steps of decay after 2 of warm-up, from 1 towards 0.2: each step takes 0.1.
    expected = [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert factors(10, name="linear", warmup_share=0.2, final_share=0.2) == pytest.approx(expected)


def test_cosine_decay():
    # Angles 0, 45, 90 and 135 degrees: (1 + cos) / 2, then from 1 towards 0.1.
    remaining = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert factors(4, name="cosine", final_share=0.1) == pytest.approx([0.1 + 0.9 * one for one in remaining])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_step_after_the_last_has_the_final_share_and_later_ones_too(name):
    section = ScheduleSection(name=name, final_share=0.1)
    assert [learning_rate_factor(section, step, 5) for step in (5, 6, 100)] == pytest.approx([0.1] * 3)


def test_a_warm_up_over_the_whole_run():
    assert factors(4, name="linear", warmup_share=1.0) == [0.25, 0.5, 0.75, 1.0]


def optimizer() -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)]},
        {"params": [torch.zeros(1, requires_grad=True)], "lr": 0.5},
    ]
    return torch.optim.SGD(groups, lr=0.3)


def rates(optimizer, schedule, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


SECTION = ScheduleSection(name="cosine", warmup_share=0.3, final_share=0.01)


def test_torchs_scheduler_follows_the_factor_in_every_group():
    straight = optimizer()
    expected = [learning_rate_factor(SECTION, step, 10) for step in range(10)]
    seen = rates(straight, build_schedule(SECTION, straight, 10), 10)
    assert seen == [[pytest.approx(0.3 * factor), pytest.approx(0.5 * factor)] for factor in expected]


@pytest.mark.parametrize("done", range(10))
def test_the_position_after_a_restore_is_exact(done):
    straight = optimizer()
    expected = rates(straight, build_schedule(SECTION, straight, 10), 10)
    # As a resume does it: a schedule at step 0 comes first, on the same optimizer.
    resumed = optimizer()
    build_schedule(SECTION, resumed, 10)
    assert rates(resumed, build_schedule(SECTION, resumed, 10, done), 10 - done) == expected[done:]
