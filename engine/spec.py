"""The tables that tell one model family from another.

The scheduler, the runner, the sampler and the chunk planner read these and never learn a model's name.
Torch-free: a family can be described, and its frame rule tested, without loading a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class CrossSpec:
    """Cross-attention KV, written once when a sequence is admitted. Only branch 0 owns it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # the longest text
    positions_per_row: float  # expected cross positions for each self position: how memory is split


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What recurrent layers carry from one position to the next: of one size however long the sequence.

    num_conv: the newest inputs of a causal convolution, each `conv_size` wide. num_heads, head_dim, size: a layer's
    matrix state, [num_heads, head_dim, size]. scan_block: a prompt's positions are scanned so many at a time, and no
    step ends between them.
    """

    num_layers: int
    num_conv: int
    conv_size: int
    num_heads: int
    head_dim: int
    size: int
    scan_block: int = 1

    def bytes_per_branch(self, element_bytes: int) -> int:
        """Bytes of one branch's state over all layers."""
        elements = self.num_conv * self.conv_size + self.num_heads * self.head_dim * self.size
        return self.num_layers * elements * element_bytes


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Paged self-attention KV of every branch, cross-attention KV and recurrent state where the family has them."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    cross: CrossSpec | None = None
    state: StateSpec | None = None

    def bytes_per_position(self, element_bytes: int) -> int:
        """Bytes of self-attention K and V that one position takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

    def cross_bytes_per_position(self, element_bytes: int) -> int:
        """Bytes of cross-attention K and V that one encoder position takes over all layers."""
        if self.cross is None:
            return 0
        return 2 * self.cross.num_layers * self.cross.num_kv_heads * self.cross.head_dim * element_bytes


@dataclass(frozen=True, slots=True)
class FrameRule:
    """How drawn codes become the next row of the grid, and when the grid is done.

    Row t, codebook q holds frame `t - 1 - delay[q]`; while that is negative the row holds `fill`.
    From the end row s (where codebook `eos_codebook` drew `eos`, or where the length is known or runs out)
    row s + j is overwritten by `drain[j]`; -1 keeps the drawn code. The grid is done after
    row s + len(drain) - 1, and it holds s - 1 frames. `eos` cannot be drawn before there are `min_frames` new ones.
    """

    delay: tuple[int, ...]
    fill: int
    eos: int | None  # None: the family never draws an end; its length is known before the first step
    drain: tuple[tuple[int, ...], ...]
    eos_codebook: int = 0
    min_frames: int = 0

    @property
    def num_codebooks(self) -> int:
        return len(self.delay)

    @property
    def max_delay(self) -> int:
        return max(self.delay)

    @property
    def num_drain_rows(self) -> int:
        return len(self.drain)


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: center + scale * (cond - uncond).

    `keep="cond"` with `top_k_filter` keeps the conditional logits of the top_k guided ids and drops the rest
    (Dia); `keep="guided"` continues with the guided logits.
    """

    center: Literal["cond", "uncond"]
    keep: Literal["cond", "guided"]
    top_k_filter: bool


@dataclass(frozen=True, slots=True)
class AllowedIds:
    """Codebook q may draw ids below `limits[q]` only."""

    limits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EosGate:
    """On `codebook`, `eos` survives only where it is the most likely id, and then alone."""

    eos: int
    codebook: int = 0


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Divide positive and multiply negative logits of the ids in the last `window` rows of the same codebook.

    An id seen twice is penalised twice (`compounding`), or once. With `skips_first` the first row drawn is not.
    """

    window: int
    compounding: bool = True
    skips_first: bool = False


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divide by the request's temperature; temperature 0 leaves the logits as they are."""


@dataclass(frozen=True, slots=True)
class TopK:
    """Keep the request's top_k largest logits (ties with the smallest kept one stay). Skipped when greedy."""


@dataclass(frozen=True, slots=True)
class TopP:
    """Keep the smallest set whose probability reaches the request's top_p. Skipped when greedy."""


@dataclass(frozen=True, slots=True)
class MinP:
    """Keep ids at least min_p times as likely as the most likely one. Skipped when greedy."""


SamplingOp = Guidance | AllowedIds | EosGate | RepetitionPenalty | Temperature | TopK | TopP | MinP


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a family draws with where the request says nothing. top_k 0, top_p 1, min_p 0, penalty 1 are 'off'."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0
    max_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """The family's ordered list of sampling ops, and its defaults."""

    ops: tuple[SamplingOp, ...]
    defaults: SamplingDefaults

    @property
    def has_guidance(self) -> bool:
        return any(isinstance(op, Guidance) for op in self.ops)


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """What the engine must know of a codec: its rates, and how many neighbouring frames a frame's samples need."""

    sample_rate_hz: int
    hop: int  # samples per frame
    left: int  # frames of context before a window
    right: int  # frames of context after it
    num_codebooks: int
    codebook_size: int
    timbres: tuple[str, ...] = ()  # voices that its decoder can give the same codes, by name

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate_hz / self.hop


@dataclass(frozen=True, slots=True)
class ControlSpec:
    """A dial of a family's own: `length` numbers from `low` to `high`, or one of `names`, which stand for numbers.

    default: what is taken where the request says nothing; None leaves it to the model. A single number is taken for
    all `length`.
    """

    description: str
    low: float
    high: float
    default: tuple[float, ...] | None
    length: int = 1
    names: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything but the weights."""

    family: str
    cache: CacheSpec
    rule: FrameRule
    sampling: SamplingSpec
    codec: CodecSpec
    hidden_size: int
    vocab_size: int  # logits per codebook
    max_positions: int  # longest sequence (prefix + rows) the model can attend over
    has_side: bool  # a vector of the text side is added to each row's embedding
    supports_speed: bool
    supports_voice_prompt: bool
    # The fewest and most that speech may take; None where the family knows the length before it draws.
    seconds_per_char: tuple[float, float] | None = None
    voices: tuple[str, ...] = ()  # the model's own, by name; the first is the default
    embeds_voices: bool = False  # a speaker encoder is at hand, which makes an embedding of reference audio
    supports_dialogue: bool = False  # [S1] and [S2] in the text switch speakers
    languages: tuple[str, ...] = ()  # tags of those that a request may name; none where the family does not look
    controls: Mapping[str, ControlSpec] = field(default_factory=dict)
    # Words of instructions, such as "slowly", and the controls they set.
    instructions: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
