"""Embedding of a row of codes: one vector per codebook, summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from declaim.kernels import backend

_TILE = 512


def codebook_embedding_reference(codes: torch.Tensor, table: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    """The sum in float32, one codebook after the other; code -1 adds nothing."""
    total = torch.zeros(len(codes), table.shape[1], device=table.device)
    for q in range(codes.shape[1]):
        added = table[q * vocab_size + codes[:, q].clamp(min=0).long()].float()
        total += added.masked_fill(codes[:, q, None] < 0, 0.0)
    return total.to(table.dtype)


@triton.jit
def _codebook_embedding_kernel(
    codes,
    table,
    out,
    codes_stride,
    table_stride,
    NUM_CODEBOOKS: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one row's sum over its codebooks."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for q in tl.static_range(NUM_CODEBOOKS):  # pyright: ignore[reportGeneralTypeIssues]
        code = tl.load(codes + row * codes_stride + q).to(tl.int64)
        # A code of no codebook must not read beyond the table: that would take down every stream on the GPU.
        num_read = tl.where((code >= 0) & (code < VOCAB_SIZE), SIZE, 0)
        source = table + (q * VOCAB_SIZE + code) * table_stride + column
        total += tl.load(source, mask=column < num_read, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, total.to(out.dtype.element_ty), mask=column < SIZE)


def codebook_embedding(codes: torch.Tensor, table: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    """Sum over codebooks q of table[q * vocab_size + codes[:, q]].

    codes: int64 or int32 [N, Q] in -1 .. vocab_size - 1, where -1 (no code drawn) adds nothing;
    table: [Q * vocab_size, C] -> [N, C] in the dtype of table. Each row depends on itself alone, to the last bit.
    Raises: ValueError (on the GPU) for shapes, strides or dtypes that the kernel cannot read.
    """
    if backend.use_triton(table):
        return _codebook_embedding_triton(codes, table, vocab_size=vocab_size)
    rows = codes + torch.arange(codes.shape[1], device=codes.device) * vocab_size
    is_code = codes >= 0
    if is_code.all():
        return F.embedding_bag(rows, table, mode="sum")
    num_codes = is_code.sum(1)
    return F.embedding_bag(rows[is_code], table, num_codes.cumsum(0) - num_codes, mode="sum")


def _codebook_embedding_triton(codes: torch.Tensor, table: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    if codes.dim() != 2 or codes.stride(1) != 1 or codes.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}, strides {codes.stride()} and {codes.dtype}: take int64 or int32"
            " [N, Q], the codes of a row side by side"
        )
    num_rows, num_codebooks = codes.shape
    if table.dim() != 2 or table.shape[0] != num_codebooks * vocab_size or table.stride(1) != 1:
        raise ValueError(
            f"the table has shape {tuple(table.shape)} and strides {table.stride()}: {num_codebooks} codebooks of"
            f" {vocab_size} codes need [{num_codebooks * vocab_size}, C], the elements of a row side by side"
        )
    size = table.shape[1]
    out = torch.empty(num_rows, size, dtype=table.dtype, device=table.device)
    backend.launch(
        _codebook_embedding_kernel,
        (num_rows, triton.cdiv(size, _TILE)),
        {"codes": codes, "table": table, "out": out, "codes_stride": codes.stride(0), "table_stride": table.stride(0)},
        {"NUM_CODEBOOKS": num_codebooks, "VOCAB_SIZE": vocab_size, "SIZE": size, "TILE": _TILE},
        warps=2,
        stages=1,
    )
    return out
