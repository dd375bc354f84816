"""A gate with one key, for what speech asks of a gate and tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from declaim.api.gate import Admission, Caller, Usage, tier_of
from declaim.api.tenant_errors import InvalidApiKey
from declaim.engine.request import Tier

KEY = {"authorization": "Bearer sk-good"}


@dataclass(slots=True)
class FakeGate:
    """Lets in who has the key, counts, and remembers what became of everybody."""

    refusal: Exception | None = None
    asked: list[tuple[str | None, int, str | None]] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    num_open: int = 0

    async def authenticate(self, credential: str | None) -> Caller:
        if credential != "sk-good":
            raise InvalidApiKey("the key is unknown: check it")
        return Caller(tenant="acme", key_id="key_1", weight=2.0)

    async def admit(self, caller: Caller, *, request_id: str, chars: int, service_tier: str | None) -> Admission:
        self.asked.append((caller.tenant, chars, service_tier))
        if self.refusal is not None:
            raise self.refusal
        self.num_open += 1
        gate = self

        class Admitted:
            tier: Tier = tier_of(service_tier)
            headers: Mapping[str, str] = {"x-ratelimit-limit-requests": "60"}

            async def charge(self, chars: int) -> None:
                raise AssertionError("a request comes whole")

            def close(self, usage: Usage) -> None:
                gate.num_open -= 1
                gate.usages.append(usage)

        return Admitted()
