"""Dia-1.6B: text bytes -> encoder -> decoder with cross-attention over nine delayed codebooks, with guidance.

The unconditional branch reads a text of zero bytes. Its encoder output is one vector at every position, and
cross-attention has no positions of its own, so all it adds is one constant vector a layer: computed at load, it spares
that branch the encoder, the cross-attention cache and the kernel.
When words are heard follows from the conditional branch's cross-attention (`alignment.py`), where steps run operation
by operation; captured graphs keep no queries, and with them no words are told.
Source: transformers `DiaForConditionalGeneration`, whose greedy codes these are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from declaim.engine.checkpoint import Checkpoint
from declaim.engine.config import Int4Recipe
from declaim.engine.errors import InvalidRequest, ModelLoadError, TooLong
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
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.safetensors_io import read_json
from declaim.engine.sequence import Prompt
from declaim.engine.spec import (
    AllowedIds,
    CacheSpec,
    CodecSpec,
    CrossSpec,
    EosGate,
    FrameRule,
    Guidance,
    ModelSpec,
    SamplingDefaults,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.engine.text import TextOptions, clean_text, is_speakable, speak
from declaim.engine.words import Segment, TimedWord, WordSpan
from declaim.kernels.attention import paged_attention
from declaim.kernels.codebooks import codebook_embedding
from declaim.kernels.linear import Linear, linear
from declaim.kernels.norm import add_rms_norm, rms_norm
from declaim.kernels.rope import rotary_table

EXPECTED_CROSS_PER_ROW = (
    0.15  # text bytes for each row of codes, in ordinary speech (15 characters and 86 frames a second)
)
# Ordinary speech takes 0.067 s. These are far enough from it to be heard as wrong.
SECONDS_PER_CHAR = (0.02, 0.4)
SPEAKER_TAGS = ((b"[S1]", b"\x01"), (b"[S2]", b"\x02"))
_TAG = re.compile(r"(\[S[12]\])")


@dataclass(frozen=True, slots=True)
class DiaConfig:
    """What config.json says, checked."""

    encoder_layers: int
    encoder_hidden: int
    encoder_ffn: int
    encoder_shape: AttentionShape
    max_text_bytes: int
    text_vocab_size: int
    layers: int
    hidden: int
    ffn: int
    shape: AttentionShape
    cross_shape: AttentionShape
    vocab_size: int
    max_positions: int
    delay: tuple[int, ...]
    eos: int
    pad: int
    bos: int
    eps: float
    theta: float

    @classmethod
    def read(cls, config: Mapping[str, Any], *, source: Path) -> DiaConfig:
        """Raises: ModelLoadError naming the first key that is missing."""
        try:
            encoder, decoder = config["encoder_config"], config["decoder_config"]
            rope = decoder.get("rope_parameters") or {"rope_theta": decoder.get("rope_theta", 10000.0)}
            return cls(
                encoder_layers=encoder["num_hidden_layers"],
                encoder_hidden=encoder["hidden_size"],
                encoder_ffn=encoder["intermediate_size"],
                encoder_shape=_shape(encoder, ""),
                max_text_bytes=encoder["max_position_embeddings"],
                text_vocab_size=encoder["vocab_size"],
                layers=decoder["num_hidden_layers"],
                hidden=decoder["hidden_size"],
                ffn=decoder["intermediate_size"],
                shape=_shape(decoder, ""),
                cross_shape=_shape(decoder, "cross_"),
                vocab_size=decoder["vocab_size"],
                max_positions=decoder["max_position_embeddings"],
                delay=tuple(config["delay_pattern"]),
                eos=decoder.get("eos_token_id") or config["eos_token_id"],
                pad=decoder.get("pad_token_id") or config["pad_token_id"],
                bos=decoder.get("bos_token_id") or config["bos_token_id"],
                eps=decoder.get("norm_eps", 1e-5),
                theta=float(rope["rope_theta"]),
            )
        except KeyError as missing:
            raise ModelLoadError(f"{source} has no {missing}: it is not the config of a Dia model") from missing


def _shape(config: Mapping[str, Any], prefix: str) -> AttentionShape:
    return AttentionShape(
        num_heads=config[f"{prefix}num_attention_heads"],
        num_kv_heads=config[f"{prefix}num_key_value_heads"],
        head_dim=config[f"{prefix}head_dim"],
        scale=1.0,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    attention: AttentionWeights
    cross_norm: torch.Tensor
    cross_q: Linear
    cross_k: Linear
    cross_v: Linear
    cross_out: Linear
    mlp: MlpWeights
    unconditional: torch.Tensor  # [C], what cross-attention adds in the unconditional branch


@dataclass(frozen=True, slots=True, eq=False)
class _Encoder:
    embedding: torch.Tensor
    layers: tuple[tuple[AttentionWeights, MlpWeights], ...]
    norm: torch.Tensor
    angles: torch.Tensor

    def run(self, text_ids: torch.Tensor, config: DiaConfig) -> torch.Tensor:
        """int64 [L] -> [L, encoder_hidden]."""
        x, angles = self.embedding[text_ids], self.angles[: len(text_ids)]
        for attention, feed_forward in self.layers:
            x = full_attention(x, attention, config.encoder_shape, eps=config.eps, angles=angles)
            x = mlp(x, feed_forward, eps=config.eps)
        return rms_norm(x, self.norm, eps=config.eps)


class DiaModel:
    """A loaded Dia. Keeps `SpeechModel`."""

    def __init__(
        self, config: DiaConfig, weights: Checkpoint, *, spec: ModelSpec, encoder: _Encoder | None = None
    ) -> None:
        """encoder: one that is loaded already, wherever it is; None loads it beside the rest."""
        self.spec = spec
        self._config = config
        self._encoder = encoder or _load_encoder(config, weights)
        self._embedding = weights.take(
            "model.decoder.embeddings.embed.weight", (len(config.delay) * config.vocab_size, config.hidden)
        )
        no_text = self._encode([0])
        self._layers = tuple(_load_layer(config, weights, i, no_text=no_text) for i in range(config.layers))
        self._norm = weights.take("model.decoder.norm.weight", (config.hidden,))
        self._head = weights.take_linear([("logits_dense.weight", len(self._embedding))], config.hidden)
        self._angles = rotary_table(
            config.max_positions, config.shape.head_dim, theta=config.theta, device=self._embedding.device
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
        text_device: torch.device | None = None,
    ) -> DiaModel:
        """Load a folder as transformers 5 saves it, quantized by `recipe` on the way.

        text_device: where the text encoder is to be, in float32; None keeps it beside the decoder. progress: see
        `Checkpoint`.
        Raises: ModelLoadError.
        """
        config = DiaConfig.read(read_json(folder / "config.json"), source=folder / "config.json")
        generation = folder / "generation_config.json"
        defaults = _defaults(read_json(generation) if generation.exists() else {})
        with torch.inference_mode():
            weights = Checkpoint(folder, dtype=dtype, device=device, recipe=recipe, progress=progress)
            text_weights = weights
            if text_device is not None:
                text_weights = weights.on(text_device, dtype=torch.float32)
            encoder = _load_encoder(config, text_weights)
            return cls(config, weights, encoder=encoder, spec=_spec(config, codec, defaults=defaults))

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def segments(self, text: str, options: TextOptions) -> list[Segment]:
        """Dia speaks a whole dialogue in one go: its voices carry over only within a sequence. It was trained on
        transcripts as they are written, so it reads numbers itself."""
        return speak(text, options, language=None, max_chars=self._config.max_text_bytes, max_segment_chars=None)

    def tokenize(self, segment: Segment, settings: PromptSettings) -> Prompt:
        config = self._config
        voice, sampling = settings.voice, settings.sampling
        before = f"{clean_text(voice.transcript)} " if voice.transcript else ""
        text_ids = encode_text(before + segment.text)
        if len(text_ids) > config.max_text_bytes:
            raise TooLong(
                f"text takes {len(text_ids)} bytes (voice transcript included), and this model reads"
                f" {config.max_text_bytes}: send it in parts",
                param="text",
            )
        if settings.speed != 1.0:
            raise InvalidRequest(
                f"speed is {settings.speed}: this model speaks at its own pace only; leave it at 1", param="speed"
            )
        # One row before the first frame, one more for the end, and what drains after it.
        most = config.max_positions - 1 - self.spec.rule.num_drain_rows - len(voice.codes)
        max_frames = min(int(sampling.max_seconds * self.spec.codec.frame_rate_hz + 1e-6), most)
        if max_frames < 1:
            raise TooLong(
                f"max_seconds {sampling.max_seconds:g} and a voice prompt of {len(voice.codes)} frames leave no room to"
                f" speak: a model of {config.max_positions} positions needs a shorter prompt, or max_seconds of at"
                f" least {1 / self.spec.codec.frame_rate_hz:.3f}",
                param="max_seconds",
            )
        return Prompt(
            text_ids=tuple(text_ids),
            prefix_len=0,
            cross_len=len(text_ids),
            prompt_frames=voice.codes,
            max_frames=max_frames,
            num_branches=1 if sampling.guidance_scale == 1.0 else 2,
            speed=settings.speed,
            words=tuple(_timed(segment.text, segment.words, num_before=len(encode_text(before)))),
        )

    @torch.inference_mode()
    def prepare(self, prompt: Prompt) -> Prefill:
        encoded = self._encode(prompt.text_ids)
        head_dim = self._config.cross_shape.head_dim
        return Prefill(
            cross=tuple(
                (
                    linear(encoded, layer.cross_k).view(len(encoded), -1, head_dim),
                    linear(encoded, layer.cross_v).view(len(encoded), -1, head_dim),
                )
                for layer in self._layers
            )
        )

    def _encode(self, text_ids: Items[int]) -> torch.Tensor:
        """[L, encoder_hidden], where the decoder is and in its dtype, wherever the encoder is."""
        on_device = torch.tensor(text_ids, dtype=torch.int64, device=self._encoder.embedding.device)
        return self._encoder.run(on_device, self._config).to(device=self.device, dtype=self.dtype)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return codebook_embedding(codes, self._embedding, vocab_size=self._config.vocab_size)

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        config = self._config
        angles = self._angles[context.positions]
        added: torch.Tensor | None = None
        for i, layer in enumerate(self._layers):
            normed, x = add_rms_norm(x, added, layer.attention.norm, eps=config.eps)
            added = attend(
                normed,
                layer.attention,
                config.shape,
                angles=angles,
                slots=context.slots,
                cache=context.caches[i],
                plan=context.attention,
            )
            normed, x = add_rms_norm(x, added, layer.cross_norm, eps=config.eps)
            added = self._cross_attend(normed[: context.num_conditional], layer, context, i)
            normed, x = add_rms_norm(x, added, layer.mlp.norm, rest=layer.unconditional, eps=config.eps)
            added = swiglu(normed, layer.mlp)
        normed, _ = add_rms_norm(x, added, self._norm, eps=config.eps)
        return normed[context.last]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self._head).float().view(len(hidden), len(self._config.delay), self._config.vocab_size)

    def _cross_attend(self, normed: torch.Tensor, layer: _Layer, context: StepContext, index: int) -> torch.Tensor:
        """What the conditional rows gain from the text; each of the others gains `layer.unconditional`."""
        if context.cross is None:
            raise ValueError("Dia needs a cross-attention plan")
        shape = self._config.cross_shape
        q = linear(normed, layer.cross_q).view(len(normed), -1, shape.head_dim)
        if context.cross_queries is not None:
            context.cross_queries.append(q * shape.scale)
        k_cache, v_cache = context.cross_caches[index]
        mixed = paged_attention(q, k_cache, v_cache, context.cross, scale=shape.scale)
        return linear(mixed.flatten(1), layer.cross_out)


def encode_text(text: str) -> list[int]:
    """UTF-8 bytes; speaker tags become the bytes 1 and 2. The text is clean, so no other byte below 9 is in it."""
    data = text.encode("utf-8")
    for tag, byte in SPEAKER_TAGS:
        data = data.replace(tag, byte)
    return list(data)


def _timed(text: str, words: Items[WordSpan], *, num_before: int) -> Iterator[TimedWord]:
    """Which bytes say each word, `num_before` others first. Speaker tags are not said: they are cut off and out of the
    words they touch, and those that hold nothing else are left out."""
    for word in words:
        parts = _TAG.split(text[word.first : word.last])
        begin = word.first
        for part in parts:
            end = begin + len(part)
            if is_speakable(part) and not _TAG.fullmatch(part):
                first, last = (num_before + len(encode_text(text[:place])) for place in (begin, end))
                yield TimedWord(word.text if len(parts) == 1 else part, first, last)
            begin = end


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """The checkpoint's generation_config.json where it speaks, else the reference implementation's settings."""

    def number(name: str, fallback: float) -> float:
        value = generation.get(name)
        return fallback if value is None else float(value)

    return SamplingDefaults(
        temperature=number("temperature", 1.2),
        top_k=int(number("top_k", 45)),
        top_p=number("top_p", 0.95),
        guidance_scale=number("guidance_scale", 3.0),
        max_seconds=30.0,
    )


def _spec(config: DiaConfig, codec: CodecSpec, *, defaults: SamplingDefaults) -> ModelSpec:
    num_codebooks, max_delay = len(config.delay), max(config.delay)
    if codec.num_codebooks != num_codebooks or codec.codebook_size > config.eos:
        raise ModelLoadError(
            f"the codec has {codec.num_codebooks} codebooks of {codec.codebook_size}, and the model draws"
            f" {num_codebooks} of {config.eos}: they do not belong together; put the model's own codec in codec/"
        )
    drain = tuple(
        tuple(config.eos if j == d else config.pad if j > d else -1 for d in config.delay) for j in range(max_delay + 1)
    )
    return ModelSpec(
        family="dia",
        cache=CacheSpec(
            num_layers=config.layers,
            num_kv_heads=config.shape.num_kv_heads,
            head_dim=config.shape.head_dim,
            cross=CrossSpec(
                num_layers=config.layers,
                num_kv_heads=config.cross_shape.num_kv_heads,
                head_dim=config.cross_shape.head_dim,
                max_positions=config.max_text_bytes,
                positions_per_row=EXPECTED_CROSS_PER_ROW,
            ),
        ),
        rule=FrameRule(delay=config.delay, fill=config.bos, eos=config.eos, drain=drain),
        sampling=SamplingSpec(
            ops=(
                Guidance(center="cond", keep="cond", top_k_filter=True),
                Temperature(),
                AllowedIds((config.eos + 1,) + (config.eos,) * (num_codebooks - 1)),
                EosGate(config.eos),
                TopK(),
                TopP(),
            ),
            defaults=defaults,
        ),
        codec=codec,
        hidden_size=config.hidden,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        has_side=False,
        supports_speed=False,
        supports_voice_prompt=True,
        seconds_per_char=SECONDS_PER_CHAR,
        supports_dialogue=True,
    )


def _load_encoder(config: DiaConfig, weights: Checkpoint) -> _Encoder:
    embedding = weights.take("model.encoder.embedding.weight", (config.text_vocab_size, config.encoder_hidden))
    return _Encoder(
        embedding=embedding,
        layers=tuple(
            (
                _load_attention(
                    weights,
                    f"model.encoder.layers.{i}",
                    config.encoder_hidden,
                    config.encoder_shape,
                    norm="pre_sa_norm",
                ),
                _load_mlp(
                    weights, f"model.encoder.layers.{i}", config.encoder_hidden, config.encoder_ffn, norm="post_sa_norm"
                ),
            )
            for i in range(config.encoder_layers)
        ),
        norm=weights.take("model.encoder.norm.weight", (config.encoder_hidden,)),
        angles=rotary_table(
            config.max_text_bytes, config.encoder_shape.head_dim, theta=config.theta, device=embedding.device
        ),
    )


def _load_layer(config: DiaConfig, weights: Checkpoint, index: int, *, no_text: torch.Tensor) -> _Layer:
    name, cross = f"model.decoder.layers.{index}", config.cross_shape
    q_size, kv_size = cross.num_heads * cross.head_dim, cross.num_kv_heads * cross.head_dim

    def cross_linear(part: str, num_out: int, num_in: int) -> Linear:
        return weights.take_linear([(f"{name}.cross_attention.{part}.weight", num_out)], num_in)

    cross_v = cross_linear("v_proj", kv_size, config.encoder_hidden)
    cross_out = cross_linear("o_proj", config.hidden, q_size)
    value = linear(no_text, cross_v).view(cross.num_kv_heads, cross.head_dim)
    value = value.repeat_interleave(cross.num_heads // cross.num_kv_heads, 0).reshape(1, q_size)
    return _Layer(
        attention=_load_attention(weights, name, config.hidden, config.shape, norm="pre_sa_norm"),
        cross_norm=weights.take(f"{name}.pre_ca_norm.weight", (config.hidden,)),
        cross_q=cross_linear("q_proj", q_size, config.hidden),
        cross_k=cross_linear("k_proj", kv_size, config.encoder_hidden),
        cross_v=cross_v,
        cross_out=cross_out,
        mlp=_load_mlp(weights, name, config.hidden, config.ffn, norm="pre_mlp_norm"),
        unconditional=linear(value, cross_out)[0],
    )


def _load_attention(
    weights: Checkpoint, name: str, hidden: int, shape: AttentionShape, *, norm: str
) -> AttentionWeights:
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv = [
        (f"{name}.self_attention.{part}.weight", size)
        for part, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
    ]
    return AttentionWeights(
        norm=weights.take(f"{name}.{norm}.weight", (hidden,)),
        qkv=weights.take_linear(qkv, hidden),
        out=weights.take_linear([(f"{name}.self_attention.o_proj.weight", hidden)], q_size),
    )


def _load_mlp(weights: Checkpoint, name: str, hidden: int, ffn: int, *, norm: str) -> MlpWeights:
    return MlpWeights(
        norm=weights.take(f"{name}.{norm}.weight", (hidden,)),
        gate_up=weights.take_linear([(f"{name}.mlp.gate_up_proj.weight", 2 * ffn)], hidden),
        down=weights.take_linear([(f"{name}.mlp.down_proj.weight", hidden)], ffn),
    )
