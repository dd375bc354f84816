"""Norm, rotary embedding, code embedding and cache writes, each against what it says it is."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from declaim.kernels.codebooks import codebook_embedding, codebook_embedding_reference
from declaim.kernels.kv_cache import allocate_cache, write_cache
from declaim.kernels.norm import add_rms_norm, layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from declaim.kernels.rope import apply_rotary, apply_rotary_reference, rotary_and_cache, rotary_table

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 7, 48, 320, 1001, 2048])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_rms_norm_is_its_reference_and_the_formula(size: int, eps: float) -> None:
    x, weight = random(33, size) * torch.logspace(-4, 4, 33)[:, None], random(size, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, eps=eps).double(), expected, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(rms_norm_reference(x, weight, eps=eps).double(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_half_precision_rounds_once_before_the_weight(dtype: torch.dtype) -> None:
    x, weight = random(9, 64).to(dtype), random(64, seed=1).to(dtype)
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    got = rms_norm(x, weight, eps=1e-5)
    assert got.dtype == dtype
    assert torch.equal(got, weight * normed)


@pytest.mark.parametrize("size", [7, 48, 320, 2048])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_normed_row_has_the_same_bits_in_any_batch(size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = random(129, size), random(size, seed=1)
        together = rms_norm(x, weight, eps=1e-5)
        for first, last in [(0, 1), (5, 6), (128, 129), (3, 20), (1, 129)]:
            assert torch.equal(rms_norm(x[first:last].clone(), weight, eps=1e-5), together[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("head_dim", [2, 16, 24, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_embedding_is_that_of_transformers(head_dim: int, theta: float) -> None:
    positions = torch.tensor([0, 1, 5, 1023, 3071])
    q, k = random(5, 3, head_dim), random(5, 2, head_dim, seed=1)
    table = rotary_table(3072, head_dim, theta=theta, device=CPU)
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(positions.float(), inverse).repeat(1, 2)[None]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], angles.cos(), angles.sin())
    for x, other in zip((q, k), expected, strict=True):
        got = apply_rotary(x, table[positions])
        assert got.is_contiguous()
        torch.testing.assert_close(got, other[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    table = rotary_table(400, 16, theta=10_000.0, device=CPU)
    q, k = random(1, 1, 16), random(1, 1, 16, seed=1)
    scores = [
        float((apply_rotary(q, table[p + 7 : p + 8]) * apply_rotary(k, table[p : p + 1])).sum())
        for p in range(0, 390, 13)
    ]
    assert max(scores) - min(scores) < 1e-4
    other = float((apply_rotary(q, table[8:9]) * apply_rotary(k, table[:1])).sum())
    assert abs(other - scores[0]) > 1e-3


def test_code_embedding_is_a_sum_over_codebooks() -> None:
    table, codes = random(3 * 11, 20), torch.randint(0, 11, (9, 3), generator=torch.Generator().manual_seed(2))
    got = codebook_embedding(codes, table, vocab_size=11)
    for n in range(9):
        expected = torch.zeros(20)
        for q in range(3):
            expected = expected + table[q * 11 + int(codes[n, q])]
        torch.testing.assert_close(got[n], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_embedding_of_a_row_has_the_same_bits_in_any_batch(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        table, codes = random(9 * 50, 321), torch.randint(0, 50, (200, 9), generator=torch.Generator().manual_seed(2))
        together = codebook_embedding(codes, table, vocab_size=50)
        for first, last in [(0, 1), (7, 8), (199, 200), (0, 16), (3, 150)]:
            assert torch.equal(codebook_embedding(codes[first:last], table, vocab_size=50), together[first:last])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_reaches_its_slots_and_nothing_else(dtype: torch.dtype) -> None:
    k_cache, v_cache = (
        allocate_cache(6, 3, block_size=4, head_dim=8, dtype=dtype, device=CPU).fill_(math.nan) for _ in range(2)
    )
    assert k_cache.shape == (6, 3, 4, 8)
    slots = torch.tensor([23, 0, 9, 10])
    k, v = random(4, 3, 8).to(dtype), random(4, 3, 8, seed=1).to(dtype)
    write_cache(k, v, slots, k_cache, v_cache)
    for slot in range(24):
        for cache, source in ((k_cache, k), (v_cache, v)):
            got = cache[slot // 4, :, slot % 4]
            if slot in slots:
                assert torch.equal(got, source[slots.tolist().index(slot)])
            else:
                assert got.isnan().all()


def test_writing_nothing_changes_nothing() -> None:
    cache = allocate_cache(2, 1, block_size=2, head_dim=4, dtype=torch.float32, device=CPU).fill_(3.0)
    write_cache(torch.zeros(0, 1, 4), torch.zeros(0, 1, 4), torch.zeros(0, dtype=torch.int64), cache, cache)
    assert (cache == 3.0).all()


def test_writing_at_a_negative_slot_is_an_error_where_nothing_is_padded() -> None:
    cache = allocate_cache(2, 1, block_size=2, head_dim=4, dtype=torch.float32, device=CPU).fill_(3.0)
    with pytest.raises(IndexError):
        write_cache(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), torch.tensor([-1]), cache, cache)


def test_a_missing_code_adds_nothing_and_changes_no_other_row() -> None:
    table, codes = random(3 * 11, 321), torch.randint(0, 11, (9, 3), generator=torch.Generator().manual_seed(2))
    whole = codebook_embedding(codes, table, vocab_size=11)
    codes[4, 1], codes[7] = -1, -1
    got = codebook_embedding(codes, table, vocab_size=11)
    others = [n for n in range(9) if n not in (4, 7)]
    assert torch.equal(got[others], whole[others])
    assert (got[7] == 0).all()
    torch.testing.assert_close(got, codebook_embedding_reference(codes, table, vocab_size=11), atol=1e-6, rtol=1e-5)
    assert torch.equal(codebook_embedding(codes.int(), table, vocab_size=11), got)


@pytest.mark.parametrize("num_residual", [0, 4, 9])
def test_the_sum_before_a_norm_is_the_plain_sum(num_residual: int) -> None:
    x, residual, weight, rest = random(9, 48), random(9, 48, seed=1), random(48, seed=2), random(48, seed=3)
    gained = torch.cat([residual[:num_residual], rest.expand(9 - num_residual, -1)])
    normed, total = add_rms_norm(x, residual[:num_residual], weight, rest=rest, eps=1e-5)
    assert torch.equal(total, x + gained)
    assert torch.equal(normed, rms_norm(x + gained, weight, eps=1e-5))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_is_its_reference_with_the_same_bits_in_any_batch(has_bias: bool, threads: int) -> None:
    x, weight, bias = random(129, 320), random(320, seed=1), random(320, seed=2) if has_bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = layer_norm(x, weight, bias, eps=1e-5)
        for first, last in [(0, 1), (5, 6), (3, 20), (1, 129)]:
            assert torch.equal(layer_norm(x[first:last].clone(), weight, bias, eps=1e-5), together[first:last])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, layer_norm_reference(x, weight, bias, eps=1e-5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (24, 8), (40, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_and_interleaved_rotary_is_its_reference(
    head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    angles = rotary_table(50, rotary_dim, theta=1e4, device=CPU, interleaved=interleaved)[[0, 1, 7, 49]]
    x = random(4, 3, head_dim).to(dtype)
    got = apply_rotary(x, angles, interleaved=interleaved)
    expected = apply_rotary_reference(x, angles, interleaved=interleaved)
    torch.testing.assert_close(got, expected, atol=1e-5 if dtype == torch.float32 else 4e-2, rtol=0)
    assert got.is_contiguous()
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


def test_rotary_and_cache_is_rotary_then_the_cache_write() -> None:
    table, qkv = rotary_table(50, 8, theta=1e4, device=CPU), random(4, (3 + 2 * 1) * 8)
    angles, slots = table[[3, 0, 9, 49]], torch.tensor([5, 0, 7, 2])
    caches = [allocate_cache(2, 1, block_size=4, head_dim=8, dtype=torch.float32, device=CPU).zero_() for _ in range(4)]
    q = rotary_and_cache(qkv, angles, slots, caches[0], caches[1], num_heads=3, num_kv_heads=1, head_dim=8)
    heads = qkv.view(4, 5, 8)
    rotated = apply_rotary(heads[:, :4], angles)
    write_cache(rotated[:, 3:], heads[:, 4:], slots, caches[2], caches[3])
    assert torch.equal(q, rotated[:, :3])
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    with pytest.raises(ValueError, match="is not 3 heads"):
        rotary_and_cache(qkv[:, 8:], angles, slots, caches[0], caches[1], num_heads=3, num_kv_heads=1, head_dim=8)
