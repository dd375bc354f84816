"""First audio leaves `declaim serve` with its headers, not a network timer later."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from tests.api.test_server import BODY, SPEECH, serve

# A receiver may keep its acknowledgement back for 40 ms, and a sender without TCP_NODELAY its next bytes for that.
DELAYED_ACK_S = 0.04


def test_first_audio_does_not_wait_until_the_headers_are_acknowledged(tmp_path: Path) -> None:
    gaps_s: list[float] = []
    with serve(tmp_path, num_chunks=2) as (url, _), httpx.Client() as client:
        # The first answers of a connection are acknowledged at once, whatever comes later. A busy machine makes many
        # gaps longer; that of a sender which waits for its acknowledgement is never short.
        while len(gaps_s) < 4 or (min(gaps_s[3:]) >= DELAYED_ACK_S / 2 and len(gaps_s) < 60):
            with client.stream("POST", url + SPEECH, json=BODY) as response:
                headers_at = time.perf_counter()
                parts = response.iter_raw()
                next(parts)
                gaps_s.append(time.perf_counter() - headers_at)
                list(parts)
    assert min(gaps_s[3:]) < DELAYED_ACK_S / 2
