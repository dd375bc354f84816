"""From a model's name to a loaded model and its codec's recipe. Finds every part before it reads the first weight."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from declaim.engine.codec.base import Codec, CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.config import EngineConfig
from declaim.engine.errors import ModelLoadError, ModelNotFound
from declaim.engine.models.base import SpeechModel
from declaim.engine.safetensors_io import read_json
from declaim.engine.spec import CodecSpec
from declaim.engine.threads import one_thread

log = logging.getLogger(__name__)

EMBEDDED_NAME = "lark"
EMBEDDED_FOLDER = Path(__file__).parent / "assets" / "lark"
MODEL_FILES = ("*.json", "*.safetensors")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's folder, its family, and where its codec lies. name: what callers ask for it by."""

    name: str
    folder: Path
    family: Literal["dia", "lark"]
    codec_folder: Path


def find_model(name: str) -> ModelFiles:
    """Resolve a folder, the embedded voice's name, or a hub id (downloaded, with its codec, where there is a network).

    Raises: ModelNotFound, ModelLoadError.
    """
    if name == EMBEDDED_NAME:
        folder = EMBEDDED_FOLDER
        if not (folder / "model.safetensors").exists():
            raise ModelNotFound(
                f"the embedded voice is not in this installation ({folder} has no model.safetensors):"
                " name a model folder or a hub id, for example nari-labs/Dia-1.6B-0626"
            )
    elif Path(name).exists():
        folder = Path(name)
        if not folder.is_dir():
            raise ModelNotFound(f"{name} is a file: name the folder that holds config.json and model.safetensors")
    else:
        folder = _download(name)
    shown = folder.resolve().name if Path(name).is_dir() else name
    family = read_json(folder / "config.json").get("model_type")
    if family == "dia":
        return ModelFiles(shown, folder, "dia", _dia_codec_folder(folder))
    if family == "lark":
        return ModelFiles(shown, folder, "lark", folder / "codec")
    raise ModelLoadError(f"{folder}/config.json says model_type {family!r}: this version serves dia and lark")


def load_model(files: ModelFiles, config: EngineConfig) -> tuple[SpeechModel, Codec, CodecRecipe]:
    """Load the codec (without its encoder) and the model; `config` is resolved. Raises: ModelLoadError."""
    device, dtype = config.torch_device, config.torch_dtype
    half = dtype if device.type == "cuda" else torch.float32
    recipe = CodecRecipe(
        kind="dac" if files.family == "dia" else "lark",
        folder=str(files.codec_folder),
        dtype="float32" if half == torch.float32 else "float16" if half == torch.float16 else "bfloat16",
        device=str(device),
    )
    with one_thread():
        codec = load_codec(recipe)
        model = _load_family(files, codec.spec, dtype=dtype, device=device)
    log.info("event=loaded model=%s family=%s dtype=%s device=%s", files.name, files.family, dtype, device)
    return model, codec, recipe


def _load_family(files: ModelFiles, codec: CodecSpec, *, dtype: torch.dtype, device: torch.device) -> SpeechModel:
    if files.family == "dia":
        from declaim.engine.models.dia import DiaModel

        return DiaModel.load(files.folder, codec=codec, dtype=dtype, device=device)
    from declaim.engine.models.lark import LarkModel

    return LarkModel.load(files.folder, codec=codec, dtype=dtype, device=device)


def _dia_codec_folder(folder: Path) -> Path:
    """`codec/` beside the model, else what its processor names: a path that exists, or a hub id."""
    beside = folder / "codec"
    named = _named_codec(folder)
    if named is not None and Path(named).is_dir():
        return Path(named)
    if (beside / "config.json").exists():
        return beside
    if named is None:
        raise ModelLoadError(
            f"{folder} names no codec: it has neither codec/ nor processor_config.json nor audio_tokenizer_config.json;"
            " put the DAC model (config.json, model.safetensors) into codec/"
        )
    if named.startswith(("/", ".")) or named.count("/") != 1:
        raise ModelLoadError(
            f"{folder}/processor_config.json names a codec at {named}, which is gone: put the DAC model"
            " (config.json, model.safetensors) into codec/"
        )
    return _download(named)


def _named_codec(folder: Path) -> str | None:
    for file_name, keys in (
        ("processor_config.json", ("audio_tokenizer", "audio_tokenizer_name_or_path")),
        ("audio_tokenizer_config.json", ("audio_tokenizer_name_or_path",)),
    ):
        path = folder / file_name
        if not path.exists():
            continue
        value: object = read_json(path)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            return value
    return None


def _download(repo_id: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    remedy = "check the name and the network, or name a folder that holds the model"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelNotFound(f"no folder {repo_id!r} here, and it is not a hub id: {remedy}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelNotFound(f"no folder {repo_id!r} here, and the hub did not give it ({reason}): {remedy}") from error
