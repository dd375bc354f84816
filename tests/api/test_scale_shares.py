"""Shares where a step has less room than there are tenants: nobody is forgotten, whatever the weights."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from declaim.engine.fairness import FairShares


def served(weights: dict[str, float], *, num_steps: int, places_per_step: int) -> Counter[str]:
    """How many places each tenant got, of tenants that always want more."""
    shares, counts = FairShares(), Counter[str]()
    for _ in range(num_steps):
        in_turn = shares.in_turn({tenant: [tenant] * places_per_step for tenant in weights})
        for tenant in islice(in_turn, places_per_step):
            shares.charge(tenant, weights[tenant])
            counts[tenant] += 1
        shares.settle(weights)
    return counts


def test_one_place_a_step_goes_round_from_the_first_step_on() -> None:
    assert served({"acme": 1.0, "bolt": 1.0, "cogs": 1.0}, num_steps=300, places_per_step=1) == {
        "acme": 100,
        "bolt": 100,
        "cogs": 100,
    }


@pytest.mark.parametrize("places_per_step", [1, 2, 7, 32])
def test_a_tenant_too_light_for_a_place_a_step_gets_its_share_over_many(places_per_step: int) -> None:
    counts = served({"heavy": 10.0, "light": 1.0}, num_steps=1100, places_per_step=places_per_step)
    assert counts["heavy"] / counts["light"] == pytest.approx(10.0, rel=0.02)
