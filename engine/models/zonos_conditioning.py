"""What Zonos is told before it speaks: phonemes, then one vector each for the voice, its mood, pitch, pace and so on.

Everything lies along the time axis, in the order of the checkpoint's config, and passes one projection and one norm.
A condition that is not given becomes a learned vector of the same length, so a prefix without conditions is as long as
one with them: guidance compares the two. Source: Zonos-v0.1 `PrefixConditioner`.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from declaim.engine.checkpoint import Checkpoint
from declaim.engine.errors import InvalidRequest, ModelLoadError
from declaim.engine.spec import ControlSpec

NORM_EPS = 1e-5

Projection = Literal["none", "linear", "mlp"]
Kind = Literal["EspeakPhonemeConditioner", "PassthroughConditioner", "FourierConditioner", "IntegerConditioner"]

UNKNOWN_ID, BOS_ID, EOS_ID, FIRST_SYMBOL_ID = 1, 2, 3, 4
# Their order is the embedding's: punctuation, the Latin alphabet, the International Phonetic Alphabet.
PUNCTUATION = ';:,.!?¡¿—…"«»“”() *~-/\\&'
SYMBOLS = (
    PUNCTUATION
    + "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    + "ɑɐɒæɓʙβɔɕçɗɖðʤəɘɚɛɜɝɞɟʄɡɠɢʛɦɧħɥʜɨɪʝɭɬɫɮʟɱɯɰŋɳɲɴøɵɸθœɶʘɹɺɾɻʀʁɽʂʃʈʧʉʊʋⱱʌɣɤʍχʎʏʑʐʒʔʡʕʢǀǁǂǃˈˌːˑʼʴʰʱʲʷˠˤ˞↓↑→↗↘'̩'ᵻ"
)
NUM_SYMBOLS = FIRST_SYMBOL_ID + len(SYMBOLS)
# A character that stands there twice has its last place.
_SYMBOL_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS, start=FIRST_SYMBOL_ID)}

# As espeak-ng names them; a language's place is what the model knows it by.
LANGUAGES = tuple(
    "af am an ar as az ba bg bn bpy bs ca cmn cs cy da de el en-029 en-gb en-gb-scotland en-gb-x-gbclan en-gb-x-gbcwmd"
    " en-gb-x-rp en-us eo es es-419 et eu fa fa-latn fi fr-be fr-ch fr-fr ga gd gn grc gu hak hi hr ht hu hy hyw ia id"
    " is it ja jbo ka kk kl kn ko kok ku ky la lfn lt lv mi mk ml mr ms mt my nb nci ne nl om or pa pap pl pt pt-br py"
    " quc ro ru ru-lv sd shn si sk sl sq sr sv sw ta te tn tr tt ur uz vi vi-vn-x-central vi-vn-x-south yue".split()
)
DEFAULT_LANGUAGE = "en-us"
# Where a plain ISO 639-1 code is not one of them.
_SPOKEN_AS: Mapping[str, str] = {"en": "en-us", "fr": "fr-fr", "no": "nb", "zh": "cmn"}
# What letters of a script are taken for, by the first word of their names in Unicode.
_OF_SCRIPT: Mapping[str, str] = {
    "CJK": "cmn",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CYRILLIC": "ru",
    "GREEK": "el",
    "ARABIC": "ar",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}

EMOTIONS = ("happiness", "sadness", "disgust", "fear", "surprise", "anger", "other", "neutral")
_CALM = (0.3077, 0.0256, 0.0256, 0.0256, 0.0256, 0.0256, 0.2564, 0.3077)


_FEELINGS: Mapping[str, str] = {
    "happy": "happiness",
    "sad": "sadness",
    "disgusted": "disgust",
    "afraid": "fear",
    "surprised": "surprise",
    "angry": "anger",
}


def _mostly(emotion: str) -> tuple[float, ...]:
    """One emotion over a trace of the others."""
    return tuple(0.8 if name == emotion else 0.02 for name in EMOTIONS)


# The request's name of each control, the condition it sets, and what it takes. Ranges are those the model was trained
# with, defaults the reference's own.
_CONTROLS: Mapping[str, tuple[str, ControlSpec]] = {
    "emotion": (
        "emotion",
        ControlSpec(
            f"weights of {', '.join(EMOTIONS)}; they are divided by their sum",
            0.0,
            1.0,
            _CALM,
            length=len(EMOTIONS),
            names={name: _mostly(name) for name in EMOTIONS}
            | {word: _mostly(name) for word, name in _FEELINGS.items()}
            | {"calm": _CALM},
        ),
    ),
    "speaking_rate": ("speaking_rate", ControlSpec("phonemes a second: 10 is slow, 30 very fast", 0.0, 40.0, (15.0,))),
    "pitch_std": ("pitch_std", ControlSpec("pitch variation in Hz: 20-45 plain, 60-150 lively", 0.0, 400.0, (20.0,))),
    "fmax": ("fmax", ControlSpec("highest frequency in Hz; 22050 suits cloned voices", 0.0, 24_000.0, (22_050.0,))),
    "quality": (
        "dnsmos_ovrl",
        ControlSpec("overall quality, as DNSMOS rates it; unset for lively speech", 1.0, 5.0, None),
    ),
    "voice_quality": ("vqscore_8", ControlSpec("VQScore of each eighth of the audio", 0.5, 0.8, None, length=8)),
    "ctc_loss": ("ctc_loss", ControlSpec("how far speech may stray from the text; 0 is clear", 0.0, 1000.0, (0.0,))),
    "speaker_noised": ("speaker_noised", ControlSpec("1 cleans up a noisy reference voice", 0.0, 1.0, (0.0,))),
}

# Words of instructions, and what they set.
INSTRUCTIONS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "happy": {"emotion": _mostly("happiness"), "pitch_std": (60.0,)},
    "happily": {"emotion": _mostly("happiness"), "pitch_std": (60.0,)},
    "cheerful": {"emotion": _mostly("happiness"), "pitch_std": (60.0,)},
    "cheerfully": {"emotion": _mostly("happiness"), "pitch_std": (60.0,)},
    "sad": {"emotion": _mostly("sadness")},
    "sadly": {"emotion": _mostly("sadness")},
    "disgusted": {"emotion": _mostly("disgust")},
    "afraid": {"emotion": _mostly("fear"), "pitch_std": (60.0,)},
    "scared": {"emotion": _mostly("fear"), "pitch_std": (60.0,)},
    "surprised": {"emotion": _mostly("surprise"), "pitch_std": (80.0,)},
    "angry": {"emotion": _mostly("anger"), "pitch_std": (60.0,)},
    "angrily": {"emotion": _mostly("anger"), "pitch_std": (60.0,)},
    "neutral": {"emotion": _mostly("neutral")},
    "calm": {"emotion": _CALM, "pitch_std": (20.0,)},
    "calmly": {"emotion": _CALM, "pitch_std": (20.0,)},
    "slowly": {"speaking_rate": (10.0,)},
    "slow": {"speaking_rate": (10.0,)},
    "quickly": {"speaking_rate": (22.0,)},
    "quick": {"speaking_rate": (22.0,)},
    "fast": {"speaking_rate": (22.0,)},
    "lively": {"pitch_std": (90.0,)},
    "expressive": {"pitch_std": (90.0,)},
    "monotone": {"pitch_std": (10.0,)},
    "clear": {"quality": (4.0,)},
    "clearly": {"quality": (4.0,)},
}


@dataclass(frozen=True, slots=True)
class ConditionerConfig:
    """One condition. num_in: numbers it takes. is_optional: a learned vector stands for it where it is not given."""

    kind: Kind
    name: str
    num_in: int
    low: float
    high: float
    projection: Projection
    is_optional: bool


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    conditioners: tuple[ConditionerConfig, ...]
    projection: Projection

    @classmethod
    def read(cls, config: Mapping[str, Any], *, source: Path) -> PrefixConfig:
        """Raises: KeyError; ModelLoadError for what this version does not know."""
        found = cls(tuple(_read_conditioner(item, source) for item in config["conditioners"]), config["projection"])
        texts = [item.name for item in found.conditioners if item.kind == "EspeakPhonemeConditioner"]
        if len(texts) != 1:
            raise ModelLoadError(
                f"{source} has {len(texts)} conditioners of phonemes, a Zonos has one: download it again"
            )
        return found

    @property
    def num_vectors(self) -> int:
        """Positions of the prefix that are not phonemes."""
        return len(self.conditioners) - 1

    @property
    def controls(self) -> dict[str, ControlSpec]:
        """Those whose condition this checkpoint has."""
        names = {item.name for item in self.conditioners}
        return {control: spec for control, (name, spec) in _CONTROLS.items() if name in names}

    @property
    def instructions(self) -> dict[str, Mapping[str, tuple[float, ...]]]:
        """Words that set nothing but such controls."""
        return {word: values for word, values in INSTRUCTIONS.items() if set(values) <= set(self.controls)}

    def takes(self, name: str) -> bool:
        return any(item.name == name for item in self.conditioners)


def _read_conditioner(config: Mapping[str, Any], source: Path) -> ConditionerConfig:
    kind, projection = config["type"], config.get("projection", "none")
    if kind not in get_args(Kind) or projection not in get_args(Projection):
        raise ModelLoadError(
            f"{source} has a conditioner of type {kind!r} and projection {projection!r}: this version knows"
            f" {', '.join(get_args(Kind))} and {', '.join(get_args(Projection))}"
        )
    ranges = {"IntegerConditioner": (0, 512)}.get(kind, (0.0, 1.0))
    num_in = {"FourierConditioner": config.get("input_dim", 1), "PassthroughConditioner": config.get("cond_dim", 0)}
    return ConditionerConfig(
        kind=kind,
        name=config["name"],
        num_in=num_in.get(kind, 1),
        low=config.get("min_val", ranges[0]),
        high=config.get("max_val", ranges[1]),
        projection=projection,
        is_optional=config.get("uncond_type", "none") == "learned",
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Dense:
    """Linear layers with silu between them; none for the identity."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for i, (weight, bias) in enumerate(self.layers):
            x = F.linear(F.silu(x) if i else x, weight, bias)
        return x

    @classmethod
    def take(cls, weights: Checkpoint, name: str, projection: Projection, *, num_in: int, num_out: int) -> _Dense:
        shapes = {"none": (), "linear": (("", num_in),), "mlp": ((".0", num_in), (".2", num_out))}[projection]
        return cls(
            tuple(
                (
                    weights.take(f"{name}.project{part}.weight", (num_out, size)),
                    weights.take(f"{name}.project{part}.bias", (num_out,)),
                )
                for part, size in shapes
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Conditioner:
    """table: the embedding of phonemes or integers, or a Fourier condition's frequencies. absent: [C]."""

    config: ConditionerConfig
    table: torch.Tensor | None
    project: _Dense
    absent: torch.Tensor | None

    @classmethod
    def take(cls, weights: Checkpoint, name: str, config: ConditionerConfig, hidden: int) -> _Conditioner:
        table: torch.Tensor | None = None
        match config.kind:
            case "EspeakPhonemeConditioner":
                table = weights.take(f"{name}.phoneme_embedder.weight", (NUM_SYMBOLS, hidden))
            case "IntegerConditioner":
                count = int(config.high) - int(config.low) + 1
                table = weights.take(f"{name}.int_embedder.weight", (count, hidden))
            case "FourierConditioner":
                table = weights.take(f"{name}.weight", (hidden // 2, config.num_in))
            case "PassthroughConditioner":
                pass
        num_in = config.num_in if config.kind == "PassthroughConditioner" else hidden
        return cls(
            config,
            table,
            _Dense.take(weights, name, config.projection, num_in=num_in or hidden, num_out=hidden),
            weights.take(f"{name}.uncond_vector", (hidden,)) if config.is_optional else None,
        )

    def __call__(self, values: tuple[float, ...], *, like: torch.Tensor) -> torch.Tensor:
        """[1, C], or [L, C] of L phonemes. like: names device and dtype."""
        config, table = self.config, self.table
        if table is None:
            return self.project(torch.tensor([values], device=like.device, dtype=like.dtype))
        if config.kind == "FourierConditioner":
            x = torch.tensor([values], device=like.device)
            x = (x - config.low) / (config.high - config.low)
            # In the weights' dtype, 16 bits included: so the model was trained.
            angles = 2 * math.pi * x.to(table.dtype) @ table.t()
            return self.project(torch.cat([angles.cos(), angles.sin()], dim=-1))
        first = 0 if config.kind == "EspeakPhonemeConditioner" else int(config.low)
        indices = torch.tensor([int(value) - first for value in values], device=like.device)
        return self.project(table[indices])


class PrefixConditioner:
    """The conditioning prefix of a loaded Zonos."""

    def __init__(self, config: PrefixConfig, weights: Checkpoint, *, hidden: int) -> None:
        name = "prefix_conditioner"
        self._conditioners = tuple(
            _Conditioner.take(weights, f"{name}.conditioners.{i}", item, hidden)
            for i, item in enumerate(config.conditioners)
        )
        self._project = _Dense.take(weights, name, config.projection, num_in=hidden, num_out=hidden)
        self._norm = (weights.take(f"{name}.norm.weight", (hidden,)), weights.take(f"{name}.norm.bias", (hidden,)))
        self._hidden = hidden

    def __call__(self, text_ids: Sequence[int], conditions: Mapping[str, tuple[float, ...]]) -> torch.Tensor:
        """The prefix [L + conditions, C] of L phoneme ids; conditions that are absent count as unknown."""
        parts = []
        for conditioner in self._conditioners:
            config = conditioner.config
            values = tuple(text_ids) if config.kind == "EspeakPhonemeConditioner" else conditions.get(config.name)
            if values is not None:
                parts.append(conditioner(values, like=self._norm[0]))
            elif conditioner.absent is not None:
                parts.append(conditioner.absent[None])
            else:
                raise ValueError(f"this Zonos always needs {config.name}, and it was not given")
        x = self._project(torch.cat(parts))
        return F.layer_norm(x, (self._hidden,), *self._norm, NORM_EPS)

    def without_conditions(self, text_ids: Sequence[int], conditions: Mapping[str, tuple[float, ...]]) -> torch.Tensor:
        """The same of the text and of what the model cannot do without: what guidance leads away from."""
        needed = {item.config.name for item in self._conditioners if not item.config.is_optional}
        return self(text_ids, {name: values for name, values in conditions.items() if name in needed})


def encode_phonemes(phonemes: str) -> tuple[int, ...]:
    """Ids of phonemes between begin and end; what the model has no symbol for becomes unknown."""
    return (BOS_ID, *(_SYMBOL_IDS.get(symbol, UNKNOWN_ID) for symbol in phonemes), EOS_ID)


def find_language(name: str) -> str | None:
    """What espeak-ng calls a language that is named by an ISO 639-1 code or a tag; None where nobody speaks it."""
    wanted = name.lower().replace("_", "-")
    if wanted in LANGUAGES:
        return wanted
    plain = wanted.split("-")[0]
    spoken = _SPOKEN_AS.get(plain, plain)
    return spoken if spoken in LANGUAGES else None


def guess_language(text: str) -> str:
    """What a text without a language is spoken as: by its most frequent script, Japanese where there is kana."""
    scripts = Counter(unicodedata.name(letter, "LATIN").split()[0] for letter in text if letter.isalpha())
    if scripts["CJK"] and (scripts["HIRAGANA"] or scripts["KATAKANA"]):
        return "ja"
    most = max(scripts, key=lambda script: scripts[script], default="LATIN")
    return _OF_SCRIPT.get(most, DEFAULT_LANGUAGE)


def conditions_of(
    config: PrefixConfig,
    controls: Mapping[str, tuple[float, ...]],
    *,
    language: str,
    embedding: Sequence[float] | None,
    speed: float,
) -> dict[str, tuple[float, ...]]:
    """Conditions by name, from resolved controls. speed multiplies the speaking rate, as far as the model goes.

    Raises: InvalidRequest for an emotion without weight.
    """
    given = {_CONTROLS[control][0]: values for control, values in controls.items()}
    if "emotion" in given:
        weights = torch.tensor(given["emotion"])
        if not weights.sum() > 0:
            raise InvalidRequest("emotion has no weight above 0: raise one, for example neutral", param="emotion")
        given["emotion"] = tuple((weights / weights.sum()).tolist())
    if "speaking_rate" in given:
        fastest = _CONTROLS["speaking_rate"][1].high
        given["speaking_rate"] = (min(fastest, given["speaking_rate"][0] * speed),)
    given["language_id"] = (float(LANGUAGES.index(language)),)
    if embedding is not None:
        given["speaker"] = tuple(float(value) for value in embedding)
    return {name: values for name, values in given.items() if config.takes(name)}
