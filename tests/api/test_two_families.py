"""Dia and Zonos at once, each in a `declaim serve` of its own from the same code: each answers as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from tests.api.test_live_server import serve
from tests.dia_checkpoints import make_dia
from tests.zonos_checkpoints import CONFIGS, EOS, make_zonos

pytest.importorskip("phonemizer")
pytest.importorskip("espeakng_loader")

SAMPLING = SamplingParams(temperature=0.0, max_seconds=0.4)
TEXTS = ("One.", "Two, or three.", "And four more of them!")
FAMILIES = ("dia", "zonos")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    dia = make_dia(root / "dia")
    zonos = make_zonos(root / "zonos", CONFIGS["hybrid"], seed=3)
    # Random weights hardly ever draw the end, and what a server speaks to warm up has no other: make it likely.
    weights = load_file(zonos / "model.safetensors")
    weights["backbone.norm_f.bias"][:] = 1.0
    weights["heads.0.weight"][EOS] = 0.19
    save_file(weights, zonos / "model.safetensors")
    return {"dia": dia, "zonos": zonos}


@pytest.fixture(scope="module")
def urls(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    root = tmp_path_factory.mktemp("servers")
    places = [root / family for family in FAMILIES]
    for place in places:
        place.mkdir()
    dia, zonos = (
        serve("inline", place, "--model", str(folders[family]), "--memory-gb", "1")
        for family, place in zip(FAMILIES, places, strict=True)
    )
    with dia as (dia_url, _), zonos as (zonos_url, _):
        yield {"dia": dia_url, "zonos": zonos_url}


def speak(url: str, text: str) -> bytes:
    body = {"model": "tts-1", "input": text, "response_format": "pcm", "sample_rate": 44_100}
    body |= {"temperature": 0, "max_seconds": 0.4}
    response = httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.content


def test_requests_to_both_at_once_get_what_each_family_says_alone(
    folders: dict[str, Path], urls: dict[str, str]
) -> None:
    alone = {(family, text): speak(urls[family], text) for family in FAMILIES for text in TEXTS}
    with ThreadPoolExecutor(len(alone)) as callers:
        for _ in range(2):
            answers = {key: callers.submit(speak, urls[key[0]], key[1]) for key in alone}
            assert all(answer.result() == alone[key] for key, answer in answers.items())
    for family in FAMILIES:
        with Engine.from_pretrained(folders[family], EngineConfig(device="cpu", memory_gb=1)) as engine:
            for text in TEXTS:
                (result,) = engine.generate([SpeechRequest(text, sampling=SAMPLING)], progress=False)
                samples = np.frombuffer(alone[family, text], "<i2") / 32767
                assert result.error is None and len(result.codes) > 3
                np.testing.assert_allclose(samples, result.audio.clip(-1, 1), atol=1e-4)


def test_each_server_has_its_own_familys_dials(urls: dict[str, str]) -> None:
    body = {"model": "tts-1", "input": "Oh.", "emotion": "anger", "max_seconds": 0.1}
    assert httpx.post(f"{urls['zonos']}/v1/audio/speech", json=body, timeout=60).status_code == 200
    refused = httpx.post(f"{urls['dia']}/v1/audio/speech", json=body, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "emotion"
