"""How long a training step waits for its data, with each loader, interleaved in one run."""

import time
from contextlib import ExitStack

from distmoe.bench.estimate import Estimate, estimate
from distmoe.config import RunConfig
from distmoe.data.loaders import open_data
from distmoe.parallel.runtime import open_runtime
from distmoe.training.feed import Feed
from distmoe.training.session import Session, open_session
from distmoe.training.step import train_step

STEPS = 8  # of one measurement


def bench_data_wait(config: RunConfig, rounds: int) -> str:
    """Trains ``config`` for a few steps a round with each loader in turn, and compares waiting with step time.

    A step waits until a ready, augmented batch is on its device; the share of it that is augmentation is given too.

    Args:
        config: The run; its folder is not touched.
        rounds: Measurements of each loader.

    Returns:
        The table as text.

    Raises:
        UserError: The run cannot be opened.
    """
    with open_runtime(config) as runtime, open_session(config, runtime) as session, ExitStack() as stack:
        feeds = {}
        for name in ("ffcv", "resident"):
            data = open_data(config.data.model_copy(update={"loader": name}))
            stack.callback(data.close)
            feeds[name] = Feed(data.loaders["train"], session.augmenter, runtime.device)
        shares: dict[str, list[tuple[float, float, float]]] = {name: [] for name in feeds}
        for number in range(rounds + 1):
            for name in sorted(feeds, reverse=bool(number % 2)):
                measured = _measure(session, feeds[name], number)
                if number:  # the first round warms up
                    shares[name].append(measured)
    rows = [f"{'training step fed by':<22}{'data wait of a step':<32}{'of which augmentation':<32}images/s"]
    for name, values in shares.items():
        wait, augment, speed = (estimate(column) for column in zip(*values, strict=True))
        rows.append(f"{name:<22}{_percent(wait):<32}{_percent(augment):<32}{speed.median:,.0f}")
    return "\n".join(rows)


def _measure(session: Session, feed: Feed, epoch: int) -> tuple[float, float, float]:
    """Shares of waiting and augmenting, and images/s, over a few steps inside an epoch."""
    planned = session.plan.epoch(epoch)[: (STEPS + 1) * session.config.train.accumulation]
    samples, started = 0, 0.0
    with feed.training_steps(planned, epoch) as steps:
        for step, micro_batches in enumerate(steps):
            result = train_step(session.engine, session.model, session.mixtures, session.config, step, micro_batches)
            session.runtime.synchronize()
            if step == 0:  # opens the epoch, which is paid once an epoch and not once in so few steps
                feed.wait_s = feed.augment_s = 0.0
                started = time.perf_counter()
            else:
                samples += result.step_samples
    elapsed = time.perf_counter() - started
    return feed.wait_s / elapsed, feed.augment_s / elapsed, samples / elapsed


def _percent(value: Estimate) -> str:
    return f"{value.median:.2%} ({value.low:.2%} to {value.high:.2%})"
