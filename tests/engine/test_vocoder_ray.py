"""The Ray vocoder pool with real workers: the samples are the inline vocoder's, whatever befalls them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import pytest
import torch

from declaim.engine.codec.base import Codec, CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.errors import EngineClosed, EngineError, ModelLoadError, SequenceFailed, VocoderLost
from declaim.engine.vocoder import ray_pool, ray_process
from declaim.engine.vocoder.base import DecodedWindow, Window, decode_window
from declaim.engine.vocoder.ray_pool import RayPoolOptions, RayVocoderPool

pytestmark = pytest.mark.ray

CODEC_FOLDER = Path(__file__).parents[2] / "engine" / "assets" / "lark" / "codec"
RECIPE = CodecRecipe(kind="lark", folder=str(CODEC_FOLDER))


class MakeClient(Protocol):
    def __call__(self, options: RayPoolOptions, *, recipe: CodecRecipe = RECIPE) -> Client: ...


def make_windows(sequence_id: int, count: int, *, length: int = 30, num_frames: int = 5) -> list[Window]:
    rng = np.random.default_rng(sequence_id)
    codes = rng.integers(0, 1024, (count, 8, length), dtype=np.int16)
    return [Window(sequence_id, i, codes[i], length - num_frames - 8, num_frames) for i in range(count)]


def key(window: Window | DecodedWindow) -> tuple[int, int]:
    return window.sequence_id, window.index


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.005)


class Client:
    """What the engine thread does with a pool: wait for its wake, poll, collect."""

    def __init__(self, options: RayPoolOptions, recipe: CodecRecipe = RECIPE) -> None:
        self.woken = threading.Event()
        self.pool = RayVocoderPool(recipe, options, wake=self.woken.set)
        self.decoded: list[DecodedWindow] = []

    def collect(self, until: Callable[[], bool], *, timeout_s: float = 200.0) -> None:
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, f"{self.pool.num_pending} windows pending, {self.pool.stats()}"
            self.woken.wait(0.2)
            self.woken.clear()
            self.decoded += self.pool.poll()

    def drain(self) -> dict[tuple[int, int], DecodedWindow]:
        """Everything pending; each window once."""
        self.collect(lambda: self.pool.num_pending == 0)
        decoded = {key(window): window for window in self.decoded}
        assert len(decoded) == len(self.decoded), "a window came back twice"
        self.decoded = []
        return decoded


@pytest.fixture(scope="module")
def codec() -> Iterator[Codec]:
    """The codec in this process, on one thread as in a worker: last bits depend on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_codec(RECIPE)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with four CPUs: what all pools here join, each from a process of its own."""
    code = """if True:
        import os, ray
        os.environ["RAY_worker_niceness"] = "0"
        options = {"include_dashboard": False, "object_store_memory": 90 * 2**20, "configure_logging": False}
        print(ray.init("local", num_cpus=4, log_to_driver=False, **options).address_info["gcs_address"], flush=True)
        input()
    """
    pipe = subprocess.PIPE
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process,
    ):
        patch.setenv("RAY_AUTH_MODE", "token")  # a Ray that was started by ray.init asks for its token
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("\n", timeout=30)


@pytest.fixture(scope="module")
def shared(cluster: str) -> Iterator[Client]:
    """A pool of one worker, for tests that do it no harm."""
    client = Client(RayPoolOptions(max_workers=1, address=cluster))
    yield client
    client.pool.close()


@pytest.fixture
def make_client(cluster: str) -> Iterator[MakeClient]:
    clients: list[Client] = []

    def make(options: RayPoolOptions, *, recipe: CodecRecipe = RECIPE) -> Client:
        clients.append(Client(replace(options, cpus_per_worker=0.25, address=cluster), recipe))
        return clients[-1]

    yield make
    for client in clients:
        client.pool.close()


def check_samples(codec: Codec, windows: list[Window], decoded: dict[tuple[int, int], DecodedWindow]) -> None:
    assert sorted(decoded) == sorted(key(window) for window in windows)
    for window in windows:
        result = decoded[key(window)]
        assert result.error is None and result.samples is not None
        assert result.samples.flags.writeable
        assert result.samples.tobytes() == decode_window(codec, window).tobytes()


def test_an_address_where_nobody_listens_is_named_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(EngineError, match=address) as error:
            RayVocoderPool(RECIPE, RayPoolOptions(address=address), wake=lambda: None)
    assert time.monotonic() - begin < 20
    assert "ray start --head" in str(error.value)


def test_an_address_where_something_else_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "_JOIN_CLUSTER_TIMEOUT_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EngineError, match=address):
            RayVocoderPool(RECIPE, RayPoolOptions(address=address), wake=lambda: None)


@pytest.mark.parametrize("address", ["localhost", "ray://localhost:10001", "localhost:6379x", ":6379"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(EngineError, match="HOST:PORT"):
        RayVocoderPool(RECIPE, RayPoolOptions(address=address), wake=lambda: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: RayPoolOptions(min_workers=0), "min_workers is 0"),
        (lambda: RayPoolOptions(min_workers=3, max_workers=2), "max_workers 2"),
        (lambda: RayPoolOptions(max_windows_per_call=0), "max_windows_per_call is 0"),
        (lambda: RayPoolOptions(gpus_per_worker=-1), "gpus_per_worker -1"),
        (lambda: RayPoolOptions(health_timeout_s=0), "health_timeout_s is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: Callable[[], RayPoolOptions], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()


def test_a_truncated_codec_stops_the_pool_from_being_built(make_client: MakeClient, tmp_path: Path) -> None:
    folder = copy_codec(tmp_path)
    truncate_codec(folder)
    with pytest.raises(ModelLoadError, match="model.safetensors"):
        make_client(RayPoolOptions(), recipe=CodecRecipe(kind="lark", folder=str(folder)))


def test_samples_are_those_of_the_inline_vocoder_and_a_bad_window_fails_alone(codec: Codec, shared: Client) -> None:
    client = shared
    windows = [window for s in range(4) for window in make_windows(s, 5, length=20 + s)]
    bad = Window(9, 1, np.full((8, 25), 1024, dtype=np.int16), 10, 5)
    client.pool.submit([*windows[:10], bad, *windows[10:]])
    assert client.pool.num_pending == 21
    decoded = client.drain()
    assert isinstance(decoded.pop((9, 1)).error, SequenceFailed)
    check_samples(codec, windows, decoded)
    assert client.pool.stats().restarts == 0


def test_sigkill_of_a_worker_loses_no_window_and_doubles_none(codec: Codec, make_client: MakeClient) -> None:
    client = make_client(RayPoolOptions(min_workers=2))
    wait_until(lambda: len(client.pool.worker_pids()) == 2)
    windows = [window for s in range(8) for window in make_windows(s, 8)]
    client.pool.submit(windows)
    client.collect(lambda: len(client.decoded) >= 10)
    victim = client.pool.worker_pids()[0]
    os.kill(victim, signal.SIGKILL)
    check_samples(codec, windows, client.drain())
    assert client.pool.stats().restarts == 1
    assert victim not in client.pool.worker_pids()


def test_an_idle_worker_that_no_longer_answers_is_replaced(make_client: MakeClient) -> None:
    client = make_client(RayPoolOptions(max_workers=1, health_interval_s=0.2, health_timeout_s=0.8))
    stopped = client.pool.worker_pids()[0]
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: client.pool.worker_pids() not in ([], [stopped]))
    assert client.pool.stats().restarts == 1


def test_stopped_workers_are_replaced_and_a_window_that_cost_three_is_given_up_but_not_its_neighbours(
    codec: Codec, make_client: MakeClient
) -> None:
    client = make_client(RayPoolOptions(max_workers=1, decode_timeout_s=1.0))
    stopped: set[int] = set()
    # Two seconds of decoding, where one is waited for: the worker is lost even if it is stopped late.
    (cursed,) = make_windows(0, 1, length=4000, num_frames=3900)
    innocent = make_windows(1, 4)[1:]

    def stop_its_worker() -> bool:
        for pid in set(client.pool.worker_pids()) - stopped:
            if client.pool.stats().restarts < 3:
                wait_until(lambda: client.pool.stats().in_flight > 0)
                os.kill(pid, signal.SIGSTOP)
                stopped.add(pid)
        return client.pool.num_pending == 0

    client.pool.submit([cursed, *innocent])
    client.collect(stop_its_worker)
    decoded = client.drain()
    error = decoded.pop((0, 0)).error
    assert isinstance(error, VocoderLost) and "3 workers" in str(error)
    check_samples(codec, innocent, decoded)
    assert client.pool.stats().restarts == 3


def test_a_cancelled_sequence_does_not_come_back(codec: Codec, shared: Client) -> None:
    pool, before = shared.pool, shared.pool.stats().windows_decoded
    kept, cancelled = make_windows(10, 8), make_windows(11, 200)
    pool.submit([*cancelled, *kept])
    wait_until(lambda: pool.stats().windows_decoded >= before + 4)
    # Some of its windows wait to be polled, some are in the worker's hands, most are queued.
    pool.cancel(11)
    assert pool.num_pending == 8
    check_samples(codec, kept, shared.drain())
    assert pool.stats().windows_decoded < before + 208


def test_the_pool_grows_while_windows_wait_and_shrinks_when_idle(codec: Codec, make_client: MakeClient) -> None:
    client = make_client(RayPoolOptions(max_workers=2, max_windows_per_call=1, idle_timeout_s=0.5))
    windows: list[Window] = []

    def feed_until_grown() -> bool:
        if client.pool.num_pending < 20:
            more = make_windows(len(windows), 20)
            windows.extend(more)
            client.pool.submit(more)
        return client.pool.stats().workers == 2

    client.collect(feed_until_grown)
    check_samples(codec, windows, client.drain())
    wait_until(lambda: client.pool.stats().workers == 1)
    assert client.pool.stats().restarts == 0


def test_windows_fail_with_the_cause_while_no_worker_can_start_and_decode_again_once_one_can(
    codec: Codec, make_client: MakeClient, tmp_path: Path
) -> None:
    folder = copy_codec(tmp_path)
    client = make_client(RayPoolOptions(max_workers=1), recipe=CodecRecipe(kind="lark", folder=str(folder)))
    truncate_codec(folder)
    os.kill(client.pool.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: client.pool.worker_pids() == [])
    client.pool.submit(make_windows(0, 3))
    errors = [window.error for window in client.drain().values()]
    assert [type(error) for error in errors] == [VocoderLost] * 3
    assert "model.safetensors" in str(errors[0])

    shutil.copy(CODEC_FOLDER / "model.safetensors", folder)
    wait_until(lambda: client.pool.worker_pids() != [])
    windows = make_windows(1, 3)
    client.pool.submit(windows)
    check_samples(codec, windows, client.drain())


def test_closing_drops_what_is_pending_kills_the_workers_and_may_be_done_twice(
    make_client: MakeClient, shared: Client
) -> None:
    client = make_client(RayPoolOptions(max_workers=1))
    (pid,) = client.pool.worker_pids()
    client.pool.submit(make_windows(0, 40))
    client.pool.close()
    client.pool.close()
    assert (client.pool.num_pending, client.pool.poll(), client.pool.worker_pids()) == (0, [], [])
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    with pytest.raises(EngineClosed):
        client.pool.submit(make_windows(1, 1))
    # Ray is the other pool's too, and that one still has its worker.
    assert len(shared.pool.worker_pids()) == 1


def host_of(pool: RayVocoderPool) -> int:
    """The process that holds this pool's Ray."""
    assert pool._ray is not None
    return pool._ray.process._process.pid


