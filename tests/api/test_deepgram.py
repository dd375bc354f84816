"""WS /v1/speak: Deepgram's protocol, and its real clients."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus

from declaim.api.deepgram import alaw, mulaw
from declaim.engine.errors import SequenceFailed
from tests.api.live_world import TextEngine, World, audio_of, events_of, live_world, pcm

FIRST = "Hello there, dear friend of mine."
SECOND = "It is good to see you again today."


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with live_world(tmp_path_factory.mktemp("shared"), TextEngine()) as made:
        yield made


@pytest.fixture
def world(shared: World) -> World:
    return shared.forget()


def test_words_are_spoken_and_a_flush_is_answered_after_the_last_audio(world: World) -> None:
    with world.deepgram("?model=aura-2-thalia-en&encoding=linear16&sample_rate=24000") as client:
        metadata = client.next()
        assert isinstance(metadata, dict) and metadata["type"] == "Metadata" and metadata["request_id"]
        for turn in range(2):
            for word in f"{FIRST} {SECOND}".split(" "):
                client.send(type="Speak", text=word + " ")
            client.send(type="Flush")
            heard = client.until("Flushed")
            assert events_of(heard) == [{"type": "Flushed", "sequence_id": turn}]
            assert audio_of(heard) == pcm(FIRST) + pcm(SECOND)
        client.send(type="Close")
        with pytest.raises(ConnectionClosed) as closed:
            client.next()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000
    assert all(request.tenant == "acme" for request in world.engine.requests)


def test_clear_stops_at_once(tmp_path: Path) -> None:
    engine = TextEngine(pace_s=0.5)  # all of it would take 7 s
    with live_world(tmp_path, engine) as world, world.deepgram() as client:
        client.send(type="Speak", text=f"{FIRST} {SECOND}")
        client.send(type="Flush")
        client.until("Metadata")
        assert isinstance(client.next(), bytes)
        began = time.perf_counter()
        client.send(type="Clear")
        client.until("Cleared")
        assert time.perf_counter() - began < 3.0 and engine.finished == []
        engine.pace_s = 0.0
        client.send(type="Speak", text=FIRST)
        client.send(type="Flush")
        assert audio_of(client.until("Flushed")) == pcm(FIRST)


@pytest.mark.parametrize(
    ("encoding", "rate_hz", "bytes_each"), [("linear16", 16_000, 2), ("mulaw", 8_000, 1), ("alaw", 8_000, 1)]
)
def test_telephone_encodings(world: World, encoding: str, rate_hz: int, bytes_each: int) -> None:
    with world.deepgram(f"?encoding={encoding}&sample_rate={rate_hz}") as client:
        client.send(type="Speak", text=FIRST)
        client.send(type="Flush")
        audio = audio_of(client.until("Flushed"))
    assert len(audio) == len(FIRST) * rate_hz // 25 * bytes_each


@pytest.mark.parametrize(("encode", "codec"), [(mulaw, "pcm_mulaw"), (alaw, "pcm_alaw")])
def test_g711_is_the_inverse_of_ffmpegs_decoder(
    encode: Callable[[NDArray[np.int16]], NDArray[np.uint8]], codec: str
) -> None:
    codes = np.arange(256, dtype=np.uint8)
    back = encode(decoded(codes, codec))
    # mu-law has two zeros.
    np.testing.assert_array_equal(back, np.where((codes == 0x7F) & (codec == "pcm_mulaw"), 0xFF, codes))
    samples = np.arange(-32768, 32768, 7).astype(np.int16)
    errors = np.abs(decoded(encode(samples), codec).astype(int) - samples)
    assert np.all(errors <= np.abs(samples.astype(int)) // 16 + 8)


def decoded(codes: NDArray[np.uint8], codec: str) -> NDArray[np.int16]:
    """What FFmpeg makes of G.711 bytes."""
    with av.open(io.BytesIO(codes.tobytes()), format=codec.removeprefix("pcm_")) as reader:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in reader.decode(audio=0)])


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?encoding=mp3", "encoding"),
        ("?sample_rate=1", "sample_rate"),
        ("?container=wav", "container"),
        ("?model=nobody", "voice"),
        ("?speed=fast", "speed"),
        ("?speed=99", "speed"),
        ("?speed=nan", "speed"),
    ],
)
def test_a_query_that_is_wrong_is_refused_at_the_handshake(world: World, query: str, param: str) -> None:
    with pytest.raises(InvalidStatus) as refused, world.deepgram(query):
        pass
    assert refused.value.response.status_code == 400
    assert json.loads(refused.value.response.body or b"")["error"]["param"] == param


def test_a_key_that_is_wrong_is_refused_at_the_handshake(world: World) -> None:
    with pytest.raises(InvalidStatus) as refused, world.deepgram(key="wrong"):
        pass
    assert refused.value.response.status_code == 401


def test_what_cannot_be_used_is_a_warning_and_what_fails_an_error(tmp_path: Path) -> None:
    with live_world(tmp_path, TextEngine(failure=SequenceFailed("it failed"))) as world, world.deepgram() as client:
        client.until("Metadata")
        client.send(type="Shout")
        warning = client.next()
        assert (
            isinstance(warning, dict) and warning["type"] == "Warning" and warning["description"] == warning["warn_msg"]
        )
        client.send(type="Speak", text="This goes BOOM in the middle.")
        client.send(type="Flush")
        events = events_of(client.until("Flushed"))
        assert [event["type"] for event in events] == ["Error", "Flushed"] and events[0]["description"] == "it failed"


def _clients_python(package: str) -> str:
    """An interpreter that has the client: this one, or DECLAIM_CLIENTS_PYTHON."""
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    python = os.environ.get("DECLAIM_CLIENTS_PYTHON")
    if python is None:
        pytest.skip(f"{package} is not installed here, nor DECLAIM_CLIENTS_PYTHON set to a Python that has it")
    return python


def heard_by(package: str, *arguments: str) -> dict[str, int]:
    """What a stock client heard, in a process of its own."""
    script = Path(__file__).parent / "clients" / f"{package}_deepgram.py"
    done = subprocess.run(
        [_clients_python(package), str(script), *arguments], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("package", ["pipecat", "livekit"])
def test_the_stock_plugin_streams_text_in(world: World, package: str) -> None:
    heard = heard_by(package, world.address, FIRST, SECOND)
    assert heard["sample_rate"] == 24_000
    assert heard["num_bytes"] == pytest.approx(len(pcm(FIRST) + pcm(SECOND)), rel=0.03)
    assert [request.text for request in world.engine.requests] == [FIRST, SECOND]


def test_pipecat_is_interrupted_and_speaks_on(tmp_path: Path) -> None:
    with live_world(tmp_path, TextEngine(pace_s=0.05)) as world:
        heard = heard_by("pipecat", world.address, "--interrupt", FIRST, SECOND)
        assert heard["num_bytes"] == pytest.approx(len(pcm(FIRST) + pcm(SECOND)), rel=0.03)
        assert [request.text for request in world.engine.requests] == [FIRST, SECOND] * 2
        assert world.engine.num_cancelled == 2
        assert [usage.outcome for usage in world.gate.usages] == ["client_gone", "complete"]
