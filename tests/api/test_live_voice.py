"""Live text with the embedded voice: what only a real engine can show."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from declaim.engine import Engine, EngineConfig
from tests.api.fake_engine import eventually
from tests.api.live_world import World, audio_of, events_of, live_world

TEXT = "The quick brown fox jumps over the lazy dog. Then it goes home and sleeps."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = Engine.from_pretrained("lark", EngineConfig(device="cpu", vocoder="inline", num_threads=1))
    with live_world(tmp_path_factory.mktemp("live"), engine) as made:
        yield made


def samples_of(audio: bytes) -> np.ndarray:
    return np.frombuffer(audio, "<i2").astype(np.float64) / 32768


def test_an_agents_words_are_heard_while_they_are_written(world: World) -> None:
    with world.live(seed=3) as client:
        words = TEXT.split(" ")
        for word in words[:10]:
            client.send(type="input.text", text=word + " ")
        # The first sentence is whole; the rest has not been written.
        first = client.until("audio.done")
        assert events_of(first)[0]["sentence_text"] == "The quick brown fox jumps over the lazy dog."
        client.say(" ".join(words[10:]))
        rest = client.until("session.done")
    audio = samples_of(audio_of(first + rest))
    assert 3.0 < len(audio) / 24_000 < 10.0 and 0.01 < np.sqrt(np.mean(audio**2)) < 0.5
    done = events_of(rest)[-1]
    assert done["audio_seconds"] == pytest.approx(len(audio) / 24_000, abs=1e-3) and done["error"] is False


def test_clauses_joined_have_no_gap_and_no_click(world: World) -> None:
    with world.live(seed=3) as client:
        client.say(TEXT)
        heard = client.until("session.done")
    pieces, piece = [], b""
    for message in heard:
        if isinstance(message, bytes):
            piece += message
        elif message["type"] == "audio.done":
            pieces.append(samples_of(piece))
            piece = b""
    assert len(pieces) >= 2
    steps = np.abs(np.diff(np.concatenate(pieces)))
    for joint in np.cumsum([len(each) for each in pieces])[:-1]:
        assert steps[joint - 1] <= 0.05, "a click at a joint"
    # No more silence than a pause between sentences at any joint.
    for before, after in zip(pieces, pieces[1:], strict=False):
        quiet = lambda each: int(np.argmax(np.abs(each) > 0.01))  # noqa: E731
        assert 0.2 <= (quiet(before[::-1]) + quiet(after)) / 24_000 <= 0.32


def test_a_cancel_frees_the_engine(world: World) -> None:
    engine = world.engine
    with world.live() as client:
        client.say(TEXT * 10)
        client.until("audio.start")
        assert engine.stats().streams > 0
        began = time.perf_counter()
        client.send(type="input.cancel")
        client.until("audio.cancelled")
        assert time.perf_counter() - began < 5.0
        assert eventually(lambda: engine.stats().blocks_used == 0 and engine.stats().running == 0, within_s=10)


def test_speed_is_the_models_own_and_deepgram_speaks_too(world: World) -> None:
    lengths = []
    for query in ("", "?speed=1.5"):
        with world.deepgram(query) as client:
            client.send(type="Speak", text="The quick brown fox jumps.")
            client.send(type="Flush")
            lengths.append(len(audio_of(client.until("Flushed"))))
    assert lengths[1] / lengths[0] == pytest.approx(1 / 1.5, rel=0.15)
