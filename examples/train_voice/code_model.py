"""The code model as it is trained: modules whose parameters have the names and shapes of the shipped file.

Source of the arithmetic: engine/assets/lark/README.md; what serving computes is in engine/models/lark.py, and a test
holds the two against each other.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

MIN_FRAMES = 4
MIN_DURATION_S, MIN_LOG_DURATION_S = 0.025, 0.02
FIRST_SPEAKER_BYTE = 1
FREE_BYTES = 253  # no phoneme's byte lies here or above: the second speaker and those after it


@dataclass(frozen=True, slots=True)
class StackShape:
    """One of the two transformers."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What `config.json` says; the defaults are the shipped model's."""

    speakers: tuple[str, ...]
    sampling_rate: int = 24_000
    frame_rate: int = 25
    num_codebooks: int = 8
    codebook_size: int = 1024
    text_vocab_size: int = 256
    encoder: StackShape = StackShape(256, 4, 4, 4, 64, 768)
    decoder: StackShape = StackShape(320, 6, 5, 1, 64, 960)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 0.6, "top_k": 20})
    max_text_length: int = 400

    @property
    def bos(self) -> int:
        return self.codebook_size

    @property
    def pad(self) -> int:
        return self.codebook_size + 1

    @property
    def speaker_bytes(self) -> tuple[int, ...]:
        """What each speaker's sentences begin with."""
        return (FIRST_SPEAKER_BYTE, *range(FREE_BYTES, FREE_BYTES + len(self.speakers) - 1))

    def config(self) -> dict[str, object]:
        speakers = [{"name": n, "byte": b} for n, b in zip(self.speakers, self.speaker_bytes, strict=True)]
        return asdict(self) | {
            "model_type": "lark",
            "bos_token_id": self.bos,
            "pad_token_id": self.pad,
            "delay_pattern": list(range(self.num_codebooks)),
            "speakers": speakers,
        }


