"""WS /v1/audio/speech/stream as its clients see it: real sockets, a real server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from declaim.engine.errors import SequenceFailed
from tests.api.fake_engine import eventually
from tests.api.live_world import TextEngine, World, audio_of, events_of, live_world, pcm

FIRST = "Hello there, dear friend of mine."
SECOND = "It is good to see you again today."
THIRD = "Let us talk about the weather now."
PATH = "/v1/audio/speech/stream"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with live_world(tmp_path_factory.mktemp("shared"), TextEngine()) as made:
        yield made


@pytest.fixture
def world(shared: World) -> World:
    return shared.forget()


def test_text_that_comes_word_by_word_is_spoken_before_it_ends(world: World) -> None:
    with world.live() as client:
        client.say(f"{FIRST} {SECOND} Let us", done=False)
        heard = client.until("audio.done") + client.until("audio.done")
        client.say("talk about the weather now.")
        heard += client.until("session.done")
    events = events_of(heard)
    assert [event["type"] for event in events] == ["audio.start", "audio.done"] * 3 + ["session.done"]
    assert [event["sentence_text"] for event in events if event["type"] == "audio.start"] == [FIRST, SECOND, THIRD]
    assert audio_of(heard) == pcm(FIRST) + pcm(SECOND) + pcm(THIRD)
    start, done = events[0], events[-1]
    assert (start["format"], start["sample_rate"], start["channels"], start["sentence_index"]) == ("pcm", 24_000, 1, 0)
    assert (done["utterance_index"], done["total_sentences"], done["error"]) == (0, 3, False)
    num_chars, num_frames = (
        len(f"{FIRST} {SECOND} Let us ") + len("talk about the weather now. "),
        len(audio_of(heard)) // 1920,
    )
    assert done["usage"] == {
        "input_tokens": num_chars,
        "output_tokens": num_frames,
        "total_tokens": num_chars + num_frames,
    }
    assert str(done["request_id"]).startswith("req_") and {event["request_id"] for event in events} == {
        done["request_id"]
    }
    assert events[1]["total_bytes"] == len(pcm(FIRST)) and events[1]["finish_reason"] == "stop"
    (usage,) = world.gate.usages
    assert (usage.chars, usage.frames, usage.status, usage.outcome) == (num_chars, num_frames, 200, "complete")
    # Two sums of the same seconds, in portions that depend on how fast the client reads: equal but for their last bits.
    assert [usage.generated_s, usage.delivered_s] == pytest.approx([num_frames / 25] * 2, abs=1e-12, rel=0)
    assert usage.ttfa_s is not None and usage.ttfa_s >= 0.0
    # Charged when it is let in: what had come by then.
    ((request_id, num_admitted),) = world.gate.admitted
    assert request_id == done["request_id"] and len(FIRST) <= num_admitted < num_chars


def test_the_config_sticks_until_another_comes(world: World) -> None:
    with world.live(seed=7) as client:
        for index in range(2):
            client.send(type="input.text", text=FIRST, utterance_id=f"turn {index}")
            client.send(type="input.done")
            done = events_of(client.until("session.done"))[-1]
            assert (done["utterance_index"], done["utterance_id"]) == (index, f"turn {index}")
        client.send(type="session.config", response_format="wav", seed=8)
        client.say(FIRST)
        heard = client.until("session.done")
    audio, rate = soundfile.read(io.BytesIO(audio_of(heard)))
    assert rate == 24_000 and len(audio) == len(FIRST) * 960
    assert [request.sampling.seed for request in world.engine.requests] == [7, 7, 8]


def test_an_utterance_may_not_change_its_config(world: World) -> None:
    with world.live() as client:
        client.say(FIRST, done=False)
        client.send(type="session.config", response_format="wav")
        client.send(type="input.done")
        events = events_of(client.until("session.done"))
    assert "input.done first" in [event for event in events if event["type"] == "error"][0]["message"]
    assert {event["format"] for event in events if event["type"] == "audio.start"} == {"pcm"}


def test_without_stream_audio_an_utterance_is_one_file(world: World) -> None:
    with connect(f"ws://{world.address}{PATH}") as socket:
        socket.send(json.dumps({"type": "session.config"}))
        socket.send(json.dumps({"type": "input.text", "text": f"{FIRST} {SECOND}"}))
        socket.send(json.dumps({"type": "input.done"}))
        messages = [socket.recv(5) for _ in range(4)]
    (file,) = [message for message in messages if isinstance(message, bytes)]
    audio, rate = soundfile.read(io.BytesIO(file))
    assert rate == 24_000 and len(audio) == len(f"{FIRST} {SECOND}") * 960
    assert [json.loads(message)["type"] for message in messages if isinstance(message, str)] == [
        "audio.start",
        "audio.done",
        "session.done",
    ]


@pytest.mark.parametrize("stream_audio", [True, False])
def test_words_come_with_their_audio(world: World, stream_audio: bool) -> None:
    with world.live(word_timestamps=True, stream_audio=stream_audio, split_granularity="sentence") as client:
        client.say(FIRST)
        events = events_of(client.until("session.done"))
    chunks = [event for event in events if event["type"] == "audio.chunk"]
    assert b"".join(base64.b64decode(str(chunk["audio_b64"])) for chunk in chunks) == pcm(FIRST)
    words = [word for chunk in chunks for word in chunk["timestamps"]]  # type: ignore[attr-defined]
    assert "".join(word["word"] for word in words) == FIRST
    assert (words[0]["start_ms"], words[0]["end_ms"]) == (0, 200)
    assert [chunk["chunk_id"] for chunk in chunks] == list(range(len(chunks)))
    assert len(chunks) > 1 if stream_audio else len(chunks) == 1


@pytest.mark.parametrize("response_format", ["mp3", "opus", "aac", "flac", "wav"])
def test_every_format_is_a_file_for_each_clause(world: World, response_format: str) -> None:
    import av

    with world.live(response_format=response_format) as client:
        client.say(FIRST)
        heard = client.until("session.done")
    with av.open(io.BytesIO(audio_of(heard))) as container:
        num_samples = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    assert num_samples == pytest.approx(len(FIRST) / 25, abs=0.12)


def test_the_next_clause_is_in_the_engine_while_one_is_spoken_and_no_third(tmp_path: Path) -> None:
    engine = TextEngine(pace_s=0.02)
    with live_world(tmp_path, engine) as world, world.live() as client:
        client.say(f"{FIRST} {SECOND} {THIRD}")
        heard = client.until("session.done")
        assert audio_of(heard) == pcm(FIRST) + pcm(SECOND) + pcm(THIRD)
    assert engine.began[SECOND] < engine.ended[FIRST] <= engine.began[THIRD]


def test_a_cancel_is_silence_at_once_and_frees_the_engine(tmp_path: Path) -> None:
    engine = TextEngine(pace_s=0.5)  # a clause takes 3 s
    with live_world(tmp_path, engine) as world, world.live() as client:
        client.say(f"{FIRST} {SECOND} {THIRD}")
        client.say("This utterance waits and will be dropped, too.")
        client.until("audio.start")
        assert isinstance(client.next(), bytes)
        began = time.perf_counter()
        client.send(type="input.cancel")
        cancelled = events_of(client.until("audio.cancelled"))[-1]
        assert time.perf_counter() - began < 2.0 and engine.finished == []
        assert (cancelled["utterance_index"], cancelled["dropped_utterances"]) == (0, 1)
        assert 0.0 < float(str(cancelled["audio_seconds"])) < len(FIRST) / 25
        assert set(engine.cancelled) == {FIRST, SECOND} and max(engine.cancelled.values()) - began < 2.0
        assert world.gate.usages[0].outcome == "client_gone"
        engine.pace_s = 0.0
        # The socket goes on, and what was cancelled is never heard of again.
        client.say(THIRD)
        after = client.until("session.done")
        assert audio_of(after) == pcm(THIRD) and events_of(after)[-1]["utterance_index"] == 2


def test_a_cancel_of_nothing_is_answered(world: World) -> None:
    with world.live() as client:
        client.send(type="input.cancel")
        assert client.next() == {
            "type": "audio.cancelled",
            "utterance_index": 0,
            "audio_seconds": 0.0,
            "dropped_utterances": 0,
        }


def test_a_client_that_leaves_frees_the_engine(tmp_path: Path) -> None:
    engine = TextEngine(pace_s=0.01)
    with live_world(tmp_path, engine) as world:
        with world.live() as client:
            client.say(FIRST)
            client.until("audio.start")
        assert eventually(lambda: set(engine.cancelled) == {FIRST}, within_s=2)
        assert eventually(lambda: len(world.gate.usages) == 1)


def test_a_slow_client_holds_the_engine_back_and_is_let_go(tmp_path: Path) -> None:
    engine = TextEngine()
    with live_world(tmp_path, engine, send_timeout_s=1.0) as world:
        with connect(f"ws://{world.address}{PATH}", max_queue=1, max_size=None, close_timeout=0.1) as socket:
            socket.send(json.dumps({"type": "session.config", "response_format": "pcm", "stream_audio": True}))
            sentences = "".join(f"This is sentence number {n} of very many. " for n in range(400))
            socket.send(json.dumps({"type": "input.text", "text": sentences}))
            # 400 sentences are 30 MB; the kernel's socket buffers take some of them.
            assert eventually(lambda: len(world.gate.usages) == 1, within_s=20)
        (usage,) = world.gate.usages
        assert usage.outcome == "client_gone" and len(engine.requests) < 390
        # Two sentences at once are all that was made and not taken.
        assert usage.delivered_s <= usage.generated_s < usage.delivered_s + 2 * 45 / 25


def test_an_engine_that_fails_is_told_and_the_socket_goes_on(tmp_path: Path) -> None:
    engine = TextEngine(failure=SequenceFailed("the sequence failed"))
    with live_world(tmp_path, engine) as world, world.live() as client:
        client.say("This sentence goes BOOM in the middle. And this one is never said.")
        events = events_of(client.until("session.done"))
        assert [event["type"] for event in events] == ["audio.start", "audio.done", "error", "session.done"]
        assert events[1]["error"] is True and events[1]["finish_reason"] == "error"
        assert events[2]["message"] == "the sequence failed"
        assert set(events[2]["error"]) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
        assert events[3]["error"] is True
        client.say(SECOND)
        assert audio_of(client.until("session.done")) == pcm(SECOND)
    assert [usage.outcome for usage in world.gate.usages] == ["cut", "complete"]


def test_a_quota_that_is_spent_is_an_error_for_every_utterance(world: World) -> None:
    with world.live(f"{PATH}?api_key=poor") as client:
        for _ in range(2):
            client.say(FIRST)
            events = events_of(client.until("session.done"))
            assert events[0]["error"]["code"] == "insufficient_quota"  # type: ignore[index]
    assert world.engine.requests == [] and world.gate.usages == []


def test_every_clause_is_charged_before_it_is_spoken_and_usage_says_the_same(world: World) -> None:
    with world.live() as client:
        client.say(f"{FIRST} {SECOND} Let us", done=False)
        client.until("audio.done")
        client.say("talk about the weather now.")
        done = events_of(client.until("session.done"))[-1]
    ((_, num_admitted),) = world.gate.admitted
    num_chars = len(f"{FIRST} {SECOND} Let us talk about the weather now. ")
    assert num_admitted < num_chars and num_admitted + sum(world.gate.charged) == num_chars
    assert [usage.chars for usage in world.gate.usages] == [done["characters"]] == [num_chars]


def test_a_limit_met_in_the_middle_of_an_utterance_is_told_and_what_was_charged_is_heard(world: World) -> None:
    world.gate.max_charged = 10
    with world.live() as client:
        client.say(f"{FIRST} It is", done=False)
        heard = client.until("audio.done")
        client.say("good to see you again today.")
        heard += client.until("session.done")
    events = events_of(heard)
    assert audio_of(heard) == pcm(FIRST)
    (error,) = (event for event in events if event["type"] == "error")
    assert error["error"]["code"] == "rate_limit_exceeded" and error["retry_after"] == 3.0  # type: ignore[index]
    assert events[-1]["error"] is True and world.gate.usages[0].status == 429
    assert world.gate.usages[0].chars == events[-1]["characters"] == world.gate.admitted[0][1]


def test_who_hangs_up_while_a_clause_is_charged_has_it_in_the_ledger(world: World) -> None:
    world.gate.charging_s = 60.0
    with world.live() as client:
        client.say(f"{FIRST} It is", done=False)
        client.until("audio.done")
        client.say("good to see you again today.")
        assert eventually(lambda: bool(world.gate.charged))
    assert eventually(lambda: bool(world.gate.usages))
    assert world.gate.usages[0].outcome == "client_gone"
    assert world.gate.usages[0].chars == world.gate.admitted[0][1] + sum(world.gate.charged)


def test_a_dialogues_speaker_is_named_again_in_every_clause(world: World) -> None:
    with world.live() as client:
        client.say(f"[S1] {FIRST} {SECOND} [S2] {THIRD} {FIRST}")
        client.until("session.done")
    assert [request.text for request in world.engine.requests] == [
        f"[S1] {FIRST}",
        f"[S1] {SECOND}",
        f"[S2] {THIRD}",
        f"[S2] {FIRST}",
    ]


@pytest.mark.parametrize("text", ["...", "🙂", " — "])
def test_what_cannot_be_said_is_a_short_silence(world: World, text: str) -> None:
    with world.live() as client:
        client.say(text)
        heard = client.until("session.done")
    assert not np.frombuffer(audio_of(heard), "<i2").any() and len(audio_of(heard)) == 9600
    assert events_of(heard)[-1]["error"] is False


def test_a_flush_of_nothing_is_done_at_once(world: World) -> None:
    with world.live() as client:
        client.send(type="input.done")
        done = client.next()
    assert isinstance(done, dict) and (done["type"], done["total_sentences"]) == ("session.done", 0)


def test_session_close_speaks_the_rest_and_closes(world: World) -> None:
    with world.live() as client:
        client.say(FIRST, done=False)
        client.send(type="session.close")
        assert audio_of(client.until("session.done")) == pcm(FIRST)
        with pytest.raises(ConnectionClosed) as closed:
            client.next()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1000


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"response_format": "mp4"}, "response_format"),
        ({"model": "gpt-9"}, None),
        ({"voice": "nobody"}, "voice"),
        ({"speed": 9}, "speed"),
        ({"split_granularity": "letter"}, "split_granularity"),
        ({"stream_audio": "yes"}, "stream_audio"),
        ({"sample_rate": 1}, "sample_rate"),
        ({"ref_audio": "!!"}, "ref_audio"),
        ({"ref_audio": base64.b64encode(b"RIFF" + bytes(100)).decode(), "ref_text": "x"}, "ref_audio"),
    ],
)
def test_a_config_that_is_wrong_is_refused_before_any_text(world: World, config: dict[str, object], param: str) -> None:
    with world.live(**config) as client:
        error = client.next()
        assert isinstance(error, dict) and error["type"] == "error", error
        assert error["error"]["param"] == param and error["message"] == error["error"]["message"]  # type: ignore[index]
        with pytest.raises(ConnectionClosed) as closed:
            client.next()
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


@pytest.mark.parametrize("message", ["{", "[]", "3", '{"type": "input.text", "text": 4}', '{"type": "x"}', "[" * 90_000,
                                     '{"type": null}', json.dumps({"type": "input.text", "text": "x" * 200_000}),
                                     json.dumps({"type": "input.text", "text": "x y " * 8_000})])  # fmt: skip
def test_a_message_that_is_wrong_is_an_error_and_no_more(world: World, message: str) -> None:
    with world.live() as client:
        client.socket.send(message)
        error = client.next()
        assert isinstance(error, dict) and error["type"] == "error"
        client.socket.send(b"\x00\x01")
        assert "binary" in str(events_of(client.until("error"))[-1]["message"])
        client.say(FIRST)
        assert audio_of(client.until("session.done")) == pcm(FIRST)


def test_a_client_that_sends_only_rubbish_is_let_go(tmp_path: Path) -> None:
    with live_world(tmp_path, TextEngine(), max_strikes=5) as world, world.live() as client:
        for _ in range(5):
            client.send(type="rubbish")
        assert [event["type"] for event in events_of([client.next() for _ in range(5)])] == ["error"] * 5
        with pytest.raises(ConnectionClosed):
            client.next()


def test_silence_is_timed(tmp_path: Path) -> None:
    with live_world(tmp_path, TextEngine(pace_s=0.02), config_timeout_s=0.2, idle_timeout_s=0.2) as world:
        with connect(f"ws://{world.address}{PATH}") as socket:
            assert "session.config" in json.loads(socket.recv(5))["message"]
        with world.live() as client:
            client.say(FIRST)
            # Speaking takes longer than the limit, and is no silence.
            assert audio_of(client.until("session.done")) == pcm(FIRST)
            client.send(type="ping")
            assert client.next() == {"type": "pong"}
            assert "0.2 s" in str(events_of(client.until("error"))[-1]["message"])
            with pytest.raises(ConnectionClosed):
                client.next()


def test_an_utterance_that_failed_and_never_ends_is_idle(tmp_path: Path) -> None:
    engine = TextEngine(failure=SequenceFailed("it failed"))
    with live_world(tmp_path, engine, idle_timeout_s=0.2) as world, world.live() as client:
        client.say("This sentence goes BOOM in the middle. And", done=False)
        assert events_of(client.until("error"))[-1]["message"] == "it failed"
        assert "0.2 s" in str(events_of(client.until("error"))[-1]["message"])


def test_keys_come_as_a_header_a_query_or_a_subprotocol(world: World) -> None:
    url = f"ws://{world.address}{PATH}"
    for query, headers, protocols in (
        ("?api_key=wrong", {}, None),
        ("", {"Authorization": "Bearer wrong"}, None),
        ("", {}, ["token", "wrong"]),
        ("", {}, ["realtime", "openai-insecure-api-key.wrong"]),
    ):
        with pytest.raises(InvalidStatus) as refused:
            connect(url + query, additional_headers=headers, subprotocols=protocols)  # type: ignore[arg-type]
        assert refused.value.response.status_code == 401
        assert json.loads(refused.value.response.body or b"")["error"]["code"] == "invalid_api_key"
    for protocols, agreed in ((["token", "acme"], "token"), (["realtime", "openai-insecure-api-key.acme"], "realtime")):
        with connect(url, subprotocols=protocols) as socket:  # type: ignore[arg-type]
            assert socket.subprotocol == agreed


def test_a_tenant_has_so_many_sockets_and_no_more(tmp_path: Path) -> None:
    with live_world(tmp_path, TextEngine(), max_sockets_per_tenant=1) as world:
        with world.live(f"{PATH}?api_key=acme"), world.live(f"{PATH}?api_key=rival"):
            with pytest.raises(InvalidStatus) as refused:
                connect(f"ws://{world.address}{PATH}?api_key=acme")
            assert refused.value.response.status_code == 503
        # A place comes back when its socket has gone.
        assert eventually(lambda: _opens(world), within_s=5)


def _opens(world: World) -> bool:
    try:
        with world.live(f"{PATH}?api_key=acme"):
            return True
    except InvalidStatus:
        return False


def test_sockets_that_drop_anywhere_leave_nothing_behind(tmp_path: Path) -> None:
    engine = TextEngine(pace_s=0.002)
    chance = random.Random(5)

    async def drop(address: str) -> None:
        async with connect_async(f"ws://{address}{PATH}", close_timeout=0.2) as socket:
            steps: list[object] = [{"type": "session.config", "response_format": "mp3", "stream_audio": True}]
            steps += [{"type": "input.text", "text": f"{FIRST} {SECOND} {THIRD}"}, {"type": "input.done"}] * 2
            steps += [{"type": "input.cancel"}, {"type": "session.close"}]
            for step in steps[: chance.randrange(len(steps) + 1)]:
                await socket.send(json.dumps(step))
            for _ in range(chance.randrange(6)):
                try:
                    await asyncio.wait_for(socket.recv(), 0.05)
                except (TimeoutError, ConnectionClosed):
                    break
            if chance.random() < 0.5:
                socket.transport.abort()

    async def storm(address: str) -> None:
        await asyncio.gather(*(drop(address) for _ in range(60)))

    with live_world(tmp_path, engine) as world:
        num_threads = threading.active_count()
        asyncio.run(storm(world.address))
        assert eventually(lambda: len(engine.finished) + engine.num_cancelled == len(engine.requests), within_s=5)
        assert eventually(lambda: len(world.gate.usages) == len(world.gate.admitted), within_s=5)
        assert engine.num_cancelled > 5
        assert threading.active_count() <= num_threads + 8  # the default executor's
        with world.live() as client:
            client.say(FIRST)
            assert audio_of(client.until("session.done")) == pcm(FIRST)


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.lists(st.integers(), max_size=2)
KINDS = st.sampled_from(
    ["session.config", "input.text", "input.done", "input.cancel", "ping", "Speak", "Flush", "Clear", "x"]
)
MESSAGES = st.one_of(
    st.fixed_dictionaries(
        {"type": KINDS | VALUES},
        optional={
            "text": st.text(max_size=60) | VALUES,
            "voice": VALUES,
            "response_format": st.sampled_from(["pcm", "wav", "json", "mp3"]) | VALUES,
            "speed": st.floats() | VALUES,
            "stream_audio": VALUES,
            "split_granularity": st.sampled_from(["none", "clause"]) | VALUES,
            "seed": VALUES,
            "ref_audio": VALUES,
            "sample_rate": VALUES,
            "utterance_id": VALUES,
        },
    ).map(json.dumps),
    st.text(max_size=30),
    st.binary(max_size=30),
)


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(MESSAGES, max_size=12), path=st.sampled_from([PATH, "/v1/speak"]), configures=st.booleans())
def test_no_message_hangs_or_breaks_the_server(
    shared: World, messages: list[str | bytes], path: str, configures: bool
) -> None:
    code = 1000
    with connect(f"ws://{shared.address}{path}", max_size=None) as socket:
        try:
            if configures:
                socket.send(json.dumps({"type": "session.config", "response_format": "pcm", "stream_audio": True}))
            for message in [*messages, '{"type": "session.close"}', '{"type": "Close"}']:
                socket.send(message)
            while True:
                socket.recv(5)
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd is not None else 1006
    assert code in (1000, 1008)
