"""What a model is made of, told by its config alone: how many weights of which kind, what a position caches, and what
a step, a text and a codec window hold in memory while they are computed.

Torch-free and pure: the memory plan reads this before any weight is read. Counts are of what the engine holds once
loaded, so layers that loading fuses or repeats are counted as it leaves them; tests compare them with loaded models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from declaim.engine.errors import InvalidConfig, ModelLoadError
from declaim.engine.spec import CacheSpec, CrossSpec, StateSpec

Precision = Literal["float32", "float16", "bfloat16", "int4"]
Family = Literal["dia", "lark", "zonos"]

# Of everything but int4's weights: activations, caches, embeddings, heads, norms.
ELEMENT_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int4": 2}
# kernels/int4.py: inputs that share a scale and an offset (the first size that divides a layer's inputs), what divides
# its outputs, and inputs that are packed together.
INT4_GROUPS = (128, 64, 32)
_INT4_OUT_MULTIPLE, _INT4_BLOCK = 16, 128
# kernels/matmul.py: products are split along their inputs until they fill the largest GPU.
_SPLIT_TILE, _SPLIT_PROGRAMS, _MAX_SPLITS, _MIN_SPLIT_INPUTS = 64, 288, 16, 256
_SCAN_BLOCK = 16  # kernels/mamba.py: positions of a prompt that a recurrent layer scans together

# What Dia-1.6B-0626 says of itself, so that it can be planned for without a network.
DIA_1_6B: Mapping[str, Any] = {
    "model_type": "dia",
    "delay_pattern": [0, 8, 9, 10, 11, 12, 13, 14, 15],
    "encoder_config": {
        "num_hidden_layers": 12,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 4096,
        "vocab_size": 256,
        "max_position_embeddings": 1024,
    },
    "decoder_config": {
        "num_hidden_layers": 18,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "cross_num_attention_heads": 16,
        "cross_num_key_value_heads": 16,
        "cross_head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 1028,
        "max_position_embeddings": 3072,
    },
}
DAC_44KHZ: Mapping[str, Any] = {
    "encoder_hidden_size": 64,
    "decoder_hidden_size": 1536,
    "n_codebooks": 9,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "sampling_rate": 44100,
    "downsampling_ratios": [2, 4, 8, 8],
}
_ZONOS_ATTENTION = {
    "causal": True,
    "num_heads": 16,
    "num_heads_kv": 4,
    "rotary_emb_dim": 128,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
}
_ZONOS_BACKBONE = {"d_model": 2048, "d_intermediate": 0, "attn_mlp_d_intermediate": 8192, "norm_epsilon": 1e-5}
_ZONOS_CONDITIONERS: tuple[Mapping[str, Any], ...] = (
    {"type": "EspeakPhonemeConditioner", "name": "espeak"},
    {
        "type": "PassthroughConditioner",
        "name": "speaker",
        "cond_dim": 128,
        "uncond_type": "learned",
        "projection": "linear",
    },
    {"type": "FourierConditioner", "name": "emotion", "input_dim": 8, "uncond_type": "learned"},
    {"type": "FourierConditioner", "name": "fmax", "min_val": 0, "max_val": 24000, "uncond_type": "learned"},
    {"type": "FourierConditioner", "name": "pitch_std", "min_val": 0, "max_val": 400, "uncond_type": "learned"},
    {"type": "FourierConditioner", "name": "speaking_rate", "min_val": 0, "max_val": 40, "uncond_type": "learned"},
    {"type": "IntegerConditioner", "name": "language_id", "min_val": -1, "max_val": 126, "uncond_type": "learned"},
)
_ZONOS_QUALITY: tuple[Mapping[str, Any], ...] = (
    {
        "type": "FourierConditioner",
        "name": "vqscore_8",
        "input_dim": 8,
        "min_val": 0.5,
        "max_val": 0.8,
        "uncond_type": "learned",
    },
    {"type": "FourierConditioner", "name": "ctc_loss", "min_val": -1, "max_val": 1000, "uncond_type": "learned"},
    {"type": "FourierConditioner", "name": "dnsmos_ovrl", "min_val": 1, "max_val": 5, "uncond_type": "learned"},
    {"type": "IntegerConditioner", "name": "speaker_noised", "min_val": 0, "max_val": 1, "uncond_type": "learned"},
)
ZONOS_TRANSFORMER: Mapping[str, Any] = {
    "backbone": {
        **_ZONOS_BACKBONE,
        "n_layer": 26,
        "ssm_cfg": {},
        "attn_layer_idx": list(range(26)),
        "attn_cfg": {**_ZONOS_ATTENTION, "rotary_emb_interleaved": True},
    },
    "prefix_conditioner": {"projection": "linear", "conditioners": list(_ZONOS_CONDITIONERS)},
    "eos_token_id": 1024,
    "masked_token_id": 1025,
}
ZONOS_HYBRID: Mapping[str, Any] = {
    "backbone": {
        **_ZONOS_BACKBONE,
        "n_layer": 46,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": list(range(0, 46, 4)),
        "attn_cfg": _ZONOS_ATTENTION,
    },
    "prefix_conditioner": {"projection": "linear", "conditioners": [*_ZONOS_CONDITIONERS, *_ZONOS_QUALITY]},
    "eos_token_id": 1024,
    "masked_token_id": 1025,
}
KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "nari-labs/Dia-1.6B-0626": DIA_1_6B,
    "Zyphra/Zonos-v0.1-transformer": ZONOS_TRANSFORMER,
    "Zyphra/Zonos-v0.1-hybrid": ZONOS_HYBRID,
}

SPARE_STATES = 8  # recurrent states beyond those of one step, for sequences that pause
_ZONOS_MAX_POSITIONS, _ZONOS_MAX_TEXT = 6400, 640  # as models/zonos.py has them; phonemes of a segment
_ZONOS_SYMBOLS, _ZONOS_CODEBOOKS = 189, 9
# The speaker encoder, as speaker.py has it: blocks and channels of each stage, mel bands, mel frames a second, sizes.
_SPEAKER_BLOCKS, _SPEAKER_CHANNELS, _SPEAKER_BANDS, _SPEAKER_RATE_HZ = (10, 20, 64, 3), (64, 128, 256, 512), 80, 100
_SPEAKER_ATTENTION, _SPEAKER_HIDDEN, _SPEAKER_EMBEDDING = 128, 256, 128
_SPEAKER_LIVE_TENSORS = 5  # of its widest stage: 4 on a GPU, and on the CPU 2 and what is computed at once

_DIA_CROSS_PER_ROW = 0.15  # text bytes a row of codes, as models/dia.py expects of ordinary speech
_MAX_REFERENCE_S = 30.0  # as voices.py takes it
_LARK_MAX_POSITIONS = 2048
_DAC_CONTEXT = 20  # frames on both sides of a window together
_LARK_CONTEXT = ("left_context", "right_context")
_LARK_PITCH_FRAMES, _LARK_PHASES = 10, 1 << 16  # as codec/lark.py and codec/source_filter.py have them
# Tensors of its widest stage that a DAC has alive at once: 6.4 measured (specs/models.md), the rest is margin.
_DAC_LIVE_TENSORS = 8


@dataclass(frozen=True, slots=True)
class Matrices:
    """`count` linear layers of one shape. stays_dense: the family's table keeps them out of int4."""

    num_in: int
    num_out: int
    count: int = 1
    stays_dense: bool = False

    @property
    def num_weights(self) -> int:
        return self.num_in * self.num_out * self.count

    @property
    def group_size(self) -> int | None:
        """Of int4; None where the shape or the table does not allow it, and the layer stays in 16 bits."""
        if self.stays_dense or self.num_out % _INT4_OUT_MULTIPLE:
            return None
        return next((size for size in INT4_GROUPS if self.num_in % size == 0), None)

    @property
    def columns_in_parts(self) -> int:
        """Float32 sums that a row of this layer's product has before its parts are summed, on any GPU."""
        count, tiles = 1, math.ceil(self.num_out / _SPLIT_TILE)
        while 2 * count <= min(_MAX_SPLITS, self.num_in // _MIN_SPLIT_INPUTS) and tiles * count < _SPLIT_PROGRAMS:
            count *= 2
        return count * self.num_out

    def bytes_in(self, precision: Precision) -> int:
        """int4: half a byte a weight in whole blocks, and a 16-bit scale and offset for each group."""
        if precision != "int4" or self.group_size is None:
            return self.num_weights * ELEMENT_BYTES[precision]
        packed = math.ceil(self.num_in / _INT4_BLOCK) * _INT4_BLOCK * self.num_out * self.count // 2
        return packed + self.num_weights // self.group_size * 2 * ELEMENT_BYTES[precision]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One line of the plan.

    matrices: the linear layers that int4 quantizes. num_plain: weights in the activations' dtype whatever the
    precision. num_float32: tables that are float32 whatever the precision. reads_text: its layers run once a request,
    over the whole text. may_offload: it may live on the CPU.
    """

    name: str
    matrices: tuple[Matrices, ...] = ()
    num_plain: int = 0
    num_float32: int = 0
    reads_text: bool = False
    may_offload: bool = False

    def bytes_in(self, precision: Precision) -> int:
        quantized = sum(layer.bytes_in(precision) for layer in self.matrices)
        return quantized + self.num_plain * ELEMENT_BYTES[precision] + self.num_float32 * 4


@dataclass(frozen=True, slots=True)
class CodecParts:
    """A codec's weights, and what a frame takes while it is decoded or encoded.

    num_decoder: weights in the codec's dtype; num_float32: the quantizer's. num_encoding: float32 weights of the copy
    that encodes reference audio (0: the family imitates no voice). frame_elements, encoding_elements: live activations
    of a frame that is decoded, or encoded. num_context: frames decoded around a window, at most.
    """

    name: str
    num_decoder: int
    num_float32: int
    num_encoding: int
    frame_elements: int
    encoding_elements: int
    num_context: int
    frame_rate_hz: float

    def decoder_bytes(self, element_bytes: int) -> int:
        return self.num_decoder * element_bytes + self.num_float32 * 4

    def window_bytes(self, num_frames: int, element_bytes: int) -> int:
        """Peak of decoding one window of `num_frames` with its context."""
        return (num_frames + self.num_context) * self.frame_elements * element_bytes

    @property
    def encoding_bytes(self) -> int:
        """The encoding copy's weights, and its peak over the longest reference audio: float32 throughout."""
        frames = math.ceil(_MAX_REFERENCE_S * self.frame_rate_hz)
        return 4 * (self.num_encoding + frames * self.encoding_elements)


@dataclass(frozen=True, slots=True)
class SpeakerParts:
    """What makes an embedding of reference audio: its weights, and live activations of a second of it; all float32."""

    num_weights: int
    elements_per_s: int

    @property
    def encoding_bytes(self) -> int:
        """Weights, and the peak over the longest reference audio."""
        return 4 * (self.num_weights + math.ceil(_MAX_REFERENCE_S * self.elements_per_s))


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A whole model, as the memory plan sees it.

    num_branches: sequences of KV that a guided request has. num_drain_rows: rows after the last frame's.
    logits_per_row: codebooks times vocabulary. row_elements: live activations of one position of a step.
    text_elements: the same of one position of the text, its cross-attention K and V not counted. side_elements: what a
    running sequence keeps for each of its rows. num_heads, head_dim, cross_heads: of the query. speaker: None where the
    family has none, or it is not at hand.
    """

    name: str
    weights: tuple[WeightPart, ...]
    codec: CodecParts
    cache: CacheSpec
    num_branches: int
    num_drain_rows: int
    max_positions: int
    max_text: int
    logits_per_row: int
    row_elements: int
    text_elements: int
    side_elements: int
    num_heads: int
    cross_heads: int
    speaker: SpeakerParts | None = None

    def rows_for(self, seconds: float) -> int:
        """Positions that a stream of so many seconds caches in each branch, at most the model's own."""
        return min(math.ceil(seconds * self.codec.frame_rate_hz) + self.num_drain_rows, self.max_positions)

    def weight_bytes(self, precision: Precision, *, is_text_offloaded: bool = False) -> int:
        """Bytes of the model's weights on the device, the codec's not counted."""
        parts = (part for part in self.weights if not (is_text_offloaded and part.may_offload))
        return sum(part.bytes_in(precision) for part in parts)

    def matrices(self, *, read_text: bool, is_text_offloaded: bool = False) -> tuple[Matrices, ...]:
        """The linear layers on the device that run over a text, or over rows."""
        return tuple(
            layer
            for part in self.weights
            if part.reads_text == read_text and not (is_text_offloaded and part.may_offload)
            for layer in part.matrices
        )


def describe_model(config: Mapping[str, Any], codec_config: Mapping[str, Any], *, name: str) -> ModelParts:
    """What the two config.json of a model and its codec say. Raises: ModelLoadError."""
    try:
        match family_of(config):
            case "dia":
                return dia_parts(config, codec_config, name=name)
            case "lark":
                return lark_parts(config, codec_config, name=name)
            case "zonos":
                return zonos_parts(config, codec_config, name=name)
    except KeyError as missing:
        raise ModelLoadError(f"the config of {name} has no key {missing}: copy the checkpoint again") from missing
    raise unserved(config, name=name)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family whose config.json this is, None if it is nobody's that is served. Zonos' names no model type."""
    match config.get("model_type"):
        case "dia":
            return "dia"
        case "lark":
            return "lark"
        case None if {"backbone", "prefix_conditioner"} <= set(config):
            return "zonos"
    return None


def unserved(config: Mapping[str, Any], *, name: str) -> ModelLoadError:
    """What to raise for a config.json of no family that is served."""
    return ModelLoadError(
        f"the config of {name} says model_type {config.get('model_type')!r}: this version serves dia and lark, and"
        " Zonos as Zyphra publishes it"
    )


def check_precision(precision: str) -> None:
    """Raises: InvalidConfig."""
    if precision not in ("auto", *ELEMENT_BYTES):
        raise InvalidConfig(f"dtype is {precision!r}: use auto, {', '.join(ELEMENT_BYTES)}")


def dia_parts(config: Mapping[str, Any], codec_config: Mapping[str, Any], *, name: str) -> ModelParts:
    """Dia: a text encoder, and a decoder whose cross-attention the conditional branch alone has."""
    encoder, decoder = _section(config, "encoder_config"), _section(config, "decoder_config")
    text, layers, cross = _Stack.read(encoder), _Stack.read(decoder), _Heads.read(decoder, "cross_")
    hidden, delay = layers.hidden, _counts(config, "delay_pattern", least=0)
    num_codes = len(delay) * _count(decoder, "vocab_size")
    max_text, max_positions = _count(encoder, "max_position_embeddings"), _count(decoder, "max_position_embeddings")
    cross_layers = (Matrices(hidden, cross.query_size, layers.depth), Matrices(cross.query_size, hidden, layers.depth))
    return ModelParts(
        name=name,
        weights=(
            _text_encoder(text, num_plain=_count(encoder, "vocab_size") * text.hidden, max_text=max_text),
            WeightPart(
                "cross-attention K and V",
                matrices=(Matrices(text.hidden, cross.kv_size, 2 * layers.depth),),
                reads_text=True,
            ),
            WeightPart("decoder layers", matrices=layers.matrices + cross_layers),
            WeightPart("embeddings", num_plain=num_codes * hidden),
            WeightPart("heads", num_plain=num_codes * hidden),
            WeightPart(
                "norms and tables",
                # Three norms a layer, and the constant that stands for the unconditional branch's cross-attention.
                num_plain=(4 * layers.depth + 1) * hidden,
                num_float32=max_positions * 2 * layers.heads.dim,
            ),
        ),
        codec=dac_parts(codec_config),
        cache=CacheSpec(
            num_layers=layers.depth,
            num_kv_heads=layers.heads.num_kv,
            head_dim=layers.heads.dim,
            cross=CrossSpec(
                num_layers=layers.depth,
                num_kv_heads=cross.num_kv,
                head_dim=cross.dim,
                max_positions=max_text,
                positions_per_row=_DIA_CROSS_PER_ROW,
            ),
        ),
        num_branches=2,
        num_drain_rows=max(delay) + 1,
        max_positions=max_positions,
        max_text=max_text,
        logits_per_row=num_codes,
        row_elements=layers.live_elements,
        text_elements=text.live_elements,
        side_elements=0,
        num_heads=layers.heads.num,
        cross_heads=cross.num,
    )


def lark_parts(config: Mapping[str, Any], codec_config: Mapping[str, Any], *, name: str) -> ModelParts:
    """lark: a text side that ends in one vector a row, and a decoder without cross-attention or guidance."""
    text, layers = _Stack.read(_section(config, "encoder")), _Stack.read(_section(config, "decoder"))
    read, hidden, max_text = text.hidden, layers.hidden, _count(config, "max_text_length")
    num_codebooks, codebook_size = _count(config, "num_codebooks"), _count(config, "codebook_size")
    # Where there are several speakers, each byte has a second vector: the speaker's whose sentences begin with it.
    embedding = _count(config, "text_vocab_size") * read * (2 if "speakers" in config else 1)
    # What a row is told: an encoded phoneme, how far it has gone and how long it lasts.
    durations_and_side = _dense(read, read) + _dense(read, 1) + _dense(read + 2, hidden)
    text_part = _text_encoder(text, num_plain=embedding + durations_and_side, max_text=max_text)
    # Of its layers int4 takes the encoder's feed-forward ones alone: see config.py's table.
    qkv, out, *feed_forward = text_part.matrices
    encoder_layers = (replace(qkv, stays_dense=True), replace(out, stays_dense=True), *feed_forward)
    decoder_layers = tuple(replace(layer, stays_dense=True) for layer in layers.matrices)
    return ModelParts(
        name=name,
        weights=(
            replace(text_part, matrices=encoder_layers),
            WeightPart("decoder layers", matrices=decoder_layers),
            WeightPart("embeddings", num_plain=num_codebooks * (codebook_size + 2) * hidden),
            WeightPart("heads", num_plain=num_codebooks * codebook_size * hidden),
            WeightPart(
                "norms and tables",
                num_plain=(2 * layers.depth + 1) * hidden,
                num_float32=_LARK_MAX_POSITIONS * 2 * layers.heads.dim,
            ),
        ),
        codec=lark_codec_parts(codec_config),
        cache=CacheSpec(num_layers=layers.depth, num_kv_heads=layers.heads.num_kv, head_dim=layers.heads.dim),
        num_branches=1,
        num_drain_rows=num_codebooks - 1,
        max_positions=_LARK_MAX_POSITIONS,
        max_text=max_text,
        logits_per_row=num_codebooks * codebook_size,
        row_elements=layers.live_elements,
        text_elements=text.live_elements,
        side_elements=hidden,
        num_heads=layers.heads.num,
        cross_heads=0,
    )


def zonos_parts(config: Mapping[str, Any], codec_config: Mapping[str, Any], *, name: str) -> ModelParts:
    """Zonos: a conditioning prefix, and a decoder of attention layers alone or among Mamba-2 layers."""
    backbone, prefix = _section(config, "backbone"), _section(config, "prefix_conditioner")
    attention, ssm = _section(backbone, "attn_cfg"), backbone.get("ssm_cfg") or {}
    hidden, depth = _count(backbone, "d_model"), _count(backbone, "n_layer")
    num_heads, num_kv = _count(attention, "num_heads"), _count(attention, "num_heads_kv")
    dim, ffn = hidden // num_heads, _count(backbone, "attn_mlp_d_intermediate")
    if ssm:
        ffn = math.ceil(ffn / 128) * 128
    layers = _Stack(hidden, ffn, len(backbone["attn_layer_idx"]) if ssm else depth, _Heads(num_heads, num_kv, dim))
    num_mamba = depth - layers.depth
    head_dim, size, width = ssm.get("headdim", 64), ssm.get("d_state", 128), ssm.get("d_conv", 4)
    inner = hidden * ssm.get("expand", 2)
    channels, heads = inner + 2 * size, inner // head_dim
    projected = inner + channels + heads
    mamba = (Matrices(hidden, projected, num_mamba), Matrices(inner, hidden, num_mamba)) if num_mamba else ()
    num_codes = _ZONOS_CODEBOOKS * (config.get("eos_token_id", 1024) + 1)
    row = max(layers.live_elements, 4 * hidden + 2 * projected + 2 * channels + 2 * inner if num_mamba else 0)
    return ModelParts(
        name=name,
        weights=(
            WeightPart("prefix conditioner", num_plain=_conditioner_weights(prefix, hidden), reads_text=True),
            WeightPart("decoder layers", matrices=(*layers.matrices, *mamba)),
            WeightPart("embeddings", num_plain=_ZONOS_CODEBOOKS * (config.get("masked_token_id", 1025) + 1) * hidden),
            WeightPart("heads", num_plain=num_codes * hidden),
            WeightPart(
                "norms and tables",
                num_plain=(4 * layers.depth + 2 * num_mamba + 2) * hidden
                + num_mamba * (channels * (width + 1) + inner),
                num_float32=_ZONOS_MAX_POSITIONS * 2 * attention.get("rotary_emb_dim", dim) + 3 * heads * num_mamba,
            ),
        ),
        codec=dac_parts(codec_config),
        cache=CacheSpec(
            num_layers=layers.depth,
            num_kv_heads=num_kv,
            head_dim=dim,
            state=StateSpec(num_mamba, width - 1, channels, heads, head_dim, size, _SCAN_BLOCK) if num_mamba else None,
        ),
        num_branches=2,
        num_drain_rows=_ZONOS_CODEBOOKS,
        max_positions=_ZONOS_MAX_POSITIONS,
        max_text=_ZONOS_MAX_TEXT,
        logits_per_row=num_codes,
        row_elements=row,
        text_elements=8 * hidden,
        side_elements=0,
        num_heads=num_heads,
        cross_heads=0,
        speaker=speaker_parts(),
    )


def _conditioner_weights(prefix: Mapping[str, Any], hidden: int) -> int:
    """Tables and projections of each condition, the vectors that stand for unknown ones, the projection of all."""
    total = 2 * hidden + _projection_weights(prefix.get("projection", "none"), hidden, hidden)
    for item in prefix["conditioners"]:
        num_in = item.get("cond_dim") or hidden
        total += _projection_weights(item.get("projection", "none"), num_in, hidden)
        total += hidden if item.get("uncond_type") == "learned" else 0
        match item["type"]:
            case "EspeakPhonemeConditioner":
                total += _ZONOS_SYMBOLS * hidden
            case "FourierConditioner":
                total += hidden // 2 * int(item.get("input_dim", 1))
            case "IntegerConditioner":
                total += (int(item.get("max_val", 512)) - int(item.get("min_val", 0)) + 1) * hidden
    return total


def _projection_weights(kind: str, num_in: int, hidden: int) -> int:
    return {"none": 0, "linear": _dense(num_in, hidden)}.get(kind, _dense(num_in, hidden) + _dense(hidden, hidden))


def speaker_parts() -> SpeakerParts:
    """Zonos' speaker encoder, its norms folded into its convolutions: of one size, whatever the checkpoint."""
    num_weights, num_in = _dense(9, _SPEAKER_CHANNELS[0]), _SPEAKER_CHANNELS[0]
    for num_blocks, width in zip(_SPEAKER_BLOCKS, _SPEAKER_CHANNELS, strict=True):
        shortcut = _dense(num_in, width) if num_in != width else 0
        num_weights += _dense(9 * num_in, width) + shortcut + (2 * num_blocks - 1) * _dense(9 * width, width)
        num_in = width
    pooled = num_in * _SPEAKER_BANDS // 2 ** (len(_SPEAKER_BLOCKS) - 1)
    # The attention's norm is not folded: four numbers a channel.
    attention = _dense(pooled, _SPEAKER_ATTENTION) + 4 * _SPEAKER_ATTENTION + _dense(_SPEAKER_ATTENTION, pooled)
    ends = _dense(2 * pooled, _SPEAKER_HIDDEN) + _dense(_SPEAKER_HIDDEN, _SPEAKER_EMBEDDING)
    return SpeakerParts(
        num_weights=num_weights + attention + ends,
        elements_per_s=_SPEAKER_LIVE_TENSORS * _SPEAKER_CHANNELS[0] * _SPEAKER_BANDS * _SPEAKER_RATE_HZ,
    )


def dac_parts(config: Mapping[str, Any]) -> CodecParts:
    """The Descript audio codec, as transformers' DacModel has it."""
    ratios = _counts(config, "downsampling_ratios", least=1)
    latent = _count(config, "encoder_hidden_size") * 2 ** len(ratios)
    num_codebooks, dim = _count(config, "n_codebooks"), _count(config, "codebook_dim")
    quantizer = num_codebooks * (_dense(latent, dim) + _dense(dim, latent) + _count(config, "codebook_size") * dim)

    width, rate, widest = _count(config, "decoder_hidden_size"), 1, 0
    decoder = _dense(7 * latent, width)
    for ratio in reversed(ratios):
        decoder += width + _dense(2 * ratio * width, width // 2) + 3 * _residual_unit(width // 2)
        width, rate = width // 2, rate * ratio
        widest = max(widest, width * rate)
    decoder += width + _dense(7 * width, 1)

    width, widest_encoded = _count(config, "encoder_hidden_size"), 0
    encoder = _dense(7, width)
    for ratio in ratios:
        encoder += 3 * _residual_unit(width) + width + _dense(2 * ratio * width, 2 * width)
        widest_encoded = max(widest_encoded, width * rate)
        width, rate = 2 * width, rate // ratio
    encoder += width + _dense(3 * width, latent)
    return CodecParts(
        name="DAC",
        num_decoder=decoder,
        num_float32=quantizer,
        num_encoding=encoder + decoder + quantizer,
        frame_elements=_DAC_LIVE_TENSORS * widest,
        encoding_elements=_DAC_LIVE_TENSORS * widest_encoded,
        num_context=_DAC_CONTEXT,
        frame_rate_hz=_count(config, "sampling_rate") / math.prod(ratios),
    )


def lark_codec_parts(config: Mapping[str, Any]) -> CodecParts:
    """The embedded voice's codec: eight ConvNeXt blocks over one, two and four rows a frame, a small network for the
    pitch, then a source and filters."""
    width, kernel, bands, n_fft, noise_n_fft = (
        _count(config, key) for key in ("hidden_size", "kernel_size", "num_bands", "synthesis_n_fft", "noise_n_fft")
    )
    num_codebooks, dim, size = (_count(config, key) for key in ("num_codebooks", "codebook_dim", "codebook_size"))
    inner = _count(config, "convnext_mult") * width
    block = (kernel + 3) * width + _dense(width, inner) + _dense(inner, width)
    upsample = 2 * (2 * width * width + width)
    decoder = _dense(kernel * width, width) + 8 * block + 2 * upsample + 2 * width + _dense(width, 2 * bands)
    hidden = _count(config, "pitch_hidden_size")
    pitch = _dense(_LARK_PITCH_FRAMES * num_codebooks * dim, hidden) + _dense(hidden, hidden) + _dense(hidden, 8)
    filters = 2 * bands * (n_fft // 2 + noise_n_fft // 2 + 2) * len(config["timbres"])
    # The codebooks' projections lie there twice: one by one, and side by side with their biases summed.
    projections = num_codebooks * _dense(dim, width) + _dense(num_codebooks * dim, width)
    # Of each of a frame's four rows: a block's before and after its gelu, or spectra and pulses on the way to samples.
    row = max(2 * inner + 4 * width, 6 * (n_fft + noise_n_fft) + 16 * _count(config, "stft_hop"))
    return CodecParts(
        name="lark codec",
        num_decoder=decoder,
        # The pitch's network is float64, the noise's phases are complex.
        num_float32=num_codebooks * size * dim
        + projections
        + 2 * (pitch + _LARK_PHASES)
        + filters
        + n_fft
        + noise_n_fft
        + _count(config, "n_fft"),
        num_encoding=0,
        frame_elements=4 * row,
        encoding_elements=0,
        num_context=sum(_count(config, key) for key in _LARK_CONTEXT),
        frame_rate_hz=_count(config, "sampling_rate") / _count(config, "hop_length"),
    )


@dataclass(frozen=True, slots=True)
class _Heads:
    num: int
    num_kv: int
    dim: int

    @classmethod
    def read(cls, config: Mapping[str, Any], prefix: str = "") -> _Heads:
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        return cls(*(_count(config, prefix + name) for name in names))

    @property
    def query_size(self) -> int:
        return self.num * self.dim

    @property
    def kv_size(self) -> int:
        return self.num_kv * self.dim


@dataclass(frozen=True, slots=True)
class _Stack:
    """The transformer layers of an encoder or a decoder."""

    hidden: int
    ffn: int
    depth: int
    heads: _Heads

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> _Stack:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers")
        hidden, ffn, depth = (_count(config, key) for key in names)
        return cls(hidden, ffn, depth, _Heads.read(config))

    @property
    def matrices(self) -> tuple[Matrices, ...]:
        """Fused q, k and v, their output, gate and up together, and down."""
        qkv = self.heads.query_size + 2 * self.heads.kv_size
        return (
            Matrices(self.hidden, qkv, self.depth),
            Matrices(self.heads.query_size, self.hidden, self.depth),
            Matrices(self.hidden, 2 * self.ffn, self.depth),
            Matrices(self.ffn, self.hidden, self.depth),
        )

    @property
    def live_elements(self) -> int:
        """What a layer holds for one position: the residual stream and its normed copy, old and new, and the larger of
        q, k, v before and after rotation with what attention gives, and gate, up and their product."""
        attention = 4 * self.heads.query_size + 4 * self.heads.kv_size
        return 4 * self.hidden + max(attention, 4 * self.ffn)


def _text_encoder(stack: _Stack, *, num_plain: int, max_text: int) -> WeightPart:
    """The layers, `num_plain` weights of the family's own, the norms, and the rotary table."""
    norms = (2 * stack.depth + 1) * stack.hidden
    return WeightPart(
        "text encoder",
        matrices=stack.matrices,
        num_plain=num_plain + norms,
        num_float32=max_text * 2 * stack.heads.dim,
        reads_text=True,
        may_offload=True,
    )


def _dense(num_in: int, num_out: int) -> int:
    """Weights and biases; a convolution's inputs are its channels times its taps."""
    return (num_in + 1) * num_out


def _residual_unit(width: int) -> int:
    """Snake, convolution of 7, snake, convolution of 1."""
    return 2 * width + _dense(7 * width, width) + _dense(width, width)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config[key]
    if not isinstance(value, Mapping):
        raise ModelLoadError(f"config.json: {key} is {value!r}, it must be an object: copy the checkpoint again")
    return value


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelLoadError(
            f"config.json: {key} is {value!r}, it must be a positive integer: copy the checkpoint again"
        )
    return value


def _counts(config: Mapping[str, Any], key: str, *, least: int) -> list[int]:
    value = config[key]
    if not isinstance(value, list) or not value or not all(isinstance(item, int) and item >= least for item in value):
        raise ModelLoadError(
            f"config.json: {key} is {value!r}, it must be a list of integers from {least}: copy the checkpoint again"
        )
    return value
