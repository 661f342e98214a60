"""Our loss scale follows the rule of torch's, whose state it also reads and writes."""

import pytest
import torch
from torch import nn

from distmoe.parallel.engines import loss_scale
from distmoe.parallel.engines.loss_scale import LossScale

INTERVAL = 3


def test_the_scale_is_that_of_grad_scaler_step_by_step(monkeypatch):
    monkeypatch.setattr(loss_scale, "_INTERVAL", INTERVAL)
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", growth_interval=INTERVAL)
    ours = LossScale(enabled=True)
    for finite in (True, True, True, True, False, True, True, False, False, True, True, True, True):
        theirs.scale(weight * (1.0 if finite else torch.inf)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(finite)
        assert ours.state() == theirs.state_dict()
    assert ours.value == 65536.0 * 2.0 / 2.0 / 4.0 * 2.0  # grown, halved, halved twice, grown


def test_it_goes_on_from_the_state_of_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "_INTERVAL", INTERVAL)
    ours = LossScale(enabled=True)
    ours.load({"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 2})
    ours.update(finite=True)
    assert ours.value == 16.0


@pytest.mark.parametrize("finite", [True, False])
def test_where_it_is_off_the_scale_stays_one(finite):
    scale = LossScale(enabled=False)
    scale.load({"scale": 8.0, "_growth_tracker": 2})
    scale.update(finite)
    assert (scale.value, scale.state()) == (1.0, {})
