"""lark, the embedded voice: phonemes with durations -> side vectors -> decoder over eight delayed codebooks.

The text side says how long every phoneme lasts, and the decoder is told at each row which phoneme it is in. So the
length is known before the first step, the voice cannot skip or repeat, and its pace is a factor on the durations.
No cross-attention, no guidance, no end code. The first byte of a sentence says whose voice it is, or the codec's timbre
does. Source: engine/assets/lark/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from declaim.engine.checkpoint import Checkpoint
from declaim.engine.config import Int4Recipe
from declaim.engine.errors import InvalidRequest, ModelLoadError, TooLong, VoiceNotFound
from declaim.engine.models.base import Prefill, PromptSettings, StepContext
from declaim.engine.models.layers import (
    AttentionShape,
    AttentionWeights,
    MlpWeights,
    attend,
    full_attention,
    mlp,
    swiglu,
)
from declaim.engine.phonemes import Phonemizer
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.safetensors_io import read_integer, read_json, read_number
from declaim.engine.sequence import Prompt
from declaim.engine.spec import (
    CacheSpec,
    CodecSpec,
    FrameRule,
    ModelSpec,
    SamplingDefaults,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.engine.text import TextOptions, check_text, clean_text, is_speakable, speak
from declaim.engine.words import Segment, TimedWord, WordSpan
from declaim.kernels.codebooks import codebook_embedding
from declaim.kernels.linear import Linear, linear
from declaim.kernels.norm import add_rms_norm, rms_norm
from declaim.kernels.rope import rotary_table

MAX_TEXT_CHARS = 20_000
MAX_SEGMENT_CHARS = 120  # the voice was trained on sentences of 15 to 120 characters
MIN_FRAMES = 4
MIN_DURATION_S, MIN_LOG_DURATION_S = 0.025, 0.02
MAX_POSITIONS = 2048
_FIRST_SPEAKER_BYTE = 1
# A phoneme is heard before its duration begins, as its teacher's are: 0.037 s is the median of 97 that follow a rest.
SPEECH_LEADS_S = 0.0375
_FOLLOWING = "of"  # a word that changes nothing in the one before it but that something follows


# A turn of a dialogue, as Dia's transcripts mark it: [S1] is the voice asked for, [S2] the model's next one.
_TURN = re.compile(r"\[S([1-9])\]\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LarkSpeaker:
    """byte: what this speaker's sentences begin with. timbre: what the codec speaks them in."""

    name: str
    byte: int
    timbre: int = 0


@dataclass(frozen=True, slots=True)
class LarkConfig:
    """What config.json says, checked. has_speaker_embedding: the file says who speaks, the first version's does not."""

    text_vocab_size: int
    max_text_length: int
    encoder_layers: int
    encoder_hidden: int
    encoder_ffn: int
    encoder_shape: AttentionShape
    layers: int
    hidden: int
    ffn: int
    shape: AttentionShape
    num_codebooks: int
    codebook_size: int
    bos: int
    pad: int
    frame_rate_hz: int
    eps: float
    theta: float
    temperature: float
    top_k: int
    speakers: tuple[LarkSpeaker, ...]
    has_speaker_embedding: bool

    @property
    def vocab_size(self) -> int:
        """Codes, begin and padding: what a row may hold."""
        return self.codebook_size + 2

    @classmethod
    def read(cls, path: Path) -> LarkConfig:
        """Raises: ModelLoadError."""
        config = read_json(path)
        encoder, decoder, sampling = (_part(config, name, path) for name in ("encoder", "decoder", "sampling"))
        num_codebooks = read_integer(config, "num_codebooks", path)
        if config.get("delay_pattern") != list(range(num_codebooks)):
            raise ModelLoadError(f"{path}: delay_pattern must be 0 .. {num_codebooks - 1} in this family")
        return cls(
            text_vocab_size=read_integer(config, "text_vocab_size", path),
            max_text_length=read_integer(config, "max_text_length", path),
            encoder_layers=read_integer(encoder, "num_hidden_layers", path),
            encoder_hidden=read_integer(encoder, "hidden_size", path),
            encoder_ffn=read_integer(encoder, "intermediate_size", path),
            encoder_shape=_shape(encoder, path),
            layers=read_integer(decoder, "num_hidden_layers", path),
            hidden=read_integer(decoder, "hidden_size", path),
            ffn=read_integer(decoder, "intermediate_size", path),
            shape=_shape(decoder, path),
            num_codebooks=num_codebooks,
            codebook_size=read_integer(config, "codebook_size", path),
            bos=read_integer(config, "bos_token_id", path),
            pad=read_integer(config, "pad_token_id", path),
            frame_rate_hz=read_integer(config, "frame_rate", path),
            eps=read_number(config, "rms_norm_eps", path),
            theta=read_number(config, "rope_theta", path),
            temperature=read_number(sampling, "temperature", path),
            top_k=read_integer(sampling, "top_k", path),
            speakers=_speakers(config, path) if "speakers" in config else (LarkSpeaker("lark", _FIRST_SPEAKER_BYTE),),
            has_speaker_embedding="speakers" in config,
        )


