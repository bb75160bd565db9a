import math

import pytest
import torch
from torch.optim import SGD

from tx_lightning.schedules import InverseSquareRoot, inverse_square_root


def optimizer(*rates: float) -> SGD:
    return SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


def learning_rates(schedule: InverseSquareRoot, sgd: SGD, n: int) -> list[list[float]]:
    rates = []
    for _ in range(n):
        rates.append([group["lr"] for group in sgd.param_groups])
        sgd.step()
        schedule.step()
    return rates


def test_closed_form_points() -> None:
    assert inverse_square_root(1, 100) == 1.0
    assert inverse_square_root(100, 100) == 1.0
    assert inverse_square_root(400, 100) == 0.5
    assert inverse_square_root(10_000, 100) == 0.1


def test_every_group_follows_its_own_peak() -> None:
    sgd = optimizer(1.0, 0.25)
    rates = learning_rates(InverseSquareRoot(sgd, reference_step=4), sgd, 40)
    expected = [[peak * math.sqrt(4 / max(t, 4)) for peak in (1.0, 0.25)] for t in range(1, 41)]
    assert rates == expected


def test_is_a_pure_function_of_the_step() -> None:
    sgd = optimizer(1.0)
    schedule = InverseSquareRoot(sgd, reference_step=3)
    learning_rates(schedule, sgd, 10)
    sgd.param_groups[0]["lr"] = 123.0  # what someone else wrote there is not read back
    sgd.step()
    schedule.step()
    assert sgd.param_groups[0]["lr"] == math.sqrt(3 / 12)


def test_state_round_trip_continues() -> None:
    sgd = optimizer(1.0)
    schedule = InverseSquareRoot(sgd, reference_step=3)
    learning_rates(schedule, sgd, 7)
    resumed_sgd = optimizer(1.0)
    resumed = InverseSquareRoot(resumed_sgd, reference_step=3)
    resumed.load_state_dict(schedule.state_dict())
    resumed_sgd.load_state_dict(sgd.state_dict())
    assert learning_rates(resumed, resumed_sgd, 5) == learning_rates(schedule, sgd, 5)


def test_a_reference_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reference_step=0 .* at least 1"):
        InverseSquareRoot(optimizer(1.0), reference_step=0)
