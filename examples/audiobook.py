"""A text file to an audiobook: a file and captions for each chapter.

Chapters begin at lines such as "Chapter 3" or "# The Storm"; paragraphs are spoken one request each, several at a time,
and joined in order. Run it again after a failure: chapters that are there are kept.

    python examples/audiobook.py book.txt --out book/
"""

from __future__ import annotations

import argparse
import base64
import re
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

HEADING = re.compile(r"^(#+\s+.*|chapter\s+\S+.*)$", re.IGNORECASE)
RATE_HZ = 24_000
PAUSE_S = 0.6
AT_A_TIME = 8


@dataclass(frozen=True, slots=True)
class Spoken:
    """A paragraph. words: (text, start, end) in seconds of its own."""

    pcm: bytes
    words: list[tuple[str, float, float]]


def chapters_of(text: str) -> list[tuple[str, list[str]]]:
    """Titles and paragraphs; what stands before the first heading is a chapter too."""
    chapters: list[tuple[str, list[str]]] = [("Beginning", [])]
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip().splitlines()
        if lines and HEADING.match(lines[0]):
            chapters.append((lines[0].lstrip("# "), []))
            chapters[-1][1].append(chapters[-1][0] + ".")
            lines = lines[1:]
        if lines:
            chapters[-1][1].append(" ".join(line.strip() for line in lines))
    return [(title, paragraphs) for title, paragraphs in chapters if paragraphs]


def speak(client: httpx.Client, text: str, voice: str) -> Spoken:
    body = {"model": "tts-1", "voice": voice, "input": text, "response_format": "json", "word_timestamps": True}
    answer = client.post("/audio/speech", json=body)
    if answer.status_code != 200:
        raise SystemExit(f"{answer.status_code}: {answer.json()['error']['message']}\n{text[:80]}")
    document = answer.json()
    audio = base64.b64decode(document["audio"])
    words = [(word["word"], word["start"], word["end"]) for word in document["words"] or []]
    return Spoken(audio[44:] if document["format"] == "wav" else audio, words)


def stamp(seconds: float) -> str:
    hours, rest = divmod(round(seconds * 1000), 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}.{rest % 1000:03d}"


def write_chapter(path: Path, paragraphs: list[str], spoken: list[Spoken]) -> float:
    """A wav and a WebVTT file, a caption each paragraph. Returns the seconds."""
    at_s = 0.0
    cues = ["WEBVTT\n"]
    with wave.open(str(path.with_suffix(".part")), "wb") as file:
        file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
        for text, part in zip(paragraphs, spoken, strict=True):
            length_s = len(part.pcm) / 2 / RATE_HZ
            first, last = (part.words[0][1], part.words[-1][2]) if part.words else (0.0, length_s)
            cues.append(f"{stamp(at_s + first)} --> {stamp(at_s + last)}\n{text}\n")
            file.writeframes(part.pcm + bytes(2 * int(PAUSE_S * RATE_HZ)))
            at_s += length_s + PAUSE_S
    path.with_suffix(".vtt").write_text("\n".join(cues), encoding="utf-8")
    path.with_suffix(".part").rename(path)
    return at_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--out", type=Path, default=Path("audiobook"))
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--voice", default="alloy")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    headers = {"Authorization": f"Bearer {arguments.key}"}
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=600) as client:
        for number, (title, paragraphs) in enumerate(chapters_of(arguments.book.read_text(encoding="utf-8")), 1):
            path = arguments.out / f"{number:03d}.wav"
            if path.exists():
                print(f"{path}: there already")
                continue
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                spoken = list(pool.map(lambda text: speak(client, text, arguments.voice), paragraphs))
            print(f"{path}: {title}, {write_chapter(path, paragraphs, spoken):.1f} s")


if __name__ == "__main__":
    main()
