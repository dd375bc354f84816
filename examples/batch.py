"""Speak every line of a file into a folder, without a server: the engine batches them all.

python examples/batch.py lines.txt --out spoken/ [--model lark]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import soundfile

from declaim.engine import Engine, SamplingParams, SpeechRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--out", type=Path, default=Path("spoken"))
    parser.add_argument("--model", default="lark")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in arguments.lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    with Engine.from_pretrained(arguments.model) as engine:
        requests = [SpeechRequest(line, sampling=SamplingParams(seed=i)) for i, line in enumerate(lines)]
        for i, result in enumerate(engine.generate(requests)):
            path = arguments.out / f"{i:05d}.wav"
            soundfile.write(path, result.audio, result.sample_rate_hz)
            if result.finish_reason != "stop":
                print(f"{path}: {result.finish_reason}: {lines[i]}")
    print(f"{len(lines)} files in {arguments.out}")


if __name__ == "__main__":
    main()
