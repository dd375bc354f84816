"""The block pool against a plain set of free blocks."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from declaim.engine.blocks import BlockPool, blocks_for


class PoolMachine(RuleBasedStateMachine):
    """Allocations and frees in any order, beside a set that says what is free."""

    @initialize(num_blocks=st.integers(0, 40))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.free = set(range(num_blocks))
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 20))
    def allocate_a_table(self, count: int) -> None:
        self._take(count, after=None, table=[])

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), count=st.integers(0, 5))
    def grow_a_table(self, data: st.DataObject, count: int) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        self.tables.remove(table)
        self._take(count, after=table[-1], table=table)

    def _take(self, count: int, *, after: int | None, table: list[int]) -> None:
        taken = self.pool.allocate(count, after=after)
        if count > len(self.free):
            assert taken is None
            taken = []
        assert taken is not None
        if taken and after is not None and after + 1 in self.free:
            assert taken[0] == after + 1
        assert len(set(taken)) == len(taken)
        assert set(taken) <= self.free
        self.free -= set(taken)
        self.tables.append(table + taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free_a_table(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        self.free |= set(table)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def free_what_is_free(self, data: st.DataObject) -> None:
        with pytest.raises(RuntimeError, match="freed twice"):
            self.pool.free([data.draw(st.sampled_from(sorted(self.free)))])

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.num_free == len(self.free)
            assert self.pool.num_used == self.num_blocks - len(self.free)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestPool = PoolMachine.TestCase


def test_an_empty_pool_of_any_size_gives_one_run_of_neighbours() -> None:
    for num_blocks in (1, 7, 64):
        for count in range(1, num_blocks + 1):
            taken = BlockPool(num_blocks).allocate(count, after=None)
            assert taken is not None
            assert taken == list(range(taken[0], taken[0] + count))


def test_a_hole_that_holds_the_whole_request_is_filled_by_neighbours() -> None:
    pool = BlockPool(10)
    assert pool.allocate(10, after=None) == list(range(10))
    pool.free([1, 5, 6, 7, 9])
    assert pool.allocate(3, after=None) == [5, 6, 7]
    assert sorted(pool.allocate(2, after=7) or []) == [1, 9]


def test_two_sequences_that_start_in_an_empty_pool_can_both_grow_next_to_themselves() -> None:
    pool = BlockPool(64)
    tables = [pool.allocate(2, after=None) or [], pool.allocate(2, after=None) or []]
    for _ in range(8):
        for table in tables:
            table += pool.allocate(1, after=table[-1]) or []
    for table in tables:
        assert table == list(range(table[0], table[0] + 10))


def test_a_double_free_within_one_call_is_found() -> None:
    pool = BlockPool(4)
    assert pool.allocate(2, after=None) is not None
    with pytest.raises(RuntimeError, match="block 1 was freed twice"):
        pool.free([1, 1])


def test_refusing_takes_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3, after=None) is not None
    assert pool.allocate(2, after=2) is None
    assert pool.num_free == 1


@given(num_positions=st.integers(0, 10_000), block_size=st.integers(1, 300))
def test_blocks_for_is_the_smallest_number_that_holds_the_positions(num_positions: int, block_size: int) -> None:
    count = blocks_for(num_positions, block_size)
    assert (count - 1) * block_size < num_positions <= count * block_size or count == num_positions == 0


def test_a_hundred_thousand_blocks_are_handed_out_quickly() -> None:
    """An allocation beside the last block costs about 1 us, a new run about 100 us; the bounds are 20 times that."""
    pool = BlockPool(100_000)
    begin = time.process_time()
    table = pool.allocate(1, after=None)
    assert table is not None
    for _ in range(10_000):
        table += pool.allocate(1, after=table[-1]) or []
    assert time.process_time() - begin < 0.4
    assert len(set(table)) == 10_001
    begin = time.process_time()
    for _ in range(100):
        assert pool.allocate(4, after=None) is not None
    assert time.process_time() - begin < 0.4
