"""Play a text while it is spoken, through ffplay, aplay or any player that takes raw PCM on its standard input.

python examples/play.py "As soon as the first words are made, you hear them."
python examples/play.py --player "aplay -q -f S16_LE -r 24000 -c 1" "The same with ALSA."
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import httpx

PLAYER = "ffplay -loglevel error -nodisp -autoexit -f s16le -ar 24000 -ch_layout mono -i -"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="- reads standard input")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--voice", default="alloy")
    parser.add_argument("--player", default=PLAYER)
    arguments = parser.parse_args()
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    body = {"model": "tts-1", "voice": arguments.voice, "input": text, "response_format": "pcm"}
    headers = {"Authorization": f"Bearer {arguments.key}"}
    with (
        httpx.stream("POST", f"{arguments.url}/audio/speech", json=body, headers=headers, timeout=60) as response,
        subprocess.Popen(shlex.split(arguments.player), stdin=subprocess.PIPE) as player,
    ):
        if response.status_code != 200:
            raise SystemExit(response.read().decode())
        assert player.stdin is not None
        for chunk in response.iter_raw():
            player.stdin.write(chunk)
            player.stdin.flush()
        player.stdin.close()


if __name__ == "__main__":
    main()
