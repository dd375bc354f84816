"""What tells one model's files from another's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from declaim.engine import integrity
from declaim.engine.integrity import fingerprint


def model(folder: Path, weights: bytes = b"w" * 5000, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in {"model.safetensors": weights, "config.json": b"{}", **files}.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_copy_of_a_model_is_the_same_and_a_change_of_one_byte_another(tmp_path: Path) -> None:
    first = fingerprint(model(tmp_path / "a"))
    assert len(first) == 64 and fingerprint(model(tmp_path / "b")) == first
    others = [
        model(tmp_path / "c", b"w" * 2500 + b"x" + b"w" * 2499),
        model(tmp_path / "d", b"w" * 5001),
        model(tmp_path / "e", **{"vocab.json": b"{}"}),
    ]
    assert len({first, *map(fingerprint, others), fingerprint(tmp_path / "a", tmp_path / "b")}) == 5


def test_of_a_large_file_its_ends_and_its_time_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(integrity, "CHUNK_BYTES", 100)
    folder = model(tmp_path / "a")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    seen = [fingerprint(folder)]
    for content in (b"x" + b"w" * 4999, b"w" * 4999 + b"x"):
        weights.write_bytes(content)
        os.utime(weights, ns=(1, 1))
        seen.append(fingerprint(folder))
    weights.write_bytes(b"w" * 2500 + b"x" + b"w" * 2499)
    os.utime(weights, ns=(2, 2))
    seen.append(fingerprint(folder))
    assert len(set(seen)) == 4
