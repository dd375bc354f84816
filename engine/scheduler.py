"""Who runs in the next step. Owns the queue, the running set and the block pools; torch-free, clock given.

Order. Levels first: by tier, and within a tier those somebody listens to before those nobody does; last of all, streams
and segments more than `max_lead_s` ahead, which run only when nobody else can. Within a level tenants share the places
by their weights (fairness.py). Within a tenant: streams without first audio, by arrival; then streams by how soon their
playback runs dry; requests nobody listens to, by arrival. A tenant that is held to its share spends it first on what
would run dry soon, so that its own crowd of new requests does not silence what it is playing.

Priority goes before everybody, flex after everybody: a flex sequence counts as default `FLEX_PATIENCE_S` after it came,
so that others delay it by so much and then share with it.

Hurry. Where a step takes longer the more take part in it, a newcomer would wait for its first audio behind everybody
else's arithmetic. So while somebody of a tenant within its share waits for first audio, tenants beyond theirs pause:
for a bounded number of steps, each of which is given back before there may be more.

Places and blocks. A sequence of an earlier level, or of a tenant below its share, is admitted however many others run:
those wait, with their blocks or, where blocks are short, without. What plays loses its blocks to no newcomer. Everyone
chosen decodes one position a step; prefill fills what is left of the step's budget, in pieces, so that a long prompt
stalls nobody. Branches of a sequence are never apart.

Cost. A step that changes nothing costs a glance at each listener and each running sequence: a sequence that decodes
needs a look again only when it needs a block or comes to its end (`plain_until`), a place in the order only when
its listener was given audio or an alarm rings.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from declaim.engine.batch import Batch, Entry
from declaim.engine.blocks import BlockPool, blocks_for
from declaim.engine.errors import TooLong
from declaim.engine.fairness import FairShares
from declaim.engine.frames import draws_end
from declaim.engine.sequence import Playback, Sequence
from declaim.engine.spec import FrameRule

SEGMENT_LEAD_S = 2.0  # how much later a segment is needed for each unfinished one before it
FLEX_PATIENCE_S = 30.0  # how long default traffic may hold back a flex sequence
DRY_SOON_S = 1.0  # a tenant held to its share serves streams with less than this in hand before new ones
PLACES_PER_QUANTUM = 32  # a large batch is shared out a few places at a time
MAX_HURRIED_STEPS = 64  # in a row; a first window takes about 16 of the embedded voice, 45 of Dia

_TIERS = {"priority": 0, "default": 1, "flex": 2}
_YIELDING = 2 * len(_TIERS)  # the level of what is too far ahead; before it two a tier: listened to, and not

# The first part of a rank, within a level.
_FIRST_AUDIO, _PLAYING, _UNHEARD = range(3)

Rank = tuple[int, float, int, int]  # one of the above, then arrival or when playback runs dry, segment, sequence id


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """max_batch: sequences in a step. max_step_positions: positions in a step, over all branches, where a block of one
    prompt does not take it further. max_lead_s: a stream further ahead of its playback than this yields. hurries:
    whether tenants beyond their share pause for first audio of the others, which is of use where a step's time grows
    with its sequences. scan_block: no step ends between so many positions of a prompt (`StateSpec`)."""

    block_size: int
    max_batch: int
    max_step_positions: int
    max_lead_s: float
    hurries: bool = False
    scan_block: int = 1


@dataclass(slots=True, eq=False)
class _Listener:
    """A request's playback, and how much of it the ranks of the request's places already know."""

    playback: Playback
    delivered_s: float
    segment: int
    places: list[_Place] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Place:
    """A sequence in the scheduler, and what is worth remembering of it from step to step."""

    sequence: Sequence
    listener: _Listener
    tenant: str
    weight: float
    num_branches: int
    decode: Entry  # one position, from which a row is drawn: the same object every step
    plain: Entry  # the same, while the row is nothing but what is drawn
    entry: Entry | None  # its part in the step being planned, if it is picked
    is_running: bool = False
    line: _Line | None = None  # None until the first step after it came
    rank: Rank = (0, 0.0, 0, 0)
    alarm_at: float | None = None  # when its level changes by itself
    plain_until: int = 0  # with fewer rows planned than this, its entry is `plain`, and has its block


_rank = attrgetter("rank")
_plain = attrgetter("plain")
_tenant = attrgetter("tenant")
_num_branches = attrgetter("num_branches")


@dataclass(slots=True, eq=False)
class _Line:
    """One tenant's places within a level, by rank."""

    level: int
    tenant: str
    running: list[_Place] = field(default_factory=list)
    waiting: list[_Place] = field(default_factory=list)

    def insert(self, place: _Place) -> None:
        insort(self.running if place.is_running else self.waiting, place, key=_rank)

    def remove(self, place: _Place) -> None:
        places = self.running if place.is_running else self.waiting
        del places[bisect_left(places, place.rank, key=_rank)]

    def in_order(self, room: int, *, dry_by: float = -math.inf) -> list[_Place]:
        """By rank, but streams that run dry before `dry_by` first; of those that wait, behind the running ones of their
        kind, as many as there may be room for."""
        running, waiting = self.running, self.waiting
        if not waiting and dry_by == -math.inf:
            return running[:]
        begin, end, new = _split(running, _PLAYING), _split(running, _PLAYING, dry_by), _split(waiting, _PLAYING)
        first = [*running[begin:end], *running[:begin], *waiting[: min(new, room)]]
        return [*first, *running[end:], *waiting[new : new + room]]

    @property
    def num_places(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def weight(self) -> float:
        return (self.running or self.waiting)[0].weight

    @property
    def awaits_first_audio(self) -> bool:
        return any(places and places[0].rank[0] == _FIRST_AUDIO for places in (self.running, self.waiting))

    def num_blocks(self) -> int:
        return sum(map(_num_blocks, self.running))


def _split(places: list[_Place], *rank: float) -> int:
    """How many of them rank before."""
    return bisect_left(places, rank, key=_rank)


class Scheduler:
    """Continuous batching over a fixed number of blocks."""

    def __init__(self, rule: FrameRule, pool: BlockPool, cross_pool: BlockPool, *, limits: SchedulerLimits) -> None:
        """rule: of every sequence that will be added."""
        self._rule = rule
        self._pool = pool
        self._cross_pool = cross_pool
        self._limits = limits
        self._places: dict[int, _Place] = {}  # by sequence id
        self._levels: list[dict[str, _Line]] = [{} for _ in range(_YIELDING + 1)]  # by tenant
        self._shares = [FairShares() for _ in self._levels]
        self._listeners: dict[int, _Listener] = {}  # by the identity of their playback
        self._served: dict[int, _Listener] = {}  # those of them that may be given audio
        self._new: list[_Place] = []  # not in a line yet
        self._alarms: list[tuple[float, int, _Place]] = []  # a heap; an entry that its place has forgotten is void
        self._preempted: set[int] = set()  # sequence ids, in the step being planned
        self._surprised: set[int] = set()  # ids of those whose end was drawn with another row in flight
        self._num_running = 0
        self._num_branches = 0  # of the running
        self._num_hurried = 0  # steps that others paused in, and that were not given back yet
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._places) - self._num_running

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_blocks_used(self) -> int:
        return self._pool.num_used + self._cross_pool.num_used

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks + self._cross_pool.num_blocks

    def check_fits(self, sequence: Sequence) -> None:
        """Raises: TooLong if the sequence could not run even alone."""
        block_size = self._limits.block_size
        needed = blocks_for(sequence.max_positions, block_size) * sequence.num_branches
        if needed > self._pool.num_blocks:
            raise TooLong(
                f"this request may need {sequence.max_positions} positions in {sequence.num_branches} branches"
                f" ({needed} blocks), and the cache has {self._pool.num_blocks}: lower max_seconds, shorten the voice"
                " prompt, turn guidance off, or start the engine with more memory_gb"
            )
        needed = blocks_for(sequence.prompt.cross_len, block_size)
        if needed > self._cross_pool.num_blocks:
            raise TooLong(
                f"this text takes {sequence.prompt.cross_len} positions ({needed} blocks) of cross-attention cache,"
                f" which has {self._cross_pool.num_blocks}: shorten the text or start the engine with more memory_gb"
            )
        if sequence.num_branches > self._limits.max_step_positions:
            raise TooLong(
                f"a step of {self._limits.max_step_positions} positions cannot hold"
                f" {sequence.num_branches} branches: raise max_step_positions"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `check_fits`."""
        playback, decode = sequence.playback, Entry(sequence, 1, draws=True)
        listener = self._listeners.setdefault(id(playback), _Listener(playback, playback.delivered_s, playback.segment))
        place = _Place(
            sequence,
            listener,
            sequence.given.tenant,
            sequence.given.weight,
            sequence.num_branches,
            decode=decode,
            plain=Entry(sequence, 1, draws=True, is_plain=True),
            entry=decode,
        )
        listener.places.append(place)
        self._places[sequence.sequence_id] = place
        self._new.append(place)

    def schedule(self, now: float) -> Batch:
        """Choose the next step's entries, admitting and preempting as blocks allow. Empty if nobody can run."""
        self._preempted.clear()
        self._line_up(now)
        batch = self._planned(self._everybody() if self._has_place_for_all() else self._pick(now))
        if self._preempted and not batch.entries:  # who was picked had to give up its blocks: the others' turn
            batch = self._planned(self._pick(now))
        return batch

    def launch(self, batch: Batch) -> None:
        """Record that a step is under way: its positions are as good as cached, the rows it draws are in flight."""
        for entry in batch.entries:
            entry.sequence.num_cached += entry.num_positions
            entry.sequence.num_planned += entry.draws

    def commit(self, batch: Batch, drawn: NDArray[np.int32]) -> list[Sequence]:
        """Record what a launched step gave; those that are done leave, and are returned.

        drawn: int32 [D, Q], a row for each entry that draws, in their order. It is kept.
        """
        drawing = batch.drawing
        with_care = set(np.flatnonzero(draws_end(self._rule, drawn)).tolist())
        if not batch.is_plain:
            with_care.update(i for i, entry in enumerate(drawing) if not entry.is_plain)
        if self._surprised:
            with_care.update(i for i, entry in enumerate(drawing) if entry.sequence.sequence_id in self._surprised)
        if not with_care:
            for entry, codes in zip(drawing, drawn, strict=True):
                entry.sequence.rows.append(codes)
            return []
        done: list[Sequence] = []
        for i, (entry, codes) in enumerate(zip(drawing, drawn, strict=True)):
            if i not in with_care:
                entry.sequence.rows.append(codes)
            elif self._append(entry.sequence, codes):
                done.append(entry.sequence)
        return done

    def _append(self, sequence: Sequence, codes: NDArray[np.int32]) -> bool:
        """Append a row that may begin the end, or be part of it. Whether it was the last one."""
        was_open = sequence.end_row is None
        sequence.append(codes)
        self._surprised.discard(sequence.sequence_id)
        place = self._places.get(sequence.sequence_id)
        if place is None:  # it has left, and this row was in flight
            return False
        if was_open and sequence.end_row is not None:
            place.plain_until = 0
            if sequence.num_in_flight:
                self._surprised.add(sequence.sequence_id)
        if sequence.is_done:
            self.remove(sequence)
        return sequence.is_done

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks. No effect if it has left already."""
        place = self._places.pop(sequence.sequence_id, None)
        if place is None:
            return
        self._leave_line(place)
        if place.is_running:
            self._release(place)
        listener = place.listener
        listener.places.remove(place)
        if not listener.places:
            del self._listeners[id(listener.playback)]
            self._served.pop(id(listener.playback), None)

    def sequences(self) -> Iterable[Sequence]:
        """Everything queued or running."""
        return [place.sequence for place in self._places.values()]

    def check_integrity(self) -> None:
        """Raises: RuntimeError if the pools' books and the running sequences disagree."""
        running = [place.sequence for place in self._places.values() if place.is_running]
        held = sum(len(table) for sequence in running for table in sequence.block_tables)
        cross_held = sum(len(sequence.cross_blocks) for sequence in running)
        if held != self._pool.num_used or cross_held != self._cross_pool.num_used:
            raise RuntimeError(
                f"blocks leaked: sequences hold {held} + {cross_held},"
                f" the pools say {self._pool.num_used} + {self._cross_pool.num_used}"
            )

    # The order.

    def _line_up(self, now: float) -> None:
        """Put who came, whose listener was given audio and whose alarm rings where they belong now."""
        moved, self._new = self._new, []
        for listener in self._served.values():
            playback = listener.playback
            if playback.delivered_s != listener.delivered_s or playback.segment != listener.segment:
                listener.delivered_s, listener.segment = playback.delivered_s, playback.segment
                moved += listener.places
        while self._alarms and self._alarms[0][0] <= now:
            at, _, place = heapq.heappop(self._alarms)
            if place.alarm_at == at:
                moved.append(place)
        for place in moved:
            if place.sequence.sequence_id in self._places:
                self._move(place, now)

    def _move(self, place: _Place, now: float) -> None:
        given = place.sequence.given
        level, rank, alarm_at = self._standing(place.sequence, now)
        self._leave_line(place)
        place.rank, place.alarm_at = rank, alarm_at
        if alarm_at is not None:
            heapq.heappush(self._alarms, (alarm_at, given.sequence_id, place))
        place.line = self._levels[level].setdefault(place.tenant, _Line(level, place.tenant))
        place.line.insert(place)

    def _leave_line(self, place: _Place) -> None:
        line, place.line, place.alarm_at = place.line, None, None
        if line is None:
            return
        line.remove(place)
        if not (line.running or line.waiting):
            del self._levels[line.level][line.tenant]

    def _standing(self, sequence: Sequence, now: float) -> tuple[int, Rank, float | None]:
        """A sequence's level and rank, and when they change although its listener is given nothing; None for never."""
        given, playback = sequence.given, sequence.playback
        tier, patience_ends_at = _TIERS[given.tier], None
        if given.tier == "flex":
            patience_ends_at = given.arrived_at + FLEX_PATIENCE_S
            if patience_ends_at <= now:
                tier, patience_ends_at = _TIERS["default"], None
        if not playback.paced:
            rank = (_UNHEARD, given.arrived_at, given.segment, given.sequence_id)
            return 2 * tier + 1, rank, patience_ends_at
        later_s = SEGMENT_LEAD_S * (given.segment - playback.segment)
        if playback.first_audio_at is None:
            kind, at = (_PLAYING, given.arrived_at + later_s) if later_s else (_FIRST_AUDIO, given.arrived_at)
            # Nothing plays yet, so time brings no segment nearer.
            is_ahead, nears_at = later_s > self._limits.max_lead_s, None
        else:
            kind, at = _PLAYING, playback.first_audio_at + playback.delivered_s + later_s
            nears_at = at - self._limits.max_lead_s
            is_ahead = nears_at > now
        rank = (kind, at, given.segment, given.sequence_id)
        return (_YIELDING, rank, nears_at) if is_ahead else (2 * tier, rank, patience_ends_at)

    # The choice.

    def _has_place_for_all(self) -> bool:
        is_everybody_running = self._num_running == len(self._places) <= self._limits.max_batch
        return is_everybody_running and self._num_branches <= self._limits.max_step_positions

    def _everybody(self) -> list[_Place]:
        """All but those who yield, or these if there is nobody else."""
        self._num_hurried = 0
        for shares in self._shares:
            shares.settle(())
        *levels, yielding = self._levels
        return [place for lines in levels for line in lines.values() for place in line.running] or [
            place for line in yielding.values() for place in line.running
        ]

    def _pick(self, now: float, *, may_hurry: bool = True) -> list[_Place]:
        """Who steps, level by level and most urgent first; those among them who were waiting are admitted."""
        picked: list[_Place] = []
        room, budget = self._limits.max_batch, self._limits.max_step_positions
        is_blocked = False  # once blocks are short for somebody, nobody less urgent takes what there is
        is_hurried = False
        for lines, shares in zip(self._levels, self._shares, strict=True):
            if not lines or is_hurried or (picked and lines is self._levels[_YIELDING]):
                continue
            is_shared = len(lines) > 1
            dry_by = now + DRY_SOON_S if is_shared else -math.inf
            served = self._hurrying(lines) if may_hurry else lines
            is_hurried = len(served) < len(lines)
            queues = {tenant: line.in_order(room, dry_by=dry_by) for tenant, line in served.items()}
            chosen: list[_Place] = []
            num_served: Counter[str] = Counter()
            quantum = 1 + room // PLACES_PER_QUANTUM
            for place in shares.in_turn(queues, quantum=quantum) if is_shared else next(iter(queues.values())):
                if not room:
                    break
                sequence = place.sequence
                if sequence.num_planned >= place.plain_until:
                    if not sequence.can_step:
                        num_served[place.tenant] += 1
                        continue
                    if sequence.sequence_id in self._preempted:
                        continue
                    if not place.is_running and place.num_branches <= budget:
                        is_blocked = is_blocked or not self._admit(place)
                    if not place.is_running:
                        continue
                if place.num_branches > budget:
                    continue
                chosen.append(place)
                room -= 1
                budget -= place.num_branches
                if is_shared:
                    shares.charge(place.tenant, place.weight)
            if is_shared:
                num_served.update(map(_tenant, chosen))
                shares.settle(tenant for tenant, line in lines.items() if line.num_places > num_served[tenant])
            picked += sorted(chosen, key=_rank)
            if is_hurried and not any(place.rank[0] == _FIRST_AUDIO for place in chosen):
                return self._pick(now, may_hurry=False)  # there are no blocks for it, so nobody is helped by a pause
        self._num_hurried = self._num_hurried + 1 if is_hurried else max(0, self._num_hurried - 1)
        return picked

    def _hurrying(self, lines: dict[str, _Line]) -> dict[str, _Line]:
        """Who of a level's tenants is served: only those within their share while one of them awaits first audio."""
        if not self._limits.hurries or len(lines) == 1 or self._num_hurried >= MAX_HURRIED_STEPS:
            return lines
        places_per_weight = self._limits.max_batch / sum(line.weight for line in lines.values())
        within = {tenant: line for tenant, line in lines.items() if line.num_places <= line.weight * places_per_weight}
        return within if any(line.awaits_first_audio for line in within.values()) else lines

    def _planned(self, picked: list[_Place]) -> Batch:
        others = [place for place in picked if place.sequence.num_planned >= place.plain_until]
        if not others:
            return Batch(tuple(map(_plain, picked)), is_plain=True)
        self._plan(others, spare=self._limits.max_step_positions - sum(map(_num_branches, picked)))
        entries = [place.plain if place.sequence.num_planned < place.plain_until else place.entry for place in picked]
        return Batch(tuple([entry for entry in entries if entry is not None]))

    def _plan(self, places: list[_Place], *, spare: int) -> None:
        """Set the entries of those who need a look: blocks for the positions, which prefill has many of."""
        is_first = True  # nobody's prompt was taken on yet
        for place in places:
            sequence = place.sequence
            if not (place.is_running and sequence.can_step):
                place.entry = None
                continue
            num_pending = sequence.num_pending
            count = 1 + min(num_pending - 1, max(0, spare) // place.num_branches)
            if self._limits.scan_block > 1:
                count = self._whole_blocks(sequence, count, is_first=is_first)
                is_first = is_first and num_pending == 1
                if not count:
                    place.entry = None
                    continue
            spare -= (count - 1) * place.num_branches
            if not self._hold(place, sequence.num_cached + count):
                continue
            is_decoding = num_pending == 1
            place.entry = place.decode if is_decoding else Entry(sequence, count, draws=count == num_pending)
            # Before its first step its length may not be known.
            if is_decoding and sequence.num_cached and sequence.num_planned >= len(sequence.forced):
                num_held = len(sequence.block_tables[0]) * self._limits.block_size - sequence.prompt.prefix_len
                place.plain_until = min(num_held + 1, sequence.last_row + min(0, sequence.rule.num_drain_rows - 1))

    def _whole_blocks(self, sequence: Sequence, count: int, *, is_first: bool) -> int:
        """Of `count` positions as many as do not end between those of a scan's block; at least one block for the first
        in a step, so that every prompt comes to its end."""
        scan_block = self._limits.scan_block
        end = sequence.num_cached + count
        if end >= sequence.num_blocked(scan_block):
            return count
        return max(count - end % scan_block, scan_block if is_first else 0)

    # Blocks.

    def _admit(self, place: _Place) -> bool:
        """Let a waiting sequence run, if there are blocks for it or somebody who gives them up."""
        sequence, line = place.sequence, place.line
        assert line is not None
        if not self._has_room(sequence, without=[]):
            givers = self._givers(place, line)
            if not self._has_room(sequence, without=[giver.sequence for giver in givers]):
                return False
            while not self._has_room(sequence, without=[]):
                self._preempt(givers.pop())
        self._give_blocks(sequence)
        line.remove(place)
        place.is_running = True
        line.insert(place)
        self._num_running += 1
        self._num_branches += place.num_branches
        if sequence.playback.paced:
            self._served[id(sequence.playback)] = place.listener
        return True

    def _givers(self, newcomer: _Place, line: _Line) -> list[_Place]:
        """Who would give up its blocks to a newcomer, the first to do so last.

        On later levels whatever is not playing, or far ahead. On its own, what is not playing of tenants that would
        still hold as much for their weights as the newcomer's would: so that none can take them back.
        """
        givers: list[_Place] = []
        held = (line.num_blocks() + self._num_blocks_for(newcomer.sequence)) / newcomer.weight
        for other in self._levels[line.level].values():
            if other is line or not other.running:
                continue
            other_weight = other.running[0].weight
            other_held = other.num_blocks()
            for place in reversed([place for place in other.running if place.rank[0] != _PLAYING]):
                other_held -= _num_blocks(place)
                if other_held / other_weight < held:
                    break
                givers.insert(0, place)
        for lines in self._levels[line.level + 1 :]:
            later = [place for other in lines.values() for place in other.running]
            if lines is not self._levels[_YIELDING]:
                later = [place for place in later if place.rank[0] != _PLAYING]
            givers += sorted(later, key=_rank)
        return givers

    def _has_room(self, sequence: Sequence, *, without: list[Sequence]) -> bool:
        """Whether all its known positions would fit now, were those `without` gone."""
        cross_needed = blocks_for(sequence.prompt.cross_len, self._limits.block_size)
        num_free = self._pool.num_free + sum(len(table) for other in without for table in other.block_tables)
        num_cross_free = self._cross_pool.num_free + sum(len(other.cross_blocks) for other in without)
        return self._num_blocks_for(sequence) <= num_free and cross_needed <= num_cross_free

    def _num_blocks_for(self, sequence: Sequence) -> int:
        return blocks_for(sequence.num_positions, self._limits.block_size) * sequence.num_branches

    def _give_blocks(self, sequence: Sequence) -> None:
        """Blocks for all its known positions, so that the next to be admitted sees what is left."""
        block_size = self._limits.block_size
        cross = self._cross_pool.allocate(blocks_for(sequence.prompt.cross_len, block_size), after=None)
        sequence.cross_blocks = cross or []
        sequence.block_tables = [[] for _ in range(sequence.num_branches)]
        sequence.is_admitted = True
        self._grow(sequence, sequence.num_positions)

    def _hold(self, place: _Place, num_positions: int) -> bool:
        """Make every branch's table long enough, preempting until it is. False if the sequence itself had to go."""
        while not self._grow(place.sequence, num_positions):
            victim = self._victim(place)
            self._preempt(victim)
            if victim is place:
                return False
        return True

    def _grow(self, sequence: Sequence, num_positions: int) -> bool:
        needed = blocks_for(num_positions, self._limits.block_size)
        for table in sequence.block_tables:
            if len(table) >= needed:
                continue
            blocks = self._pool.allocate(needed - len(table), after=table[-1] if table else None)
            if blocks is None:
                return False
            table += blocks
        return True

    def _victim(self, needy: _Place) -> _Place:
        """Who loses its blocks so that a running sequence goes on: of the last level with anybody in it, the last.

        Where tenants share its level, the one that holds most for its weight loses, and unless it is its own need, what
        it is not playing yet; but none loses its only running sequence while another has two.
        """
        assert needy.line is not None
        levels = reversed(self._levels[needy.line.level :])
        by_level = ([line for line in lines.values() if line.running] for lines in levels)
        running = next(lines for lines in by_level if lines)  # there is one: the needy one runs
        many = [line for line in running if len(line.running) > 1]
        if len(running) == 1 or not many:
            return max((line.running[-1] for line in running), key=_rank)
        greediest = max(many, key=lambda line: line.num_blocks() / line.running[0].weight)
        num_silent = _split(greediest.running, _PLAYING)
        if greediest is needy.line or not num_silent:
            return greediest.running[-1]
        return greediest.running[num_silent - 1]

    def _preempt(self, place: _Place) -> None:
        """Back to the queue without blocks: its positions will be computed again."""
        sequence, line = place.sequence, place.line
        assert line is not None
        line.remove(place)
        self._release(place)
        line.insert(place)
        place.entry, place.plain_until = None, 0
        self._preempted.add(sequence.sequence_id)
        sequence.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, place: _Place) -> None:
        sequence = place.sequence
        for table in sequence.block_tables:
            self._pool.free(table)
        self._cross_pool.free(sequence.cross_blocks)
        sequence.block_tables, sequence.cross_blocks = [], []
        sequence.num_cached = 0
        sequence.is_admitted = place.is_running = False
        self._num_running -= 1
        self._num_branches -= place.num_branches


def _num_blocks(place: _Place) -> int:
    return sum(len(table) for table in place.sequence.block_tables)
