"""Load a speech endpoint with locust, for those whose dashboards and CI live there.

    pip install locust
    locust -f benchmarks/locustfile.py --headless -H http://127.0.0.1:8000 -u 8 -r 2 -t 60s --api-key sk-...

Each user speaks one text after the other, with a rest between them. Beside what locust measures of HTTP there are rows
of type "audio": `first audio` (ms from the request to the first sample, silent or not) and `real-time factor` (in
thousandths: 250 is four times as fast as speech). A stream without samples, or with half of one, is a failure. What
listeners hear (leading silence, under-runs, goodput) `declaim bench serve` measures; the texts are the same.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import HttpUser, between, events, task

PROMPTS = [line for line in (Path(__file__).parent / "load" / "prompts.txt").read_text("utf-8").splitlines() if line]
SAMPLE_BYTES = 2
WAV_HEADER_BYTES = 44


@events.init_command_line_parser.add_listener
def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--api-key", env_var="DECLAIM_API_KEY", default="", help="sent as a bearer token")
    parser.add_argument("--speech-model", default="tts-1", help="sent as `model`")
    parser.add_argument("--voice", default="alloy")
    parser.add_argument("--response-format", choices=("pcm", "wav"), default="pcm")
    parser.add_argument("--sample-rate", type=int, default=24_000, help="of the audio that comes, Hz")


class Listener(HttpUser):
    """Has texts spoken, and reads each as it comes."""

    wait_time = between(0.1, 1.0)

    @task
    def speak(self) -> None:
        options: Any = self.environment.parsed_options
        body = {
            "model": options.speech_model,
            "voice": options.voice,
            "input": random.choice(PROMPTS),
            "response_format": options.response_format,
        }
        headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        header_bytes = WAV_HEADER_BYTES if options.response_format == "wav" else 0
        num_bytes, first_s = -header_bytes, None
        began_s = time.perf_counter()
        with self.client.post(
            "/v1/audio/speech", json=body, headers=headers, stream=True, catch_response=True, name="speech"
        ) as response:
            if response.status_code != 200:
                response.failure(f"http {response.status_code} {response.headers.get('retry-after', '')}".strip())
                return
            for piece in response.iter_content(chunk_size=None):
                num_bytes += len(piece)
                if first_s is None and num_bytes > 0:
                    first_s = time.perf_counter() - began_s
            if first_s is None or num_bytes % SAMPLE_BYTES:
                response.failure(f"{max(0, num_bytes)} bytes of audio")
                return
        audio_s = num_bytes / SAMPLE_BYTES / options.sample_rate
        self._tell("first audio", 1000 * first_s, num_bytes)
        self._tell("real-time factor", 1000 * (time.perf_counter() - began_s) / audio_s, num_bytes)

    def _tell(self, name: str, value: float, num_bytes: int) -> None:
        events.request.fire(
            request_type="audio",
            name=name,
            response_time=value,
            response_length=num_bytes,
            exception=None,
            context={},
        )
