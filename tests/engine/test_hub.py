"""Models from a hub that runs here: what is fetched, resumed, refused, checked and removed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save

from declaim.engine import ModelLoadError, ModelNotFound
from declaim.engine.hub import Hub, HubRepo
from declaim.engine.integrity import check_folder
from declaim.engine.loader import find_model, resolve_parts
from tests.fake_hub import FakeHub, FakeRepo, serve_hub

NAME, CODEC = "org/dia", "org/codec"
WEIGHTS = save({"weight": np.arange(300_000, dtype=np.float32)})
CODEC_WEIGHTS = save({"weight": np.ones(50_000, dtype=np.float32)})


def names_codec(where: str) -> bytes:
    return json.dumps({"audio_tokenizer": {"audio_tokenizer_name_or_path": where}}).encode()


def dia_repo(changes: Mapping[str, bytes | None] | None = None) -> FakeRepo:
    files: dict[str, bytes | None] = {
        "config.json": b'{"model_type": "dia"}',
        "processor_config.json": names_codec(CODEC),
        "preprocessor_config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "old.pth": b"x" * 1000,
        "README.md": b"Hello.",
        **(changes or {}),
    }
    return FakeRepo({name: content for name, content in files.items() if content is not None})


def codec_repo() -> FakeRepo:
    return FakeRepo({"config.json": b'{"model_type": "dac"}', "model.safetensors": CODEC_WEIGHTS})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("declaim.engine.hub.RETRY_WAITS_S", (0.0, 0.0))


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with serve_hub({NAME: dia_repo(), CODEC: codec_repo()}) as server:
        yield server


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(server.url, tmp_path / "cache")


def pull(hub: Hub, *, everything: bool = False) -> tuple[Path, ...]:
    return hub.pull(resolve_parts(NAME, hub, everything=everything))


def names(repo: HubRepo) -> set[str]:
    return {file.path for file in repo.files}


def test_every_part_is_named_with_its_size_before_any_weight_is_fetched(hub: Hub, server: FakeHub) -> None:
    model, codec = resolve_parts(NAME, hub)
    assert (model.repo_id, codec.repo_id) == (NAME, CODEC)
    assert names(model) == {"config.json", "processor_config.json", "preprocessor_config.json", "model.safetensors"}
    assert names(codec) == {"config.json", "model.safetensors"}
    assert {file.path: file.size for file in model.files}["model.safetensors"] == len(WEIGHTS)
    assert not server.downloads(".safetensors")
    assert {file.path for file in hub.missing(model)} == {"preprocessor_config.json", "model.safetensors"}


def test_all_of_a_repository_where_that_is_asked(hub: Hub) -> None:
    model, codec = resolve_parts(NAME, hub, everything=True)
    assert {"old.pth", "README.md"} < names(model)
    folder, _ = hub.pull([model, codec])
    assert (folder / "old.pth").read_bytes() == b"x" * 1000


def test_weights_in_shards_are_those_that_the_index_names(hub: Hub, server: FakeHub) -> None:
    index = json.dumps({"weight_map": {"weight": "model-00001-of-00001.safetensors"}}).encode()
    server.repos[NAME] = dia_repo({"model.safetensors.index.json": index, "model-00001-of-00001.safetensors": WEIGHTS})
    model, _ = resolve_parts(NAME, hub)
    assert "model-00001-of-00001.safetensors" in names(model) and "model.safetensors" not in names(model)


def test_a_codec_in_the_models_own_repository(hub: Hub, server: FakeHub) -> None:
    inside: dict[str, bytes | None] = {
        "codec/config.json": b"{}",
        "codec/model.safetensors": CODEC_WEIGHTS,
        "fp16/model.safetensors": WEIGHTS,
    }
    server.repos[NAME] = dia_repo(inside)
    (model,) = resolve_parts(NAME, hub)
    assert {"codec/config.json", "codec/model.safetensors"} < names(model) and "fp16/model.safetensors" not in names(
        model
    )
    files = find_model(NAME, hub=hub)
    assert files.codec_folder == files.folder / "codec" and (files.codec_folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.safetensors": None}, "no model.safetensors.*old.pth"),
        ({"config.json": None}, "no config.json"),
        ({"config.json": b'{"model_type": "llama"}'}, "llama.*dia and lark"),
        ({"processor_config.json": None}, "names no codec"),
        ({"processor_config.json": names_codec("org/gone")}, "org/gone.*no such repository"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_weight_is_fetched(
    hub: Hub, server: FakeHub, changes: dict[str, bytes | None], words: str
) -> None:
    server.repos[NAME] = dia_repo(changes)
    with pytest.raises((ModelLoadError, ModelNotFound), match=words):
        resolve_parts(NAME, hub)
    assert not server.downloads(".safetensors")


def test_a_pull_records_hashes_and_a_second_one_fetches_nothing(hub: Hub, server: FakeHub) -> None:
    stages: dict[str, tuple[int, int]] = {}
    folders = hub.pull(resolve_parts(NAME, hub), lambda stage, done, total: stages.update({stage: (done, total)}))
    assert (folders[0] / "model.safetensors").read_bytes() == WEIGHTS
    assert (folders[1] / "model.safetensors").read_bytes() == CODEC_WEIGHTS
    assert stages["download"][0] == stages["download"][1] > len(WEIGHTS) + len(CODEC_WEIGHTS)
    codec, model = hub.cached_repos()
    assert model.record is not None and codec.record is not None
    assert model.parts == (CODEC,) and set(model.record.files) == {path.name for path in folders[0].iterdir()}
    assert hub.verify(model).problems == hub.verify(codec).problems == ()
    before = len(server.downloads())
    assert pull(hub) == folders
    assert len(server.downloads()) == before


def test_serving_a_pulled_model_reads_no_file_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = pull(hub)
    monkeypatch.setattr("declaim.engine.hub.hash_file", None)
    files = find_model(NAME, hub=hub)
    assert (files.folder, files.codec_folder) == folders


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, server: FakeHub) -> None:
    server.drops["model.safetensors"] = [500_000, 0, 300_000]
    folder, _ = pull(hub)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    wanted = [wanted for _, wanted in server.downloads("model.safetensors")]
    starts = [int(re.findall(r"\d+", text)[0]) for text in wanted if text is not None]
    assert len(starts) == 3 and 0 < starts[0] == starts[1] < starts[2]


def test_a_pull_that_was_given_up_goes_on_in_the_next(hub: Hub, server: FakeHub) -> None:
    server.drops["model.safetensors"] = [700_000, 0, 0, 0]
    with pytest.raises(ModelLoadError, match=rf"broke off at \d+ of {len(WEIGHTS)}.*run the same command again"):
        pull(hub)
    (model,) = [repo for repo in hub.cached_repos() if repo.repo_id == NAME]
    assert model.record is None and hub.cached_folder(NAME) is None
    server.requests.clear()
    folder, _ = pull(hub)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    (_, wanted), _ = server.downloads("model.safetensors")
    assert wanted is not None and int(re.findall(r"\d+", wanted)[0]) > 600_000


def test_a_server_that_knows_no_ranges_is_read_from_the_start(hub: Hub, server: FakeHub) -> None:
    server.with_ranges = False
    server.drops["model.safetensors"] = [400_000]
    folder, _ = pull(hub)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("path", ["model.safetensors", "preprocessor_config.json"])
def test_a_file_that_is_damaged_on_its_way_is_never_kept(hub: Hub, server: FakeHub, path: str) -> None:
    server.damaged.add(path)
    with pytest.raises(ModelLoadError, match=rf"{path} of {NAME} does not match.*HF_ENDPOINT"):
        pull(hub)
    server.damaged.clear()
    folder, _ = pull(hub)
    assert (folder / path).read_bytes() == dia_repo().files[path]


@pytest.mark.parametrize("path", ["model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_file_that_went_bad_is_found_named_and_fetched_again(hub: Hub, path: str, is_cut: bool) -> None:
    folder, _ = pull(hub)
    bad = folder / path
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1] if is_cut else whole[:-1] + bytes([whole[-1] ^ 1]))
    (model,) = [repo for repo in hub.cached_repos() if repo.repo_id == NAME]
    (problem,) = hub.verify(model).problems
    assert str(bad) in problem and f"`declaim models pull {NAME}`" in problem
    assert ("bytes instead of" if is_cut else "SHA-256") in problem
    assert pull(hub)[0] == folder
    assert bad.read_bytes() == whole
    assert hub.verify(model).problems == ()


def test_a_truncated_file_is_fetched_again_when_the_model_is_served(hub: Hub) -> None:
    folder, _ = pull(hub)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:1000])
    assert (find_model(NAME, hub=hub).folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    hub: Hub, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = resolve_parts(NAME, hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    needed = sum(file.size for repo in parts for file in hub.missing(repo))
    with pytest.raises(ModelLoadError, match=rf"{needed} more bytes are needed in {hub.cache}, and 1234 are free"):
        hub.pull(parts)
    assert not server.downloads(".safetensors")


def test_a_disk_that_fills_up_on_the_way(hub: Hub, server: FakeHub) -> None:
    parts = resolve_parts(NAME, hub)
    (weights,) = [file for file in parts[0].files if file.path == "model.safetensors"]
    part = hub.folder(parts[0]).parents[1] / "blobs" / f"{weights.sha256}.incomplete"
    part.parent.mkdir(exist_ok=True)
    part.symlink_to("/dev/full")
    with pytest.raises(ModelLoadError, match=rf"disk is full: \d+ more bytes.*{hub.cache}.*HF_HUB_CACHE.*goes on"):
        hub.pull(parts)
    part.unlink()
    assert (pull(hub)[0] / "model.safetensors").read_bytes() == WEIGHTS


def test_without_a_network_the_cached_copy_is_used(hub: Hub, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = pull(hub)
    server.requests.clear()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        files = find_model(NAME, hub=hub)
        with pytest.raises(ModelNotFound, match="no folder 'org/other'"):
            find_model("org/other", hub=hub)
    assert (files.folder, files.codec_folder) == folders and not server.requests
    unreachable = Hub("http://127.0.0.1:9", hub.cache)
    assert find_model(NAME, hub=unreachable).folder == folders[0]
    with pytest.raises(ModelNotFound, match="no folder 'org/other'"):
        find_model("org/other", hub=unreachable)


def test_a_new_commit_is_fetched_and_shares_what_did_not_change(hub: Hub, server: FakeHub) -> None:
    (old, _) = pull(hub)
    server.repos[NAME] = dia_repo({"README.md": b"Other.", "preprocessor_config.json": b'{"a": 1}'})
    server.requests.clear()
    new = find_model(NAME, hub=hub).folder
    assert new != old and (new / "preprocessor_config.json").read_bytes() == b'{"a": 1}'
    assert (new / "model.safetensors").read_bytes() == WEIGHTS and not server.downloads(".safetensors")


def test_removing_a_model_leaves_a_codec_that_another_uses(hub: Hub, server: FakeHub) -> None:
    server.repos["org/second"] = dia_repo({"README.md": b"Second."})
    pull(hub)
    hub.pull(resolve_parts("org/second", hub))
    doomed = hub.removable(NAME)
    assert [repo.repo_id for repo in doomed] == [NAME]
    hub.remove(doomed)
    assert [repo.repo_id for repo in hub.cached_repos()] == [CODEC, "org/second"]
    hub.remove(hub.removable("org/second"))
    assert hub.cached_repos() == []
    with pytest.raises(ModelNotFound, match="not in .*no models"):
        hub.removable(NAME)


def test_gated_and_unknown_repositories_say_what_to_do(hub: Hub, server: FakeHub) -> None:
    server.gated.add(NAME)
    with pytest.raises(ModelNotFound, match="gated.*HF_TOKEN"):
        resolve_parts(NAME, hub)
    with pytest.raises(ModelNotFound, match="no such repository.*HF_TOKEN"):
        resolve_parts("org/nothing", hub)
    with pytest.raises(ModelNotFound, match="not a hub id"):
        resolve_parts("no such/thing at/all", hub)


def test_a_mirror_cannot_name_files_outside_the_cache(hub: Hub, server: FakeHub) -> None:
    server.repos[NAME] = dia_repo({"../../../../precious.json": b"{}"})
    with pytest.raises(ModelNotFound, match="HF_ENDPOINT"):
        resolve_parts(NAME, hub, everything=True)


def test_a_folder_of_ones_own_is_checked_for_what_can_be_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    verdict = check_folder(tmp_path)
    assert verdict.problems == () and verdict.num_files == 2
    assert verdict.unknown is not None and "no SHA-256 is recorded" in verdict.unknown
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[:-4])
    (tmp_path / "config.json").write_text("{")
    problems = check_folder(tmp_path).problems
    assert len(problems) == 2 and "model.safetensors" in problems[1] and "cut short" in problems[1]
    (tmp_path / "model.safetensors").unlink()
    assert "holds no safetensors" in check_folder(tmp_path).problems[-1]


def test_a_model_that_another_tool_fetched_is_checked_without_a_record(hub: Hub, server: FakeHub) -> None:
    pull(hub)
    for record in hub.cache.glob("*/declaim/*.json"):
        record.write_text("not json")
    (_, model) = hub.cached_repos()
    verdict = hub.verify(model)
    assert verdict.problems == () and verdict.unknown is not None and "models pull" in verdict.unknown
    server.requests.clear()
    pull(hub)
    assert not server.downloads()
    assert hub.cached_repos()[1].record is not None
