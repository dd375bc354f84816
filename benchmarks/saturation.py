"""What does a server do at 70 % and at 150 % of what it bears?

Method. A `declaim serve` of its own with its defaults, but for the vocoder, which is in the server's process: on a
machine with two cores Ray's worker and this tester would share one. Poisson arrivals of the load tester's texts, longer
ones left out: those that take more than --max-chars. `declaim bench serve --saturation` finds the highest rate at
which 95 % of the requests are heard within the objective and no player that buffers 100 ms runs dry, then offers 70 %
and 150 % of it. A second to the first audible sound is asked for.
What should hold then is told, and whether it does; the exit status is 1 if anything does not.

    python benchmarks/saturation.py [--rate 2] [--seconds 30] [--first-audio-ms 1000] [--serve "--max-batch 16"]
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import machine
from own_server import own_server

from declaim.load.cli import PROMPTS
from declaim.load.client import Target
from declaim.load.runs import Arrivals, highest_rate, print_claims, print_runs, saturate
from declaim.load.summary import Objective
from declaim.load.workload import Tenant, read_prompts

QUESTION = "A server at 70 % and at 150 % of the highest rate that holds its objective"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second to begin with")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals in each run")
    parser.add_argument("--requests", type=int, help="in each run, however long they take to come")
    parser.add_argument("--first-audio-ms", type=float, default=1000.0)
    parser.add_argument("--buffer-ms", type=float, default=100.0)
    parser.add_argument("--max-chars", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", default="", help="further options of the server")
    args = parser.parse_args()
    texts = [text for text in read_prompts(PROMPTS) if len(text) <= args.max_chars]
    if not texts:
        parser.error(f"--max-chars is {args.max_chars}: no text of {PROMPTS} is as short")
    objective = Objective(args.first_audio_ms / 1000, args.buffer_ms / 1000)
    if args.requests is not None and args.requests < 1:
        parser.error(f"--requests is {args.requests}: give 1 or more")
    document = machine.begin(QUESTION, vars(args) | {"objective": asdict(objective), "texts": len(texts)})
    seconds = args.seconds if args.requests is None else None
    arrivals = Arrivals(texts, [Tenant("all")], args.requests or 0, 1.0, args.seed, seconds)
    with tempfile.TemporaryDirectory(prefix="declaim-saturation-") as folder:
        options = [
            "--shed",
            "late",
            "--vocoder",
            "inline",
            "--no-auth",
            "--database-url",
            f"sqlite:///{Path(folder) / 'declaim.db'}",
        ]
        with own_server("saturation", [*options, *shlex.split(args.serve)]) as (url, _):
            target = Target(url=f"{url}/v1", model="tts-1", voice="alloy")
            runs, claims = saturate(target, arrivals, objective, begin_per_s=args.rate)
    print_runs(runs)
    print_claims(claims)
    machine.end(
        document,
        {
            "highest_rate_per_s": highest_rate(runs),
            "runs": [{"label": run.label, **run.summary.as_dict()} for run in runs],
            "claims": [asdict(claim) for claim in claims],
        },
    )
    return int(not all(claim.holds for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