def _part(config: dict[str, object], name: str, path: Path) -> dict[str, object]:
    part = config.get(name)
    if not isinstance(part, dict):
        raise ModelLoadError(f"{path} has no section {name!r}: it is not the config of a lark model")
    return part


def _speakers(config: dict[str, object], path: Path) -> tuple[LarkSpeaker, ...]:
    entries = config["speakers"]
    if not isinstance(entries, list) or not entries:
        raise ModelLoadError(f"{path}: speakers must be a list of {{name, byte}}, one at least")
    speakers = []
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ModelLoadError(f"{path}: speakers holds {entry!r}: each must be {{name, byte}}")
        speakers.append(LarkSpeaker(name, read_integer(entry, "byte", path)))
    if len({speaker.name for speaker in speakers}) < len(speakers):
        raise ModelLoadError(f"{path}: two speakers share a name: {', '.join(speaker.name for speaker in speakers)}")
    if not all(0 < speaker.byte < 256 for speaker in speakers) or len({s.byte for s in speakers}) < len(speakers):
        raise ModelLoadError(f"{path}: the speakers' bytes must lie in 1 .. 255 and differ")
    return tuple(speakers)


def _shape(config: dict[str, object], path: Path) -> AttentionShape:
    head_dim = read_integer(config, "head_dim", path)
    return AttentionShape(
        num_heads=read_integer(config, "num_attention_heads", path),
        num_kv_heads=read_integer(config, "num_key_value_heads", path),
        head_dim=head_dim,
        scale=head_dim**-0.5,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _TextSide:
    """From phoneme bytes to durations and side vectors."""

    embedding: torch.Tensor
    speakers: torch.Tensor | None  # [256, encoder_hidden], by the sentence's first byte; zero where no speaker is
    layers: tuple[tuple[AttentionWeights, MlpWeights], ...]
    norm: torch.Tensor
    angles: torch.Tensor
    duration_hidden: Linear
    duration_out: Linear
    side: Linear

    def encode(self, text_ids: torch.Tensor, config: LarkConfig) -> torch.Tensor:
        """int64 [L] -> [L, encoder_hidden]."""
        x, angles = self.embedding[text_ids], self.angles[: len(text_ids)]
        if self.speakers is not None:
            x = x + self.speakers[text_ids[:1]]  # a slice: an element would be waited for
        for attention, feed_forward in self.layers:
            x = full_attention(x, attention, config.encoder_shape, eps=config.eps, angles=angles)
            x = mlp(x, feed_forward, eps=config.eps)
        return rms_norm(x, self.norm, eps=config.eps)

    def durations_s(self, encoded: torch.Tensor) -> torch.Tensor:
        """Seconds that each byte lasts, float32 [L]."""
        hidden = F.silu(linear(encoded, self.duration_hidden))
        return linear(hidden, self.duration_out)[:, 0].float().exp()

    def side_vectors(
        self, encoded: torch.Tensor, durations_s: torch.Tensor, *, num_rows: int, rate_hz: int
    ) -> torch.Tensor:
        """What each row is told of the text: [num_rows, hidden]. Row t sounds at (t + 0.5) / rate."""
        ends = durations_s.cumsum(0)
        times = (torch.arange(num_rows, device=ends.device) + 0.5) / rate_hz
        index = torch.searchsorted(ends, times).clamp_(max=len(ends) - 1)
        lasting = durations_s[index]
        progress = ((times - (ends[index] - lasting)) / lasting.clamp(min=MIN_DURATION_S)).clamp(0.0, 1.5)
        length = lasting.log().clamp(min=float(np.log(MIN_LOG_DURATION_S)))
        told = torch.cat([encoded[index], torch.stack([progress, length], dim=1).to(encoded.dtype)], dim=1)
        return linear(told, self.side)


class LarkModel:
    """A loaded lark. Keeps `SpeechModel`."""

    def __init__(self, config: LarkConfig, weights: Checkpoint, *, spec: ModelSpec, phonemizer: Phonemizer) -> None:
        self.spec = spec
        self._config = config
        self._speakers = _all_speakers(config, spec.codec)
        self._phonemizer = phonemizer
        marks = (phonemizer.byte_of_symbol.get(mark) for mark in " .,!?;:—")
        self._pauses = frozenset(byte for byte in marks if byte is not None)
        self._space = phonemizer.byte_of_symbol[" "]
        self._text_side = _load_text_side(config, weights)
        self._layers = tuple(
            _load_block(weights, f"decoder.{i}", config.hidden, config.ffn, shape=config.shape)
            for i in range(config.layers)
        )
        self._embedding = weights.take(
            "code_embedding.weight", (config.num_codebooks * config.vocab_size, config.hidden)
        )
        self._norm = weights.take("norm.weight", (config.hidden,))
        self._head = weights.take_linear([("head.weight", config.num_codebooks * config.codebook_size)], config.hidden)
        self._angles = rotary_table(
            MAX_POSITIONS, config.shape.head_dim, theta=config.theta, device=self._embedding.device
        )
        self.weight_bytes = weights.weight_bytes

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        codec: CodecSpec,
        dtype: torch.dtype,
        device: torch.device,
        recipe: Int4Recipe | None = None,
        progress: Progress = ignore_progress,
    ) -> LarkModel:
        """Load a folder as engine/assets/lark/README.md describes it, quantized by `recipe` on the way.

        progress: see `Checkpoint`.
        Raises: ModelLoadError.
        """
        config = LarkConfig.read(folder / "config.json")
        with torch.inference_mode():
            return cls(
                config,
                Checkpoint(folder, dtype=dtype, device=device, recipe=recipe, progress=progress),
                spec=_spec(config, codec),
                phonemizer=Phonemizer.load(folder),
            )

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def segments(self, text: str, options: TextOptions) -> list[Segment]:
        """See `SpeechModel.segments`. A turn's segments begin with its mark, which `tokenize` reads."""
        marks = list(_TURN.finditer(text))
        if not marks:
            return _spoken(text, options)
        check_text(clean_text(_TURN.sub(" ", text)), max_chars=MAX_TEXT_CHARS)
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        turns = [(f"[S{mark.group(1)}] ", text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
        before = text[: marks[0].start()]
        return [
            Segment(mark + piece.text, tuple(_shifted(word, len(mark)) for word in piece.words), piece.ends_paragraph)
            for mark, turn in (("", before), *turns)
            if is_speakable(turn)
            for piece in _spoken(turn, options)
        ]

    def tokenize(self, segment: Segment, settings: PromptSettings) -> Prompt:
        sampling, text, words = settings.sampling, segment.text, segment.words
        if len(settings.voice.codes):
            raise InvalidRequest(
                "this model cannot imitate a voice: leave voice out, or name one of its own:"
                f" {', '.join(self.spec.voices)}",
                param="voice",
            )
        turn = _TURN.match(text)
        if turn is not None:
            text = text[turn.end() :]
            words = tuple(_shifted(word, -turn.end()) for word in words)
        speaker = self._speaker(settings.voice_name, turn=int(turn.group(1)) if turn is not None else 1)
        text_ids = (speaker.byte, *self._phonemizer.encode(text)[1:])
        if len(text_ids) > self._config.max_text_length:
            raise TooLong(
                f"a sentence takes {len(text_ids)} phonemes, and this model reads {self._config.max_text_length}:"
                " put punctuation in, or shorten it",
                param="text",
            )
        most = MAX_POSITIONS - self.spec.rule.num_drain_rows - 1
        max_frames = min(int(sampling.max_seconds * self._config.frame_rate_hz + 1e-6), most)
        if max_frames < 1:
            raise TooLong(
                f"max_seconds is {sampling.max_seconds:g}: a frame of this model lasts"
                f" {1 / self._config.frame_rate_hz:g} s, ask for at least that",
                param="max_seconds",
            )
        return Prompt(
            text_ids=text_ids,
            prefix_len=0,
            cross_len=0,
            prompt_frames=settings.voice.codes,
            max_frames=max_frames,
            num_branches=1,
            speed=settings.speed,
            words=self._timed(text, text_ids, words),
            timbre=speaker.timbre,
        )

    def _speaker(self, name: str | None, *, turn: int) -> LarkSpeaker:
        """Who says a turn: the speakers take turns from the one named on, or from the first.

        Raises: VoiceNotFound.
        """
        speakers = self._speakers
        names = [speaker.name for speaker in speakers]
        if name is not None and name not in names:
            raise VoiceNotFound(f"no voice {name!r} in this model: its voices are {', '.join(names)}", param="voice")
        first = 0 if name is None else names.index(name)
        return speakers[(first + turn - 1) % len(speakers)]

    def _timed(self, text: str, text_ids: Items[int], words: tuple[WordSpan, ...]) -> tuple[TimedWord, ...]:
        """Which bytes say each word: marks beside it are pauses and left out, a mere space is run over and belongs to
        the word before.

        How a word is said hangs on its neighbours, so each is counted with all before it and a word after it.
        """
        encode, pauses = self._phonemizer.encode, self._pauses
        begin, timed = 1, []  # the speaker's byte comes first
        num_following = len(encode(f". {_FOLLOWING}")) - len(encode("."))
        for word in words:
            is_last = word.last >= len(text.rstrip())
            end = len(text_ids) if is_last else len(encode(f"{text[: word.last]} {_FOLLOWING}")) - num_following
            first, last = begin, min(end - 1, len(text_ids) - 1)
            while first < last and text_ids[first] in pauses:
                first += 1
            while first < last and text_ids[last - 1] in pauses:
                last -= 1
            if first < last and text_ids[last] == self._space and text_ids[last + 1] not in pauses:
                last += 1
            if first < last:
                timed.append(TimedWord(word.text, first, last))
            begin = max(begin, end - 1)
        return tuple(timed)

    @torch.inference_mode()
    def prepare(self, prompt: Prompt) -> Prefill:
        text_ids = torch.tensor(prompt.text_ids, dtype=torch.int64, device=self.device)
        encoded = self._text_side.encode(text_ids, self._config)
        durations_s = self._text_side.durations_s(encoded) / prompt.speed
        rate_hz = self._config.frame_rate_hz
        num_frames = max(MIN_FRAMES, round(float(durations_s.sum()) * rate_hz))
        num_rows = min(num_frames, prompt.max_frames) + self.spec.rule.num_drain_rows
        side = self._text_side.side_vectors(encoded, durations_s, num_rows=num_rows, rate_hz=rate_hz)
        heard_s = durations_s.cpu().numpy().copy()
        heard_s[0] = max(0.0, heard_s[0] - SPEECH_LEADS_S / prompt.speed)
        return Prefill(side=side, num_frames=num_frames, durations_s=heard_s)

    def durations_s(self, prompt: Prompt) -> torch.Tensor:
        """Seconds that each byte of the prompt lasts at speed 1, float32 [L]."""
        with torch.inference_mode():
            text_ids = torch.tensor(prompt.text_ids, dtype=torch.int64, device=self.device)
            return self._text_side.durations_s(self._text_side.encode(text_ids, self._config))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return codebook_embedding(codes, self._embedding, vocab_size=self._config.vocab_size)

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        config = self._config
        angles = self._angles[context.positions]
        added: torch.Tensor | None = None
        for i, (attention, feed_forward) in enumerate(self._layers):
            normed, x = add_rms_norm(x, added, attention.norm, eps=config.eps)
            added = attend(
                normed,
                attention,
                config.shape,
                angles=angles,
                slots=context.slots,
                cache=context.caches[i],
                plan=context.attention,
            )
            normed, x = add_rms_norm(x, added, feed_forward.norm, eps=config.eps)
            added = swiglu(normed, feed_forward)
        normed, _ = add_rms_norm(x, added, self._norm, eps=config.eps)
        return normed[context.last]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        config = self._config
        return linear(hidden, self._head).float().view(len(hidden), config.num_codebooks, config.codebook_size)


def _spec(config: LarkConfig, codec: CodecSpec) -> ModelSpec:
    if codec.num_codebooks != config.num_codebooks or codec.codebook_size != config.codebook_size:
        raise ModelLoadError(
            f"the codec has {codec.num_codebooks} codebooks of {codec.codebook_size}, and the model draws"
            f" {config.num_codebooks} of {config.codebook_size}: they do not belong together"
        )
    delay = tuple(range(config.num_codebooks))
    return ModelSpec(
        family="lark",
        cache=CacheSpec(
            num_layers=config.layers, num_kv_heads=config.shape.num_kv_heads, head_dim=config.shape.head_dim
        ),
        rule=FrameRule(
            delay=delay,
            fill=config.bos,
            eos=None,
            drain=tuple(tuple(config.pad if d <= j else -1 for d in delay) for j in range(max(delay))),
        ),
        sampling=SamplingSpec(
            ops=(Temperature(), TopK(), TopP()),
            defaults=SamplingDefaults(temperature=config.temperature, top_k=config.top_k, max_seconds=30.0),
        ),
        codec=codec,
        hidden_size=config.hidden,
        vocab_size=config.codebook_size,
        max_positions=MAX_POSITIONS,
        has_side=True,
        supports_speed=True,
        supports_voice_prompt=False,
        voices=tuple(speaker.name for speaker in _all_speakers(config, codec)),
    )


def _all_speakers(config: LarkConfig, codec: CodecSpec) -> tuple[LarkSpeaker, ...]:
    """The model's own, and the first of them in each timbre of the codec's that has no name among these."""
    own = config.speakers
    names = {speaker.name for speaker in own}
    others = (
        LarkSpeaker(name, own[0].byte, timbre)
        for timbre, name in enumerate(codec.timbres)
        if timbre > 0 and name not in names
    )
    return (*own, *others)


def _spoken(text: str, options: TextOptions) -> list[Segment]:
    return speak(text, options, language="en", max_chars=MAX_TEXT_CHARS, max_segment_chars=MAX_SEGMENT_CHARS)


def _shifted(word: WordSpan, by: int) -> WordSpan:
    return replace(word, first=word.first + by, last=word.last + by)


def _load_text_side(config: LarkConfig, weights: Checkpoint) -> _TextSide:
    hidden = config.encoder_hidden

    def dense(name: str, num_out: int, num_in: int) -> Linear:
        return weights.take_linear([(f"{name}.weight", num_out)], num_in, bias=f"{name}.bias")

    embedding = weights.take("text_embedding.weight", (config.text_vocab_size, hidden))
    speakers: torch.Tensor | None = None
    if config.has_speaker_embedding:
        speakers = torch.zeros_like(embedding)
        rows = weights.take("speaker_embedding.weight", (len(config.speakers), hidden))
        speakers[[speaker.byte for speaker in config.speakers]] = rows
    return _TextSide(
        embedding=embedding,
        speakers=speakers,
        layers=tuple(
            _load_block(weights, f"encoder.{i}", hidden, config.encoder_ffn, shape=config.encoder_shape)
            for i in range(config.encoder_layers)
        ),
        norm=weights.take("encoder_norm.weight", (hidden,)),
        angles=rotary_table(
            config.max_text_length, config.encoder_shape.head_dim, theta=config.theta, device=embedding.device
        ),
        duration_hidden=dense("duration.0", hidden, hidden),
        duration_out=dense("duration.2", 1, hidden),
        side=dense("side_proj", config.hidden, hidden + 2),
    )


def _load_block(
    weights: Checkpoint, name: str, hidden: int, ffn: int, *, shape: AttentionShape
) -> tuple[AttentionWeights, MlpWeights]:
    attention = AttentionWeights(
        norm=weights.take(f"{name}.input_norm.weight", (hidden,)),
        qkv=weights.take_linear([(f"{name}.qkv_proj.weight", shape.qkv_size)], hidden),
        out=weights.take_linear([(f"{name}.o_proj.weight", hidden)], shape.num_heads * shape.head_dim),
    )
    feed_forward = MlpWeights(
        norm=weights.take(f"{name}.post_norm.weight", (hidden,)),
        gate_up=weights.take_linear([(f"{name}.gate_up_proj.weight", 2 * ffn)], hidden),
        down=weights.take_linear([(f"{name}.down_proj.weight", hidden)], ffn),
    )
    return attention, feed_forward
