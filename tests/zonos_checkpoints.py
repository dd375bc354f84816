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
from declaim.engine.request import ControlValue, EncodedVoice, SamplingParams
from declaim.engine.speaker import ENCODER_NAME, PROJECTION_NAME, SpeakerNet
from declaim.engine.spec import CodecSpec
from tests.dia_checkpoints import make_dac

FIXTURE = Path(__file__).parent / "engine" / "fixtures" / "zonos.npz"
HIDDEN, NUM_CODEBOOKS, EOS, MASKED = 64, 9, 1024, 1025
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
        "masked_token_id": MASKED,
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
    """What the reference was asked. text: IPA, no espeak-ng between. conditions: by the reference's names.

    seed, eos_like: of the weights; the code of the first codebook in whose place they draw the end. num_prompt: frames
    of audio to continue, in which the text's first num_said words are spoken. nth: of those that one checkpoint was
    asked; each has a speaker and a prompt of its own.
    """

    family: str
    text: str
    seed: int
    max_frames: int
    eos_like: int | None = None
    guidance_scale: float = 2.0
    has_speaker: bool = False
    num_prompt: int = 0
    num_said: int = 2
    language: str = "en-us"
    conditions: Mapping[str, Any] = field(default_factory=dict)
    nth: int = 0

    @property
    def speaker(self) -> NDArray[np.float32] | None:
        if not self.has_speaker:
            return None
        return np.random.RandomState(self.seed + 1 + 100 * self.nth).standard_normal(128).astype(np.float32)

    @property
    def prompt_frames(self) -> NDArray[np.int32]:
        """[P, 9]."""
        random = np.random.RandomState(self.seed + 2 + 100 * self.nth)
        return random.randint(0, 1024, (self.num_prompt, NUM_CODEBOOKS)).astype(np.int32)

    @property
    def voice(self) -> EncodedVoice:
        said = self.text.split(" ")[: self.num_said] if self.num_prompt else []
        return EncodedVoice(" ".join(said), self.prompt_frames, self.speaker)

    @property
    def text_to_say(self) -> str:
        """What the voice has not said yet."""
        return self.text.removeprefix(self.voice.transcript).strip()

    @property
    def controls(self) -> dict[str, ControlValue]:
        """The conditions by this project's names."""
        names = {"dnsmos_ovrl": "quality", "vqscore_8": "voice_quality"}
        return {
            names.get(name, name): tuple(value) if isinstance(value, list) else float(value)
            for name, value in self.conditions.items()
        }