class Block(nn.Module):
    """A pre-norm transformer block with gated feed-forward and rotary positions."""

    def __init__(self, shape: StackShape, eps: float) -> None:
        super().__init__()
        hidden, heads, kv = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
        self.shape = shape
        self.input_norm = nn.RMSNorm(hidden, eps=eps)
        self.qkv_proj = nn.Linear(hidden, (heads + 2 * kv) * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * shape.head_dim, hidden, bias=False)
        self.post_norm = nn.RMSNorm(hidden, eps=eps)
        self.gate_up_proj = nn.Linear(hidden, 2 * shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, hidden, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x: [B, T, C]; rotation: complex [T, head_dim / 2]; mask: bool [B, 1, 1, T], None for causal attention."""
        batch, length, _ = x.shape
        shape, size = self.shape, self.shape.head_dim
        qkv = self.qkv_proj(self.input_norm(x)).view(batch, length, -1, size).transpose(1, 2)
        heads, kv = shape.num_attention_heads, shape.num_key_value_heads
        q, k, v = qkv.split((heads, kv, kv), dim=1)
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up_proj(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Halves of each head as the real and imaginary parts of a turning number."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rotation.real, rotation.imag
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sentences side by side, padded at their ends.

    text_ids: int64 [B, L]; num_bytes, num_frames, speaker: int64 [B]; durations_s: float32 [B, L], 0 in the padding;
    codes: int64 [B, N, Q], anything in the padding.
    """

    text_ids: torch.Tensor
    num_bytes: torch.Tensor
    durations_s: torch.Tensor
    codes: torch.Tensor
    num_frames: torch.Tensor
    speaker: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


class CodeModel(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        text, audio = shape.encoder.hidden_size, shape.decoder.hidden_size
        self.text_embedding = nn.Embedding(shape.text_vocab_size, text)
        self.speaker_embedding = nn.Embedding(len(shape.speakers), text)
        self.encoder = nn.ModuleList(
            Block(shape.encoder, shape.rms_norm_eps) for _ in range(shape.encoder.num_hidden_layers)
        )
        self.encoder_norm = nn.RMSNorm(text, eps=shape.rms_norm_eps)
        self.duration = nn.Sequential(nn.Linear(text, text), nn.SiLU(), nn.Linear(text, 1))
        self.side_proj = nn.Linear(text + 2, audio)
        self.code_embedding = nn.Embedding(shape.num_codebooks * (shape.codebook_size + 2), audio)
        self.decoder = nn.ModuleList(
            Block(shape.decoder, shape.rms_norm_eps) for _ in range(shape.decoder.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(audio, eps=shape.rms_norm_eps)
        self.head = nn.Linear(audio, shape.num_codebooks * shape.codebook_size, bias=False)
        for embedding in (self.text_embedding, self.code_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.speaker_embedding.weight)

    @classmethod
    def load(cls, folder: Path, speakers: tuple[str, ...] = ()) -> CodeModel:
        """A folder as `save` leaves it, or the first version's, which has one speaker.

        speakers: () for those of the folder; any that it lacks begin like the first.
        """
        raw = json.loads((folder / "config.json").read_text())
        speakers = speakers or tuple(speaker["name"] for speaker in raw.get("speakers", [{"name": "lark"}]))
        names = ModelShape.__dataclass_fields__
        values = {name: value for name, value in raw.items() if name in names and name != "speakers"}
        values |= {part: StackShape(**raw[part]) for part in ("encoder", "decoder")}
        model = cls(ModelShape(speakers, **values))
        weights = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
        known = weights.pop("speaker_embedding.weight", torch.zeros(1, model.shape.encoder.hidden_size))
        embedding = known[:1].repeat(len(speakers), 1)
        embedding[: len(known)] = known[: len(speakers)]
        if len(known) < len(speakers):
            for byte in model.shape.speaker_bytes[len(known) :]:
                weights["text_embedding.weight"][byte] = weights["text_embedding.weight"][FIRST_SPEAKER_BYTE]
        model.load_state_dict(weights | {"speaker_embedding.weight": embedding})
        return model

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.shape.config(), indent=2) + "\n")
        weights = {name: t.detach().to(torch.float16).contiguous() for name, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def encode(self, batch: Batch) -> torch.Tensor:
        """[B, L, text]."""
        x = self.text_embedding(batch.text_ids) + self.speaker_embedding(batch.speaker)[:, None]
        length = x.shape[1]
        mask = (torch.arange(length, device=x.device) < batch.num_bytes[:, None])[:, None, None]
        rotation = self._rotation(length, self.shape.encoder.head_dim, x.device)
        for block in self.encoder:
            x = block(x, rotation, mask)
        return self.encoder_norm(x)

    def log_durations(self, encoded: torch.Tensor) -> torch.Tensor:
        return self.duration(encoded)[..., 0]

    def side_vectors(self, encoded: torch.Tensor, batch: Batch, num_rows: int) -> torch.Tensor:
        """What each row is told of the text, from the durations of the batch: [B, rows, audio]."""
        durations = batch.durations_s
        ends = durations.cumsum(1)
        times = (torch.arange(num_rows, device=ends.device) + 0.5) / self.shape.frame_rate
        times = times.expand(len(ends), -1).contiguous()
        index = torch.minimum(torch.searchsorted(ends, times), batch.num_bytes[:, None] - 1)
        lasting = durations.gather(1, index)
        progress = (times - (ends.gather(1, index) - lasting)) / lasting.clamp(min=MIN_DURATION_S)
        length = lasting.clamp(min=1e-9).log().clamp(min=math.log(MIN_LOG_DURATION_S))
        rows = encoded.gather(1, index[..., None].expand(-1, -1, encoded.shape[2]))
        told = torch.cat([rows, progress.clamp(0.0, 1.5)[..., None], length[..., None]], dim=2)
        return self.side_proj(told)

    def decode(self, rows: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        """rows: int64 [B, T, Q], fed; to hidden states [B, T, audio], from which `head` draws what follows."""
        offsets = torch.arange(self.shape.num_codebooks, device=rows.device) * (self.shape.codebook_size + 2)
        x = self.code_embedding(rows + offsets).sum(2) + side
        rotation = self._rotation(x.shape[1], self.shape.decoder.head_dim, x.device)
        for block in self.decoder:
            x = block(x, rotation, None)
        return self.norm(x)

    def grid(self, batch: Batch, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Delayed rows of `codes` [B, N, Q] that are fed, and the codes of the next row, -1: none. Both [B, T, Q]."""
        count = self.shape.num_codebooks
        device = codes.device
        num_rows = codes.shape[1] + count - 1
        frames = torch.arange(num_rows, device=device)[:, None] - 1 - torch.arange(count, device=device)
        ends = batch.num_frames[:, None, None]

        def placed(source: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
            return source.gather(1, frames.clamp(0, source.shape[1] - 1).expand(len(source), -1, -1))

        rows = placed(codes, frames).masked_fill(frames < 0, self.shape.bos).masked_fill(frames >= ends, self.shape.pad)
        following = frames + 1
        targets = placed(batch.codes, following).masked_fill((following < 0) | (following >= ends), -1)
        return rows, targets

    @staticmethod
    def _rotation(length: int, size: int, device: torch.device, theta: float = 10_000.0) -> torch.Tensor:
        rates = theta ** (-torch.arange(0, size, 2, device=device).float() / size)
        angles = torch.arange(length, device=device)[:, None] * rates
        return torch.polar(torch.ones_like(angles), angles)
