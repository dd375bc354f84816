"""Answers given again: the same bytes, to the same tenant only, never a damaged one, never past the disk's share."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.types import ASGIApp

from declaim.api.app import create_app
from declaim.api.cache import ResultCache, StoredSpeech, cache_key
from declaim.api.gate import Admission, Caller, OpenGate, Usage
from declaim.api.serving import Serving
from declaim.api.settings import ApiSettings
from declaim.engine import SequenceFailed, SpeechRequest
from declaim.engine.request import EncodedVoice, SamplingParams, Word
from tests.api.fake_engine import FakeEngine, eventually, make_spec, scripted
from tests.api.test_app import BODY, SPEECH, ask, client_of


def stored(size: int = 100) -> StoredSpeech:
    return StoredSpeech(os.urandom(size), (Word("Hi", 0.0, 0.25),), 7, 0.28, "stop")


class TenantGate(OpenGate):
    """Takes a key for the tenant's name."""

    def __init__(self) -> None:
        self.usages: list[Usage] = []

    async def authenticate(self, credential: str | None) -> Caller:
        return Caller(tenant=credential or "")

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        usages = self.usages
        inner = await super().admit(caller, request_id=request_id, chars=chars, service_tier=service_tier)

        class Admitted:
            tier = inner.tier
            headers = inner.headers

            async def charge(self, chars: int) -> None:
                raise AssertionError("a request comes whole")

            def close(self, usage: Usage) -> None:
                usages.append(usage)

        return Admitted()


def app_of(engine: FakeEngine, folder: Path, gate: TenantGate | None = None) -> ASGIApp:
    serving = Serving(lambda: engine)
    serving.start()
    assert eventually(lambda: serving.stage == "ready")
    return create_app(serving, gate=gate or TenantGate(), settings=ApiSettings(cache_folder=folder))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def post(app: ASGIApp, key: str = "acme", **changes: Any) -> httpx.Response:
    return ask(app, "POST", SPEECH, json={**BODY, **changes}, headers={"authorization": f"Bearer {key}"})


def in_turn(app: ASGIApp, folder: Path, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """Ask one after the other in one event loop, each once those before it are on disk; "key" names the tenant."""

    async def go() -> list[httpx.Response]:
        responses: list[httpx.Response] = []
        async with client_of(app) as client:
            for body in bodies:
                fields = {**BODY, **body}
                headers = {"authorization": f"Bearer {fields.pop('key', 'acme')}"}
                responses.append(await client.post(SPEECH, json=fields, headers=headers))
                if "content-length" not in responses[-1].headers:
                    before = sum("content-length" not in response.headers for response in responses)
                    assert await asyncio.to_thread(eventually, lambda n=before: len(files_in(folder)) == n)
        return responses

    return asyncio.run(go())


def test_what_is_written_is_read_also_by_the_next_process(tmp_path: Path) -> None:
    answer = stored()
    ResultCache(tmp_path, max_bytes=10_000).write("ab" * 32, answer)
    again = ResultCache(tmp_path, max_bytes=10_000)
    assert again.read("ab" * 32) == answer and again.read("cd" * 32) is None
    assert again.num_bytes == sum(path.stat().st_size for path in files_in(tmp_path))


def test_what_a_crash_left_half_written_is_swept_away(tmp_path: Path) -> None:
    ResultCache(tmp_path, max_bytes=10_000).write("ab" * 32, stored())
    half, young = tmp_path / "ab" / f"{'ab' * 32}.0123", tmp_path / "ab" / f"{'ab' * 32}.4567"
    for path in (half, young):
        path.write_bytes(b"half")
    os.utime(half, (0, 0))
    ResultCache(tmp_path, max_bytes=10_000)
    assert not half.exists() and young.exists()  # the young one may be another process's, at work


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_file_is_no_answer_and_is_deleted(tmp_path: Path, damage: str) -> None:
    cache = ResultCache(tmp_path, max_bytes=10_000)
    cache.write("ab" * 32, stored())
    (path,) = files_in(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"bit": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])
    assert cache.read("ab" * 32) is None
    assert files_in(tmp_path) == [] and cache.num_bytes == 0


def test_what_was_not_asked_for_longest_goes_first(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, max_bytes=3_500)
    keys = [f"{index:02}" * 32 for index in range(4)]
    for key in keys[:3]:
        cache.write(key, stored(1_000))
    assert cache.read(keys[0]) is not None
    cache.write(keys[3], stored(1_000))
    assert [cache.read(key) is not None for key in keys] == [True, False, True, True]
    assert sum(path.stat().st_size for path in files_in(tmp_path)) <= 3_500
    cache.write("ff" * 32, stored(5_000))  # larger than all the room: not kept, and nothing goes for it
    assert len(files_in(tmp_path)) == 3


def test_a_disk_that_takes_nothing_costs_nothing_but_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    engine = FakeEngine()
    app = app_of(engine, folder)
    folder.rmdir()
    folder.write_text("now a file is in the way")
    assert post(app).content == post(app).content
    assert len(engine.requests) == 2


