"""The load tester tells what a listener would hear: checked against a peer that notes what it did."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from declaim.load import runs
from declaim.load.cli import PROMPTS, build_bench_cli
from declaim.load.client import Outcome, Target
from declaim.load.playback import Listener, underruns
from declaim.load.report import Run
from declaim.load.runs import judge
from declaim.load.session import run_closed, run_open
from declaim.load.summary import Objective, jain, summarize
from declaim.load.workload import (
    Job,
    Tenant,
    WorkloadError,
    closed_loop,
    open_loop,
    parse_tenant,
    read_prompts,
    trace,
)

from .fake_peer import CHUNK_S, FakePeer

TEXTS = ["One two three four.", "Five six."]
NOBODY = [Tenant("all")]
TOLERANCE_S = 0.02  # a wrong measure is off by a delay or a chunk, 50 ms or more


def target_of(peer: FakePeer, **fields: object) -> Target:
    return Target(url=peer.url, model="m", voice="v", **fields)  # type: ignore[arg-type]


def ask_all(peer: FakePeer, num: int = 6, *, rate_per_s: float = 20.0, **fields: object) -> list[Outcome]:
    jobs = open_loop(TEXTS, NOBODY, rate_per_s=rate_per_s, num_jobs=num, burstiness=0, seed=1)
    return asyncio.run(run_open(target_of(peer, **fields), jobs, lambda outcome: None))


def usual_error(told: Sequence[float | None], given: Sequence[float]) -> float:
    """The lowest tenth: a machine that is busy with other things delays most of both, and a wrong measure is wrong for
    all. How many milliseconds they are off on a quiet one is what `benchmarks/tester.py` measures."""
    errors = [abs((math.nan if value is None else value) - other) for value, other in zip(told, given, strict=True)]
    return float(np.quantile(errors, 0.1))


@pytest.mark.parametrize("protocol", ["http", "sse", "ws"])
def test_it_reports_the_delays_it_was_given(protocol: str) -> None:
    with FakePeer(first_s=0.08, every_s=0.05, silent_chunks=2) as peer:
        outcomes = ask_all(peer, 7, rate_per_s=8.0, protocol=protocol, words_per_s=1000.0)
        arrived, sent = peer.arrived, peer.sent
    assert [outcome.error for outcome in outcomes] == [None] * 7
    given_s = [times[0] - came for times, came in zip(sent, arrived, strict=True)]
    assert usual_error([o.first_byte_s for o in outcomes], given_s) < TOLERANCE_S
    # Two chunks of silence, 50 ms apart, are waited for before the third is heard.
    assert usual_error([o.first_audio_s for o in outcomes], [2 * CHUNK_S + value for value in given_s]) < TOLERANCE_S
    gaps_s = [later - sooner for times in sent for sooner, later in zip(times, times[1:], strict=False)]
    assert usual_error([gap for o in outcomes for gap in o.listener.gaps_s()], gaps_s) < TOLERANCE_S
    assert {round(o.listener.audio_s, 6) for o in outcomes} == {1.0}


def test_a_stall_longer_than_the_lead_is_an_underrun_and_a_buffer_hides_it() -> None:
    with FakePeer(every_s=0.0, stall_at=5, stall_s=1.5, silent_chunks=0) as peer:
        (outcome,) = ask_all(peer, 1)
    # Half a second is there when a stall of 1.5 begins; a busy machine makes it longer, never shorter.
    dry = underruns(outcome.listener.arrivals, buffer_s=0.0)
    assert dry.count >= 1 and 0.95 < dry.stalled_s < 10.0
    assert underruns(outcome.listener.arrivals, buffer_s=60.0).count == 0


def test_a_player_by_hand() -> None:
    arrivals = [(0.0, 0.1), (0.3, 0.4), (0.35, 1.0)]
    assert underruns(arrivals, buffer_s=0.0).count == 1
    assert underruns(arrivals, buffer_s=0.0).stalled_s == pytest.approx(0.2)
    assert underruns(arrivals, buffer_s=0.2) == underruns(arrivals, buffer_s=5.0)  # both start late and never stop
    assert underruns([], buffer_s=0.0).count == 0


def test_the_first_sound_is_found_however_the_bytes_are_cut() -> None:
    quiet, loud = np.zeros(1234, "<i2"), np.full(3000, 9000, "<i2")
    data = b"HEADER" + quiet.tobytes() + loud.tobytes()
    for size in (1, 7, 333, 10_000):
        listener = Listener(24_000, header_bytes=6)
        for i in range(0, len(data), size):
            listener.feed(data[i : i + size], i / 1e6)
        assert listener.onset_s == pytest.approx(1200 / 24_000)  # its 10 ms window has it
        assert listener.audio_s == pytest.approx(4234 / 24_000)


def test_refusals_are_counted_by_code_with_the_time_they_took() -> None:
    with FakePeer(refuse=429, refuse_each=2, num_chunks=2) as peer:
        outcomes = ask_all(peer, 6)
    summary = summarize(outcomes, Objective())
    assert summary.errors == {"http 429 rate_limit_exceeded": 3}
    assert summary.num_whole == 3 and summary.good_share == pytest.approx(0.5)
    assert not summary.holds_objective
    assert 0 < summary.refusal_s.p50 < 10.0
    assert {o.retry_after_s for o in outcomes if o.error} == {0.05}


def test_the_last_line_is_json_for_any_reader_though_there_is_nothing_to_tell() -> None:
    with FakePeer(refuse=503) as peer:
        done = CliRunner().invoke(build_bench_cli(), ["serve", "--url", peer.url, "--rate", "50", "--num", "3"])
    assert done.exit_code == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"JSON knows no {constant}")

    (line,) = [line for line in done.output.splitlines() if line.startswith("{")]
    (run,) = json.loads(line, parse_constant=refuse)["runs"]
    assert run["first_audio_s"]["p50"] is None and run["refusal_s"]["p50"] > 0 and run["fairness"] is None
    assert run["tenants"][0]["first_audio_s"]["max"] is None


def test_a_broken_connection_is_no_whole_stream() -> None:
    with FakePeer(cut_after=3) as peer:
        outcomes = ask_all(peer, 2)
        events = ask_all(peer, 2, protocol="sse")
    assert [o.error for o in outcomes + events] == ["cut"] * 4


def test_silence_is_an_error_and_so_are_no_server_and_no_answer() -> None:
    with FakePeer(silent_chunks=99) as peer:
        assert [o.error for o in ask_all(peer, 1)] == ["silent"]
    with FakePeer(first_s=5.0) as peer:
        assert [o.error for o in ask_all(peer, 1, timeout_s=0.2)] == ["timeout"]
    assert [o.error for o in ask_all(peer, 1)] == ["refused"]


def test_a_closed_loop_keeps_its_number_busy_and_sends_each_tenants_key() -> None:
    tenants = [Tenant("a", "sk-a"), Tenant("b", "sk-b")]
    with FakePeer(num_chunks=3) as peer:
        jobs = closed_loop(TEXTS, tenants, num_jobs=12, seed=0)
        outcomes = asyncio.run(run_closed(target_of(peer), jobs, lambda outcome: None, concurrency=4))
    assert len(outcomes) == 12 and {key for key in peer.keys} == {"Bearer sk-a", "Bearer sk-b"}
    edges = sorted([(o.sent_s, 1) for o in outcomes] + [(o.ended_s, -1) for o in outcomes])
    assert max(np.cumsum([step for _, step in edges])) == 4
    summary = summarize(outcomes, Objective())
    assert [t.num_requests for t in summary.tenants] == [6, 6]
    assert summary.fairness == pytest.approx(1.0)


def test_words_are_fed_one_by_one_and_arrive_as_the_text() -> None:
    with FakePeer() as peer:
        (outcome,) = ask_all(peer, 1, protocol="ws", words_per_s=50.0)
    assert outcome.error is None and peer.texts == [outcome.job.text]
    assert outcome.first_byte_s is not None and outcome.first_byte_s > (len(outcome.job.text.split()) - 1) / 50.0


def test_arrivals_have_the_rate_and_the_burstiness_asked_for() -> None:
    for burstiness in (0.0, 1.0, 4.0):
        jobs = open_loop(TEXTS, NOBODY, rate_per_s=10, num_jobs=4000, burstiness=burstiness, seed=3)
        gaps = np.diff([job.at_s for job in jobs])
        assert gaps.mean() == pytest.approx(0.1, rel=0.1)
        assert gaps.var() / 0.1**2 == pytest.approx(burstiness, rel=0.25, abs=1e-9)
    assert jobs == open_loop(TEXTS, NOBODY, rate_per_s=10, num_jobs=4000, burstiness=4.0, seed=3)


def test_tenants_arrive_by_their_weights() -> None:
    tenants = [Tenant("a", rate_weight=3.0), Tenant("b")]
    jobs = open_loop(TEXTS, tenants, rate_per_s=10, num_jobs=4000, burstiness=1.0, seed=0)
    assert sum(job.tenant.name == "a" for job in jobs) / 4000 == pytest.approx(0.75, abs=0.03)


def test_fairness_is_jains() -> None:
    assert jain([1, 1, 1, 1]) == 1.0
    assert jain([1, 0, 0, 0]) == 0.25
    assert math.isnan(jain([0, 0]))


def test_a_trace_is_read_and_what_is_wrong_with_one_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("at_s,tenant,text\n0.5,b,Hello.\n0.1,a,\n", encoding="utf-8")
    jobs = trace(path, TEXTS, [Tenant("a"), Tenant("b")], seed=0)
    assert [(job.at_s, job.tenant.name) for job in jobs] == [(0.1, "a"), (0.5, "b")]
    assert jobs[1].text == "Hello." and jobs[0].text in TEXTS
    with pytest.raises(WorkloadError, match="'b': give it with --tenant"):
        trace(path, TEXTS, [Tenant("a")], seed=0)
    path.write_text("when\n1\n", encoding="utf-8")
    with pytest.raises(WorkloadError, match="column at_s"):
        trace(path, TEXTS, NOBODY, seed=0)


@pytest.mark.parametrize("value", ["", ":k", "a:k:0", "a:k:x", "a:k:1:2:3", "a:k:-1"])
def test_a_tenant_that_makes_no_sense_is_named(value: str) -> None:
    with pytest.raises(WorkloadError, match="--tenant is"):
        parse_tenant(value)


def test_a_tenant_has_a_key_a_weight_and_a_share() -> None:
    assert parse_tenant("a") == Tenant("a")
    assert parse_tenant("a:sk-1:2:0.5") == Tenant("a", "sk-1", 2.0, 0.5)


def test_the_prompts_that_come_with_it() -> None:
    assert len(read_prompts(PROMPTS)) > 50


def test_the_command_sweeps_prints_and_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SWEEP_STEPS", 3)
    with FakePeer(num_chunks=2, every_s=0.0, first_s=0.01) as peer:
        arguments = ["serve", "--url", peer.url, "--rate", "60", "--sweep", "--num", "6", "--report", str(tmp_path)]
        done = CliRunner().invoke(build_bench_cli(), [*arguments, "--first-audio-ms", "30000", "--buffer-ms", "30000"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert result["highest_rate_per_s"] == pytest.approx(60 * 1.6**2) and len(result["runs"]) == 3
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 3 and "requests/s" in page
    for name in ("latency", "distributions", "timeline"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --rate, --concurrency and --trace"),
        (["--rate", "1", "--concurrency", "2"], "give one of"),
        (["--concurrency", "2", "--sweep"], "--sweep searches a rate"),
        (["--concurrency", "2", "--saturation"], "--saturation searches a rate"),
        (["--rate", "1", "--seconds", "2"], "--seconds is for --sweep and --saturation"),
        (["--rate", "1", "--extra", "[1]"], "give a JSON object"),
        (["--rate", "1", "--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
        (["--rate", "50", "--num", "1", "--url", "http://127.0.0.1:9/v1"], "is the server up"),
    ],
)
def test_what_cannot_be_run_is_said(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(build_bench_cli(), ["serve", *arguments])
    assert done.exit_code != 0 and said in done.output


def outcomes_by_hand(num_good: int, refused: Sequence[str], *, refusal_s: float = 0.01) -> list[Outcome]:
    """Streams of one second that came at once, one a second; and refusals."""
    outcomes = []
    loud = np.full(24_000, 9000, "<i2").tobytes()
    for i in range(num_good):
        outcome = Outcome(Job(i, float(i), NOBODY[0], "a"), float(i))
        outcome.listener.feed(loud, i + 0.1)
        outcome.ended_s = i + 0.2
        outcomes.append(outcome)
    for error in refused:
        outcomes.append(Outcome(Job(0, 0.0, NOBODY[0], "a"), 0.0, ended_s=refusal_s, error=error))
    return outcomes


def run_of(rate: float, outcomes: list[Outcome]) -> Run:
    return Run(f"{rate:g} requests/s", rate, outcomes, summarize(outcomes, Objective()))


class ServerByHand:
    """Stands in for `runs.run`: whole streams up to a rate, beyond it a third of the requests refused at once."""

    def __init__(self, *, bears_per_s: float) -> None:
        self._bears_per_s = bears_per_s
        self.asked: list[tuple[float, list[Job]]] = []

    def run(self, target: Target, jobs: list[Job], objective: Objective, *, label: str, offered_per_s: float) -> Run:
        self.asked.append((offered_per_s, jobs))
        num_refused = 0 if offered_per_s <= self._bears_per_s else len(jobs) // 3
        outcomes = outcomes_by_hand(len(jobs) - num_refused, ["http 503 server_is_overloaded"] * num_refused)
        return Run(label, offered_per_s, outcomes, summarize(outcomes, objective))


def saturation_of(url: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    options = ["serve", "--url", url, "--saturation", "--seconds", "0.3", *arguments]
    done = CliRunner().invoke(build_bench_cli(), options)
    return done.exit_code, json.loads(done.output.splitlines()[-1]), done.output


@pytest.mark.parametrize("begin_per_s", [3.0, 40.0, 700.0])
def test_saturation_tries_less_and_more_than_the_highest_rate_and_judges_both(
    monkeypatch: pytest.MonkeyPatch, begin_per_s: float
) -> None:
    server = ServerByHand(bears_per_s=100.0)
    monkeypatch.setattr(runs, "run", server.run)
    code, result, output = saturation_of("http://127.0.0.1:9/v1", "--rate", str(begin_per_s))
    highest = result["highest_rate_per_s"]
    assert 100.0 / runs.SWEEP_PRECISION < highest <= 100.0
    *searched, calm, flood = server.asked
    assert searched[0][0] == begin_per_s and highest in {rate for rate, _ in searched}
    assert (calm[0], flood[0]) == (0.7 * highest, 1.5 * highest)
    assert all(len(jobs) == max(runs.MIN_JOBS, round(0.3 * rate)) for rate, jobs in server.asked)
    assert len({tuple(job.text for job in jobs[:20]) for _, jobs in server.asked}) == len(server.asked)
    rates = sorted(rate for rate, _ in server.asked)
    assert [run["label"] for run in result["runs"]] == [f"{rate:.3g} requests/s" for rate in rates]
    claims = result["claims"]
    assert f"at 70 % ({0.7 * highest:.3g} requests/s)" in claims[0]["claim"]
    assert f"at 150 % ({1.5 * highest:.3g} requests/s)" in claims[1]["claim"]
    assert [claim["holds"] for claim in claims] == [True] * 4, claims
    assert code == 0 and output.count("\nholds: at ") == 4


def test_a_server_that_never_holds_the_objective_has_no_saturation_rate() -> None:
    with FakePeer(num_chunks=2, every_s=0.0, first_s=0.05) as peer:
        code, result, output = saturation_of(peer.url, "--rate", "400", "--first-audio-ms", "10")
    assert code == 1 and result["highest_rate_per_s"] == 0
    assert 400 / 16 / 1.6 < min(float(run["label"].split()[0]) for run in result["runs"]) <= 400 / 16
    assert "DOES NOT HOLD: some rate holds the objective: none of" in output


def test_a_claim_that_does_not_hold_ends_the_command_with_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "run", ServerByHand(bears_per_s=100.0).run)
    monkeypatch.setattr(runs, "MAX_REFUSAL_S", 0.001)
    code, result, output = saturation_of("http://127.0.0.1:9/v1", "--rate", "90")
    assert [claim["holds"] for claim in result["claims"]] == [True, True, False, True]
    assert code == 1 and "DOES NOT HOLD: at 150 %" in output


@pytest.mark.parametrize(
    ("num_good", "refused", "refusal_s", "holds"),
    [
        (10, ["http 503 server_is_overloaded"] * 5, 0.01, [True, True, True, True]),
        (10, ["http 429"] * 5, 0.06, [True, True, False, True]),
        (10, ["http 429", "timeout"], 0.01, [True, False, True, True]),
        (10, [], 0.01, [True, False, False, True]),
        (5, ["http 429"], 0.01, [True, True, True, False]),
    ],
)
def test_what_is_claimed_of_a_flood(num_good: int, refused: list[str], refusal_s: float, holds: list[bool]) -> None:
    calm, flood = run_of(0.7, outcomes_by_hand(10, [])), run_of(1.5, outcomes_by_hand(num_good, refused))
    for outcome in flood.outcomes:
        if outcome.error is None and num_good < 10:
            outcome.ended_s += 10.0  # so that fewer come in the same time
        elif outcome.error is not None:
            outcome.ended_s = refusal_s
    flood = run_of(1.5, list(flood.outcomes))
    claims = judge([calm, flood], calm=calm, flood=flood, objective=Objective())
    assert [claim.holds for claim in claims] == holds, claims


def test_a_player_that_runs_dry_at_seventy_percent_is_told() -> None:
    outcomes = outcomes_by_hand(3, [])
    outcomes[1].listener.feed(np.full(2400, 9000, "<i2").tobytes(), 9.0)
    calm, flood = run_of(0.7, outcomes), run_of(1.5, outcomes_by_hand(3, ["http 429"]))
    claim = judge([calm, flood], calm=calm, flood=flood, objective=Objective())[0]
    assert not claim.holds and claim.measured == "1 of 3 ran dry, 0 of 3 not served"
