"""A fault campaign: faults drawn by a random seed strike a training, one after the other, and after each all is well.

What has to hold is in :func:`_check`. A campaign is repeated with the same number: kinds, victims, steps and delays are
the same again; how far the training is at that moment, to the microsecond, is the machine's.
"""

import logging
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import psutil

from distmoe.training.checkpoint import load_checkpoint
from distmoe.training.integrity import DamagedCheckpointError
from distmoe.training.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.launch.faults import KINDS, Damage, Fault
from tests.launch.supervised import POLL_S, RECOVERY_S, SupervisedRun
from tests.runs import checkpoint_steps

logger = logging.getLogger(__name__)

FIRST_STEP = 8  # by then there are checkpoints
STEPS_APART = 8
LAST_STEPS = 25  # after the last fault: it must not come when the training is over
SHARE_WHILE_SAVING = 0.3
NOTICE_S = 2.0  # besides the time limit: signs of life are written and read twice a second
OURS = re.compile(rf'File "{re.escape(str(REPOSITORY))}/distmoe/|^(Exception (in|ignored)|terminate called|Fatal )')


@dataclass
class Recovery:
    """What a fault has cost.

    Attributes:
        fault: It.
        step: Steps done when it came.
        saving: Whether a checkpoint was being written.
        noticed_s: Until the first message about it, or the end of a process that it has not ended itself.
        next_step_s: Until a step was done after it.
        resumed_at: The step from which the training went on; None: it was not interrupted.
        starts: Of all processes, until then.
        damage: What it has spoilt.
    """

    fault: Fault
    step: int
    saving: bool
    noticed_s: float | None = None
    next_step_s: float = 0.0
    resumed_at: int | None = None
    starts: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def steps_again(self) -> int:
        """Steps that had to be done a second time."""
        return 0 if self.resumed_at is None else max(self.step - self.resumed_at, 0)


def num_steps(num_faults: int) -> int:
    """How long a training is that so many faults fit into."""
    return FIRST_STEP + num_faults * STEPS_APART + LAST_STEPS


