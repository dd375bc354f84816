"""Live text: one client's utterances, spoken clause by clause while their text still arrives.

Owns the way from text to clauses to the engine and back, in order: the next clause is submitted while the one before
is still spoken, and neither text nor audio piles up when the client is slow. Knows no protocol: it emits events, and
`live.py` and `deepgram.py` say them in their clients' words.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from declaim.api.clauses import ClauseSplitter, Granularity
from declaim.api.errors import answer_for
from declaim.api.gate import Admission, Gate, Usage
from declaim.api.rendering import Part, Rendering, render
from declaim.api.schemas import SpeechBody
from declaim.api.serving import Serving
from declaim.api.speech import Lexicons, Voices, tempo_of, to_request, voice_name
from declaim.engine.errors import DeclaimError, EngineError, TooLong
from declaim.engine.joints import Joint
from declaim.engine.request import EncodedVoice, FinishReason

logger = logging.getLogger(__name__)

_SPEAKER_TAG = re.compile(r"\[S\d\]")

# The clause that is heard, and the one that will be.
_CLAUSES_AT_ONCE = 2
# Of one clause; beyond them the audio waits in the engine, which makes no more than the clause.
_MAX_PARTS_HELD = 8
_MAX_UTTERANCES = 64


@dataclass(frozen=True, slots=True)
class LiveServices:
    """What a session needs of the server. workers: threads that encode."""

    serving: Serving
    gate: Gate
    voices: Voices
    lexicons: Lexicons
    workers: Executor


@dataclass(frozen=True, slots=True)
class LiveConfig:
    """How utterances are spoken. body: every field but input; reference: a voice that came with it."""

    body: SpeechBody
    response_format: str
    granularity: Granularity
    reference: EncodedVoice | None = None


@dataclass(frozen=True, slots=True)
class ClauseBegun:
    """The audio of a clause follows."""

    utterance: Utterance
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ClauseAudio:
    """A part of a clause's audio; its words are timed from the clause's begin."""

    utterance: Utterance
    index: int
    part: Part


@dataclass(frozen=True, slots=True)
class ClauseDone:
    """A clause's audio is whole, or broke off with an error."""

    utterance: Utterance
    index: int
    audio_s: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class UtteranceFailed:
    """The rest of an utterance will not be spoken."""

    utterance: Utterance
    error: DeclaimError


@dataclass(frozen=True, slots=True)
class UtteranceDone:
    """All of an utterance was spoken, or it failed and its text has ended."""

    utterance: Utterance


LiveEvent = ClauseBegun | ClauseAudio | ClauseDone | UtteranceFailed | UtteranceDone
Emit = Callable[[LiveEvent], Awaitable[None]]


@dataclass(slots=True, eq=False)
class Utterance:
    """Text from its first piece to its flush, and what became of it."""

    index: int
    config: LiveConfig
    label: str | None  # the client's own name of it
    splitter: ClauseSplitter
    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    # as text comes in
    clauses: deque[str] = field(default_factory=deque)
    is_whole: bool = False
    num_chars: int = 0
    num_charged: int = 0  # of them, to the caller; a clause is charged before it is spoken
    first_clause_at: float = 0.0  # time.perf_counter()
    # as it is spoken
    speaker_tag: str = ""  # the last one of a dialogue, for the clause after it
    num_started: int = 0
    num_heard: int = 0
    num_frames: int = 0
    generated_s: float = 0.0
    delivered_s: float = 0.0
    ttfa_s: float | None = None
    failure: DeclaimError | None = None

    @property
    def num_waiting_chars(self) -> int:
        """What the engine has not seen yet."""
        return sum(map(len, self.clauses)) + self.splitter.num_held_chars