def test_a_key_names_everything_that_decides_the_answer() -> None:
    base = SpeechRequest(text="Hi.", tenant="acme", sampling=SamplingParams(seed=1))
    codes = np.ones((4, 2), np.int32)
    others = [
        base,
        replace(base, text="Ho."),
        replace(base, tenant="other"),
        replace(base, sampling=SamplingParams(seed=2)),
        replace(base, sampling=SamplingParams(seed=1, temperature=0.5)),
        replace(base, speed=1.5),
        replace(base, language="de"),
        replace(base, normalize=False),
        replace(base, lexicon={"Hi": "Ho"}),
        replace(base, controls={"emotion": (0.1, 0.2)}),
        replace(base, word_timestamps=True),
        replace(base, voice="anna"),
        replace(base, voice=EncodedVoice("x", codes)),
        replace(base, voice=EncodedVoice("y", codes)),
        replace(base, voice=EncodedVoice("x", codes + 1)),
        replace(base, voice=EncodedVoice("x", codes, np.ones(3, np.float32))),
    ]
    known: dict[str, Any] = {
        "model_name": "lark",
        "fingerprint": "weights",
        "spec": make_spec(24_000),
        "rendering": "mp3",
    }
    keys = [cache_key(request, **known) for request in others]
    keys += [
        cache_key(base, **{**known, name: other})
        for name, other in (("model_name", "dia"), ("fingerprint", "trained on"), ("rendering", "wav"))
    ]
    assert len(set(keys)) == len(keys)
    again = replace(base, request_id="another", weight=3.0, tier="flex")
    assert cache_key(again, **known) == keys[0]
    same_voice = replace(base, voice=EncodedVoice("x", codes.copy()))
    assert cache_key(same_voice, **known) == keys[12]


@pytest.mark.parametrize("response_format", ["mp3", "wav", "pcm", "opus"])
def test_the_second_answer_is_the_first_with_its_length_and_costs_nothing(tmp_path: Path, response_format: str) -> None:
    engine, gate = FakeEngine(), TenantGate()
    app = app_of(engine, tmp_path, gate)
    body = {"response_format": response_format, "seed": 1}
    first, second = in_turn(app, tmp_path, body, body)
    assert second.content[44:] == first.content[44:] and len(second.content) == len(first.content)
    assert int(second.headers["content-length"]) == len(second.content)
    assert len(engine.requests) == 1
    assert [usage.is_cached for usage in gate.usages] == [False, True]
    assert gate.usages[1].generated_s == 0.0 and gate.usages[1].delivered_s == pytest.approx(0.6)
    assert "declaim_cached_answers_total 1.0" in ask(app, "GET", "/metrics").text


def test_another_tenant_or_seed_is_spoken_anew(tmp_path: Path) -> None:
    engine = FakeEngine()
    app = app_of(engine, tmp_path)
    in_turn(app, tmp_path, {"seed": 1}, {"seed": 1, "key": "other"}, {"seed": 2}, {"seed": 1})
    assert len(engine.requests) == 3


def test_other_weights_in_the_same_folder_are_asked_again(tmp_path: Path) -> None:
    before, after = FakeEngine(), FakeEngine(fingerprint="trained on")
    in_turn(app_of(before, tmp_path), tmp_path, {"seed": 1}, {"seed": 1})
    assert post(app_of(after, tmp_path), seed=1).status_code == 200
    assert (len(before.requests), len(after.requests)) == (1, 1)


def test_identical_requests_in_flight_share_one_generation(tmp_path: Path) -> None:
    engine, gate = scripted(num_chunks=5, delay_s=0.05), TenantGate()
    app = app_of(engine, tmp_path, gate)

    async def go() -> list[bytes]:
        async with client_of(app) as client:
            posts = [client.post(SPEECH, json={**BODY, "seed": 1}) for _ in range(8)]
            return [response.content for response in await asyncio.gather(*posts)]

    contents = asyncio.run(go())
    assert len(engine.requests) == 1 and len(set(contents)) == 1 and len(contents[0]) == 2 * 5 * 5 * 960
    assert sorted(usage.is_cached for usage in gate.usages) == [False] + [True] * 7


def test_a_failed_generation_fails_all_who_share_it_and_is_not_kept(tmp_path: Path) -> None:
    engine = scripted(num_chunks=5, delay_s=0.05, fail_after=2, failure=SequenceFailed("fell over"))
    app = app_of(engine, tmp_path)

    async def go() -> list[int]:
        async with client_of(app) as client:
            posts = [client.post(SPEECH, json={**BODY, "stream": False}) for _ in range(3)]
            return [response.status_code for response in await asyncio.gather(*posts)]

    assert asyncio.run(go()) == [500, 500, 500]
    assert len(engine.requests) == 1 and files_in(tmp_path) == []


def test_a_shared_generation_outlives_its_first_client_and_ends_with_its_last(tmp_path: Path) -> None:
    engine = scripted(num_chunks=10, delay_s=0.05)
    app = app_of(engine, tmp_path)

    async def go() -> bytes:
        async with client_of(app) as client:
            first = asyncio.create_task(client.post(SPEECH, json=BODY))
            second = asyncio.create_task(client.post(SPEECH, json=BODY))
            assert await asyncio.to_thread(eventually, lambda: len(engine.requests) == 1)
            first.cancel()
            content = (await second).content
            assert len(engine.finished) == 1
            alone = asyncio.create_task(client.post(SPEECH, json={**BODY, "seed": 2}))
            assert await asyncio.to_thread(eventually, lambda: len(engine.requests) == 2)
            alone.cancel()
            await asyncio.wait({first, alone})
            assert await asyncio.to_thread(eventually, lambda: len(files_in(tmp_path)) == 1)
            return content

    assert len(asyncio.run(go())) == 2 * 10 * 5 * 960
    assert len(engine.requests) == 2 and len(engine.cancelled) == 1
