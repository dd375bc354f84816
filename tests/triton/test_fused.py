"""Norms, rotary embedding with the cache write, SwiGLU and code embedding under the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declaim.kernels.activation import silu_and_mul, silu_and_mul_reference
from declaim.kernels.codebooks import codebook_embedding, codebook_embedding_reference
from declaim.kernels.kv_cache import allocate_cache, write_cache, write_cache_reference
from declaim.kernels.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from declaim.kernels.rope import apply_rotary, apply_rotary_reference, rotary_and_cache, rotary_table
from tests.triton.guards import CPU, guard_allocations, random, strided

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (absolute, relative). The interpreter truncates to bfloat16, so that its bound is twice that of a GPU.
TOLERANCE = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (1e-6, 1.6e-2)}


@pytest.fixture(autouse=True)
def guarded_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from guard_allocations(monkeypatch)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    absolute, relative = TOLERANCE[got.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got.float(), expected.float(), atol=absolute, rtol=relative)


def assert_sum_near(got: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> None:
    if x.dtype == torch.bfloat16:
        assert_near(got, x + residual)
    else:
        assert torch.equal(got, x + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 48, 320, 1001, 2048])
def test_rms_norm_is_its_reference(size: int, dtype: torch.dtype) -> None:
    x, weight = (
        random(5, size, dtype=dtype) * torch.logspace(-2, 2, 5)[:, None].to(dtype),
        random(size, seed=1).to(dtype),
    )
    expected = rms_norm_reference(x.float(), weight.float(), eps=1e-5).to(dtype)
    assert_near(rms_norm(x, weight, eps=1e-5), expected)
    assert_near(rms_norm(strided(x), weight, eps=1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 320, 2048])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_is_its_reference_and_that_of_torch(size: int, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight = random(4, size, dtype=dtype) + 3, random(size, seed=1).to(dtype)
    bias = random(size, seed=2).to(dtype) if has_bias else None
    expected = layer_norm_reference(x, weight, bias, eps=1e-5)
    wide_bias = bias.float() if bias is not None else None
    torch_s = torch.nn.functional.layer_norm(x.float(), (size,), weight.float(), wide_bias, 1e-5)
    torch.testing.assert_close(
        layer_norm_reference(x.float(), weight.float(), wide_bias, eps=1e-5), torch_s, atol=1e-5, rtol=1e-5
    )
    got = layer_norm(strided(x), weight, bias, eps=1e-5)
    scale = expected.float().abs().max().item()
    assert_near(got / scale, expected / scale)
    normed, total = add_layer_norm(x, random(4, size, seed=3).to(dtype), weight, bias, eps=1e-5)
    assert_sum_near(total, x, random(4, size, seed=3).to(dtype))
    assert torch.equal(normed, layer_norm(total, weight, bias, eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_residual", [0, 1, 3, 5])
def test_added_rms_norm_is_the_norm_of_the_stored_sum(num_residual: int, dtype: torch.dtype) -> None:
    x, weight = strided(random(5, 320, dtype=dtype)), random(320, seed=1).to(dtype)
    residual, rest = strided(random(5, 320, seed=2, dtype=dtype)), random(320, seed=3).to(dtype)
    gained = torch.cat([residual[:num_residual], rest.expand(5 - num_residual, -1)])
    normed, total = add_rms_norm(x, residual[:num_residual], weight, rest=rest, eps=1e-5)
    assert_sum_near(total, x, gained)
    assert torch.equal(normed, rms_norm(total, weight, eps=1e-5))
    if num_residual == 5:
        alone = add_rms_norm(x, residual, weight, eps=1e-5)
        assert torch.equal(alone[0], normed) and torch.equal(alone[1], total)


def test_adding_nothing_is_the_norm_alone() -> None:
    x, weight = random(3, 48), random(48, seed=1)
    normed, total = add_rms_norm(x, None, weight, eps=1e-5)
    assert total is x
    assert torch.equal(normed, rms_norm(x, weight, eps=1e-5))


@pytest.mark.parametrize("size", [1, 33, 960, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul_is_its_reference(size: int, dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * size, dtype=dtype) * 4
    expected = silu_and_mul_reference(gate_up)
    got = silu_and_mul(strided(gate_up))
    assert got.shape == (3, size) and got.is_contiguous()
    assert_near(got, expected)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's remark on exp, which is infinite as it should be
def test_silu_of_large_gates_is_finite() -> None:
    gate_up = torch.tensor([[-3e38, -200.0, 200.0, 0.0, 1.0, 2.0, 3.0, 4.0]])
    torch.testing.assert_close(silu_and_mul(gate_up), torch.tensor([[0.0, 0.0, 600.0, 0.0]]), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("codes_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_codebooks", [1, 8, 9])
def test_code_embedding_is_its_reference_and_skips_missing_codes(
    num_codebooks: int, dtype: torch.dtype, codes_dtype: torch.dtype
) -> None:
    table = random(num_codebooks * 11, 321, dtype=dtype)
    codes = torch.randint(-1, 11, (6, num_codebooks), generator=torch.Generator().manual_seed(1)).to(codes_dtype)
    codes[0] = -1
    wide = torch.full((6, 16), 10**6, dtype=codes_dtype)
    wide[:, :num_codebooks] = codes
    got = codebook_embedding(wide[:, :num_codebooks], table, vocab_size=11)
    expected = codebook_embedding_reference(codes, table, vocab_size=11)
    scale = expected.float().abs().max().item()
    assert_near(got / scale, expected / scale)
    assert (got[0] == 0).all()


def test_a_code_of_no_codebook_reads_nothing() -> None:
    table = torch.full((3 * 5, 16), math.nan)
    assert (codebook_embedding(torch.tensor([[5, 10**12, -7]]), table, vocab_size=5) == 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (24, 24), (16, 8), (40, 12), (2, 2), (12, 10)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_is_its_reference(head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    angles = rotary_table(900, rotary_dim, theta=1e4, device=CPU, interleaved=interleaved)[[0, 1, 899]]
    x = strided(random(3, 7 * head_dim, dtype=dtype))
    heads = x[:, : 5 * head_dim].unflatten(1, (5, head_dim))
    got = apply_rotary(heads, angles, interleaved=interleaved)
    assert got.shape == heads.shape and got.is_contiguous()
    expected = apply_rotary_reference(heads, angles, interleaved=interleaved)
    torch.testing.assert_close(got, expected, atol=0.03 if dtype == torch.bfloat16 else 2e-3, rtol=0)
    if dtype == torch.float32:
        assert_near(got / 4, expected / 4)
    assert torch.equal(got[..., rotary_dim:], heads[..., rotary_dim:])
    assert torch.equal(got[0], heads[0])


def poisoned_cache(
    num_blocks: int, num_kv_heads: int, *, block_size: int, head_dim: int, dtype: torch.dtype, is_head_major: bool
) -> torch.Tensor:
    """Either order of memory: the GPU's, or the CPU's as `allocate_cache` makes it."""
    if is_head_major:
        return torch.full((num_blocks, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype)
    return torch.full((num_blocks, block_size, num_kv_heads, head_dim), math.nan, dtype=dtype).transpose(1, 2)


def check_rotary_and_cache(
    *,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    block_size: int,
    slots: list[int],
    dtype: torch.dtype,
    interleaved: bool,
    is_head_major: bool,
) -> None:
    num_heads, num_kv_heads = heads
    num_rows, first_v = len(slots), num_heads + num_kv_heads
    qkv = strided(random(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype))
    table = rotary_table(64, rotary_dim, theta=1e4, device=CPU, interleaved=interleaved)
    angles = table[torch.randint(0, 64, (num_rows,), generator=torch.Generator().manual_seed(5))]
    k_cache, v_cache, k_expected, v_expected = (
        poisoned_cache(
            7, num_kv_heads, block_size=block_size, head_dim=head_dim, dtype=dtype, is_head_major=is_head_major
        )
        for _ in range(4)
    )
    q = rotary_and_cache(
        qkv,
        angles,
        torch.tensor(slots, dtype=torch.int64),
        k_cache,
        v_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        interleaved=interleaved,
    )
    split = qkv.unflatten(1, (-1, head_dim))
    # The unfused kernel has its own test against the reference.
    rotated = apply_rotary(split[:, :first_v], angles, interleaved=interleaved)
    write_cache_reference(rotated[:, num_heads:], split[:, first_v:], torch.tensor(slots), k_expected, v_expected)
    assert torch.equal(q, rotated[:, :num_heads]) and q.is_contiguous()
    torch.testing.assert_close(k_cache, k_expected, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(v_cache, v_expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("heads", [(4, 1), (3, 3), (6, 2), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_and_cache_is_rotary_then_the_cache_write(
    heads: tuple[int, int], dtype: torch.dtype, interleaved: bool
) -> None:
    check_rotary_and_cache(
        heads=heads,
        head_dim=24,
        rotary_dim=16,
        block_size=4,
        slots=[27, -1, 0, 9, 10, -1],
        dtype=dtype,
        interleaved=interleaved,
        is_head_major=True,
    )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_rotary_and_cache_of_any_shape(data: st.DataObject) -> None:
    num_kv_heads, block_size = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 16, 32]))
    head_dim = 2 * data.draw(st.integers(1, 20))
    all_slots = data.draw(st.permutations(range(7 * block_size)))
    num_rows = data.draw(st.integers(0, min(6, 7 * block_size)))
    check_rotary_and_cache(
        heads=(num_kv_heads * data.draw(st.integers(1, 3)), num_kv_heads),
        head_dim=head_dim,
        rotary_dim=2 * data.draw(st.integers(1, head_dim // 2)),
        block_size=block_size,
        slots=[-1 if data.draw(st.booleans()) else slot for slot in all_slots[:num_rows]],
        dtype=data.draw(st.sampled_from(DTYPES)),
        interleaved=data.draw(st.booleans()),
        is_head_major=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_head_major", [True, False])
def test_a_cache_write_reaches_its_slots_and_nothing_else(dtype: torch.dtype, is_head_major: bool) -> None:
    caches = [
        poisoned_cache(5, 5, block_size=4, head_dim=24, dtype=dtype, is_head_major=is_head_major) for _ in range(4)
    ]
    k, v = (strided(random(4, 5 * 24, seed=seed, dtype=dtype)).unflatten(1, (5, 24)) for seed in (1, 2))
    slots = torch.tensor([19, -1, 0, 6])
    write_cache(k, v, slots, caches[0], caches[1])
    write_cache_reference(k, v, slots, caches[2], caches[3])
    for got, expected in ((caches[0], caches[2]), (caches[1], caches[3])):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


def test_slots_are_counted_in_64_bits(tmp_path: Path) -> None:
    """Block 3 begins beyond 2^31 elements; a sparse file stands for the memory between the blocks."""
    block_stride = 2**30
    memory = torch.from_file(str(tmp_path / "cache"), shared=True, size=3 * block_stride + 64, dtype=torch.float16)
    k_cache = memory.as_strided((4, 1, 4, 8), (block_stride, 32, 8, 1))
    v_cache = memory[32:].as_strided((4, 1, 4, 8), (block_stride, 32, 8, 1), 32)
    qkv, angles = random(1, 24, dtype=torch.float16), rotary_table(1, 8, theta=1e4, device=CPU)
    slots = torch.tensor([13])
    rotary_and_cache(qkv, angles, slots, k_cache, v_cache, num_heads=1, num_kv_heads=1, head_dim=8)
    assert torch.equal(k_cache[3, 0, 1], qkv[0, 8:16]) and torch.equal(v_cache[3, 0, 1], qkv[0, 16:])
    write_cache(qkv[:, None, :8], qkv[:, None, 8:16], slots + 1, k_cache, v_cache)
    assert torch.equal(k_cache[3, 0, 2], qkv[0, :8]) and torch.equal(v_cache[3, 0, 2], qkv[0, 8:16])


def test_no_rows_are_no_work() -> None:
    nothing = torch.zeros(0, 48)
    weight = torch.ones(48)
    assert rms_norm(nothing, weight, eps=1e-5).shape == (0, 48)
    assert [part.shape for part in add_rms_norm(nothing, nothing, weight, eps=1e-5)] == [(0, 48), (0, 48)]
    assert silu_and_mul(nothing).shape == (0, 24)
    assert codebook_embedding(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(9, 8), vocab_size=3).shape == (0, 8)


def test_wrong_inputs_are_named() -> None:
    x, weight = random(4, 16), random(16)
    angles = rotary_table(4, 8, theta=1e4, device=CPU)
    caches = [torch.zeros(2, 1, 4, 8) for _ in range(2)]
    slots = torch.arange(4)

    def rotate(qkv: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, angles: torch.Tensor = angles) -> None:
        rotary_and_cache(qkv, angles, slots, k_cache, caches[1], num_heads=1, num_kv_heads=1, head_dim=8)

    wrong: list[tuple[str, Callable[[], object]]] = [
        ("the elements of a row side by side", lambda: rms_norm(x.t(), random(4), eps=1e-5)),
        ("C <= 16384", lambda: rms_norm(torch.zeros(1, 16385), torch.zeros(16385), eps=1e-5)),
        ("does not fit rows of 16", lambda: rms_norm(x, weight[:15], eps=1e-5)),
        ("does not fit rows of 16", lambda: rms_norm(x, weight.half(), eps=1e-5)),
        ("only with `rest`", lambda: add_rms_norm(x, x[:3], weight, eps=1e-5)),
        ("must agree", lambda: add_rms_norm(x, x.half(), weight, eps=1e-5)),
        (r"takes \[N, 2F\]", lambda: silu_and_mul(x[:, :15])),
        ("int64 or int32", lambda: codebook_embedding(x, x, vocab_size=1)),
        (r"need \[32, C\]", lambda: codebook_embedding(torch.zeros(1, 2, dtype=torch.int64), x, vocab_size=16)),
        ("heads of a row must lie side by side", lambda: apply_rotary(random(4, 8, 2).transpose(1, 2), angles)),
        ("rows of rotary_table", lambda: apply_rotary(random(4, 2, 8), angles[:3])),
        ("rows of rotary_table", lambda: apply_rotary(random(4, 2, 4), angles)),
        ("is not 1 heads", lambda: rotate(random(4, 16), slots, caches[0])),
        (r"need int64 \[4\]", lambda: rotate(random(4, 24), slots.int(), caches[0])),
        ("make both with allocate_cache", lambda: rotate(random(4, 24), slots, caches[0][:1])),
        ("cannot hold", lambda: rotate(random(4, 24).half(), slots, caches[0])),
        ("do not fit", lambda: write_cache(random(4, 1, 8), random(4, 2, 8), slots, caches[0], caches[1])),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()


def test_padding_on_a_cache_of_the_cpu_s_own_layout() -> None:
    k_cache, v_cache = (
        allocate_cache(3, 2, block_size=4, head_dim=8, dtype=torch.float32, device=CPU) for _ in range(2)
    )
    write_cache(random(2, 2, 8), random(2, 2, 8), torch.tensor([-1, -1]), k_cache, v_cache)
    assert k_cache.isnan().all() and v_cache.isnan().all()