class LiveSession:
    """One client's utterances, one after another. Used by one event loop; `emit` may wait for a slow client."""

    def __init__(
        self, services: LiveServices, *, credential: str | None, emit: Emit, max_waiting_chars: int = 20_000
    ) -> None:
        """credential: looked up again at every utterance, so that a revoked key ends here too."""
        self._services = services
        self._credential = credential
        self._emit = emit
        self._max_waiting_chars = max_waiting_chars
        self._utterances: deque[Utterance] = deque()  # the first is being spoken, the last may be open
        self._num_begun = 0
        self._changed = asyncio.Event()
        self._speaker: asyncio.Task[None] | None = None
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with what ended the speaking for good: a client that is gone or too slow, or a bug."""

    @property
    def is_open(self) -> bool:
        """Whether an utterance waits for the rest of its text."""
        return bool(self._utterances) and not self._utterances[-1].is_whole

    @property
    def is_busy(self) -> bool:
        """Whether anything is being spoken, or could be without more text."""
        return any(
            each.is_whole or each.clauses or (each.failure is None and each.num_heard < each.num_started)
            for each in self._utterances
        )

    @property
    def next_index(self) -> int:
        """The index of the utterance that is open, else of the next one."""
        return self._utterances[-1].index if self.is_open else self._num_begun

    def add_text(self, text: str, config: LiveConfig, *, label: str | None = None) -> None:
        """Take the next piece of text. It opens an utterance, of this config, unless one is open.

        Raises: TooLong where more waits than is sensible; the piece is dropped.
        """
        waiting = sum(each.num_waiting_chars for each in self._utterances)
        if waiting + len(text) > self._max_waiting_chars:
            raise TooLong(
                f"{waiting} characters wait to be spoken and this text has {len(text)}: at most "
                f"{self._max_waiting_chars} may wait; send it later",
                param="text",
            )
        if text:
            utterance = self._open(config, label)
            utterance.num_chars += len(text)
            self._take(utterance, utterance.splitter.feed(text))

    def end_utterance(self, config: LiveConfig, *, label: str | None = None) -> None:
        """No more text comes for the open utterance; if none is open, an empty one begins and ends.

        Raises: TooLong where too many utterances wait.
        """
        utterance = self._open(config, label)
        utterance.is_whole = True
        self._take(utterance, utterance.splitter.flush())

    async def cancel(self) -> tuple[Utterance | None, int]:
        """Stop: no audio follows, nothing waits, and the engine's place is free at its next step.

        Returns the utterance that was being spoken, and how many others were dropped.
        """
        await self._stop()
        dropped = list(self._utterances)
        self._utterances.clear()
        return (dropped[0] if dropped else None), max(0, len(dropped) - 1)

    async def finish(self) -> None:
        """Wait until all is spoken. Call it with no utterance open."""
        if self._speaker is not None:
            await asyncio.wait({self._speaker})

    async def close(self) -> None:
        """Stop for good; idempotent."""
        await self._stop()
        self._utterances.clear()
        if not self.broken.cancel() and not self.broken.cancelled():
            self.broken.exception()  # seen: where the client is gone, nobody else will look

    def _open(self, config: LiveConfig, label: str | None) -> Utterance:
        if not self.is_open:
            if len(self._utterances) >= _MAX_UTTERANCES:
                raise TooLong(f"{_MAX_UTTERANCES} utterances wait to be spoken, the most: send it later", param="text")
            self._utterances.append(Utterance(self._num_begun, config, label, ClauseSplitter(config.granularity)))
            self._num_begun += 1
        return self._utterances[-1]

    def _take(self, utterance: Utterance, clauses: list[str]) -> None:
        if clauses and not utterance.first_clause_at:
            utterance.first_clause_at = time.perf_counter()
        if utterance.failure is None:
            utterance.clauses += clauses
        self._changed.set()
        if self._speaker is None or self._speaker.done():
            self._speaker = asyncio.create_task(self._speak_all())
            self._speaker.add_done_callback(self._note_end)

    def _note_end(self, speaker: asyncio.Task[None]) -> None:
        if not speaker.cancelled() and not self.broken.done():
            failure = speaker.exception()
            if failure is not None:
                self.broken.set_exception(failure)

    async def _stop(self) -> None:
        speaker, self._speaker = self._speaker, None
        if speaker is not None:
            speaker.cancel()
            await asyncio.wait({speaker})

    # The speaker: one task while there is something to say.

    async def _speak_all(self) -> None:
        while self._utterances:
            await self._speak(self._utterances[0])
            self._utterances.popleft()

    async def _speak(self, utterance: Utterance) -> None:
        try:
            if await self._has_clause(utterance):
                await self._speak_admitted(utterance)
        except DeclaimError as error:
            utterance.failure = error
            utterance.clauses.clear()
            await self._emit(UtteranceFailed(utterance, error))
            while not utterance.is_whole:
                await self._change()
        await self._emit(UtteranceDone(utterance))

    async def _has_clause(self, utterance: Utterance) -> bool:
        """Wait for the next clause; False once none can come."""
        while not utterance.clauses:
            if utterance.is_whole:
                return False
            await self._change()
        return True

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _speak_admitted(self, utterance: Utterance) -> None:
        services, config = self._services, utterance.config
        engine = services.serving.engine_for_accepted()
        caller = await services.gate.authenticate(self._credential)
        voice: EncodedVoice | str | None = config.reference
        if voice is None:
            voice = await services.voices.resolve(caller.tenant, voice_name(config.body))
        lexicon = await services.lexicons.entries(caller.tenant)
        num_chars = utterance.num_chars
        admission = await services.gate.admit(
            caller,
            request_id=utterance.request_id,
            chars=num_chars,
            service_tier=config.body.service_tier,
        )
        utterance.num_charged = num_chars
        how = Rendering(
            config.response_format, sample_rate_hz=config.body.sample_rate, tempo=tempo_of(config.body, engine.spec)
        )

        def start(text: str, index: int) -> AsyncGenerator[Part, None]:
            request = to_request(
                config.body.model_copy(update={"input": text}),
                engine=engine,
                caller=caller,
                tier=admission.tier,
                voice=voice,
                lexicon=lexicon,
                request_id=f"{utterance.request_id}_{index}",
            )
            # Who has heard the beginning hears the rest.
            request = replace(request, continues=index > 0)
            # More may follow, so every clause ends as if another came after it.
            joint = Joint(engine.spec.codec.sample_rate_hz, is_first=index == 0, is_last=False)
            return render(engine, request, how, services.workers, joint=joint)

        status, outcome = 499, "client_gone"
        try:
            await self._deliver(utterance, admission, start)
            status, outcome = 200, "complete"
        except DeclaimError as error:
            status, outcome = answer_for(error).status, "cut"
            raise
        finally:
            self._account(utterance, admission, model=engine.model_name, status=status, outcome=outcome)

    async def _deliver(
        self, utterance: Utterance, admission: Admission, start: Callable[[str, int], AsyncGenerator[Part, None]]
    ) -> None:
        """Speak an utterance's clauses in order, at most `_CLAUSES_AT_ONCE` of them in the engine."""
        begun: asyncio.Queue[_ClauseStream | None] = asyncio.Queue()
        room = asyncio.Semaphore(_CLAUSES_AT_ONCE)

        async def begin_clauses() -> None:
            while await self._has_clause(utterance):
                await room.acquire()
                await _charge(utterance, admission)
                text = _tagged(utterance, utterance.clauses.popleft())
                index, utterance.num_started = utterance.num_started, utterance.num_started + 1
                begun.put_nowait(_ClauseStream(text, index, start(text, index), utterance))

        beginner = asyncio.create_task(begin_clauses())
        beginner.add_done_callback(lambda _: begun.put_nowait(None))
        clause: _ClauseStream | None = None
        try:
            while (clause := await begun.get()) is not None:
                await self._hear(utterance, clause)
                room.release()
            beginner.result()
        finally:
            beginner.cancel()
            await asyncio.wait({beginner})
            left = [clause, *(begun.get_nowait() for _ in range(begun.qsize()))]
            await asyncio.gather(*(each.close() for each in left if each is not None))

    async def _hear(self, utterance: Utterance, clause: _ClauseStream) -> None:
        audio_s = 0.0
        reason: FinishReason = "error"
        is_begun = False
        try:
            while (part := await clause.next()) is not None:
                if not is_begun:
                    await self._emit(ClauseBegun(utterance, clause.index, clause.text))
                    is_begun = True
                await self._emit(ClauseAudio(utterance, clause.index, part))
                if utterance.ttfa_s is None and part.data:
                    utterance.ttfa_s = time.perf_counter() - utterance.first_clause_at
                utterance.delivered_s += part.audio_s
                audio_s += part.audio_s
                reason = part.finish_reason or reason
        except DeclaimError:
            if is_begun:
                await self._emit(ClauseDone(utterance, clause.index, audio_s, "error"))
            raise
        if not is_begun:
            raise EngineError("the engine ended a clause without audio")
        await self._emit(ClauseDone(utterance, clause.index, audio_s, reason))
        utterance.num_heard += 1

    def _account(self, utterance: Utterance, admission: Admission, *, model: str, status: int, outcome: str) -> None:
        config = utterance.config
        usage = Usage(
            model=model,
            voice="ref_audio" if config.reference is not None else voice_name(config.body) or "default",
            response_format=config.response_format,
            chars=utterance.num_charged,
            frames=utterance.num_frames,
            generated_s=utterance.generated_s,
            delivered_s=utterance.delivered_s,
            ttfa_s=utterance.ttfa_s,
            status=status,
            outcome=outcome,
        )
        admission.close(usage)
        ttfa = "" if usage.ttfa_s is None else f" ttfa_ms={usage.ttfa_s * 1000:.0f}"
        logger.info(
            "event=utterance request_id=%s status=%d outcome=%s chars=%d clauses=%d audio_s=%.2f%s",
            utterance.request_id,
            status,
            outcome,
            usage.chars,
            utterance.num_started,
            usage.delivered_s,
            ttfa,
        )


