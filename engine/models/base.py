"""What a model family is to the engine: a spec (tables), and five functions over tensors.

A family never sees blocks, batches or other requests; the engine never sees a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine.request import ControlValue, EncodedVoice, ResolvedSampling
from declaim.engine.sequence import Prompt
from declaim.engine.spec import ModelSpec
from declaim.engine.states import LayerState
from declaim.engine.text import TextOptions
from declaim.engine.words import Segment
from declaim.kernels.attention import AttentionPlan
from declaim.kernels.mamba import StatePlan


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """What the text side of a model made of a prompt, once, when its sequence was admitted.

    prefix: [branches, prefix_len, C], embeddings that are not rows of codes.
    side: [num_rows, C], added to the embedding of each row.
    cross: K and V of every cross-attention layer, each [cross_len, kv_heads, head_dim].
    num_frames: the length, where the family knows it before the first step.
    durations_s: float32 [len(text_ids)], how long each id of the prompt is heard, where the family knows it.
    """

    prefix: torch.Tensor | None = None
    side: torch.Tensor | None = None
    cross: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    num_frames: int | None = None
    durations_s: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptSettings:
    """How a request wants to be spoken, the same for all its segments.

    voice: its codes are [P, Q], P = 0 without a voice prompt. voice_name: one of `spec.voices`.
    controls: those of `spec.controls` that the request sets.
    """

    sampling: ResolvedSampling
    voice: EncodedVoice
    voice_name: str | None = None
    speed: float = 1.0
    language: str | None = None
    controls: Mapping[str, ControlValue] = field(default_factory=dict)


LayerCache = tuple[torch.Tensor, torch.Tensor]
"""K and V of one layer, each [blocks, kv_heads, block_size, head_dim]."""


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """One step's N positions, the rows of every tensor in it: first all of branch 0, then all of branch 1.

    positions: int64 [N], for rotary embedding; slots: int64 [N], where their K and V go.
    cross: the plan of the first `num_conditional` rows (branch 0); None where the family has no cross-attention.
    last: int64 [M], the rows whose logits are wanted.
    state: whose rows move which recurrent state in `states`; None where the family has none.
    cross_queries: where it is a list, a family with cross-attention appends each layer's queries to it,
    [num_conditional, H, D], times the scale of their products with K.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    attention: AttentionPlan
    caches: tuple[LayerCache, ...]
    cross: AttentionPlan | None
    cross_caches: tuple[LayerCache, ...]
    num_conditional: int
    last: torch.Tensor
    state: StatePlan | None = None
    states: tuple[LayerState, ...] = ()
    cross_queries: list[torch.Tensor] | None = None


class SpeechModel(Protocol):
    """A loaded model family."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def weight_bytes(self) -> int: ...

    def segments(self, text: str, options: TextOptions) -> list[Segment]:
        """Clean a text and cut it into pieces that are spoken as sequences of their own: `text.speak` does it.

        Raises: InvalidRequest, TooLong.
        """
        ...

    def tokenize(self, segment: Segment, settings: PromptSettings) -> Prompt:
        """Make one segment's prompt; cheap, on the caller's thread. A family that can time words times the segment's.

        Raises: InvalidRequest, TooLong.
        """
        ...

    def prepare(self, prompt: Prompt) -> Prefill:
        """Run the text side. Its result depends on the prompt alone."""
        ...

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """int64 [N, Q] -> [N, C]."""
        ...

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Run the decoder over N new positions, writing their K and V. [N, C] -> hidden states [M, C] of `last`."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, C] -> float32 [M, Q, V]."""
        ...
