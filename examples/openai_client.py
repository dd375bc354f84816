"""Speak through an unmodified OpenAI client: the whole at once, and as it is made.

declaim serve &
python examples/openai_client.py "Hello from the OpenAI client."
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--voice", default="alloy")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key=arguments.key)

    speech = client.audio.speech.create(model="tts-1", voice=arguments.voice, input=arguments.text)
    Path("hello.mp3").write_bytes(speech.content)
    print(f"hello.mp3: {len(speech.content)} bytes")

    began_s = time.perf_counter()
    num_bytes = 0
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice=arguments.voice, input=arguments.text, response_format="pcm"
    ) as response:
        for chunk in response.iter_bytes():
            if num_bytes == 0:
                print(f"first audio after {1000 * (time.perf_counter() - began_s):.0f} ms")
            num_bytes += len(chunk)
    print(f"{num_bytes / 48_000:.2f} s of audio in {time.perf_counter() - began_s:.2f} s")


if __name__ == "__main__":
    main()
