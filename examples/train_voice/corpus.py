"""What is spoken for training, and what is held out of it.

The sentences come from a file, one a line; numbers, dates, money, questions and short dialogue turns are made here,
because example sentences of a dictionary hold few of them. Everything goes through the product's own front end, so the
voice is trained on the very phonemes that it will be asked for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from declaim.engine.errors import DeclaimError
from declaim.engine.loader import EMBEDDED_FOLDER
from declaim.engine.phonemes import Phonemizer
from declaim.engine.text import clean_text, normalize_english, segment

MAX_BYTES = 240  # the longest sentence of 120 characters, in phonemes
HELD_OUT_PERCENT = 1

# Said without stress inside a phrase; exported with the voice as the front end's "weak".
WEAK_WORDS = frozenset(
    "am an and are as at be been but by can could did do does for from had has have he her him his i if in is it its me"
    " my of on or our she so than that the their them then there they this to us was we were when while who will with"
    " would you your".split()
)

_MONTHS = "January February March April May June July August September October November December".split()
_NAMES = "Anna Peter Maria James Susan Robert Emily David Laura Thomas Helen Daniel Julia Martin Rachel Oliver".split()
_THINGS = "apples tickets letters chairs bottles pages stamps lanterns boxes coins maps candles bricks ladders".split()
_PLACES = "the station|the library|the harbour|the market|the old mill|the second floor|the north gate".split("|")
_FRAMES = (
    "On {month} {day}, {year}, {name} bought {n} {things}.",
    "It costs ${dollars}.{cents:02d}, or {n} percent less on {weekday}.",
    "Is it {hour}:{minute:02d} already, {name}?",
    "{name} said: {n} {things}, not {m}!",
    "Why did {name} leave {things} at {place}?",
    "The number is {n}, and the code is {m}.",
    "Where is {place}?",
    "Dr. {name} lives at {n} {surname} St.",
    "{name} waited {n} minutes at {place}, then {m} more.",
    "Yes, {name}, I know. What about {place}?",
    "No! {n} {things}? That is impossible.",
    "It was {temperature} degrees in {month}, {name} told me.",
    "Call {name} on {weekday} at {hour}:{minute:02d}, please.",
    "They won {small} to {tiny} in {year}.",
    "Hello, {name}. How are you today?",
    "I am fine, thank you, {name}. And you?",
)


def made_sentences(seed: int) -> Iterator[str]:
    """Sentences from the frames above, without end."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(_FRAMES).format(
            month=draw.choice(_MONTHS),
            day=draw.randint(1, 28),
            year=draw.choice((draw.randint(1700, 1999), draw.randint(2000, 2035))),
            name=draw.choice(_NAMES),
            surname=draw.choice(_NAMES),
            n=draw.choice((draw.randint(2, 20), draw.randint(21, 999), draw.randint(1000, 99_999))),
            m=draw.randint(2, 999),
            things=draw.choice(_THINGS),
            dollars=draw.randint(1, 999),
            cents=draw.randint(0, 99),
            weekday=draw.choice("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
            hour=draw.randint(1, 12),
            minute=draw.randint(0, 59),
            place=draw.choice(_PLACES),
            temperature=draw.randint(-15, 40),
            small=draw.randint(1, 30),
            tiny=draw.randint(0, 9),
        )


def is_held_out(text: str) -> bool:
    """A fixed percent of all texts, whatever their order: for the validation loss, never trained on."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def texts(sentences: Path, *, seed: int, made_share: float = 0.08) -> Iterator[str]:
    """The file's sentences in a shuffled order that `seed` fixes, again and again, made ones between them."""
    lines = [line for line in sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
    draw, made = random.Random(seed), made_sentences(seed)
    while True:
        draw.shuffle(lines)
        for line in lines:
            if draw.random() < made_share:
                yield next(made)
            yield line


def front_end() -> Phonemizer:
    """The product's, as the voice that is trained here will have it."""
    return replace(Phonemizer.load(EMBEDDED_FOLDER), weak_words=WEAK_WORDS)


def phonemes_of(text: str, phonemizer: Phonemizer) -> list[str]:
    """The phonemes of each segment that the product would speak of a text; [] where there is nothing to say."""
    try:
        pieces = segment(normalize_english(clean_text(text)))
    except DeclaimError:
        return []
    spoken = (phonemizer.phonemes(piece) for piece in pieces)
    return [phonemes for phonemes in spoken if 3 < len(phonemes) <= MAX_BYTES - 2]
