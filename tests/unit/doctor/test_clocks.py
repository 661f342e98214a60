"""Skew of clocks: what is measured, how well, and from when on it matters."""

import pytest

from distmoe.doctor import clocks
from distmoe.doctor.clocks import Skew, judge_hosts, judge_skew, measure_skew
from distmoe.doctor.findings import Finding

SYNCHRONIZE = "systemctl restart chronyd (or systemd-timesyncd, ntpd), then chronyc tracking or timedatectl"


def test_half_of_the_round_trip_is_taken_off():
    # Asked at 100.0, heard at 100.4: the other clock said 103.0 when this one stood at 100.2, give or take 0.2.
    skew = Skew.of_answer(100.0, 103.0, 100.4)
    assert skew.seconds == pytest.approx(2.8)
    assert skew.accuracy_s == pytest.approx(0.2)
    assert str(skew) == "+2.8 s (+-200.0 ms)"
    assert str(Skew(-0.0125, 0.0004)) == "-12.5 ms (+-0.4 ms)"


def test_quickest_answer_counts(monkeypatch: pytest.MonkeyPatch):
    # The other clock is 5 s ahead. Answers take 2.0, 0.2, 2.0, ... s, and the slow ones all of it on the way back.
    now = [1000.0]
    delays = iter([2.0, 0.2, 2.0, 2.0, 2.0])

    def ask() -> float:
        delay = next(delays)
        answer = now[0] + (delay / 2 if delay < 1 else 0.0) + 5.0
        now[0] += delay
        return answer

    monkeypatch.setattr("time.time", lambda: now[0])
    skew = measure_skew(ask)
    assert (skew.seconds, skew.accuracy_s) == pytest.approx((5.0, 0.1))


LEVELS = {
    "equal": (Skew(0.0, 0.001), "ok"),
    "little": (Skew(-0.9, 0.001), "ok"),
    "may be the measurement's": (Skew(3.0, 2.5), "ok"),
    "ahead": (Skew(1.2, 0.1), "warn"),
    "behind": (Skew(-59.0, 0.1), "warn"),
    "far, as far as is known": (Skew(61.0, 2.0), "warn"),
    "far": (Skew(-61.0, 0.5), "fail"),
}


@pytest.mark.parametrize("case", LEVELS)
def test_levels(case: str):
    skew, level = LEVELS[case]
    found = judge_skew("clock", "of b against a", skew)
    assert (found.level, found.subject) == (level, "clock")
    assert found.found.startswith(f"of b against a: {skew}")
    assert found.remedy == ("" if level == "ok" else SYNCHRONIZE)
    assert clocks.WARN_S < clocks.FAIL_S


def test_one_line_for_each_other_host():
    skews = [Skew(0.0, 0.1), Skew(9.0, 0.1), Skew(0.5, 0.1), Skew(9.0, 0.1)]
    assert judge_hosts(["a", "a", "b", "b"], skews, ranks_per_host=2) == [
        Finding("ok", "clock", "b against a: +500.0 ms (+-100.0 ms)")
    ]
