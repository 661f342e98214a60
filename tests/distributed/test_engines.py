"""What engines do besides: half precision, loss scaling and its skipped steps, experts that keep their weights."""

from typing import Any

import pytest
import torch

from distmoe.parallel.engines import deepspeed
from distmoe.parallel.engines.loss_scale import LossScale
from tests.distributed.layout_cases import Case, Layout
from tests.distributed.layout_training import Tensors, Training, training
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(optimizer="adamw", samples="uneven")
ALONE = (Layout(), *(Layout(1, 1, engine) for engine in ("zero 0", "zero 1", "zero 2")))
SPREAD = tuple(Layout(2, 2, engine) for engine in ("zero 0", "zero 1", "zero 2"))
NUM_STEPS, NUM_FROZEN = 5, 3  # of four experts; on the second of two ranks, one is free


def losses_of(run: Training) -> list[float]:
    return [run.step(number).loss for number in range(NUM_STEPS)]


def _check_half_precision() -> dict[Layout, Any]:
    found = {}
    for layout in ALONE:
        with training(CASE, layout) as run:
            full = losses_of(run)
        with training(CASE, layout, train={"precision": "bf16", "clip_norm": 0.05}) as run:
            half = losses_of(run)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                batch = run.steps[0][0].batch
                output = run.module(batch.images, run.context(0, batch))
            (routing,) = output.routings.values()
            kinds = {str(parameter.dtype) for parameter in run.module.parameters()}
            found[layout] = (full, half, str(output.logits.dtype), str(routing.logits_TE.dtype), kinds)
    return found


@pytest.fixture(scope="module")
def half():
    (found,) = run_ranks(_check_half_precision, 1)
    return found


@pytest.mark.parametrize("layout", ALONE, ids=str)
def test_bf16_trains_like_fp32_with_the_gate_and_all_weights_in_float32(layout, half):
    full, halved, logits, gate_logits, weights = half[layout]
    assert halved == pytest.approx(full, rel=2**-7)  # bf16 has 8 bits
    assert max(abs(ours - theirs) for ours, theirs in zip(halved, full, strict=True)) > 1e-5  # it was switched on
    assert halved == pytest.approx(half[ALONE[0]][1], rel=1e-6)
    assert (logits, gate_logits, weights) == ("torch.bfloat16", "torch.float32", {"torch.float32"})


def _check_scaling_and_freezing() -> dict[Layout, dict[str, Any]]:
    found: dict[Layout, dict[str, Any]] = {}
    for layout in SPREAD:
        with training(CASE, layout) as run:
            losses_of(run)
            expected = run.weights()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(deepspeed, "LossScale", lambda enabled: LossScale(enabled=not enabled))
            with training(CASE, layout) as run:
                losses_of(run)
                scaled = run.weights()
                run.engine.load_scaler_state({"scale": 2.0**130, "_growth_tracker": 7})  # more than float32 holds
                norm = run.step(NUM_STEPS).norm
                skipped, state = run.weights(), run.engine.scaler_state()
                run.engine.load_scaler_state({"scale": 1024.0, "_growth_tracker": 0})
                after = run.step(NUM_STEPS + 1).norm
        found[layout] = {
            "apart": apart(scaled, expected),
            "skipped": (norm, apart(skipped, scaled), state["scale"], state["_growth_tracker"]),
            "after": (after, apart(run.weights(), skipped)),
            "frozen": frozen(layout),
        }
    return found


def apart(one: Tensors, other: Tensors) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def frozen(layout: Layout) -> dict[str, tuple[bool, bool]]:
    """By stack of experts: whether the frozen ones are as before, and whether the others have moved."""
    with training(CASE, layout) as run:
        run.freeze(NUM_FROZEN)
        stacks = {name: extent.tensor for name, extent in run.extents.items() if extent.of_expert}
        before = {name: stack.detach().clone() for name, stack in stacks.items()}
        losses_of(run)
        num_local = min(max(NUM_FROZEN - 2 * run.mesh.expert_rank, 0), 2)
        return {
            name: (
                torch.equal(stack[:num_local], before[name][:num_local]),
                bool((stack != before[name])[num_local:].any()),
            )
            for name, stack in stacks.items()
        }


@pytest.fixture(scope="module")
def spread():
    return run_ranks(_check_scaling_and_freezing, 2)


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_a_loss_scale_changes_nothing_in_the_result(layout, spread):
    assert max(found[layout]["apart"] for found in spread) <= 1e-7


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_an_overflow_skips_the_step_and_halves_the_scale(layout, spread):
    for found in spread:
        norm, moved, scale, tracker = found[layout]["skipped"]
        assert not torch.tensor(norm).isfinite()
        assert (moved, scale, tracker) == (0.0, 2.0**129, 0)
        norm, moved = found[layout]["after"]
        assert 0.0 < norm < torch.inf
        assert 0.0 < moved < torch.inf


@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_frozen_experts_stay_bit_for_bit(layout, spread):
    first, second = (found[layout]["frozen"] for found in spread)
    assert first == dict.fromkeys(first, (True, False))  # all of them are frozen: there are no others
    assert second == dict.fromkeys(second, (True, True))