async def _charge(utterance: Utterance, admission: Admission) -> None:
    """Charge the text that came since the last clause began. Raises: RateLimited, QuotaExceeded."""
    before, utterance.num_charged = utterance.num_charged, max(utterance.num_charged, utterance.num_chars)
    if utterance.num_charged == before:
        return
    # Counted first: a charge that is under way when the caller hangs up is not taken back.
    try:
        await admission.charge(utterance.num_charged - before)
    except DeclaimError:
        utterance.num_charged = before
        raise


def _tagged(utterance: Utterance, clause: str) -> str:
    """A clause with its speaker's tag: in a dialogue, the model must be told again who goes on."""
    tags = _SPEAKER_TAG.findall(clause)
    tag = "" if clause.startswith("[S") else utterance.speaker_tag
    utterance.speaker_tag = tags[-1] if tags else utterance.speaker_tag
    return f"{tag} {clause}" if tag else clause


class _ClauseStream:
    """The parts of one clause, made ahead of the listener by no more than `_MAX_PARTS_HELD`."""

    def __init__(self, text: str, index: int, parts: AsyncGenerator[Part, None], utterance: Utterance) -> None:
        self.text = text
        self.index = index
        self._held: deque[Part] = deque()
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._pump(parts, utterance))
        self._task.add_done_callback(lambda _: self._changed.set())

    async def next(self) -> Part | None:
        """The next part, None after the last. Raises: what the engine raises."""
        while not self._held:
            if self._task.done():
                self._task.result()
                return None
            await self._change()
        self._changed.set()
        return self._held.popleft()

    async def close(self) -> None:
        """End the engine's work, finished or not; idempotent."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # seen: where the client is gone, nobody else will look

    async def _pump(self, parts: AsyncGenerator[Part, None], utterance: Utterance) -> None:
        async with aclosing(parts):
            async for part in parts:
                utterance.num_frames += part.num_frames
                utterance.generated_s += part.generated_s
                self._held.append(part)
                self._changed.set()
                while len(self._held) >= _MAX_PARTS_HELD:
                    await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
