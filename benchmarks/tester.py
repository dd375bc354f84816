"""Does the load tester tell the delays it was given?

Method. A server that speaks silence and tones with known delays notes when it handed each piece to its socket; the
tester asks it over HTTP, SSE and WebSocket, and what it tells is compared with the notes: the time to the first
samples, to the first audible sound (leading silence is waited for), and between pieces. Both run in one process.

    python -m benchmarks.tester [--requests 40] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

import numpy as np

from benchmarks import machine
from declaim.load.client import PROTOCOLS, Protocol, Target
from declaim.load.session import run_open
from declaim.load.workload import Tenant, open_loop
from tests.benchmarks.fake_peer import CHUNK_S, FakePeer

QUESTION = "The load tester against a server with known delays: how far off is what it tells?"
TEXTS = ("One two three four.", "Five six.")
NUM_SILENT = 2


def measure(protocol: Protocol, *, num_requests: int) -> dict[str, Sequence[float]]:
    """Errors in seconds, by what was told."""
    with FakePeer(first_s=0.08, every_s=0.05, silent_chunks=NUM_SILENT) as peer:
        jobs = open_loop(TEXTS, [Tenant("all")], rate_per_s=8.0, num_jobs=num_requests, burstiness=0.0, seed=1)
        target = Target(url=peer.url, model="m", voice="v", protocol=protocol, words_per_s=1000.0)
        outcomes = asyncio.run(run_open(target, jobs, lambda outcome: None))
        arrived, sent = peer.arrived, peer.sent
    if any(outcome.error for outcome in outcomes):
        raise RuntimeError(f"{protocol}: {[outcome.error for outcome in outcomes]}")
    first_s = [times[0] - came for times, came in zip(sent, arrived, strict=True)]
    audible_s = [value + NUM_SILENT * CHUNK_S for value in first_s]
    gaps_s = [later - sooner for times in sent for sooner, later in zip(times, times[1:], strict=False)]
    told = {
        "first samples": ([o.first_byte_s for o in outcomes], first_s),
        "first audible sound": ([o.first_audio_s for o in outcomes], audible_s),
        "between pieces": ([gap for o in outcomes for gap in o.listener.gaps_s()], gaps_s),
    }
    return {
        f"{protocol}, {name}": [abs((value or 0.0) - given) for value, given in zip(values, wanted, strict=True)]
        for name, (values, wanted) in told.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="three requests")
    args = parser.parse_args()
    num_requests = 3 if args.quick else args.requests
    document = machine.begin(QUESTION, vars(args) | {"requests": num_requests})
    errors = []
    for protocol in PROTOCOLS:
        for what, values in measure(protocol, num_requests=num_requests).items():
            p50, p95 = (1000 * float(value) for value in np.percentile(values, (50, 95)))
            largest = 1000 * max(values)
            errors.append({"what": what, "count": len(values), "p50_ms": p50, "p95_ms": p95, "max_ms": largest})
    machine.print_table(
        "told against given, ms", ("what", "values", "p50", "p95", "largest"), [list(row.values()) for row in errors]
    )
    machine.end(document, {"errors": errors})


if __name__ == "__main__":
    main()