def draw(number: int, num_faults: int, kinds: Sequence[str], num_hosts: int, num_ranks: int) -> list[Fault]:
    """Faults in the order of their steps; the same ones for the same arguments.

    Args:
        number: Of the campaign.
        num_faults: Of which every kind gets an equal share, give or take one.
        kinds: Of :data:`tests.launch.faults.KINDS`; one that is named twice gets two shares.
        num_hosts: On which they come.
        num_ranks: Whom they hit.
    """
    dice = random.Random(number)
    shares = [dice.sample(kinds, len(kinds)) for _ in range(-(-num_faults // len(kinds)))]
    drawn = [kind for share in shares for kind in share][:num_faults]
    steps = dice.sample(range(FIRST_STEP, FIRST_STEP + num_faults * STEPS_APART), num_faults)
    return [
        Fault(
            kind=kind,
            step=step,
            delay_ms=dice.randrange(300),
            while_saving=dice.random() < SHARE_WHILE_SAVING,
            rank=dice.randrange(num_ranks),
            host=dice.randrange(num_hosts),
            lasts_s=round(dice.uniform(*KINDS[kind].lasts_s), 2),
            place=dice.random(),
        )
        for kind, step in zip(drawn, sorted(steps), strict=True)
    ]


def run_campaign(run: SupervisedRun, faults: Sequence[Fault]) -> Iterator[Recovery]:
    """Trains to the end, through all faults; gives what each has cost.

    Raises:
        AssertionError: Something that must hold did not; the message says what, and holds the end of the log.
    """
    run.start()
    for number, fault in enumerate(faults, start=1):
        logger.info("%d of %d: %s", number, len(faults), fault)
        recovery = _strike(run, fault)
        logger.info(
            "at step %d%s: noticed %s, next step %.1f s, resumed at %s, starts %d, %s",
            recovery.step,
            " while saving" if recovery.saving else "",
            "never" if recovery.noticed_s is None else f"{recovery.noticed_s:.1f} s",
            recovery.next_step_s,
            recovery.resumed_at,
            recovery.starts,
            recovery.damage,
        )
        yield recovery
    run.wait_until(lambda: run.finished, "end of the training")
    assert run.processes() == [], run.tail()
    _check_said(run)


def _strike(run: SupervisedRun, fault: Fault) -> Recovery:
    """Lets a fault happen and waits until the training has gone on, or does not."""
    kind = KINDS[fault.kind]
    ready = f"step {fault.step} by {run.num_ranks} ranks"
    run.wait_until(lambda: run.step >= fault.step and len(run.ranks()) == run.num_ranks, ready)
    time.sleep(fault.delay_ms / 1000)
    if fault.while_saving:
        run.wait_until(lambda: _is_saving(run), "checkpoint", pause_s=0.001)
    run.poll()
    run.lines.clear()
    run.victims.clear()
    watched = list(run.ranks().values())
    checkpoints, starts = checkpoint_steps(run.folder), run.starts
    recovery = Recovery(fault, run.step, _is_saving(run))
    struck = time.monotonic()
    script = kind.strike(run, fault, recovery.damage)
    over, looked_at = False, False
    while True:
        over = over or next(script, recovery) is recovery
        run.poll()
        passed_s = time.monotonic() - struck
        alive = [process for process in watched if _is_alive(process)]
        if recovery.noticed_s is None and (run.messages or _ended(run, watched, alive)):
            recovery.noticed_s = passed_s
        if not alive and not looked_at:  # nobody writes: what is there now is what they have left behind
            _check_checkpoints(run, checkpoints, recovery.damage)
            looked_at = True
        if over and _has_gone_on(run, recovery, kind.loses == "unnoticed"):
            break
        said_in_time = recovery.noticed_s is not None or passed_s < run.timeout_s + NOTICE_S
        assert said_in_time or kind.loses == "unnoticed", f"nobody notices {fault}\n{run.tail()}"
        assert passed_s < RECOVERY_S + fault.lasts_s, f"no step after {fault}\n{run.tail()}"
        time.sleep(POLL_S)
    recovery.next_step_s, recovery.starts = passed_s, run.starts - starts
    recovery.resumed_at = run.started_at if recovery.starts else None
    _check(run, recovery, checkpoints)
    return recovery


def _is_saving(run: SupervisedRun) -> bool:
    return any(run.folder.checkpoints().root.glob(".writing-*"))


def _has_gone_on(run: SupervisedRun, recovery: Recovery, unnoticed: bool) -> bool:
    if unnoticed:
        return run.step > recovery.step + 1  # the next one may have been under way
    return run.starts > run.harmed_after and run.step > run.started_at


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ended(run: SupervisedRun, watched: Sequence[psutil.Process], alive: Sequence[psutil.Process]) -> bool:
    """Whether a rank has ended that the fault has not ended."""
    return any(process not in alive and process.pid not in run.victims for process in watched)


def _check(run: SupervisedRun, recovery: Recovery, checkpoints: Sequence[int]) -> None:
    """What has to hold when the training has gone on after a fault, besides that it did so in time."""
    kind = KINDS[recovery.fault.kind]
    about = f"{recovery}\n{run.tail()}"
    _check_said(run)
    assert run.orphans() == [], about
    assert _broken_checkpoints(run.folder, recovery.damage) == [], about
    if kind.loses == "unnoticed":
        assert (run.messages, recovery.resumed_at) == ([], None), about
        return
    assert recovery.resumed_at is not None, about
    if kind.loses == "nothing":
        assert recovery.resumed_at >= recovery.step, about
    elif kind.loses == "damaged" and recovery.damage:
        (damage,) = recovery.damage
        assert recovery.resumed_at == max([step for step in checkpoints if step < damage.step], default=0), about
        aside = run.folder.checkpoints().root / f"damaged-step-{damage.step}"
        assert aside.is_dir(), about
        named = [line for line in run.lines if f"step-{damage.step}: " in line and damage.file in line]
        assert len(named) == 1, about
        assert " WARNING " in named[0], about
    else:
        assert recovery.resumed_at >= max(checkpoints, default=0), about


def _check_said(run: SupervisedRun) -> None:
    """No traceback from the training's own code, and no other sign of a defect."""
    assert [line for line in run.lines if OURS.search(line)] == [], run.tail()


def _check_checkpoints(run: SupervisedRun, before: Sequence[int], damage: Sequence[Damage]) -> None:
    """The newest one from before the fault is there, and all are whole but the one that was damaged."""
    about = f"{before} before, {checkpoint_steps(run.folder)} now, {damage}\n{run.tail()}"
    assert set(before[-1:]) <= set(checkpoint_steps(run.folder)), about
    broken = _broken_checkpoints(run.folder, damage)
    assert broken == [], f"{broken}: {about}"


def _broken_checkpoints(folder: RunFolder, damage: Sequence[Damage]) -> list[str]:
    """What is not whole although it has a checkpoint's name, besides what was damaged."""
    checkpoints, broken = folder.checkpoints(), []
    for step in set(checkpoints.steps()) - {one.step for one in damage}:
        try:
            load_checkpoint(checkpoints.path(step))
        except DamagedCheckpointError as error:
            if checkpoints.path(step).exists():  # otherwise a training that goes on has just removed it
                broken.append(str(error))
    return broken


def table(recoveries: Sequence[Recovery]) -> str:
    """A line a kind, and the totals."""
    lines = [
        f"{'':34} faults  noticed s: median max  next step s: median max  steps again: max",
        *(_row(kind, [one for one in recoveries if one.fault.kind == kind]) for kind in KINDS),
        _row("all", recoveries),
        f"{sum(one.saving for one in recoveries)} came while a checkpoint was being written; "
        f"{sum(one.starts for one in recoveries)} starts",
    ]
    return "\n".join(line for line in lines if line)


def _row(name: str, recoveries: Sequence[Recovery]) -> str:
    if not recoveries:
        return ""
    noticed = [one.noticed_s for one in recoveries if one.noticed_s is not None]
    next_step = [one.next_step_s for one in recoveries]
    noticed_text = f"{statistics.median(noticed):18.1f} {max(noticed):4.1f}" if noticed else f"{'never':>23}"
    again = max(one.steps_again for one in recoveries)
    return (
        f"{name:34} {len(recoveries):6d} {noticed_text} {statistics.median(next_step):20.1f} {max(next_step):4.1f} "
        f"{again:16d}"
    )
