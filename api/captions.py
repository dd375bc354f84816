"""When words are spoken, as WebVTT captions."""

from __future__ import annotations

from collections.abc import Iterable

from declaim.engine.request import Word

_MAX_CUE_CHARS = 84  # two lines of 42, as captions are commonly set
_MAX_CUE_S = 6.0
_MAX_GAP_S = 0.8
_ENDS = (".", "!", "?", "…", "。", "！", "？")


def to_webvtt(words: Iterable[Word]) -> str:
    """Captions of a few seconds each, cut after sentences and at pauses; words: in order, timed in seconds."""
    blocks = ["WEBVTT"]
    for cue in _cues(words):
        text = " ".join(word.text for word in cue)
        # Only these mean something to a WebVTT parser.
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_time(cue[0].start_s)} --> {_time(cue[-1].end_s)}\n{text}")
    return "\n\n".join(blocks) + "\n"


def _cues(words: Iterable[Word]) -> Iterable[list[Word]]:
    cue: list[Word] = []
    for word in words:
        if cue:
            num_chars = sum(len(other.text) + 1 for other in cue) + len(word.text)
            is_full = num_chars > _MAX_CUE_CHARS or word.end_s - cue[0].start_s > _MAX_CUE_S
            if is_full or word.start_s - cue[-1].end_s > _MAX_GAP_S or cue[-1].text.endswith(_ENDS):
                yield cue
                cue = []
        cue.append(word)
    if cue:
        yield cue


def _time(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds / 1000:06.3f}"