LIVELY = {
    "emotion": [0.8, 0.1, 0.0, 0.0, 0.2, 0.0, 0.1, 0.3],
    "pitch_std": 85.0,
    "fmax": 24000.0,
    "speaking_rate": 21.5,
}
# What the hybrid alone knows; the reference leaves the first two open unless it is asked not to.
RATED = {
    "vqscore_8": [0.62, 0.65, 0.7, 0.71, 0.74, 0.77, 0.78, 0.79],
    "dnsmos_ovrl": 3.6,
    "ctc_loss": 12.5,
    "speaker_noised": True,
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


def load_zonos(
    folder: Path,
    *,
    codec: CodecSpec = DAC,
    recipe: Int4Recipe | None = None,
    dtype: torch.dtype = torch.float32,
) -> ZonosModel:
    """On the CPU, quantized as the recipe says; texts are taken for phonemes."""
    return ZonosModel.load(
        folder,
        codec=codec,
        dtype=dtype,
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


# Codes that the checkpoint without an end draws at some row; found by fixtures/make_zonos.py --find.
EOS_LIKE: dict[str, dict[str, int | None]] = {
    "transformer": {"lively": 117, "continued": 521, "short": 769, "crowd": 906},
    "hybrid": {"lively": 598, "continued": 194, "short": 444, "crowd": 223},
}


def _cases(family: str) -> dict[str, Case]:
    ends = EOS_LIKE[family]
    cases = {
        "plain": Case(family, "həloʊ wɜːld", seed=3, max_frames=40),
        "lively": Case(
            family,
            "ɪt kˈɔst fˈaɪv dˈɑːlɚz!",
            seed=5,
            max_frames=60,
            eos_like=ends["lively"],
            has_speaker=True,
            language="de",
            conditions=LIVELY,
        ),
        "continued": Case(
            family,
            "ðə sˈʌn, ænd ðə mˈuːn.",
            seed=8,
            max_frames=60,
            eos_like=ends["continued"],
            guidance_scale=3.5,
            has_speaker=True,
            num_prompt=11,
        ),
        "short": Case(family, "nˈoʊ", seed=13, max_frames=60, eos_like=ends["short"], guidance_scale=1.5),
    }
    if family == "hybrid":
        cases["rated"] = Case(family, "klˈɪɹ ænd klˈiːn.", seed=17, max_frames=20, conditions=RATED)
    return cases


def _crowd(family: str) -> tuple[Case, ...]:
    """Requests of one checkpoint, as different as they come."""
    own = RATED if family == "hybrid" else {}
    asked: list[dict[str, Any]] = [
        {"text": "wˈʌn tˈuː θɹˈiː fˈoːɹ", "max_frames": 48},
        {
            "text": "ɡˈuːtən mˈɔʁɡən, vˈɛlt!",
            "max_frames": 70,
            "guidance_scale": 3.0,
            "has_speaker": True,
            "language": "de",
            "conditions": LIVELY | own,
        },
        {
            "text": "ðə lˈɔŋ hˈɑːt sˈʌmɚ, ænd nˈoʊ wˈɪnd æt ˈɔːl.",
            "max_frames": 33,
            "guidance_scale": 1.4,
            "has_speaker": True,
            "num_prompt": 17,
            "language": "en-gb",
        },
        {
            "text": "bɔ̃ʒˈuʁ",
            "max_frames": 90,
            "guidance_scale": 4.5,
            "num_prompt": 5,
            "num_said": 0,
            "language": "fr-fr",
            "conditions": {"speaking_rate": 30.0, "pitch_std": 120.0},
        },
        {"text": "oʊ", "max_frames": 80, "guidance_scale": 2.5, "has_speaker": True, "language": "pt-br"},
        {
            "text": "ni2 xˈɑu2, ʂˈi.ɻ5 tɕˈiɛ5: ɪt ɪz nˈoʊ sˈoʊ lˈɔŋ ɐ stˈoːɹi, bˌʌt ɪt ɪz tˈoʊld.",
            "max_frames": 26,
            "guidance_scale": 1.8,
            "language": "cmn",
            "conditions": own | {"fmax": 16_000.0},
        },
    ]
    shared = {"family": family, "seed": 32, "eos_like": EOS_LIKE[family]["crowd"]}
    return tuple(Case(**shared, **one, nth=i) for i, one in enumerate(asked))


CASES = {f"{family}-{name}": case for family in CONFIGS for name, case in _cases(family).items()}
CROWDS = {family: _crowd(family) for family in CONFIGS}
# Whose prefix is computed in bfloat16 too.
HALVED = ("transformer-lively", "hybrid-rated")
SPEAKER_RATES_HZ = (16_000, 44_100)

# What is drawn with; in each but the first min_p is told, which `generate` of the reference sets and its sampler not.
SAMPLED: Mapping[str, SamplingParams] = {
    "defaults": SamplingParams(),
    "unfiltered": SamplingParams(min_p=0.0),
    "cold": SamplingParams(temperature=0.7, min_p=0.1, repetition_penalty=1.5, guidance_scale=3.0),
    "top_p, top_k": SamplingParams(top_p=0.8, top_k=40, min_p=0.0),
    "top_p, min_p": SamplingParams(top_p=0.5, min_p=0.1),
}
# Of each run the first draw, which no penalty falls on; two whose past is not filled yet in every codebook; and one
# whose past is.
SAMPLED_DRAWS = {name: (0, 1, 2, 11) if name == "defaults" else (11,) for name in SAMPLED}


@dataclass(frozen=True)
class Script:
    """A run whose logits are the same in every step, and whose codes are told, not drawn: what is left to draw from
    then shows the filters alone. logits: float32 [2, 9, 1025], of both branches. prompt: int32 [P, 9]. drawn: int32
    [draws, 9]."""

    logits: NDArray[np.float32]
    prompt: NDArray[np.int32]
    drawn: NDArray[np.int32]

    @classmethod
    def write(cls) -> Script:
        """The end is likely in every codebook. The past repeats itself: in likely codes, and in ones below 0."""
        random = np.random.RandomState(31)
        conditional = random.standard_normal((NUM_CODEBOOKS, EOS + 1))
        logits = np.stack([conditional, conditional + 0.5 * random.standard_normal(conditional.shape)])
        logits[:, :, EOS] = np.sort(2 * logits[0] - logits[1], axis=-1)[:, -4]
        ranked = np.argsort(logits[1] - 2 * logits[0], axis=-1)
        ranked = ranked[ranked != EOS].reshape(NUM_CODEBOOKS, EOS)
        places = random.choice([0, 1, 3, 900], size=(12, NUM_CODEBOOKS))
        drawn = ranked[np.arange(NUM_CODEBOOKS), places]
        prompt = np.repeat(ranked[None, :, 0], 2, axis=0)
        return cls(logits.astype(np.float32), prompt.astype(np.int32), drawn.astype(np.int32))


# Texts that espeak-ng turns into phonemes, and their language.
ESPEAK = (
    ("Hello there, my friend! Are you sure -- really?", "en-us"),
    ("Ça va; c'est « très » bien.", "fr-fr"),
    ("Über sieben Brücken mußt du gehn…", "de"),
)
