"""The simulation: what it says of loads whose outcome can be reckoned by hand, and that it repeats itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def simulate() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import simulate

        yield simulate


@pytest.fixture
def made_of(simulate: Any) -> Any:
    """Fifty frames a second, no delay and no context; a step takes 10 ms whatever is in it, a window 2 ms."""
    return simulate.Machine(
        name="by hand",
        rule=simulate.FrameRule(delay=(0,), fill=9, eos=None, drain=()),
        codec=simulate.CodecSpec(24000, 480, left=0, right=0, num_codebooks=1, codebook_size=8),
        num_branches=1,
        prefix_len=0,
        step_ms=(10.0, 0.0, 0.0),
        window_ms=(2.0, 0.0),
    )


def arrivals(simulate: Any, *times: float, audio_s: float = 2.0, tenant: str = "") -> list[Any]:
    return [simulate.Arrival(at, audio_s, simulate.Tenant(tenant)) for at in times]


def test_one_request_alone_is_heard_when_arithmetic_says(simulate: Any, made_of: Any) -> None:
    """The first window holds 8 frames and is cut when the ninth is there: nine steps of 10 ms, and a window of 2."""
    outcome = simulate.Server(made_of, simulate.Setup()).serve(arrivals(simulate, 1.0))
    assert outcome.first_audio_s == pytest.approx([0.092])
    assert outcome.audio_s == pytest.approx([2.0])
    assert outcome.gap_s == pytest.approx([0.0], abs=1e-9)
    assert outcome.num_steps == pytest.approx(100, abs=1)


def test_a_machine_slower_than_playback_underruns_by_what_is_missing(simulate: Any, made_of: Any) -> None:
    """Steps of 40 ms make 2 s of audio in 4: the listener waits about as long as it hears."""
    slow = replace(made_of, step_ms=(40.0, 0.0, 0.0))
    summary = simulate.Server(slow, simulate.Setup()).serve(arrivals(simulate, 0.0)).summary()
    assert summary["underrun_percent"] == 100.0
    assert simulate.Server(made_of, simulate.Setup()).serve(arrivals(simulate, 0.0)).summary()["underrun_percent"] == 0


def test_what_exceeds_the_queue_is_refused(simulate: Any, made_of: Any) -> None:
    setup = simulate.Setup(max_batch=2, max_waiting=3)
    outcome = simulate.Server(made_of, setup).serve(arrivals(simulate, *[0.0] * 8, tenant="a"))
    assert outcome.refused == {"a": 3}
    assert len(outcome.tenants) == 5


@pytest.mark.parametrize("policy", ["first-come", "deadline", "fair"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_request_is_served_whole_under_every_policy(
    simulate: Any, made_of: Any, policy: str, workers: int
) -> None:
    load = simulate.Load(120, rate_hz=15.0, tenants=(simulate.Tenant("a"), simulate.Tenant("b", weight=3.0)))
    setup = simulate.Setup(policy=policy, vocoder_workers=workers, max_batch=8, num_blocks=40)
    drawn = load.draw()
    first = simulate.Server(made_of, setup).serve(drawn)
    assert sum(first.audio_s) == pytest.approx(sum(round(one.audio_s * 50) / 50 for one in drawn))
    again = simulate.Server(made_of, setup).serve(drawn)
    assert (first.first_audio_s, first.gap_s) == (again.first_audio_s, again.gap_s)


def test_a_quiet_tenant_is_heard_soon_only_where_shares_are_fair(simulate: Any, made_of: Any) -> None:
    crowd = arrivals(simulate, *[0.0] * 200, tenant="crowd")
    quiet = arrivals(simulate, 1.0, tenant="quiet")
    waits = {}
    for policy in simulate.POLICIES:
        outcome = simulate.Server(made_of, simulate.Setup(policy=policy, max_batch=8)).serve([*crowd, *quiet])
        waits[policy] = outcome.summary("quiet")["first_audio_p95_ms"]
    assert waits["fair"] == pytest.approx(92, abs=15)
    assert waits["fair"] * 10 < min(waits["first-come"], waits["deadline"])


def test_windows_cut_by_lead_hold_the_same_audio(simulate: Any, made_of: Any) -> None:
    drawn = simulate.Load(50, rate_hz=5.0).draw()
    totals = [
        sum(simulate.Server(made_of, simulate.Setup(chunks=chunks)).serve(drawn).audio_s)
        for chunks in ("by index", "by lead")
    ]
    assert totals[0] == pytest.approx(totals[1])


def test_a_fit_finds_the_line_and_never_a_negative_cost(simulate: Any) -> None:
    x = np.array([[1.0, 1.0], [10.0, 5.0], [40.0, 20.0], [7.0, 7.0], [64.0, 2.0]])
    assert simulate.fit_line(x, 3 + 0.5 * x[:, 0] + 0.25 * x[:, 1]) == pytest.approx([3.0, 0.5, 0.25])
    assert min(simulate.fit_line(x, 30 - 0.2 * x[:, 0] + x[:, 1])) == 0.0


def test_arrivals_have_the_rate_and_the_burstiness_that_were_asked_for(simulate: Any) -> None:
    for cv in (0.5, 1.0, 3.0):
        times = np.array([one.at for one in simulate.Load(20_000, rate_hz=4.0, cv=cv).draw()])
        gaps = np.diff(times)
        assert gaps.mean() == pytest.approx(0.25, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_the_script_says_what_is_predicted_and_what_is_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "simulate.py"), "--quick", "--policies", "--cost", "--speedup", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    result = json.loads(last)["result"]
    assert [row["policy"] for row in result["policies"]] == [
        policy for policy in ("first-come", "deadline", "fair") for _ in range(2)
    ]
    assert result["cost"]["now"]["256, all run"]["schedule_us"] > 0
    assert "PREDICTED" in "".join(printed) and "MEASURED here: the scheduler's cost" in "".join(printed)
