"""A family's own dials (`ModelSpec.controls`): what a request sets, checked against the family's table.

Torch-free; knows no family, only the names of all their dials. Instructions are words the family has a table for,
nothing is guessed from others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from declaim.engine.errors import InvalidRequest
from declaim.engine.request import ControlValue
from declaim.engine.spec import ControlSpec

# Every dial that a family may have. A request that sets one which the served model lacks is refused, so a name has to
# be known to be looked at: other unknown fields are ignored.
DIALS: Mapping[str, str] = {
    "emotion": "an emotion by name, or the weights of all",
    "speaking_rate": "phonemes a second",
    "pitch_std": "variation of pitch, Hz",
    "fmax": "highest frequency, Hz",
    "quality": "overall quality wanted, as DNSMOS rates it",
    "voice_quality": "VQScore wanted, of each eighth of the audio",
    "ctc_loss": "how far speech may stray from the text",
    "speaker_noised": "1 cleans up a noisy reference voice",
}

# What follows one of these is not wanted.
_NEGATIONS = frozenset({"not", "never", "no", "don't", "without", "less"})


def resolve_controls(
    given: Mapping[str, ControlValue], table: Mapping[str, ControlSpec]
) -> dict[str, tuple[float, ...]]:
    """Numbers of every control that is set or has a default; the others are left to the model.

    Raises: InvalidRequest naming the control, its value and what it takes.
    """
    for name in given:
        if name not in table:
            known = ", ".join(table) or "none"
            raise InvalidRequest(f"this model has no control {name!r}: it has {known}; leave it out", param=name)
    resolved = {name: spec.default for name, spec in table.items() if spec.default is not None}
    return resolved | {name: _numbers(name, value, table[name]) for name, value in given.items()}


def read_instructions(
    instructions: str, table: Mapping[str, Mapping[str, tuple[float, ...]]]
) -> dict[str, tuple[float, ...]]:
    """What words such as "happy, slowly" set, case-insensitively; of words that disagree, the later counts, and "not
    happy" sets nothing.

    Raises: InvalidRequest where none of the words is in the table.
    """
    words = re.findall(r"[\w']+", instructions.lower().replace("’", "'"))
    befores = ["", *words]
    found = [
        table[word] for word, before in zip(words, befores, strict=False) if word in table and before not in _NEGATIONS
    ]
    if words and not found:
        known = ", ".join(table) or "none"
        raise InvalidRequest(
            f"instructions {instructions!r} hold no word that this model acts on: it knows {known}",
            param="instructions",
        )
    return {name: values for setting in found for name, values in setting.items()}


def _numbers(name: str, value: ControlValue, spec: ControlSpec) -> tuple[float, ...]:
    if isinstance(value, str):
        if value.lower() not in spec.names:
            known = f"one of {', '.join(spec.names)}, or " if spec.names else ""
            raise InvalidRequest(f"{name} is {value!r}: it must be {known}{_wanted(spec)}", param=name)
        return spec.names[value.lower()]
    # One number for all has no meaning where each has a name of its own, as emotions have.
    count = 1 if spec.names else spec.length
    numbers: tuple[float, ...] = tuple(value) if isinstance(value, tuple | list) else (value,) * count
    if len(numbers) != spec.length:
        raise InvalidRequest(f"{name} holds {len(numbers)} numbers: it must be {_wanted(spec)}", param=name)
    for number in numbers:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or math.isnan(number) or not spec.low <= number <= spec.high:
            raise InvalidRequest(f"{name} is {value!r}: it must be {_wanted(spec)}", param=name)
    return tuple(float(number) for number in numbers)


def _wanted(spec: ControlSpec) -> str:
    count = "a number" if spec.length == 1 else f"{spec.length} numbers"
    return f"{count} from {spec.low:g} to {spec.high:g} ({spec.description})"