def test_a_cluster_is_joined_again_once_the_process_that_holds_ray_is_killed_or_frozen(
    codec: Codec, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "_SILENT_TIMEOUT_S", 2.5)
    client = make_client(RayPoolOptions(max_workers=1))
    for how in (signal.SIGKILL, signal.SIGSTOP):
        before, host = client.pool.worker_pids(), host_of(client.pool)
        windows = make_windows(how, 60)
        client.pool.submit(windows)
        os.kill(host, how)
        check_samples(codec, windows, client.drain())
        wait_until(lambda: client.pool.worker_pids() not in ([], before), timeout_s=90)  # noqa: B023
        assert not Path(f"/proc/{host}").exists()
        assert client.pool.failure is None
    assert client.pool.stats().restarts == 2


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; time.sleep(60)", "Ray did not start within 0.5 s"),
        ("import sys; sys.exit(3)", r"has ended \(exit status 3\)"),
        ("import os; os.kill(os.getpid(), 9)", r"has ended \(signal 9\)"),
        ("import os, sys; os.write(int(sys.argv[1]), b'\\0\\0\\0\\1x')", "has ended"),
    ],
    ids=["it hangs", "it ends", "it is killed", "it says nonsense"],
)
def test_a_ray_that_does_not_start_is_told_of_and_its_process_ended(
    monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    monkeypatch.setattr(ray_process, "_COMMAND", (sys.executable, "-c", code))
    if "sleep" in code:
        monkeypatch.setattr(ray_pool, "_START_RAY_TIMEOUT_S", 0.5)
    with pytest.raises(EngineError, match=told):
        RayVocoderPool(RECIPE, RayPoolOptions(), wake=lambda: None)
    wait_until(lambda: not [child for child in psutil.Process().children() if code in child.cmdline()])


def copy_codec(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CODEC_FOLDER, tmp_path / "codec"))


def truncate_codec(folder: Path) -> None:
    weights = folder / "model.safetensors"
    # A new file in place of the old: a worker may have mapped that one.
    content = weights.read_bytes()[:100_000]
    weights.unlink()
    weights.write_bytes(content)
