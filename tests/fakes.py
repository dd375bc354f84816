"""A tiny fake family, a fake codec and a fake vocoder: engine behaviour without weights.

The family has what the real ones here lack: a text prefix kept by both guidance branches, guidance around the
unconditional logits, min-p and a repetition penalty over two rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from declaim.engine.errors import InvalidRequest
from declaim.engine.models.base import Prefill, PromptSettings, StepContext
from declaim.engine.models.layers import AttentionShape, AttentionWeights, MlpWeights, attend, mlp
from declaim.engine.sequence import Prompt
from declaim.engine.spec import (
    AllowedIds,
    CacheSpec,
    CodecSpec,
    FrameRule,
    Guidance,
    MinP,
    ModelSpec,
    RepetitionPenalty,
    SamplingDefaults,
    SamplingSpec,
    Temperature,
    TopK,
    TopP,
)
from declaim.engine.text import TextOptions
from declaim.engine.vocoder.base import DecodedWindow, Wake, Window, decode_window
from declaim.engine.words import Segment
from declaim.kernels.codebooks import codebook_embedding
from declaim.kernels.linear import linear, pack_linear
from declaim.kernels.norm import rms_norm
from declaim.kernels.rope import rotary_table

NUM_CODEBOOKS, CODEBOOK_SIZE, EOS, MASKED = 3, 20, 20, 21
VOCAB_SIZE = 22
HIDDEN, MAX_POSITIONS = 32, 320
SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=8, scale=8**-0.5)
FAKE_CODEC = CodecSpec(
    sample_rate_hz=8000, hop=800, left=2, right=2, num_codebooks=NUM_CODEBOOKS, codebook_size=CODEBOOK_SIZE
)


class FakeModel:
    """Random weights, real arithmetic. A text holding "!crash" fails in prepare, "!nan" makes its logits NaN."""

    def __init__(self, *, seed: int = 0, eos_bias: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * 0.3

        ones = torch.ones(HIDDEN)
        self._layers = [
            (
                AttentionWeights(ones, pack_linear(normal(SHAPE.qkv_size, HIDDEN)), pack_linear(normal(HIDDEN, 32))),
                MlpWeights(ones, pack_linear(normal(96, HIDDEN)), pack_linear(normal(HIDDEN, 48))),
            )
            for _ in range(2)
        ]
        self._embedding = normal(NUM_CODEBOOKS * VOCAB_SIZE, HIDDEN)
        self._text = normal(256, HIDDEN)
        self._style = normal(2, HIDDEN)
        self._head = pack_linear(normal(NUM_CODEBOOKS * VOCAB_SIZE, HIDDEN) * 3)
        self._eos_bias = eos_bias
        self._angles = rotary_table(MAX_POSITIONS, SHAPE.head_dim, theta=100.0, device=torch.device("cpu"))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.weight_bytes = 0
        self.spec = ModelSpec(
            family="fake",
            cache=CacheSpec(num_layers=2, num_kv_heads=SHAPE.num_kv_heads, head_dim=SHAPE.head_dim),
            rule=FrameRule(
                delay=(0, 1, 2),
                fill=MASKED,
                eos=EOS,
                drain=tuple(tuple(EOS if c == j else MASKED if c < j else -1 for c in range(3)) for j in range(3)),
            ),
            sampling=SamplingSpec(
                ops=(
                    Guidance(center="uncond", keep="guided", top_k_filter=False),
                    AllowedIds((EOS + 1, EOS, EOS)),
                    RepetitionPenalty(window=2),
                    Temperature(),
                    TopP(),
                    TopK(),
                    MinP(),
                ),
                defaults=SamplingDefaults(
                    temperature=1.0, min_p=0.1, repetition_penalty=3.0, guidance_scale=2.0, max_seconds=4.0
                ),
            ),
            codec=FAKE_CODEC,
            hidden_size=HIDDEN,
            vocab_size=VOCAB_SIZE,
            max_positions=MAX_POSITIONS,
            has_side=False,
            supports_speed=False,
            supports_voice_prompt=True,
        )

    def segments(self, text: str, options: TextOptions) -> list[Segment]:
        if not text.strip():
            raise InvalidRequest("text is empty", param="text")
        return [Segment(piece) for piece in text.split("|")]

    def tokenize(self, segment: Segment, settings: PromptSettings) -> Prompt:
        text_ids, sampling = tuple(segment.text.encode()), settings.sampling
        return Prompt(
            text_ids=text_ids,
            prefix_len=len(text_ids) + 1,
            cross_len=0,
            prompt_frames=settings.voice.codes,
            max_frames=max(1, int(sampling.max_seconds * FAKE_CODEC.frame_rate_hz + 1e-6)),
            num_branches=1 if sampling.guidance_scale == 1.0 else 2,
            speed=settings.speed,
        )

    def prepare(self, prompt: Prompt) -> Prefill:
        if b"!crash" in bytes(prompt.text_ids):
            raise RuntimeError("this text crashes the encoder")
        text = self._text[list(prompt.text_ids)]
        if b"!nan" in bytes(prompt.text_ids):
            text = text * float("nan")
        branches = [torch.cat([text, self._style[branch : branch + 1]]) for branch in range(prompt.num_branches)]
        return Prefill(prefix=torch.stack(branches))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return codebook_embedding(codes, self._embedding, vocab_size=VOCAB_SIZE)

    def forward(self, x: torch.Tensor, context: StepContext) -> torch.Tensor:
        angles = self._angles[context.positions]
        for (attention, feed_forward), cache in zip(self._layers, context.caches, strict=True):
            x = x + attend(
                rms_norm(x, attention.norm, eps=1e-5),
                attention,
                SHAPE,
                angles=angles,
                slots=context.slots,
                cache=cache,
                plan=context.attention,
            )
            x = mlp(x, feed_forward, eps=1e-5)
        return rms_norm(x[context.last], torch.ones(HIDDEN), eps=1e-5)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, self._head).view(len(hidden), NUM_CODEBOOKS, VOCAB_SIZE).clone()
        logits[:, 0, EOS] += self._eos_bias
        return logits


class FakeCodec:
    """Each sample is a fixed function of its frame and two neighbours on each side; zeros beyond the ends."""

    spec = FAKE_CODEC
    device = torch.device("cpu")

    def decode(self, codes: torch.Tensor, *, first: int = 0, last: int | None = None, timbre: int = 0) -> torch.Tensor:
        value = torch.nn.functional.pad((codes.float() + 1).sum(1), (2, 2))
        mixed = sum(value[:, i : i + codes.shape[2]] * (i + 1) for i in range(5))
        ramp = torch.arange(1, FAKE_CODEC.hop + 1) % 7
        return (torch.as_tensor(mixed)[:, first:last, None] * ramp).flatten(1) / 10_000

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        num_frames = -(-len(audio) // FAKE_CODEC.hop)
        return (torch.arange(num_frames) % CODEBOOK_SIZE).repeat(NUM_CODEBOOKS, 1)


class ShuffledVocoder:
    """Returns windows late and out of order, as a pool of workers may; `seed` decides how."""

    def __init__(self, *, seed: int, wake: Wake) -> None:
        self._random = np.random.default_rng(seed)
        self._wake = wake
        self._queued: list[Window] = []

    def submit(self, windows: Sequence[Window]) -> None:
        self._queued += windows
        self._wake()

    def poll(self) -> list[DecodedWindow]:
        self._random.shuffle(self._queued)  # type: ignore[arg-type]
        count = int(self._random.integers(0, len(self._queued) + 1))
        ready, self._queued = self._queued[:count], self._queued[count:]
        if self._queued:
            self._wake()
        return [DecodedWindow(w.sequence_id, w.index, decode_window(FakeCodec(), w)) for w in ready]

    def cancel(self, sequence_id: int) -> None:
        self._queued = [window for window in self._queued if window.sequence_id != sequence_id]

    @property
    def num_pending(self) -> int:
        return len(self._queued)

    def close(self) -> None:
        self._queued = []
