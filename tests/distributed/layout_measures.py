"""A training in any layout, and what is measured of it against the same training in one process.

(a) From the states of a one-process training, one step each: loss and gradients. Gradients are read off what the step
does to the weights, with plain SGD, so that clipping and whatever an engine does to gradients are in them.
(b) In float64, the gradient rule written out in a loop: all weights after a free-running training.
(c) In float32: the losses of a free-running training, and when a token first goes to another expert.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distmoe.parallel.shards import Extent
from distmoe.training.step import MicroBatch
from tests.distributed.layout_cases import REFERENCE, Case, Layout
from tests.distributed.layout_training import CHOICES_OF_A_SAMPLE, NUM_STEPS, Step, Tensors, Training, training

LOOP = Layout(engine="loop")
LIMIT = 1e-5  # of a gradient's error
# So large that a step forgets the weights it started from: what is left is the gradient, to the last bit but one.
PROBE = {"name": "sgd", "lr": 2.0**30, "momentum": 0.0}


@dataclass(frozen=True)
class Reference:
    """A case in one process.

    Attributes:
        states: Weights and buffers before each step of a training with the case's own optimizer.
        free: The steps of that training.
        single: The step from each state that measure (a) takes, and its gradients.
        rounding: Of each of these gradients, by how much float32 makes it differ from the one in float64.
        final: Weights of the float64 training.
    """

    states: list[dict[str, Tensors]]
    free: list[Step]
    single: list[tuple[Step, Tensors]]
    rounding: list[dict[str, float]]
    final: Tensors = field(default_factory=dict)


def references(cases: Sequence[Case], wide_cases: Sequence[Case], file: Path) -> None:
    """Trains all cases in one process, those of ``wide_cases`` in float64 too, and writes what came out."""
    found = {}
    for case in cases:
        with named(case, REFERENCE):
            found[case] = reference_of(case, case in wide_cases)
    torch.save(found, file)


def reference_of(case: Case, wide: bool) -> Reference:
    """See :func:`references`."""
    states, steps = [], []
    with training(case, REFERENCE) as free:
        for number in range(NUM_STEPS):
            states.append(free.state())
            steps.append(free.step(number))
        if case.lopsided:
            check_lopsided(case, free.model.loads[: 3 * case.accumulation])
    with training(case, REFERENCE, optim=PROBE) as probe:
        single = [probed(probe, state, number) for number, state in enumerate(states)]
    with training(case, LOOP, optim=PROBE) as probe:
        exact = [probed(probe, state, number)[1] for number, state in enumerate(states)]
    rounding = [
        {name: float((gradient - one[name]).abs().max()) for name, gradient in gradients.items()}
        for (_, gradients), one in zip(single, exact, strict=True)
    ]
    final = wide_weights(case, LOOP)[1] if wide else {}
    return Reference(states, steps, single, rounding, final)


def check_lopsided(case: Case, loads: list[Tensor]) -> None:
    """That the first steps are what the case says; then the balance loss has its way."""
    for load in loads:
        rows = int(load.sum()) // case.k
        assert (int(load[0]), int(load[-1])) == (rows, 0), f"{case}: {load.tolist()} of {rows} tokens"


def probed(probe: Training, state: dict[str, Tensors], number: int) -> tuple[Step, Tensors]:
    """One step from a state, and the local gradients. Collective."""
    probe.load(state, number)
    before = probe.weights()
    step = probe.step(number)
    after = probe.weights()
    return step, {name: (before[name].double() - after[name].double()) / PROBE["lr"] for name in before}


def wide_weights(case: Case, layout: Layout) -> tuple[dict[str, Extent], Tensors]:
    """The local weights after a training in float64, and what they are of. Collective."""
    with training(case, layout) as wide:
        for number in range(NUM_STEPS):
            wide.step(number)
        return wide.extents, wide.weights()


@dataclass(frozen=True)
class Single:
    """Measure (a): the largest errors over all states, on this rank.

    Attributes:
        loss: Relative; of auxiliary losses too.
        norm: Relative.
        gradient: Of any parameter: largest difference over max(its largest entry, 1e-2 x global norm). Where rounding
            alone makes one of more than a quarter of the limit in one process, the limit is four times that.
        worst: The parameter and the state of ``gradient``.
    """

    loss: float = 0.0
    norm: float = 0.0
    gradient: float = 0.0
    worst: str = ""


@dataclass(frozen=True)
class Free:
    """Measure (c), on this rank.

    Attributes:
        losses: Relative error of each step's loss.
        first_change: The step at which a token goes to another expert than in the reference; NUM_STEPS: never.
    """

    losses: list[float]
    first_change: int

    @property
    def until_change(self) -> float:
        """The largest error before the first change; the loss of that step has seen it."""
        return max(self.losses[: self.first_change], default=0.0)


@dataclass(frozen=True)
class Wide:
    """Measure (b), on this rank: the largest difference of a weight, and its name."""

    weight: float
    worst: str


def measure_single(case: Case, layout: Layout, reference: Reference, every: int = 1) -> Single:
    """Measure (a) on this rank, of every so-manieth state. Collective."""
    worst = Single()
    with training(case, layout, optim=PROBE) as probe:
        for number, state in list(enumerate(reference.states))[::every]:
            expected, gradients = reference.single[number]
            step, own = probed(probe, state, number)
            loss = max(losses_apart(step, expected))
            norm = relative(step.norm, expected.norm)
            gradient, name = gradients_apart(own, gradients, reference.rounding[number], probe.extents)
            if gradient > worst.gradient or math.isnan(gradient):
                worst = Single(worst.loss, worst.norm, gradient, f"{name} at state {number}")
            worst = Single(max(worst.loss, loss), max(worst.norm, norm), worst.gradient, worst.worst)
    return worst


def losses_apart(step: Step, expected: Step) -> list[float]:
    """Relative errors of the loss, and of auxiliary losses beside it: they may be differences of large numbers."""
    assert step.auxiliary.keys() == expected.auxiliary.keys()
    auxiliary = [
        relative(step.auxiliary[name], value, beside=expected.loss) for name, value in expected.auxiliary.items()
    ]
    return [relative(step.loss, expected.loss), *auxiliary]


def gradients_apart(
    own: Tensors, expected: Tensors, rounding: dict[str, float], extents: dict[str, Extent]
) -> tuple[float, str]:
    """The largest error of a parameter's gradient, see :class:`Single`, and its name."""
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    worst = (0.0, "")
    for name, gradient in own.items():
        extent = extents[name]
        scale = max(float(expected[name].abs().max()), 1e-2 * norm, 4.0 * rounding[name] / LIMIT)
        apart = gradient - expected[name][extent.start : extent.stop]
        error = float(apart.abs().max()) / scale
        worst = max(worst, (math.inf if math.isnan(error) else error, name))
    return worst


