"""The noise against SplitMix64 in Python integers, and against the distribution it claims."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from declaim.kernels.noise import draw_keys, gumbel_noise, mix64

GAMMA = 0x9E3779B97F4A7C15
WORD = 1 << 64


def output(state: int) -> int:
    """SplitMix64's output function."""
    z = state % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def key_of(seed: int, row: int, codebook: int) -> int:
    return output(output(output(seed + GAMMA) + row * GAMMA) + (codebook + 1) * GAMMA)


def noise_of(key: int, id_: int) -> float:
    uniform = ((output(key + (id_ + 1) * GAMMA) >> 41) + 0.5) / 2**23
    return -math.log(-math.log(uniform))


def test_the_mixer_gives_the_published_first_outputs_of_splitmix64() -> None:
    """The generator's stream from seed 1234567, as its users publish it."""
    stream = [mix64(1234567 + i * GAMMA) for i in (1, 2, 3)]
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]


seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, row=st.integers(0, 100_000), codebook=st.integers(0, 8), id_=st.integers(0, 5000))
def test_keys_and_noise_are_those_of_python_integers(seed: int, row: int, codebook: int, id_: int) -> None:
    keys = draw_keys(torch.tensor([seed]), torch.tensor([row]), num_codebooks=9)
    assert int(keys[0, codebook, 0]) % WORD == key_of(seed, row, codebook)
    noise = float(gumbel_noise(keys, torch.tensor([id_]))[0, codebook, 0])
    assert math.isclose(noise, noise_of(key_of(seed, row, codebook), id_), rel_tol=1e-4, abs_tol=1e-5)


@given(seed=seeds, ids=st.lists(st.integers(0, 5000), min_size=1, max_size=70))
def test_noise_belongs_to_the_id_wherever_it_stands(seed: int, ids: list[int]) -> None:
    keys = draw_keys(torch.tensor([seed]), torch.tensor([3]), num_codebooks=2)
    together = gumbel_noise(keys, torch.tensor(ids).expand(1, 2, -1))
    everything = gumbel_noise(keys, torch.arange(5001).expand(1, 2, -1))
    assert torch.equal(together, everything[..., ids])


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov over 200,000 values: a false alarm once in 10^6, but the seed is fixed."""
    keys = draw_keys(torch.tensor([11]), torch.tensor([0]), num_codebooks=1)
    noise = gumbel_noise(keys, torch.arange(200_000))[0, 0].double().numpy()
    uniform = np.exp(-np.exp(-noise))
    assert kstest(uniform, "uniform").pvalue > 1e-6


def test_the_largest_and_the_smallest_bits_give_finite_noise() -> None:
    """Ids whose bits are all ones or all zeros turn up once in 2^23: here a key is made to order for id 0."""
    for bits in (0, 1, (1 << 23) - 2, (1 << 23) - 1):
        key = (unmix(bits << 41) - GAMMA) % WORD
        signed = key - WORD if key >= WORD // 2 else key
        noise = gumbel_noise(torch.tensor([signed]), torch.tensor([0]))
        assert torch.isfinite(noise).all()
        assert math.isclose(float(noise[0]), noise_of(key, 0), rel_tol=1e-4)


def unmix(value: int) -> int:
    """The state whose output is `value`."""
    z = unshift(value, 31) * pow(0x94D049BB133111EB, -1, WORD) % WORD
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, WORD) % WORD
    return unshift(z, 30)


def unshift(value: int, count: int) -> int:
    """Undo z ^ (z >> count)."""
    z = value
    for _ in range(64 // count + 1):
        z = value ^ (z >> count)
    return z
