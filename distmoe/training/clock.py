"""Times of a run, carried over interruptions."""

import time
from collections.abc import Mapping

from distmoe.training.feed import Feed


class Clock:
    """Adds up a run's times, in seconds; a resumed run goes on from those of its checkpoint.

    Args:
        feed: Of training; it knows the waiting.

    Attributes:
        step_s: Spent in optimizer steps, waiting for data included.
        samples: Trained on, meanwhile.
        first_step_s: From the start of the first process to the end of the first step.
    """

    def __init__(self, feed: Feed) -> None:
        self.step_s = 0.0
        self.samples = 0.0
        self.first_step_s: float | None = None
        self._feed = feed
        self._earlier_s = 0.0
        self._started = time.perf_counter()
        self._marks = (0.0, 0.0, 0.0, 0.0)

    def start(self) -> None:
        """Training starts now: set-up does not count."""
        self._started = time.perf_counter()

    def train_s(self) -> float:
        """Seconds of training so far, validation and saving included."""
        return self._earlier_s + time.perf_counter() - self._started

    def rates(self) -> dict[str, float]:
        """Images/s, and the shares of waiting and augmenting in step time, of the whole run."""
        return _rates(self._now())

    def rates_since_last(self) -> dict[str, float]:
        """The same since this was last asked."""
        now = self._now()
        since = tuple(new - old for new, old in zip(now, self._marks, strict=True))
        self._marks = now
        return _rates(since)

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        step_s, samples, wait_s, augment_s = self._now()
        times = {"step_s": step_s, "samples": samples, "wait_s": wait_s, "augment_s": augment_s}
        return {**times, "train_s": self.train_s(), "first_step_s": self.first_step_s or 0.0}

    def load(self, state: Mapping[str, float]) -> None:
        """Goes on from :meth:`state`."""
        self.step_s, self.samples = state["step_s"], state["samples"]
        self._feed.wait_s, self._feed.augment_s = state["wait_s"], state["augment_s"]
        self._earlier_s = state["train_s"]
        self.first_step_s = state["first_step_s"] or None
        self._marks = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        return self.step_s, self.samples, self._feed.wait_s, self._feed.augment_s


def _rates(times: tuple[float, ...]) -> dict[str, float]:
    step_s, samples, wait_s, augment_s = times
    step_s = max(step_s, 1e-9)
    return {
        "images_per_second": samples / step_s,
        "data_wait_share": wait_s / step_s,
        "augment_share": augment_s / step_s,
    }