def measure_free(case: Case, layout: Layout, reference: Reference) -> Free:
    """Measure (c) on this rank. Collective."""
    losses, first_change = [], NUM_STEPS
    with training(case, layout) as free:
        for number, expected in enumerate(reference.free):
            step = free.step(number)
            losses.append(relative(step.loss, expected.loss))
            if first_change == NUM_STEPS and not same_choices(step, expected, free.steps[number]):
                first_change = number
    return Free(losses, first_change)


def same_choices(step: Step, expected: Step, micros: list[MicroBatch]) -> bool:
    """Whether this rank's tokens went where they go in one process."""
    per_micro = len(expected.choices) // len(micros)
    for index, (own, everyone) in enumerate(zip(step.choices, expected.choices, strict=True)):
        mine = torch.isin(everyone // CHOICES_OF_A_SAMPLE, micros[index // per_micro].batch.sample_ids)
        if not torch.equal(own, everyone[mine]):
            return False
    return True


def relative(value: float, expected: float, beside: float = 0.0) -> float:
    """Relative error, to something larger that it is beside if need be; infinite where it is not a number."""
    error = abs(value - expected) / max(abs(expected), abs(beside), 1e-30)
    return math.inf if math.isnan(error) else error


def measure(
    rows: Sequence[tuple[Case, Layout]], wide_rows: Sequence[tuple[Case, Layout]], file: Path, every: int
) -> tuple[list[tuple[Single, Free]], list[Wide]]:
    """Measures (a) and (c) of all rows and (b) of all wide rows, on this rank. Collective."""
    expected: dict[Case, Reference] = torch.load(file, weights_only=False)
    found, wide = [], []
    for case, layout in rows:
        with named(case, layout):
            reference = expected[case]
            found.append((measure_single(case, layout, reference, every), measure_free(case, layout, reference)))
    for case, layout in wide_rows:
        with named(case, layout):
            wide.append(weights_apart(*wide_weights(case, layout), expected[case].final))
    return found, wide


def weights_apart(extents: dict[str, Extent], own: Tensors, expected: Tensors) -> Wide:
    """The largest difference of a weight."""
    worst = (0.0, "")
    for name, weights in own.items():
        extent = extents[name]
        apart = float((weights - expected[name][extent.start : extent.stop]).abs().max())
        worst = max(worst, (math.inf if math.isnan(apart) else apart, name))
    return Wide(*worst)


def over_ranks(singles: Sequence[Single], frees: Sequence[Free]) -> tuple[Single, Free]:
    """The worst of all ranks."""
    worst = max(singles, key=lambda single: single.gradient)
    single = Single(
        max(single.loss for single in singles), max(single.norm for single in singles), worst.gradient, worst.worst
    )
    losses = [max(step) for step in zip(*(free.losses for free in frees), strict=True)]
    return single, Free(losses, min(free.first_change for free in frees))


def failures(single: Single, free: Free) -> list[str]:
    """Which promises are not kept."""
    kept = {
        f"(a) loss {single.loss:.1e} above 1e-6": single.loss <= 1e-6,
        f"(a) norm {single.norm:.1e} above 1e-5": single.norm <= 1e-5,
        f"(a) gradient {single.gradient:.1e} above 1e-5: {single.worst}": single.gradient <= LIMIT,
        f"(c) loss {max(free.losses[:3]):.1e} above 1e-6 in the first 3 steps": max(free.losses[:3]) <= 1e-6,
        f"(c) loss {free.until_change:.1e} above 1e-4 before a token changes its expert at step {free.first_change}": (
            free.until_change <= 1e-4
        ),
        f"(c) loss {free.losses[-1]:.1e} above 2e-2 at step {NUM_STEPS}": free.losses[-1] <= 2e-2,
    }
    return [what for what, is_kept in kept.items() if not is_kept]


@contextmanager
def named(case: Case, layout: Layout) -> Iterator[None]:
    """An error inside says where it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {layout}: {case}")
        raise
