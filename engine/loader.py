"""From a model's name to a loaded model and its codec's recipe. Finds every part before it reads the first weight."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from declaim.engine.checkpoint import INDEX_NAME, SINGLE_NAME
from declaim.engine.codec.base import Codec, CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.config import EngineConfig
from declaim.engine.errors import ModelLoadError, ModelNotFound
from declaim.engine.hub import Hub, HubRepo, HubUnreachable
from declaim.engine.integrity import half_written
from declaim.engine.models.base import SpeechModel
from declaim.engine.parts import Family, family_of, unserved
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.safetensors_io import freed_at_once, read_json
from declaim.engine.speaker import ENCODER_NAME, PROJECTION_NAME, SpeakerEncoder, fetch_command
from declaim.engine.speaker import REPO_ID as ZONOS_SPEAKER
from declaim.engine.spec import CodecSpec
from declaim.kernels.threads import one_thread

log = logging.getLogger(__name__)

EMBEDDED_NAME = "lark"
EMBEDDED_FOLDER = Path(__file__).parent / "assets" / "lark"
NAMING_FILES = ("config.json", "processor_config.json", "audio_tokenizer_config.json")
ZONOS_CODEC = "descript/dac_44khz"  # a Zonos names none: all of them have this one
SPEAKER_NAMES = (ENCODER_NAME, PROJECTION_NAME)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's folder, its family, and where its codec lies. name: what callers ask for it by.

    speaker_folder: where its speaker encoder lies, of a family that has one and where it is at hand.
    """

    name: str
    folder: Path
    family: Family
    codec_folder: Path
    speaker_folder: Path | None = None


def find_model(name: str, progress: Progress = ignore_progress, *, hub: Hub | None = None) -> ModelFiles:
    """Resolve a folder, the embedded voice's name, or a hub id (downloaded, with its codec, where there is a network).

    hub: the hub and cache to use; None takes what the environment names.
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
        folder = _fetch(name, hub or Hub(), progress)
    unfinished = half_written(folder)
    if unfinished is not None:
        raise ModelLoadError(unfinished)
    shown = folder.resolve().name if Path(name).is_dir() else name
    family = read_family(folder)
    if family == "lark":
        return ModelFiles(shown, folder, "lark", folder / "codec")
    codec = _dac_folder(folder, family)
    if isinstance(codec, str):
        codec = _fetch_codec(codec, hub or Hub(), progress)
    speaker = find_speaker(folder, hub or Hub()) if family == "zonos" else None
    return ModelFiles(shown, folder, family, codec, speaker)


def find_speaker(folder: Path, hub: Hub) -> Path | None:
    """Where the speaker encoder of a Zonos lies: `speaker/` beside it, or what was pulled with one; None if nowhere."""
    beside = folder / "speaker"
    return beside if beside.is_dir() else hub.cached_folder(ZONOS_SPEAKER, holding=SPEAKER_NAMES)


def check_speaker(files: ModelFiles) -> None:
    """Before a weight is read: refuse a speaker encoder that could not be loaded, and say where one is missing.

    Raises: ModelLoadError.
    """
    if files.family != "zonos":
        return
    if files.speaker_folder is not None:
        SpeakerEncoder.check(files.speaker_folder)
        return
    is_of_hub = "/" in files.name
    log.warning(
        "event=no_speaker_encoder model=%s: %s is not here, so a voice is only known by going on from its recording,"
        " which needs the words said in it; get it with: %s",
        files.name,
        ZONOS_SPEAKER,
        f"declaim models pull {files.name}" if is_of_hub else fetch_command(files.folder / "speaker"),
    )


def read_family(folder: Path) -> Family:
    """The family that a model folder's config.json names. Raises: ModelLoadError where it is not served."""
    config = read_json(folder / "config.json")
    family = family_of(config)
    if family is not None:
        return family
    raise unserved(config, name=str(folder))


def resolve_parts(repo_id: str, hub: Hub, *, everything: bool = False) -> tuple[HubRepo, ...]:
    """Name every file that a hub model needs, with sizes, before any weight is fetched: the model's, then its codec's.

    Fetches the few JSON files that name the rest. everything: all files of each repository, not what serving reads.
    Raises: ModelNotFound, ModelLoadError.
    """
    listed = hub.list_files(repo_id)
    if all(file.path != "config.json" for file in listed.files):
        raise ModelLoadError(f"{repo_id} has no config.json: name a model as transformers saves it")
    folder = hub.fetch_small(listed.only(NAMING_FILES))
    family = read_family(folder)
    wanted = _wanted(listed, hub)
    repos = [listed if everything else wanted]
    if family != "lark":
        has_codec = any(file.path == "codec/config.json" for file in listed.files)
        codec = _dac_folder(folder, family, has_codec_folder=has_codec)
        if isinstance(codec, str):
            listed = hub.list_files(codec)
            wanted = _wanted(listed, hub)
            repos.append(listed if everything else wanted)
    if family == "zonos":
        speaker = hub.list_files(ZONOS_SPEAKER)
        repos.append(speaker if everything else speaker.only(SPEAKER_NAMES))
    return tuple(repos)


