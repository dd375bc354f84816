"""Adds up a run: latencies, real-time factors, under-runs, goodput, errors, fairness."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from declaim.load.client import Outcome
from declaim.load.playback import underruns

PERCENTILES = (50, 90, 95, 99)
BUFFERS_S = (0.0, 0.1, 0.2)
REFUSALS = ("http 429", "http 503")


@dataclass(frozen=True, slots=True)
class Objective:
    """When a request was served well: first audible sound within first_audio_s, and no under-run for a player that
    buffers buffer_s. A rate holds it if at least `share` of all requests were."""

    first_audio_s: float = 0.5
    buffer_s: float = 0.1
    share: float = 0.95


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one quantity; NaN where there is none of it."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution:
        known = [value for value in values if value is not None]
        if not known:
            nothing = float("nan")
            return cls(nothing, nothing, nothing, nothing, nothing, nothing)
        p50, p90, p95, p99 = (float(value) for value in np.percentile(known, PERCENTILES))
        return cls(float(np.mean(known)), p50, p90, p95, p99, float(np.max(known)))


@dataclass(frozen=True, slots=True)
class TenantSummary:
    """audio_s: delivered in whole requests. share: what it got of all, over what it may expect of all."""

    name: str
    num_requests: int
    num_errors: int
    audio_s: float
    first_audio_s: Distribution


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Seconds everywhere; *_per_s over the time from the first sending to the last end.

    lag_s: how late the tester itself sent. num_refused: answers 429 and 503; refusal_s: how long they took to come.
    underruns: by seconds of buffer, the share of whole streams that ran dry at least once.
    fairness: Jain's index of delivered audio over expected share; 1 is even.
    """

    num_requests: int
    num_whole: int
    num_refused: int
    wall_s: float
    requests_per_s: float
    audio_s_per_s: float
    goodput_audio_s_per_s: float
    good_share: float
    holds_objective: bool
    first_audio_s: Distribution
    first_byte_s: Distribution
    rtf: Distribution
    gap_s: Distribution
    lag_s: Distribution
    refusal_s: Distribution
    underruns: dict[str, float]
    errors: dict[str, int]
    tenants: tuple[TenantSummary, ...]
    fairness: float

    def as_dict(self) -> dict[str, object]:
        """As JSON has it: None for what there is none of, since JSON knows no NaN."""
        return {name: _known(value) for name, value in asdict(self).items()}


def _known(value: object) -> object:
    if isinstance(value, dict):
        return {name: _known(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def jain(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2). Source: Jain, Chiu, Hawe 1984. NaN for nothing at all."""
    x = np.asarray(values, dtype=float)
    return float(x.sum() ** 2 / (len(x) * np.square(x).sum())) if x.any() else float("nan")


def is_good(outcome: Outcome, objective: Objective) -> bool:
    first_audio_s = outcome.first_audio_s
    return (
        outcome.error is None
        and first_audio_s is not None
        and first_audio_s <= objective.first_audio_s
        and underruns(outcome.listener.arrivals, buffer_s=objective.buffer_s).count == 0
    )


def summarize(outcomes: Sequence[Outcome], objective: Objective) -> Summary:
    """Outcomes in any order, at least one."""
    whole = [outcome for outcome in outcomes if outcome.error is None]
    good = [outcome for outcome in whole if is_good(outcome, objective)]
    refused = [o for o in outcomes if o.error is not None and o.error.startswith(REFUSALS)]
    begin_s = min(outcome.sent_s for outcome in outcomes)
    wall_s = max(max(outcome.ended_s for outcome in outcomes) - begin_s, 1e-9)
    dry = {
        f"{buffer_s:g}": sum(underruns(o.listener.arrivals, buffer_s=buffer_s).count > 0 for o in whole)
        / max(1, len(whole))
        for buffer_s in BUFFERS_S
    }
    tenants = sorted({outcome.job.tenant for outcome in outcomes}, key=lambda tenant: tenant.name)
    delivered = {t.name: sum(o.listener.audio_s for o in whole if o.job.tenant == t) for t in tenants}
    return Summary(
        num_requests=len(outcomes),
        num_whole=len(whole),
        num_refused=len(refused),
        wall_s=wall_s,
        requests_per_s=len(whole) / wall_s,
        audio_s_per_s=sum(o.listener.audio_s for o in whole) / wall_s,
        goodput_audio_s_per_s=sum(o.listener.audio_s for o in good) / wall_s,
        good_share=len(good) / len(outcomes),
        holds_objective=len(good) >= objective.share * len(outcomes),
        first_audio_s=Distribution.of(o.first_audio_s for o in whole),
        first_byte_s=Distribution.of(o.first_byte_s for o in whole),
        rtf=Distribution.of(o.rtf for o in whole),
        gap_s=Distribution.of(gap for o in whole for gap in o.listener.gaps_s()),
        lag_s=Distribution.of(o.sent_s - o.job.at_s for o in outcomes if o.job.at_s is not None),
        refusal_s=Distribution.of(o.wall_s for o in refused),
        underruns=dry,
        errors=dict(Counter(o.error for o in outcomes if o.error is not None).most_common()),
        tenants=tuple(
            TenantSummary(
                name=t.name,
                num_requests=sum(o.job.tenant == t for o in outcomes),
                num_errors=sum(o.job.tenant == t and o.error is not None for o in outcomes),
                audio_s=delivered[t.name],
                first_audio_s=Distribution.of(o.first_audio_s for o in whole if o.job.tenant == t),
            )
            for t in tenants
        ),
        fairness=jain([delivered[t.name] / t.share for t in tenants]),
    )
