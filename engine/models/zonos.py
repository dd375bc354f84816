"""Zonos-v0.1: a prefix of phonemes and conditions -> decoder over nine delayed codebooks, with guidance.

Two backbones share everything else: a transformer, and a hybrid whose layers are Mamba-2 but for every fourth. The
unconditional branch reads the same text under unknown conditions. An audio prefix is continued: its words come before
the text, its frames before the first new one. Source: github.com/Zyphra/Zonos, whose greedy codes these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from declaim.engine.checkpoint import Checkpoint, shard_names
from declaim.engine.config import Int4Recipe
from declaim.engine.controls import resolve_controls
from declaim.engine.errors import InvalidRequest, ModelLoadError, TooLong
from declaim.engine.espeak import EspeakPhonemizer
from declaim.engine.models.base import Prefill, PromptSettings, StepContext
from declaim.engine.models.layers import (
    AttentionShape,
    AttentionWeights,
    MambaShape,
    MambaWeights,
    MlpWeights,
    attend,
    mamba,
    swiglu,
)
from declaim.engine.models.zonos_conditioning import (
    LANGUAGES,
    PUNCTUATION,
    PrefixConditioner,
    PrefixConfig,
    conditions_of,
    encode_phonemes,
    find_language,
    guess_language,
)
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.safetensors_io import read_json
from declaim.engine.sequence import Prompt
from declaim.engine.spec import (
    AllowedIds,
    CacheSpec,
    CodecSpec,
    FrameRule,
    Guidance,
    MinP,
    ModelSpec,
    RepetitionPenalty,
    SamplingDefaults,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.engine.text import TextOptions, clean_text, speak
from declaim.engine.words import Segment
from declaim.kernels.codebooks import codebook_embedding
from declaim.kernels.linear import linear, pack_linear
from declaim.kernels.norm import add_layer_norm
from declaim.kernels.rope import rotary_table

NUM_CODEBOOKS = 9
ROPE_BASE = 10_000.0
# Thirty seconds to continue, thirty more to speak, and the longest text; rotary embedding goes on beyond.
MAX_POSITIONS = 6400
MAX_TEXT_CHARS = 20_000
MAX_SEGMENT_CHARS = 300  # some twenty seconds: the model was trained on thirty at most
SPEAKER_SIZE = 128

Phonemize = Callable[[str, str], str]
"""A text and its language, as espeak-ng names it, to IPA."""


@dataclass(frozen=True, slots=True, eq=False)
class ZonosPrompt(Prompt):
    """A prompt with its conditions by name; what is absent is unknown."""

    conditions: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class ZonosConfig:
    """What config.json says, checked. attention_layers: the others are Mamba-2."""

    layers: int
    attention_layers: frozenset[int]
    hidden: int
    ffn: int
    shape: AttentionShape
    rotary_dim: int
    mamba: MambaShape | None
    eps: float
    eos: int
    masked: int
    prefix: PrefixConfig

    @property
    def vocab_size(self) -> int:
        """Logits a codebook: its codes and the end. Rows that pad the checkpoint's heads are dropped."""
        return self.eos + 1

    @classmethod
    def read(cls, config: Mapping[str, Any], *, source: Path) -> ZonosConfig:
        """Raises: ModelLoadError naming the first key that is missing, or what this version does not know."""
        try:
            backbone, prefix = config["backbone"], config["prefix_conditioner"]
            attention, ssm = backbone["attn_cfg"], backbone.get("ssm_cfg") or {}
            _check_backbone(backbone, attention, ssm, source)
            hidden, num_heads = backbone["d_model"], attention["num_heads"]
            head_dim, ffn = hidden // num_heads, backbone["attn_mlp_d_intermediate"]
            return cls(
                layers=backbone["n_layer"],
                attention_layers=frozenset(backbone["attn_layer_idx"] if ssm else range(backbone["n_layer"])),
                hidden=hidden,
                # mamba_ssm's MLP is rounded up to a multiple of 128.
                ffn=-(-ffn // 128) * 128 if ssm else ffn,
                shape=AttentionShape(
                    num_heads=num_heads,
                    num_kv_heads=attention.get("num_heads_kv", num_heads),
                    head_dim=head_dim,
                    scale=head_dim**-0.5,
                    interleaved=attention.get("rotary_emb_interleaved", not ssm),
                ),
                rotary_dim=attention.get("rotary_emb_dim", head_dim),
                mamba=MambaShape(
                    num_heads=hidden * ssm.get("expand", 2) // ssm.get("headdim", 64),
                    head_dim=ssm.get("headdim", 64),
                    size=ssm.get("d_state", 128),
                    width=ssm.get("d_conv", 4),
                    eps=1e-5,
                )
                if ssm
                else None,
                eps=backbone.get("norm_epsilon", 1e-5),
                eos=config.get("eos_token_id", 1024),
                masked=config.get("masked_token_id", 1025),
                prefix=PrefixConfig.read(prefix, source=source),
            )
        except KeyError as missing:
            raise ModelLoadError(f"{source} has no {missing}: it is not the config of a Zonos model") from missing


def _check_backbone(
    backbone: Mapping[str, Any], attention: Mapping[str, Any], ssm: Mapping[str, Any], source: Path
) -> None:
    """Raises: ModelLoadError for settings that no published Zonos has."""
    expected = {
        "rms_norm": (backbone.get("rms_norm", False), False),
        "residual_in_fp32": (backbone.get("residual_in_fp32", False), False),
        "d_intermediate": (backbone.get("d_intermediate", 0) if ssm else 0, 0),
        "attn_cfg.qkv_proj_bias": (attention.get("qkv_proj_bias", False), False),
        "attn_cfg.out_proj_bias": (attention.get("out_proj_bias", False), False),
        "ssm_cfg.layer": (ssm.get("layer", "Mamba2"), "Mamba2"),
        "ssm_cfg.ngroups": (ssm.get("ngroups", 1), 1),
    }
    for key, (found, served) in expected.items():
        if found != served:
            raise ModelLoadError(f"{source} says {key} {found!r}: this version serves {served!r}, as Zonos-v0.1 has it")


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def take(cls, weights: Checkpoint, name: str, hidden: int) -> _Norm:
        return cls(weights.take(f"{name}.weight", (hidden,)), weights.take(f"{name}.bias", (hidden,)))

    def add(self, x: torch.Tensor, added: torch.Tensor | None, *, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum, and the sum."""
        return add_layer_norm(x, added, self.weight, self.bias, eps=eps)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    norm: _Norm
    mixer: AttentionWeights | MambaWeights
    mlp_norm: _Norm | None
    mlp: MlpWeights | None


class ZonosModel:
    """A loaded Zonos. Keeps `SpeechModel`."""

    def __init__(
        self,
        config: ZonosConfig,
        weights: Checkpoint,
        *,
        spec: ModelSpec,
        phonemize: Phonemize,
        num_head_rows: int | None = None,
    ) -> None:
        """num_head_rows: of each head in the checkpoint; None where nothing pads them."""
        self.spec = spec
        self._config = config
        self._phonemize = phonemize
        hidden = config.hidden
        self._prefix = PrefixConditioner(config.prefix, weights, hidden=hidden)
        self._layers = tuple(_load_layer(config, weights, i) for i in range(config.layers))
        tables = [weights.take(f"embeddings.{q}.weight", (config.masked + 1, hidden)) for q in range(NUM_CODEBOOKS)]
        self._embedding = torch.cat(tables)
        self._norm = _Norm.take(weights, "backbone.norm_f", hidden)
        num_rows = num_head_rows or config.vocab_size
        self._head = pack_linear(
            torch.cat([_take_head(weights, q, config, num_rows=num_rows) for q in range(NUM_CODEBOOKS)])
        )
        self._angles = rotary_table(
            MAX_POSITIONS,
            config.rotary_dim,
            theta=ROPE_BASE,
            device=self._embedding.device,
            interleaved=config.shape.interleaved,
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
        phonemize: Phonemize | None = None,
    ) -> ZonosModel:
        """Load a folder as Zyphra publishes it, quantized by `recipe` on the way.

        phonemize: takes espeak-ng's place. progress: see `Checkpoint`. Raises: ModelLoadError.
        """
        config = ZonosConfig.read(read_json(folder / "config.json"), source=folder / "config.json")
        with torch.inference_mode():
            weights = Checkpoint(folder, dtype=dtype, device=device, recipe=recipe, progress=progress)
            phonemize = phonemize or EspeakPhonemizer(punctuation=PUNCTUATION)
            model = cls(
                config,
                weights,
                spec=zonos_spec(config, codec),
                phonemize=phonemize,
                num_head_rows=_num_head_rows(folder, config),
            )
            weights.refuse_leftovers()
            return model

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def segments(self, text: str, options: TextOptions) -> list[Segment]:
        language = _spoken(options.language, text)
        rules = "en" if language.startswith("en") else "zh" if language in ("cmn", "yue", "hak") else None
        return speak(text, options, language=rules, max_chars=MAX_TEXT_CHARS, max_segment_chars=MAX_SEGMENT_CHARS)

    def tokenize(self, segment: Segment, settings: PromptSettings) -> ZonosPrompt:
        """Make one segment's prompt.

        A voice with a transcript is continued from its frames. One without is known by its embedding, and only where
        it has none by its frames.
        language: an ISO 639-1 code or a tag of LANGUAGES; None goes by the segment's letters.
        embedding of the voice: float32 [128], what the speaker encoder made of it.
        Raises: InvalidRequest, TooLong; ModelLoadError if espeak-ng is not installed.
        """
        config = self._config
        sampling, speed = settings.sampling, settings.speed
        voice_text, voice_codes, embedding = settings.voice.transcript, settings.voice.codes, settings.voice.embedding
        spoken = _spoken(settings.language, segment.text)
        if embedding is not None and embedding.shape != (SPEAKER_SIZE,):
            raise InvalidRequest(
                f"the voice's embedding has shape {list(embedding.shape)}: this model takes [{SPEAKER_SIZE}]; encode"
                " the voice again with this model",
                param="voice",
            )
        if speed != 1.0 and not self.spec.supports_speed:
            raise InvalidRequest(
                f"speed is {speed}: this checkpoint has no speaking rate to set; leave it at 1", param="speed"
            )
        if embedding is not None and not voice_text:
            voice_codes = voice_codes[:0]
        conditions = conditions_of(
            config.prefix,
            resolve_controls(settings.controls, self.spec.controls),
            language=spoken,
            embedding=None if embedding is None else embedding.tolist(),
            speed=speed,
        )
        said = f"{clean_text(voice_text)} {segment.text}" if voice_text else segment.text
        text_ids = encode_phonemes(self._phonemize(said, spoken))
        prefix_len = len(text_ids) + config.prefix.num_vectors
        # One row before the first frame, one more for the end, and what drains after it.
        most = MAX_POSITIONS - prefix_len - 1 - self.spec.rule.num_drain_rows - len(voice_codes)
        max_frames = min(int(sampling.max_seconds * self.spec.codec.frame_rate_hz + 1e-6), most)
        if max_frames < 1:
            raise TooLong(
                f"a text of {len(text_ids)} phonemes, a voice prompt of {len(voice_codes)} frames and max_seconds"
                f" {sampling.max_seconds:g} leave no room to speak: this model has {MAX_POSITIONS} positions, and a"
                f" frame lasts {1 / self.spec.codec.frame_rate_hz:.3f} s; shorten the voice prompt or the text",
                param="max_seconds",
            )
        return ZonosPrompt(
            text_ids=text_ids,
            prefix_len=prefix_len,
            cross_len=0,
            prompt_frames=voice_codes,
            max_frames=max_frames,
            num_branches=1 if sampling.guidance_scale == 1.0 else 2,
            speed=speed,
            conditions=conditions,
        )

    @torch.inference_mode()
    def prepare(self, prompt: Prompt) -> Prefill:
        if not isinstance(prompt, ZonosPrompt):
            raise TypeError(f"a Zonos speaks prompts of its own, not {type(prompt).__name__}")
        branches = [self._prefix(prompt.text_ids, prompt.conditions)]
        if prompt.num_branches > 1:
            branches.append(self._prefix.without_conditions(prompt.text_ids, prompt.conditions))
        return Prefill(prefix=torch.stack(branches))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return codebook_embedding(codes, self._embedding, vocab_size=self._config.masked + 1)

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        config = self._config
        angles = self._angles[context.positions]
        caches, states = iter(context.caches), iter(context.states)
        added: torch.Tensor | None = None
        for layer in self._layers:
            normed, x = layer.norm.add(x, added, eps=config.eps)
            if isinstance(layer.mixer, AttentionWeights):
                added = attend(
                    normed,
                    layer.mixer,
                    config.shape,
                    angles=angles,
                    slots=context.slots,
                    cache=next(caches),
                    plan=context.attention,
                )
            else:
                if config.mamba is None or context.state is None:
                    raise ValueError("a hybrid Zonos needs recurrent states")
                added = mamba(normed, layer.mixer, config.mamba, state=next(states), plan=context.state)
            if layer.mlp_norm is not None and layer.mlp is not None:
                normed, x = layer.mlp_norm.add(x, added, eps=config.eps)
                added = swiglu(normed, layer.mlp)
        normed, _ = self._norm.add(x, added, eps=config.eps)
        return normed[context.last]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self._head).float().view(len(hidden), NUM_CODEBOOKS, self._config.vocab_size)


def _spoken(name: str | None, text: str) -> str:
    """The language that a request names, or that its text is written in. Raises: InvalidRequest."""
    spoken = guess_language(text) if name is None else find_language(name)
    if spoken is None:
        raise InvalidRequest(f"language is {name!r}: this model speaks {', '.join(LANGUAGES)}", param="language")
    return spoken


def zonos_spec(config: ZonosConfig, codec: CodecSpec) -> ModelSpec:
    """The tables of a checkpoint. Raises: ModelLoadError if the codec is another model's."""
    if codec.num_codebooks != NUM_CODEBOOKS or codec.codebook_size > config.eos:
        raise ModelLoadError(
            f"the codec has {codec.num_codebooks} codebooks of {codec.codebook_size}, and the model draws"
            f" {NUM_CODEBOOKS} of {config.eos}: they do not belong together; put descript/dac_44khz in codec/"
        )
    codebooks = range(NUM_CODEBOOKS)
    drain = tuple(tuple(config.masked if q < j else config.eos if q == j else -1 for q in codebooks) for j in codebooks)
    mamba_layers = config.layers - len(config.attention_layers)
    return ModelSpec(
        family="zonos",
        cache=CacheSpec(
            num_layers=len(config.attention_layers),
            num_kv_heads=config.shape.num_kv_heads,
            head_dim=config.shape.head_dim,
            state=None if config.mamba is None else config.mamba.state_spec(mamba_layers),
        ),
        # The reference ignores an end that it draws first, and its code sounds as 0; here it is not drawn.
        rule=FrameRule(delay=tuple(codebooks), fill=config.masked, eos=config.eos, drain=drain, min_frames=1),
        sampling=SamplingSpec(
            ops=(
                Guidance(center="uncond", keep="guided", top_k_filter=False),
                AllowedIds((config.eos + 1,) + (config.eos,) * (NUM_CODEBOOKS - 1)),
                RepetitionPenalty(window=2, skips_first=True),
                Temperature(),
                TopP(),
                TopK(),
                MinP(),
            ),
            defaults=SamplingDefaults(
                temperature=1.0, min_p=0.1, repetition_penalty=3.0, guidance_scale=2.0, max_seconds=30.0
            ),
        ),
        codec=codec,
        hidden_size=config.hidden,
        vocab_size=config.vocab_size,
        max_positions=MAX_POSITIONS,
        has_side=False,
        supports_speed=config.prefix.takes("speaking_rate"),
        supports_voice_prompt=True,
        languages=LANGUAGES,
        controls=config.prefix.controls,
        instructions=config.prefix.instructions,
    )


def _load_layer(config: ZonosConfig, weights: Checkpoint, index: int) -> _Layer:
    name, hidden = f"backbone.layers.{index}", config.hidden
    norm = _Norm.take(weights, f"{name}.norm", hidden)
    if index not in config.attention_layers:
        if config.mamba is None:
            raise ModelLoadError(f"{weights.folder}: layer {index} has no attention, and there is no ssm_cfg")
        return _Layer(norm, _load_mamba(weights, f"{name}.mixer", hidden, config.mamba), None, None)
    shape = config.shape
    mlp_norm = _Norm.take(weights, f"{name}.norm2", hidden)
    return _Layer(
        norm=norm,
        mixer=AttentionWeights(
            norm=norm.weight,
            qkv=weights.take_linear([(f"{name}.mixer.in_proj.weight", shape.qkv_size)], hidden),
            out=weights.take_linear([(f"{name}.mixer.out_proj.weight", hidden)], shape.num_heads * shape.head_dim),
        ),
        mlp_norm=mlp_norm,
        mlp=MlpWeights(
            norm=mlp_norm.weight,
            gate_up=weights.take_linear([(f"{name}.mlp.fc1.weight", 2 * config.ffn)], hidden, is_gate_last=True),
            down=weights.take_linear([(f"{name}.mlp.fc2.weight", hidden)], config.ffn),
        ),
    )


def _take_head(weights: Checkpoint, codebook: int, config: ZonosConfig, *, num_rows: int) -> torch.Tensor:
    """A codebook's head without the rows that pad it."""
    return weights.take(f"heads.{codebook}.weight", (num_rows, config.hidden))[: config.vocab_size]


def _num_head_rows(folder: Path, config: ZonosConfig) -> int:
    """Rows of the checkpoint's heads: as trained, or with those that pad them, where the reference saved it again."""
    name = "heads.0.weight"
    for shard in shard_names(folder):
        with safe_open(folder / shard, framework="pt") as file:
            if name in file.keys():
                return max(config.vocab_size, int(file.get_slice(name).get_shape()[0]))
    return config.vocab_size


def _load_mamba(weights: Checkpoint, name: str, hidden: int, shape: MambaShape) -> MambaWeights:
    heads, channels = (shape.num_heads,), shape.num_channels
    taps = weights.take(f"{name}.conv1d.weight", (channels, 1, shape.width))
    return MambaWeights(
        inputs=weights.take_linear([(f"{name}.in_proj.weight", shape.num_projected)], hidden),
        taps=taps[:, 0].t().contiguous(),
        taps_bias=weights.take(f"{name}.conv1d.bias", (channels,)),
        decay=-weights.take(f"{name}.A_log", heads).float().exp(),
        skip=weights.take(f"{name}.D", heads).float(),
        dt_bias=weights.take(f"{name}.dt_bias", heads).float(),
        norm=weights.take(f"{name}.norm.weight", (shape.inner,)),
        out=weights.take_linear([(f"{name}.out_proj.weight", hidden)], shape.inner),
    )
