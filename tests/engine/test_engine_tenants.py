"""The bounded queue is shared: one tenant that floods it leaves places to the others."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

from declaim.engine import AudioChunk, Engine, EngineConfig, Overloaded, SamplingParams, SpeechRequest
from tests.fakes import FakeCodec, FakeModel, ShuffledVocoder

# Sixteen places, of which a tenant of weight 1 may fill twelve.
CONFIG = EngineConfig(device="cpu", dtype="float32", num_blocks=4096, block_size=4, max_batch=4, max_waiting=12)


@contextmanager
def engine_of(config: EngineConfig = CONFIG) -> Iterator[Engine]:
    with Engine(
        FakeModel(eos_bias=-100.0),
        config,
        make_vocoder=lambda wake: ShuffledVocoder(seed=0, wake=wake),
        model_name="fake",
        load_encoder=FakeCodec,
    ) as engine:
        yield engine


class Crowd:
    """Requests of tenants that are open until the crowd is closed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: list[Generator[AudioChunk]] = []

    def ask(self, tenant: str, *, weight: float = 1.0, text: str = "abc") -> None:
        """Raises: Overloaded."""
        sampling = SamplingParams(max_seconds=25.0)
        stream = self._engine.stream(SpeechRequest(text, sampling=sampling, tenant=tenant, weight=weight))
        next(stream)
        self._streams.append(stream)

    def flood(self, tenant: str, *, weight: float = 1.0) -> tuple[int, str]:
        """Ask until refused. Returns how many were taken, and why no more."""
        for count in range(100):
            try:
                self.ask(tenant, weight=weight)
            except Overloaded as error:
                assert error.retry_after_s > 0
                return count, str(error)
        raise AssertionError("nothing was refused")

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    # Everybody runs, so that each request's first chunk comes and the next can be asked for.
    config = EngineConfig(device="cpu", dtype="float32", num_blocks=4096, block_size=4, max_batch=16, max_waiting=0)
    with engine_of(config) as engine:
        crowd = Crowd(engine)
        yield crowd
        crowd.close()


def test_one_tenant_fills_three_quarters_and_is_told_its_name_and_share(crowd: Crowd) -> None:
    count, why = crowd.flood("acme")
    assert count == 12
    assert "tenant 'acme' has 12 sequences" in why
    assert "may hold 9 of its 16 places" in why


def test_the_next_tenants_find_places_and_leave_some_too(crowd: Crowd) -> None:
    crowd.flood("acme")
    assert [crowd.flood(tenant)[0] for tenant in ("bolt", "cogs")] == [3, 1]


def test_a_heavier_tenant_may_hold_more_and_a_lighter_one_less(crowd: Crowd) -> None:
    assert crowd.flood("light", weight=0.25)[0] == 6
    count, _ = crowd.flood("heavy", weight=3.0)
    assert count == 9
    crowd.ask("next")


def test_a_full_engine_refuses_everybody_and_names_the_limit(crowd: Crowd) -> None:
    crowd.flood("acme")
    for tenant in ("bolt", "cogs", "dash", "east"):
        crowd.ask(tenant)
    with pytest.raises(Overloaded, match="limit is 16"):
        crowd.ask("fifth")


def test_without_tenants_all_places_are_anybodys(crowd: Crowd) -> None:
    count, why = crowd.flood("")
    assert count == 16
    assert "limit is 16" in why


def test_places_come_back_when_requests_end() -> None:
    with engine_of() as engine:
        short = SamplingParams(max_seconds=0.3)
        for _ in range(3):
            results = engine.generate([SpeechRequest("ab", sampling=short, tenant="acme")] * 14, progress=False)
            assert {result.finish_reason for result in results} == {"length"}
        assert not engine._num_open_of