def load_model(
    files: ModelFiles,
    config: EngineConfig,
    progress: Progress = ignore_progress,
    *,
    is_text_offloaded: bool = False,
) -> tuple[SpeechModel, Codec, CodecRecipe]:
    """Load the codec (without its encoder) and the model; `config` is resolved.

    is_text_offloaded: what reads the text stays on the CPU, where the family allows it. Raises: ModelLoadError.
    """
    device, dtype = config.torch_device, config.torch_dtype
    recipe = CodecRecipe(
        kind="lark" if files.family == "lark" else "dac",
        folder=str(files.codec_folder),
        dtype=codec_dtype(device, dtype),
        device=str(device),
    )
    codec_bytes, model_bytes = _weight_bytes(files.codec_folder), _weight_bytes(files.folder)
    total = codec_bytes + model_bytes

    def report(stage: str, done: int, of: int) -> None:
        # Tensors count as their part of the files; only what is read is one stage with the codec.
        if stage == "read":
            done, of = codec_bytes + done * model_bytes // max(of, 1), total
        progress(stage, done, of)

    with one_thread(), freed_at_once():
        progress("read", 0, total)
        codec = load_codec(recipe)
        progress("read", codec_bytes, total)
        model = _load_family(files, codec.spec, config, is_text_offloaded=is_text_offloaded, progress=report)
    log.info("event=loaded model=%s family=%s dtype=%s device=%s", files.name, files.family, dtype, device)
    return model, codec, recipe


def codec_dtype(device: torch.device, dtype: torch.dtype) -> Literal["float32", "float16"]:
    """What a codec decodes in beside a model in `dtype`: of 16 bits always float16, as Zonos' reference, since bfloat16
    has 17 dB more noise."""
    return "float32" if device.type == "cpu" or dtype == torch.float32 else "float16"


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _load_family(
    files: ModelFiles, codec: CodecSpec, config: EngineConfig, *, is_text_offloaded: bool, progress: Progress
) -> SpeechModel:
    dtype, device, recipe = config.torch_dtype, config.torch_device, config.int4_recipe(files.family)
    if files.family == "dia":
        from declaim.engine.models.dia import DiaModel

        return DiaModel.load(
            files.folder,
            codec=codec,
            dtype=dtype,
            device=device,
            recipe=recipe,
            text_device=torch.device("cpu") if is_text_offloaded else None,
            progress=progress,
        )
    if files.family == "zonos":
        from declaim.engine.models.zonos import ZonosModel

        return ZonosModel.load(files.folder, codec=codec, dtype=dtype, device=device, recipe=recipe, progress=progress)
    from declaim.engine.models.lark import LarkModel

    return LarkModel.load(files.folder, codec=codec, dtype=dtype, device=device, recipe=recipe, progress=progress)


def _fetch(repo_id: str, hub: Hub, progress: Progress) -> Path:
    """A hub model's folder: what the hub has now, or what is cached where the hub is out of reach."""
    try:
        repos = resolve_parts(repo_id, hub)
    except HubUnreachable as error:
        folder = hub.cached_folder(repo_id)
        if folder is None:
            raise
        log.warning("event=hub_unreachable model=%s error=%r: the cached copy is used", repo_id, str(error))
        return folder
    if all(hub.is_complete(repo) for repo in repos):
        return hub.folder(repos[0])
    for repo in repos:
        fetched = sum(file.size for file in hub.missing(repo))
        log.info("event=part repo=%s bytes=%d bytes_to_fetch=%d", repo.repo_id, repo.num_bytes, fetched)
    return hub.pull(repos, progress)[0]


def _fetch_codec(repo_id: str, hub: Hub, progress: Progress) -> Path:
    folder = hub.cached_folder(repo_id)
    if folder is not None and (folder / SINGLE_NAME).exists():
        return folder
    return hub.pull([_wanted(hub.list_files(repo_id), hub)], progress)[0]


def _wanted(repo: HubRepo, hub: Hub) -> HubRepo:
    """What serving reads of a repository: JSON files and weights, at its top and in codec/.

    Raises: ModelLoadError where there are no safetensors weights; ModelNotFound.
    """
    paths = {file.path for file in repo.files}
    wanted = {path for path in paths if path.endswith(".json") and "/" not in path}
    wanted |= {path for path in paths if path.startswith("codec/") and path.endswith((".json", ".safetensors"))}
    if INDEX_NAME in paths:
        shards = read_json(hub.fetch_small(repo.only([INDEX_NAME])) / INDEX_NAME).get("weight_map")
        weights = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
    else:
        weights = {SINGLE_NAME}
    absent = weights - paths
    if absent:
        held = ", ".join(sorted(path for path in paths if path.endswith(WEIGHT_SUFFIXES))) or "no weights"
        raise ModelLoadError(
            f"{repo.repo_id} has no {min(absent)} (it holds {held}): this version reads safetensors as transformers"
            " saves them, for example nari-labs/Dia-1.6B-0626"
        )
    return repo.only(wanted | weights)


def _dac_folder(folder: Path, family: Family, *, has_codec_folder: bool | None = None) -> Path | str:
    """Where a model's DAC is: a folder that its processor names, else `codec/` beside the model, else a hub id.

    has_codec_folder: whether there will be a codec/; None looks. Raises: ModelLoadError if none is named.
    """
    beside = folder / "codec"
    named = _named_codec(folder) or (ZONOS_CODEC if family == "zonos" else None)
    if named is not None and Path(named).is_dir():
        return Path(named)
    if (beside / "config.json").exists() if has_codec_folder is None else has_codec_folder:
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
    return named


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
