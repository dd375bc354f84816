"""Embedding of a row of codes: one vector per codebook, summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def codebook_embedding(codes: torch.Tensor, table: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
    """Sum over codebooks q of table[q * vocab_size + codes[:, q]].

    codes: int64 [N, Q] in 0 .. vocab_size - 1, table: [Q * vocab_size, C] -> [N, C].
    """
    offsets = torch.arange(codes.shape[1], device=codes.device) * vocab_size
    return F.embedding_bag(codes + offsets, table, mode="sum")
