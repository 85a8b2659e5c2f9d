"""Learning rates against the formulas, and against torch's schedulers."""

import pytest
import torch

from mint.recipes.schedule import learning_rate_at


def rates(num_steps, schedule, warmup=0, peak=2.0):
    return [learning_rate_at(step, num_steps, peak, schedule, warmup) for step in range(num_steps)]


def torch_rates(num_steps, make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, found = make(optimizer), []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_is_constant():
    assert rates(5, "constant") == [2.0] * 5


def test_linear_and_cosine_are_torch_s():
    linear = torch_rates(10, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 10))
    cosine = torch_rates(10, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10))
    assert rates(10, "linear") == pytest.approx(linear)
    assert rates(10, "cosine") == pytest.approx(cosine)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_the_peak_and_the_schedule_follows_from_there(schedule):
    found = rates(10, schedule, warmup=4)
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert found[4:] == pytest.approx(rates(6, schedule))


def test_all_steps_may_be_warm_up():
    assert rates(2, "cosine", warmup=2) == [1.0, 2.0]
