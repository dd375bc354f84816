"""Small random Zonos checkpoints in the published layout, and the cases that the reference implementation spoke.

Weights come from numpy's RandomState, whose stream never changes: so the fixtures hold seeds, and no weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from declaim.engine.codec.base import CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.config import Int4Recipe
from declaim.engine.models.zonos import ZonosModel
from declaim.engine.speaker import ENCODER_NAME, PROJECTION_NAME, SpeakerNet
from declaim.engine.spec import CodecSpec
from tests.dia_checkpoints import make_dac

FIXTURE = Path(__file__).parent / "engine" / "fixtures" / "zonos.npz"
HIDDEN, NUM_CODEBOOKS, EOS = 64, 9, 1024
FRAME_RATE_HZ = 44100 / 512
DAC = CodecSpec(sample_rate_hz=44100, hop=512, left=10, right=10, num_codebooks=9, codebook_size=1024)

_CONDITIONERS: list[dict[str, Any]] = [
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
]
_HYBRID_CONDITIONERS: list[dict[str, Any]] = [
    {
        "type": "FourierConditioner",
        "name": "vqscore_8",
        "input_dim": 8,
        "min_val": 0.5,
        "max_val": 0.8,
        "uncond_type": "learned",
    },
    {"type": "FourierConditioner", "name": "ctc_loss", "min_val": -1.0, "max_val": 1000, "uncond_type": "learned"},
    {"type": "FourierConditioner", "name": "dnsmos_ovrl", "min_val": 1, "max_val": 5, "uncond_type": "learned"},
    {"type": "IntegerConditioner", "name": "speaker_noised", "min_val": 0, "max_val": 1, "uncond_type": "learned"},
]


def _config(backbone: dict[str, Any], conditioners: list[dict[str, Any]]) -> dict[str, Any]:
    common = {
        "d_model": HIDDEN,
        "d_intermediate": 0,
        "attn_mlp_d_intermediate": 128,
        "rms_norm": False,
        "residual_in_fp32": False,
        "norm_epsilon": 1e-5,
    }
    return {
        "backbone": common | backbone,
        "prefix_conditioner": {"projection": "linear", "conditioners": conditioners},
        "eos_token_id": EOS,
        "masked_token_id": 1025,
        "pad_vocab_to_multiple_of": 8,
    }


_ATTENTION = {
    "causal": True,
    "num_heads": 4,
    "num_heads_kv": 2,
    "rotary_emb_dim": 16,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
}
TRANSFORMER = _config(
    {
        "n_layer": 2,
        "ssm_cfg": {},
        "attn_layer_idx": [0, 1],
        "attn_cfg": _ATTENTION | {"rotary_emb_interleaved": True},
    },
    _CONDITIONERS,
)
HYBRID = _config(
    {
        "n_layer": 5,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16},
        "attn_layer_idx": [0, 4],
        "attn_cfg": _ATTENTION,
    },
    _CONDITIONERS + _HYBRID_CONDITIONERS,
)
CONFIGS = {"transformer": TRANSFORMER, "hybrid": HYBRID}


@dataclass(frozen=True)
class Case:
    """What the reference was asked. text: IPA, no espeak-ng between. num_prompt: frames of audio to continue, seeded.

    eos_like: a code of the first codebook in whose place the checkpoint draws the end.
    """

    family: str
    text: str
    seed: int
    max_frames: int
    eos_like: int | None = None
    guidance_scale: float = 2.0
    has_speaker: bool = False
    num_prompt: int = 0
    language: str = "en-us"
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speaker(self) -> NDArray[np.float32] | None:
        if not self.has_speaker:
            return None
        return np.random.RandomState(self.seed + 1).standard_normal(128).astype(np.float32)

    @property
    def prompt_frames(self) -> NDArray[np.int32]:
        """[P, 9]."""
        random = np.random.RandomState(self.seed + 2)
        return random.randint(0, 1024, (self.num_prompt, NUM_CODEBOOKS)).astype(np.int32)


LIVELY = {
    "emotion": [0.8, 0.1, 0.0, 0.0, 0.2, 0.0, 0.1, 0.3],
    "pitch_std": 85.0,
    "fmax": 24000.0,
    "speaking_rate": 21.5,
}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as the reference saves it."""
    backbone, hidden = config["backbone"], config["backbone"]["d_model"]
    attention, ssm, ffn = backbone["attn_cfg"], backbone["ssm_cfg"], backbone["attn_mlp_d_intermediate"]
    qkv = hidden + 2 * hidden * attention["num_heads_kv"] // attention["num_heads"]
    shapes: dict[str, tuple[int, ...]] = {}
    for q in range(NUM_CODEBOOKS):
        shapes[f"embeddings.{q}.weight"] = (config["masked_token_id"] + 1, hidden)
        shapes[f"heads.{q}.weight"] = (config["eos_token_id"] + 1, hidden)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    for i in range(backbone["n_layer"]):
        name = f"backbone.layers.{i}"
        norm(f"{name}.norm")
        if i in backbone["attn_layer_idx"]:
            norm(f"{name}.norm2")
            shapes[f"{name}.mixer.in_proj.weight"] = (qkv, hidden)
            shapes[f"{name}.mixer.out_proj.weight"] = (hidden, hidden)
            shapes[f"{name}.mlp.fc1.weight"] = (2 * ffn, hidden)
            shapes[f"{name}.mlp.fc2.weight"] = (hidden, ffn)
            continue
        inner, heads = 2 * hidden, 2 * hidden // ssm["headdim"]
        channels = inner + 2 * ssm["d_state"]
        shapes[f"{name}.mixer.in_proj.weight"] = (inner + channels + heads, hidden)
        shapes[f"{name}.mixer.conv1d.weight"] = (channels, 1, 4)
        shapes[f"{name}.mixer.conv1d.bias"] = (channels,)
        shapes |= {f"{name}.mixer.{part}": (heads,) for part in ("dt_bias", "A_log", "D")}
        shapes[f"{name}.mixer.norm.weight"] = (inner,)
        shapes[f"{name}.mixer.out_proj.weight"] = (hidden, inner)
    norm("backbone.norm_f")
    prefix = "prefix_conditioner"
    for i, item in enumerate(config["prefix_conditioner"]["conditioners"]):
        name = f"{prefix}.conditioners.{i}"
        match item["type"]:
            case "EspeakPhonemeConditioner":
                shapes[f"{name}.phoneme_embedder.weight"] = (189, hidden)
            case "FourierConditioner":
                shapes[f"{name}.weight"] = (hidden // 2, item.get("input_dim", 1))
            case "IntegerConditioner":
                shapes[f"{name}.int_embedder.weight"] = (item["max_val"] - item["min_val"] + 1, hidden)
            case "PassthroughConditioner":
                shapes[f"{name}.project.weight"] = (hidden, item["cond_dim"])
                shapes[f"{name}.project.bias"] = (hidden,)
        if item.get("uncond_type") == "learned":
            shapes[f"{name}.uncond_vector"] = (hidden,)
    shapes[f"{prefix}.project.weight"] = (hidden, hidden)
    shapes[f"{prefix}.project.bias"] = (hidden,)
    norm(f"{prefix}.norm")
    return shapes


def random_weights(config: Mapping[str, Any], *, seed: int, eos_like: int | None = None) -> dict[str, torch.Tensor]:
    """float32, scaled so that codes vary; `eos_like` draws the end wherever that code would have been drawn."""
    random = np.random.RandomState(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes_of(config).items():
        values = random.standard_normal(shape)
        if name.endswith("A_log"):
            values = np.log(1.0 + 4.0 * np.abs(values))
        elif name.endswith("dt_bias"):
            values = values - 1.0
        elif "norm" in name and name.endswith("weight") or name.endswith("mixer.D"):
            values = 1.0 + 0.2 * values
        elif "conditioners" in name and name.endswith(".weight") and "project" not in name:
            pass
        elif name.endswith("uncond_vector"):
            values = 0.5 * values
        elif len(shape) == 1:
            values = 0.1 * values
        elif "conv1d" in name:
            values = 0.5 * values
        elif "embeddings" not in name:
            values = values / math.sqrt(shape[-1]) * (3.0 if "heads" in name else 1.4)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    head = weights["heads.0.weight"]
    head[config["eos_token_id"]] = 0.0 if eos_like is None else head[eos_like] * 1.01
    return weights


def make_zonos(
    folder: Path, config: Mapping[str, Any], *, seed: int = 0, eos_like: int | None = None, codec_channels: int = 64
) -> Path:
    """Save config.json and model.safetensors as Zyphra does; in codec/ a random DAC, unless it would be of none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, seed=seed, eos_like=eos_like), folder / "model.safetensors")
    if codec_channels:
        make_dac(folder / "codec", seed=seed, num_channels=codec_channels)
    return folder


def load_zonos(folder: Path, *, codec: CodecSpec = DAC, recipe: Int4Recipe | None = None) -> ZonosModel:
    """In float32 on the CPU, or as the recipe says; texts are taken for phonemes."""
    return ZonosModel.load(
        folder,
        codec=codec,
        dtype=torch.float32,
        device=torch.device("cpu"),
        recipe=recipe,
        phonemize=lambda text, language: text,
    )


def make_speaker(folder: Path, *, seed: int) -> Path:
    """The speaker encoder's two files, of real size. Every tensor reads on in one random pattern: as many numbers of
    its own would take longer to draw than the network takes to run."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    pattern = random.standard_normal(100_003).astype(np.float32)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in SpeakerNet().state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(1)
            continue
        values = np.resize(np.roll(pattern, -random.randint(len(pattern))), shape)
        if len(shape) > 1:
            values = values * 0.7 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("running_var"):
            values = 1.0 + 0.5 * np.abs(values)
        else:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        weights[name] = torch.from_numpy(values)
    torch.save(weights, folder / ENCODER_NAME)
    projection = {
        "weight": torch.from_numpy(random.standard_normal((128, 256)).astype(np.float32) / 16),
        "bias": torch.from_numpy(random.standard_normal(128).astype(np.float32)),
    }
    torch.save(projection, folder / PROJECTION_NAME)
    return folder


def reference_audio(*, seed: int, rate_hz: int = 16_000, seconds: float = 1.0) -> NDArray[np.float32]:
    """Harmonics that glide, under noise: float32 [S]."""
    random = np.random.RandomState(seed)
    time = np.arange(int(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(150 + 60 * np.sin(5 * time)) / rate_hz
    voiced = sum(np.sin(k * phase + random.uniform(0, 6)) / k for k in range(1, 12))
    return (0.2 * voiced + 0.01 * random.standard_normal(len(time))).astype(np.float32)


def codec_recipe(folder: Path) -> CodecRecipe:
    return CodecRecipe(kind="dac", folder=str(folder / "codec"))


def load_dac(folder: Path, *, with_encoder: bool = False) -> Any:
    return load_codec(codec_recipe(folder), with_encoder=with_encoder)


def _cases() -> dict[str, Case]:
    return {
        f"{family}-{name}": Case(family=family, **settings)
        for family in CONFIGS
        for name, settings in {
            "plain": {"text": "həloʊ wɜːld", "seed": 3, "max_frames": 40},
            "lively": {
                "text": "ɪt kˈɔst fˈaɪv dˈɑːlɚz!",
                "seed": 5,
                "max_frames": 60,
                "eos_like": EOS_LIKE[family]["lively"],
                "has_speaker": True,
                "language": "de",
                "conditions": LIVELY,
            },
            "continued": {
                "text": "ðə sˈʌn, ænd ðə mˈuːn.",
                "seed": 8,
                "max_frames": 60,
                "eos_like": EOS_LIKE[family]["continued"],
                "guidance_scale": 3.5,
                "has_speaker": True,
                "num_prompt": 11,
            },
            "short": {
                "text": "nˈoʊ",
                "seed": 13,
                "max_frames": 60,
                "eos_like": EOS_LIKE[family]["short"],
                "guidance_scale": 1.5,
            },
        }.items()
    }


# Codes that the checkpoint without an end draws at some row; found by fixtures/make_zonos.py --find.
EOS_LIKE: dict[str, dict[str, int | None]] = {
    "transformer": {"lively": 117, "continued": 521, "short": 769},
    "hybrid": {"lively": 598, "continued": 194, "short": 444},
}
CASES = _cases()

# Texts that espeak-ng turns into phonemes, and their language.
ESPEAK = (
    ("Hello there, my friend! Are you sure -- really?", "en-us"),
    ("Ça va; c'est « très » bien.", "fr-fr"),
    ("Über sieben Brücken mußt du gehn…", "de"),
)
