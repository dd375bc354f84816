"""When Dia's words are heard: on a model that looks, row by row, where its weights were set to look.

Row p's embedding is unit vector p, whatever else the layers could add is zero, and the head draws code p from it: so
the model counts, and stops where it is told. Its queries are a table: row p looks for the byte that row p is to say. It
sees the bytes alone, not where they are, so it looks at every "a" of a text at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from declaim.engine import AudioChunk, Engine, EngineConfig, SamplingParams, SpeechRequest, Word
from declaim.engine.alignment import Aligner
from declaim.engine.models.dia import encode_text
from declaim.engine.request import EncodedVoice
from declaim.engine.words import TimedWord
from declaim.kernels.attention import attention_weights, paged_attention, plan_attention
from declaim.kernels.kv_cache import allocate_cache
from tests.dia_checkpoints import BOS, EOS, FRAME_RATE_HZ, DiaSize, make_dia

TEXT = "[S1] Anna can bake a banana cake,  [S2]and \u00e9lan!"
WORDS = ["Anna", "can", "bake", "a", "banana", "cake,", "and", "\u00e9lan!"]
MOST_ROWS = 256
SIZE = DiaSize(layers=3, hidden=MOST_ROWS, ffn=16, encoder_layers=1, encoder_hidden=64, max_positions=320)
HEAD_DIM = 16


@dataclass(frozen=True)
class Script:
    """What a counting model does. looks_at: the place in the whole text, in bytes, that each row says."""

    folder: Path
    text: str
    looks_at: list[int]
    num_prompt_frames: int

    def frames(self, word_number: int) -> tuple[int, int]:
        """When a word of WORDS is heard, in frames: from its first byte until what follows its last."""
        whole = encode_text(self.text)
        begin = end = len(encode_text(self.text[: self.text.rindex("[S1] Anna")]))
        for word in WORDS[: word_number + 1]:
            said = list(word.encode())
            begin = next(i for i in range(end, len(whole)) if whole[i : i + len(said)] == said)
            end = begin + len(said)
        new = self.looks_at[self.num_prompt_frames :]
        return sum(place < begin for place in new), sum(place < end for place in new)


def make_counting(folder: Path, *, text: str = TEXT, num_prompt_frames: int = 0, others: str = "nothing") -> Script:
    """A model that says every byte for 1 to 5 rows. others: what the heads of layers 0 and 2 look at."""
    random = np.random.default_rng(5)
    num_before = len(encode_text(text[: text.rindex("[S1] Anna")]))
    num_bytes = len(encode_text(text))
    rows = [0] * num_prompt_frames
    if num_before:
        rows = sorted(random.integers(0, num_before, num_prompt_frames).tolist())
    for place in range(num_before, num_bytes):
        rows += [place] * int(random.integers(1, 6))
    make_dia(folder, SIZE)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        if "encoder.embedding" in name or name.endswith("cross_attention.k_proj.weight"):
            weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    embedding, head = weights["model.decoder.embeddings.embed.weight"], weights["logits_dense.weight"]
    embedding.zero_()
    embedding[BOS, 0] = 1.0
    embedding[torch.arange(MOST_ROWS - 1), torch.arange(1, MOST_ROWS)] = 1.0
    head.zero_()
    head[torch.arange(MOST_ROWS), torch.arange(MOST_ROWS)] = 1.0
    head[len(rows), len(rows)], head[EOS, len(rows)] = 0.0, 1.0
    # Each byte's key, as the norms leave it, in every head: what a query of length 60 along it finds.
    encoded = weights["model.encoder.embedding.weight"]
    encoded = encoded / encoded.square().mean(1, keepdim=True).sqrt()
    ids = torch.tensor(encode_text(text))
    for layer in range(SIZE.layers):
        name = f"model.decoder.layers.{layer}.cross_attention"
        keys = (encoded @ weights[f"{name}.k_proj.weight"].T).view(len(encoded), -1, HEAD_DIM)
        wanted = keys / keys.norm(dim=-1, keepdim=True)
        # The norm makes a unit vector sqrt(hidden) long.
        queries = torch.zeros(SIZE.cross_heads, HEAD_DIM, MOST_ROWS)
        looks_at = torch.tensor(rows)
        if layer != 1:
            looks_at = {
                "nothing": torch.full_like(looks_at, -1),
                "its beginning": torch.full_like(looks_at, num_before),
                "its end": torch.full_like(looks_at, num_bytes - 1),
                "anything": torch.full_like(looks_at, -1),
            }[others]
        if others == "anything" and layer != 1:
            queries.normal_(0.0, 0.05 / MOST_ROWS**0.5, generator=torch.Generator().manual_seed(layer))
        elif looks_at[0] >= 0:
            queries[:, :, : len(rows)] = 8.0 * wanted[ids[looks_at]].permute(1, 2, 0) / MOST_ROWS**0.5
        weights[f"{name}.q_proj.weight"] = queries.reshape(-1, MOST_ROWS).contiguous()
    for name in weights:
        if name.endswith("pre_ca_norm.weight") or name == "model.decoder.norm.weight":
            weights[name].fill_(1.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Script(folder, text, rows, num_prompt_frames)


def request(*, seconds: float | None = None, temperature: float = 0.0) -> SpeechRequest:
    sampling = SamplingParams(temperature=temperature, seed=3, max_seconds=seconds)
    return SpeechRequest(TEXT, sampling=sampling, word_timestamps=True)


def words_of(chunks: list[AudioChunk]) -> list[Word]:
    return [word for chunk in chunks for word in chunk.words]


def check_in_order(chunks: list[AudioChunk]) -> None:
    begin = 0.0
    for chunk in chunks:
        end = begin + len(chunk.audio) / chunk.sample_rate_hz
        assert all(begin - 1e-9 <= word.start_s < end for word in chunk.words)
        begin = end
    times = [time for word in words_of(chunks) for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert not times or times[-1] <= begin + 1e-9


def check_times(words: list[Word], script: Script, *, within: float) -> None:
    assert [word.text for word in words] == WORDS
    for i, word in enumerate(words):
        begin, end = script.frames(i)
        assert word.start_s * FRAME_RATE_HZ == pytest.approx(begin, abs=within), word
        assert word.end_s * FRAME_RATE_HZ == pytest.approx(end, abs=within), word


@pytest.mark.parametrize("others", ["nothing", "its beginning", "its end", "anything"])
def test_words_are_heard_when_their_bytes_are_looked_at_within_a_frame(tmp_path: Path, others: str) -> None:
    script = make_counting(tmp_path, others=others)
    # One chunk holds all, so that every word's end is known.
    with Engine.from_pretrained(tmp_path, EngineConfig(first_chunk_s=10.0, max_chunk_s=10.0)) as engine:
        chunks = list(engine.stream(request()))
    assert sum(chunk.num_frames for chunk in chunks) == len(script.looks_at)
    check_in_order(chunks)
    check_times(words_of(chunks), script, within=1.0 + 1e-6)


def test_words_begin_in_the_chunk_that_brings_them_and_never_change_with_the_chunks(tmp_path: Path) -> None:
    script = make_counting(tmp_path)
    with Engine.from_pretrained(tmp_path, EngineConfig(first_chunk_s=0.05, max_chunk_s=0.2)) as engine:
        chunks = list(engine.stream(request()))
    assert len(chunks) > 5
    assert sum(bool(chunk.words) for chunk in chunks) > 3
    check_in_order(chunks)
    words = words_of(chunks)
    assert [word.text for word in words] == WORDS
    for i, word in enumerate(words):
        begin, end = script.frames(i)
        assert word.start_s * FRAME_RATE_HZ == pytest.approx(begin, abs=1.0 + 1e-6)
        assert word.end_s * FRAME_RATE_HZ <= end + 1.0 + 1e-6  # the end, or as much of it as was known


def test_what_a_voice_prompt_says_is_not_told_and_takes_no_time(tmp_path: Path) -> None:
    said = "[S1] Can Anna bake a cake?"
    script = make_counting(tmp_path, text=f"{said} {TEXT}", num_prompt_frames=40)
    codes = np.zeros((40, 9), dtype=np.int32)
    codes[:, 0] = np.arange(40)
    speech = SpeechRequest(
        TEXT, voice=EncodedVoice(said, codes), sampling=SamplingParams(temperature=0.0), word_timestamps=True
    )
    config = EngineConfig(first_chunk_s=10.0, max_chunk_s=10.0, max_step_positions=12)
    with Engine.from_pretrained(tmp_path, config) as engine:
        chunks = list(engine.stream(speech))
    assert sum(chunk.num_frames for chunk in chunks) == len(script.looks_at) - 40
    check_in_order(chunks)
    check_times(words_of(chunks), script, within=1.0 + 1e-6)


def test_words_that_are_cut_off_are_not_told(tmp_path: Path) -> None:
    script = make_counting(tmp_path)
    with Engine.from_pretrained(tmp_path) as engine:
        chunks = list(engine.stream(request(seconds=script.frames(3)[0] / FRAME_RATE_HZ - 0.03)))
    assert chunks[-1].finish_reason == "length"
    check_in_order(chunks)
    assert [word.text for word in words_of(chunks)] == WORDS[:3]


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dia(tmp_path_factory.mktemp("dia") / "random", seed=2)


def test_asking_for_words_changes_no_code(random_weights: Path) -> None:
    asking = [
        SpeechRequest(TEXT[: 20 + 9 * i], sampling=SamplingParams(seed=i, max_seconds=0.6), word_timestamps=True)
        for i in range(3)
    ]
    silent = [SpeechRequest(each.text, sampling=each.sampling) for each in asking]
    with Engine.from_pretrained(random_weights, EngineConfig(max_step_positions=7)) as engine:
        expected = engine.generate(silent, progress=False)
        mixed = engine.generate([asking[0], silent[1], asking[2]], progress=False)
        alone = [engine.generate([each], progress=False)[0] for each in asking]
    for result, *others in zip(expected, mixed, alone, strict=True):
        for other in others:
            np.testing.assert_array_equal(other.codes, result.codes)
            np.testing.assert_array_equal(other.audio, result.audio)


def test_words_of_random_weights_are_in_order_inside_the_audio_and_the_seeds_alone(random_weights: Path) -> None:
    speech = request(seconds=1.2, temperature=1.0)
    with Engine.from_pretrained(random_weights) as engine:
        chunks = list(engine.stream(speech))
        assert all(chunk.words == () for chunk in engine.stream(SpeechRequest(TEXT, sampling=speech.sampling)))
    check_in_order(chunks)
    # A cache for one: with another beside it, it is preempted and begins again.
    config = EngineConfig(num_blocks=20, block_size=16)
    with Engine.from_pretrained(random_weights, config) as engine:
        first, second = engine.stream(speech), engine.stream(speech)
        crowd = [[next(first)], [next(second)]]
        crowd[0] += first
        crowd[1] += second
        assert engine.stats().preemptions > 0
    for each in crowd:
        check_in_order(each)
        assert [word.text for word in words_of(each)] == [word.text for word in words_of(chunks)]
        assert [word.start_s for word in words_of(each)] == [word.start_s for word in words_of(chunks)]


def test_attention_weights_are_those_that_attention_mixes_values_by() -> None:
    torch.manual_seed(0)
    device = torch.device("cpu")
    k_cache, v_cache = (
        allocate_cache(6, 2, block_size=4, head_dim=8, dtype=torch.float32, device=device).normal_() for _ in range(2)
    )
    queries, table = torch.randn(3, 4, 8), [4, 1, 5]
    plan = plan_attention([table], [3], context_lens=[10], block_size=4, causal=False, device=device)
    weights = attention_weights(queries * 0.5, k_cache, table, context_len=10)
    values = v_cache[table].transpose(1, 2).flatten(0, 1)[:10].repeat_interleave(2, 1)
    mixed = paged_attention(queries, k_cache, v_cache, plan, scale=0.5)
    torch.testing.assert_close(torch.einsum("nht,thd->nhd", weights, values), mixed)


def test_what_nobody_looks_at_takes_no_time_and_what_is_never_reached_is_not_told() -> None:
    aligner = Aligner([TimedWord(name, 3 * i + 1, 3 * i + 3) for i, name in enumerate("abcd")], 12, lag=2)
    for place in [0, 1, 1, 2, 2, 2, 7, 7, 8, 8, 8, 8]:
        aligner.observe(np.eye(12)[[place]])
    assert aligner.words(1.0) == (Word("a", 1.0, 6.0), Word("b", 6.0, 6.0), Word("c", 6.0, 10.0))


def test_a_frames_time_is_never_in_the_frame_before() -> None:
    aligner = Aligner([TimedWord(str(i), i, i + 1) for i in range(400)], 400, lag=0)
    for place in range(400):
        aligner.observe(np.eye(400)[[place]])
    starts = [word.start_s * FRAME_RATE_HZ for word in aligner.words(FRAME_RATE_HZ)]
    assert len(starts) == 400
    assert all(frame <= start < frame + 1e-6 for frame, start in enumerate(starts))
