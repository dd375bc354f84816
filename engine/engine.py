"""The engine: one thread that schedules, runs, commits and delivers; and the doors through which callers reach it.

The only file that knows both the thread and the event loop. Callers put sequences into an inbox and take events from
a sink; everything between belongs to the engine thread. Whatever ends, ends with an event: audio, or an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import queue
import secrets
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Generator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from declaim.engine.batch import Batch
from declaim.engine.blocks import BlockPool
from declaim.engine.capacity import Capacity
from declaim.engine.chunks import ChunkPolicy
from declaim.engine.codec.base import Codec, CodecRecipe
from declaim.engine.codec.load import load_codec
from declaim.engine.config import EngineConfig
from declaim.engine.controls import resolve_controls
from declaim.engine.errors import (
    Cancelled,
    DeclaimError,
    EngineClosed,
    EngineError,
    InvalidRequest,
    Overloaded,
    SequenceFailed,
    VocoderLost,
    VoiceNotFound,
)
from declaim.engine.graphs import GraphRunner
from declaim.engine.guard import Guard, with_another_seed
from declaim.engine.integrity import QUANTIZATION_NAME
from declaim.engine.integrity import fingerprint as fingerprint_of
from declaim.engine.lexicon import Lexicon
from declaim.engine.loader import EMBEDDED_NAME, ModelFiles, check_speaker, find_model, load_model
from declaim.engine.memory import (
    GB,
    WINDOW_BATCHES,
    DevicePlan,
    Load,
    MemoryPlan,
    available_bytes,
    plan_device,
    plan_memory,
    probe_device,
)
from declaim.engine.models.base import PromptSettings, SpeechModel
from declaim.engine.parts import describe_model
from declaim.engine.progress import Progress, ignore_progress
from declaim.engine.request import (
    AudioChunk,
    EncodedVoice,
    FinishReason,
    ResolvedSampling,
    SpeechRequest,
    SpeechResult,
    Voice,
)
from declaim.engine.runner import LaunchedStep, Runner
from declaim.engine.safetensors_io import read_json
from declaim.engine.scheduler import Scheduler, SchedulerLimits
from declaim.engine.sequence import Playback, Prompt, Sequence, SequenceInput
from declaim.engine.speaker import SpeakerEncoder
from declaim.engine.spec import ModelSpec
from declaim.engine.stats import EngineStats
from declaim.engine.stream import Event, Finished, RequestStream, Sink
from declaim.engine.text import TextOptions
from declaim.engine.vocoder.base import Vocoder, Wake, WorkerPool
from declaim.engine.vocoder.inline import InlineVocoder
from declaim.engine.words import Segment
from declaim.kernels import backend
from declaim.kernels.linear import compile_ahead
from declaim.kernels.threads import one_thread

log = logging.getLogger(__name__)

MAX_CACHED_VOICES = 64
WARM_UP_TEXT = "This is a short test."
PLACES_PER_FREE_PLACE = 3.0  # what a tenant of weight 1 may hold while so much is free
MAX_HELD_S = 2.0  # for a place that was likely to be free sooner
SEED_STRIDE = 0x9E3779B97F4A7C15

VocoderFactory = Callable[[Wake], Vocoder]


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    """A checked request on its way into the engine thread."""

    request: SpeechRequest
    request_id: str
    prompts: tuple[Prompt, ...]
    samplings: tuple[ResolvedSampling, ...]
    guards: tuple[Guard | None, ...]
    ends_paragraph: tuple[bool, ...]
    paced: bool
    max_frames: int | None
    sink: Sink
    made_at: float  # on the monotonic clock


class Engine:
    """Serves one model. Thread-safe: any number of threads and event loops may call it at once."""

    def __init__(
        self,
        model: SpeechModel,
        config: EngineConfig,
        *,
        make_vocoder: VocoderFactory,
        model_name: str,
        load_encoder: Callable[[], Codec] | None = None,
        load_speaker: Callable[[], SpeakerEncoder] | None = None,
        plan: DevicePlan | None = None,
        fingerprint: str = "",
        progress: Progress = ignore_progress,
    ) -> None:
        """Allocate memory as planned, and start the thread. `config` is resolved.

        load_encoder: loads the codec with what encodes reference audio; None if the family clones no voices.
        load_speaker: loads what makes an embedding of reference audio; None if the family has none, or it is not here.
        fingerprint: of the model's files (`integrity.fingerprint`); "" where it was made without any.
        plan: made before the model was loaded; None plans for the loaded model alone.
        progress: hears of the graphs that are captured.
        Raises: OutOfMemory, and whatever `make_vocoder` raises.
        """
        self.spec: ModelSpec = dataclasses.replace(model.spec, embeds_voices=load_speaker is not None)
        self.model_name = model_name
        self.fingerprint = fingerprint
        self.config = config
        self.device_plan = plan
        self.plan: MemoryPlan = _plan_cache(model, config, plan)
        self._model = model
        self._load_encoder = load_encoder
        self._encoder: Codec | None = None
        self._load_speaker = load_speaker
        self._speaker: SpeakerEncoder | None = None
        self._encoder_lock = threading.Lock()
        self._voices: dict[str, EncodedVoice] = {}
        self._encoded: OrderedDict[bytes, EncodedVoice] = OrderedDict()
        self._policy = ChunkPolicy.from_seconds(
            model.spec.codec, first_s=config.first_chunk_s, max_s=config.max_chunk_s
        )

        # shared with callers, under the lock
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._inbox: deque[_Ticket | str] = deque()  # a request, or the id of one to cancel
        self._held: deque[_Ticket] = deque()  # requests that wait until somebody who listens has left
        self._num_open = 0  # sequences accepted and not yet finished
        self._num_open_of: Counter[str] = Counter()  # by tenant
        self._open_ids: set[str] = set()
        self._listened_ids: set[str] = set()  # those of them that somebody hears as they are made, and not at leisure
        self._is_closing = False
        self._awake = threading.Event()

        # the engine thread's own
        self._scheduler = Scheduler(
            self.spec.rule,
            BlockPool(self.plan.num_blocks),
            BlockPool(self.plan.num_cross_blocks),
            limits=SchedulerLimits(
                block_size=config.block_size,
                max_batch=config.max_batch,
                max_step_positions=config.max_step_positions,
                max_lead_s=config.max_lead_s,
                hurries=model.device.type == "cpu",
                scan_block=1 if self.spec.cache.state is None else self.spec.cache.state.scan_block,
            ),
        )
        self._capacity = Capacity(frame_s=1 / model.spec.codec.frame_rate_hz, max_batch=config.max_batch)
        self._runner = _make_runner(model, config, self.plan, progress)
        self._streams: dict[str, RequestStream] = {}
        self._owners: dict[int, RequestStream] = {}  # by sequence id
        self._next_sequence_id = 0
        self._in_flight: list[LaunchedStep] = []  # launched, and not committed yet
        self._num_steps = 0
        self._num_frames = 0
        self._num_retries = 0
        self._num_underruns = 0

        self._vocoder = make_vocoder(self._awake.set)
        self._thread = threading.Thread(target=self._loop, name="declaim-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EMBEDDED_NAME,
        config: EngineConfig | None = None,
        progress: Progress = ignore_progress,
    ) -> Engine:
        """Load a model folder, a hub id, or the embedded voice ("lark"); `progress` hears how far it is.

        Memory is planned first: what cannot fit is refused before a weight is read.

        Raises: ModelNotFound, ModelLoadError, InvalidConfig, OutOfMemory, EngineError (Ray unreachable).
        """
        files = find_model(str(model), progress)
        check_speaker(files)
        # Before they are read: what is written over them meanwhile must not pass for what was loaded.
        fingerprint = fingerprint_of(files.folder, files.codec_folder)
        plan, resolved = _plan_device(files, config or EngineConfig())
        loaded, codec, recipe = load_model(files, resolved, progress, is_text_offloaded=plan.is_text_offloaded)
        encoder_device = "cpu" if plan.is_reference_offloaded else recipe.device
        speaker_folder = files.speaker_folder
        speaker_device = torch.device("cpu" if plan.is_speaker_offloaded else recipe.device)
        encoder_recipe = dataclasses.replace(recipe, dtype="float32", device=encoder_device)
        return cls(
            loaded,
            resolved,
            make_vocoder=lambda wake: _make_vocoder(resolved, codec, recipe, wake=wake, plan=plan),
            model_name=files.name,
            fingerprint=fingerprint,
            plan=plan,
            progress=progress,
            load_speaker=(
                None if speaker_folder is None else lambda: SpeakerEncoder.load(speaker_folder, device=speaker_device)
            ),
            load_encoder=(
                (lambda: load_codec(encoder_recipe, with_encoder=True)) if loaded.spec.supports_voice_prompt else None
            ),
        )

    # What callers see.

    def generate(self, requests: Items[SpeechRequest], *, progress: bool | None = None) -> list[SpeechResult]:
        """Speak a list of requests and wait for all; results in the order of the requests.

        However long the list, no more than the engine takes are in it at once. progress: a bar on stderr; None shows
        one on a terminal. A request that fails in the engine has finish_reason "error"; its neighbours go on.
        Raises: RequestError, before anything is spoken, if any of the requests is at fault; EngineClosed.
        """
        from tqdm import tqdm

        sinks = [_QueueSink() for _ in requests]
        tickets = [self._check(*pair, paced=False) for pair in zip(requests, sinks, strict=True)]
        results: list[SpeechResult] = []
        is_shown = sys.stderr.isatty() if progress is None else progress
        submitter = threading.Thread(target=self._submit_all, args=(tickets,), daemon=True)
        submitter.start()
        try:
            for ticket, sink in zip(tqdm(tickets, unit="request", disable=not is_shown), sinks, strict=True):
                results.append(_collect(ticket.request_id, sink, sample_rate_hz=self.spec.codec.sample_rate_hz))
        finally:
            self._abandon(*sinks)
            submitter.join()
        return results

    def stream(self, request: SpeechRequest) -> Generator[AudioChunk]:
        """Speak a request, chunk by chunk as it is made. Closing the iterator cancels the request.

        Raises: RequestError or Overloaded at the first chunk; EngineError or Cancelled where the audio breaks off.
        """
        sink = _QueueSink()
        self._refuse_late(request)
        ticket = self._check(request, sink, paced=True)
        self._submit(ticket, wait=False)
        try:
            while True:
                event = sink.events.get()
                if isinstance(event, Finished):
                    _raise_unless_whole(ticket.request_id, event)
                    return
                yield event
        finally:
            self._abandon(sink)

    async def astream(self, request: SpeechRequest) -> AsyncGenerator[AudioChunk]:
        """`stream` for an event loop: checking and voice encoding happen in a thread, chunks come without blocking.

        Raises: as `stream`.
        """
        sink = _LoopSink(asyncio.get_running_loop())
        request_id = request.request_id or _new_request_id()
        request = dataclasses.replace(request, request_id=request_id)
        self._refuse_late(request)
        try:
            await asyncio.to_thread(lambda: self._submit(self._check(request, sink, paced=True), wait=False))
            while True:
                event = await sink.events.get()
                if isinstance(event, Finished):
                    _raise_unless_whole(request_id, event)
                    return
                yield event
        finally:
            self._abandon(sink)

    def cancel(self, request_id: str) -> None:
        """End a request; its stream raises Cancelled. No effect if it has ended or never was."""
        with self._lock:
            if request_id not in self._open_ids:
                return
            self._inbox.append(request_id)
        self._awake.set()

    def add_voice(self, name: str, voice: Voice) -> None:
        """Check and encode a voice, and keep it under a name for `SpeechRequest.voice`.

        Raises: InvalidRequest.
        """
        self._voices[name] = self.encode_voice(voice)

    def warm_up(self) -> None:
        """Send one real request through engine and vocoder. Raises: EngineError if it does not come back as audio."""
        (result,) = self.generate([SpeechRequest(text=WARM_UP_TEXT)], progress=False)
        if result.error is not None:
            raise EngineError(f"the warm-up request failed: {result.error}") from result.error

    def stats(self) -> EngineStats:
        """A snapshot, for metrics and tests."""
        pool = self._vocoder if isinstance(self._vocoder, WorkerPool) else None
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + len(self._inbox) + len(self._held),
            streams=len(self._streams),
            blocks_used=self._scheduler.num_blocks_used,
            blocks_total=self._scheduler.num_blocks,
            cache_bytes=self.plan.kv_bytes,
            vocoder_pending=self._vocoder.num_pending,
            steps=self._num_steps,
            frames=self._num_frames,
            preemptions=self._scheduler.num_preemptions,
            retries=self._num_retries,
            underruns=self._num_underruns,
            vocoder_workers=0 if pool is None else pool.num_workers,
            vocoder_restarts=0 if pool is None else pool.num_restarts,
            vocoder_failure=None if pool is None else pool.failure,
        )

    def close(self) -> None:
        """Stop: running requests end with EngineClosed, workers stop, the thread ends. Idempotent."""
        with self._lock:
            self._is_closing = True
            self._has_room.notify_all()
        self._awake.set()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # On the caller's thread: check, and hand over.

    def _check(self, request: SpeechRequest, sink: Sink, *, paced: bool) -> _Ticket:
        """Turn a request into prompts that are known to fit. Raises: RequestError."""
        sampling = request.sampling
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(62))
        resolved = sampling.resolve(self.spec.sampling.defaults)
        if resolved.guidance_scale != 1.0 and not self.spec.sampling.has_guidance:
            raise InvalidRequest(
                f"guidance_scale is {resolved.guidance_scale:g}: this model has no guidance; leave it out",
                param="guidance_scale",
            )
        resolve_controls(request.controls, self.spec.controls)  # refuses what the family does not take
        voice = self._voice_of(request)
        options = TextOptions(request.language, request.normalize, Lexicon.of(request.lexicon))
        segments = self._model.segments(request.text, options)
        guards = tuple(Guard.of(segment.text, self.spec, speed=request.speed) for segment in segments)
        ends_paragraph = tuple(segment.ends_paragraph for segment in segments)
        if not request.word_timestamps:
            segments = [Segment(segment.text) for segment in segments]
        settings = PromptSettings(
            resolved,
            voice,
            voice_name=self._own_voice(request.voice),
            speed=request.speed,
            language=request.language,
            controls=request.controls,
        )
        prompts = tuple(self._model.tokenize(segment, settings) for segment in segments)
        prompts = tuple(
            prompt if guard is None else guard.limit(prompt) for prompt, guard in zip(prompts, guards, strict=True)
        )
        ticket = _Ticket(
            request,
            request_id=request.request_id or _new_request_id(),
            prompts=prompts,
            samplings=tuple(
                dataclasses.replace(resolved, seed=(resolved.seed + i * SEED_STRIDE) % 2**63)
                for i in range(len(prompts))
            ),
            guards=guards,
            ends_paragraph=ends_paragraph,
            paced=paced,
            max_frames=(
                max(1, int(resolved.max_seconds * self.spec.codec.frame_rate_hz + 1e-6))
                if sampling.max_seconds is not None
                else None
            ),
            sink=sink,
            made_at=time.monotonic(),
        )
        for i in range(len(prompts)):
            self._scheduler.check_fits(self._sequence(ticket, i, sequence_id=0, playback=Playback(paced), now=0.0))
        return ticket

    def _submit(self, ticket: _Ticket, *, wait: bool) -> None:
        """Put a ticket into the inbox. wait: until there is room, rather than refuse.

        Raises: Overloaded, EngineClosed, InvalidRequest if a request of that id is running.
        """
        with self._lock:
            while wait and self._refusal(ticket) is not None and not self._is_closing:
                self._has_room.wait()
            if self._is_closing:
                raise EngineClosed("the engine is closed")
            if ticket.request_id in self._open_ids:
                raise InvalidRequest(
                    f"a request {ticket.request_id!r} is running: choose another id", param="request_id"
                )
            refusal = self._refusal(ticket)
            if refusal is not None:
                raise Overloaded(refusal)
            must_wait = ticket.paced and self._must_wait(ticket.request)
            self._num_open += len(ticket.prompts)
            self._num_open_of[ticket.request.tenant] += len(ticket.prompts)
            self._open_ids.add(ticket.request_id)
            if ticket.paced and ticket.request.tier != "flex":
                self._listened_ids.add(ticket.request_id)
            (self._held if must_wait else self._inbox).append(ticket)
        self._awake.set()

    def _refusal(self, ticket: _Ticket) -> str | None:
        """Why a ticket cannot be taken in now; None if it can. The lock is held.

        A tenant may hold no more than so many times what it leaves free: alone it fills three quarters, and the fuller
        the engine is the less anybody may hold, so whoever comes next finds a place. Source: Choudhury and Hahne,
        "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998.
        """
        limit, count = self.config.max_batch + self.config.max_waiting, len(ticket.prompts)
        tenant = ticket.request.tenant
        held, total = self._num_open_of[tenant], self._num_open + count
        if self._num_open and total > limit:
            return (
                f"{self._num_open} sequences are in the engine and this request brings {count};"
                f" the limit is {limit} (max_batch {self.config.max_batch} + max_waiting"
                f" {self.config.max_waiting}): try again in a second"
            )
        share = int(PLACES_PER_FREE_PLACE * ticket.request.weight * (limit - total))
        if not (tenant and held) or held + count <= share:
            return None
        return (
            f"tenant {tenant!r} has {held} sequences in the engine and this request brings {count}; as"
            f" full as it would be, a tenant may hold {share} of its {limit} places: try again when some have ended"
        )

    def _refuse_late(self, request: SpeechRequest) -> None:
        """Before a stream costs anything: the text side of those that are refused would slow down the others.

        Raises: Overloaded.
        """
        most = self._capacity.num_listeners
        with self._lock:
            self._capacity.record_arrival(is_full=most is not None and len(self._listened_ids) >= most)
            self._must_wait(request)

    def _must_wait(self, request: SpeechRequest) -> bool:
        """Whether one more stream would be served slower than it is heard, and those before it too. The lock is held.

        Flex may be late, and what goes on with speech that somebody hears is let in. So is a tenant that holds less
        than its part of what the engine bears: the scheduler sees to it that others who hold more wait for it.

        Raises: Overloaded if it would wait too long.
        """
        most, num_listened = self._capacity.num_listeners, len(self._listened_ids)
        may_be_late = self.config.shed == "full" or request.tier == "flex" or request.continues
        if may_be_late or most is None or num_listened < most:
            return False
        held = self._num_open_of[request.tenant]
        num_others = len(self._num_open_of) - (held > 0)
        if request.tenant and num_others and held < most * request.weight / (request.weight + num_others):
            return False
        if num_listened < most + self._capacity.num_waiters:
            return True
        raise Overloaded(
            f"{num_listened} streams are being spoken, and by its last steps this engine can speak {most} as"
            " fast as they are heard: try again in a second, or start the engine with shed='full' to queue instead"
        )

    def _submit_all(self, tickets: Items[_Ticket]) -> None:
        for ticket in tickets:
            if ticket.sink.is_abandoned:
                continue
            try:
                self._submit(ticket, wait=True)
            except DeclaimError as error:
                ticket.sink.deliver(Finished("error", self._no_codes(), error))

    def _abandon(self, *sinks: _QueueSink | _LoopSink) -> None:
        """Nobody reads these any more: what still runs for them ends with the current step."""
        for sink in sinks:
            sink.is_abandoned = True
        self._awake.set()

    def _voice_of(self, request: SpeechRequest) -> EncodedVoice:
        voice = request.voice
        if voice is None or voice in ("default", self.model_name, *self.spec.voices):
            return EncodedVoice.none(self.spec.rule.num_codebooks)
        if isinstance(voice, EncodedVoice):
            self._check_voice(voice)
            return voice
        if isinstance(voice, Voice):
            return self.encode_voice(voice)
        if voice not in self._voices:
            known = ", ".join(["default", *self.spec.voices, *sorted(self._voices)])
            raise VoiceNotFound(f"no voice {voice!r} here: the voices are {known}", param="voice")
        return self._voices[voice]

    def encode_voice(self, voice: Voice) -> EncodedVoice:
        """Encode reference audio, once for the same audio; callers of different voices wait for each other.

        Raises: InvalidRequest for audio that cannot be used, and where the model imitates no voices.
        """
        from declaim.engine.voices import encode_voice

        if self._load_encoder is None:
            raise InvalidRequest("this model has one voice and cannot imitate another: leave voice out", param="voice")
        audio = np.ascontiguousarray(voice.audio)
        digest = hashlib.sha256(audio.tobytes() + f"{audio.shape}{voice.sample_rate_hz}".encode())
        key = digest.digest() + voice.transcript.encode("utf-8", "replace")
        with self._encoder_lock:
            if key not in self._encoded:
                with one_thread():
                    if self._speaker is None and self._load_speaker is not None:
                        self._speaker = self._load_speaker()
                    embedding = None if self._speaker is None else self._speaker.encode(voice)
                    codes = self._no_codes()
                    # Where an embedding tells the voice, frames are gone on from only if their words are known.
                    if embedding is None or voice.transcript:
                        if self._encoder is None:
                            self._encoder = self._load_encoder()
                        codes = encode_voice(self._encoder, voice)
                self._encoded[key] = EncodedVoice(voice.transcript, codes, embedding)
                while len(self._encoded) > MAX_CACHED_VOICES:
                    self._encoded.popitem(last=False)
            self._encoded.move_to_end(key)
            return self._encoded[key]

    def _own_voice(self, voice: Voice | EncodedVoice | str | None) -> str | None:
        """The model's own voice of that name, if it has one."""
        return voice if isinstance(voice, str) and voice in self.spec.voices else None

    def _check_voice(self, voice: EncodedVoice) -> None:
        if self._load_encoder is None:
            raise InvalidRequest("this model has one voice and cannot imitate another: leave voice out", param="voice")
        num_codebooks, size = self.spec.codec.num_codebooks, self.spec.codec.codebook_size
        codes = voice.codes
        is_well_formed = codes.ndim == 2 and codes.shape[1] == num_codebooks
        if not is_well_formed or (codes.size and not 0 <= codes.min() <= codes.max() < size):
            raise InvalidRequest(
                f"the voice's codes have shape {list(codes.shape)}: this model takes [frames, {num_codebooks}] of codes"
                f" below {size}; encode the voice again with this model",
                param="voice",
            )

    def _no_codes(self) -> NDArray[np.int32]:
        return np.zeros((0, self.spec.rule.num_codebooks), dtype=np.int32)

    def _sequence(self, ticket: _Ticket, segment: int, *, sequence_id: int, playback: Playback, now: float) -> Sequence:
        return Sequence(
            given=SequenceInput(
                sequence_id=sequence_id,
                request_id=ticket.request_id,
                segment=segment,
                sampling=ticket.samplings[segment],
                prompt=ticket.prompts[segment],
                arrived_at=now,
                tenant=ticket.request.tenant,
                weight=ticket.request.weight,
                tier=ticket.request.tier,
            ),
            rule=self.spec.rule,
            playback=playback,
        )

    # On the engine thread.

    def _loop(self) -> None:
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        try:
            while not self._is_closing:
                if not (self._scheduler.num_running or self._scheduler.num_waiting or self._in_flight):
                    while not self._is_closing and compile_ahead():
                        pass
                    self._awake.wait()
                self._awake.clear()
                began = time.monotonic()
                self._receive()
                num_stepped = self._step()
                self._deliver()
                if num_stepped:
                    self._capacity.record(num_stepped, time.monotonic() - began)
        finally:
            with self._lock:
                self._is_closing = True
                self._has_room.notify_all()
            self._end_everything()
            self._vocoder.close()

    def _receive(self) -> None:
        """Take in new requests and cancellations."""
        while self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, _Ticket):
                self._open(message)
                continue
            for ticket in list(self._held):
                if ticket.request_id == message:
                    self._held.remove(ticket)
                    self._open(ticket)
            if message in self._streams:
                self._end(self._streams[message], "cancelled")

    def _open_held(self) -> None:
        """Let in who waits: in turn where places are free, whoever waited long enough, and who hung up, to be ended."""
        too_long_ago = time.monotonic() - MAX_HELD_S
        for ticket in list(self._held):
            most = self._capacity.num_listeners
            is_free = most is None or len(self._listened_ids) - len(self._held) < most
            if is_free or ticket.sink.is_abandoned or ticket.made_at < too_long_ago:
                self._held.remove(ticket)
                self._open(ticket)

    def _open(self, ticket: _Ticket) -> None:
        now = time.monotonic()
        playback = Playback(ticket.paced)
        sequences = []
        for segment in range(len(ticket.prompts)):
            sequences.append(
                self._sequence(ticket, segment, sequence_id=self._next_sequence_id, playback=playback, now=now)
            )
            self._next_sequence_id += 1
        stream = RequestStream(
            ticket.request_id,
            sequences,
            playback=playback,
            sink=ticket.sink,
            codec=self.spec.codec,
            policy=self._policy,
            max_frames=ticket.max_frames,
            guards=ticket.guards,
            ends_paragraph=ticket.ends_paragraph,
        )
        self._streams[ticket.request_id] = stream
        self._owners |= {sequence.sequence_id: stream for sequence in sequences}
        if ticket.sink.is_abandoned:
            self._end(stream, "cancelled")
            return
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _step(self) -> int:
        """Schedule and launch a step, then take in what the step before gave, which a GPU made in the meantime.

        Returns how many sequences the step has.
        """
        batch = self._scheduler.schedule(time.monotonic())
        launched = self._launch(batch) if batch.entries else []
        due, self._in_flight = self._in_flight, launched
        if not self._runner.is_asynchronous:
            due, self._in_flight = launched, []
        for step in due:
            self._commit(step)
        return len(batch.entries)

    def _launch(self, batch: Batch) -> list[LaunchedStep]:
        """Launch a step. If that fails, launch its sequences one by one, and end those that fail alone."""
        try:
            for entry in batch.entries:
                if not self._runner.has_begun(entry.sequence):
                    self._runner.begin(entry.sequence)
            step = self._runner.launch(batch)
        except Exception as error:  # the step loop's guard: the one place that may catch everything
            if len(batch.entries) == 1:
                self._fail(batch.entries[0].sequence, error)
                return []
            log.warning("event=step_failed sequences=%d error=%r: running them one by one", len(batch.entries), error)
            # A segment that fails ends its request, and with it segments of the same step.
            entries = (entry for entry in batch.entries if entry.sequence.sequence_id in self._owners)
            return [step for entry in entries for step in self._launch(Batch((entry,)))]
        self._scheduler.launch(batch)
        self._num_steps += 1
        return [step]

    def _commit(self, step: LaunchedStep) -> None:
        """Record what a step drew, end what failed in it, and send what is ready to the vocoder."""
        drawn, drawing = step.drawn(), step.batch.drawing
        for i in np.flatnonzero((drawn < 0).any(axis=1)).tolist():
            error = SequenceFailed("the model's logits were not finite, or nothing was left to draw")
            self._fail(drawing[i].sequence, error)
        done = self._scheduler.commit(step.batch, drawn)
        self._num_frames += len(drawn)
        for sequence in done:
            self._runner.release(sequence)
            if not self._retry(sequence):
                self._decode(sequence)
        for entry in drawing:
            sequence = entry.sequence
            if len(sequence.rows) >= sequence.num_rows_wanted:
                self._decode(sequence)

    def _decode(self, sequence: Sequence) -> None:
        """Send the windows of a sequence that are whole to the vocoder."""
        stream = self._owners.get(sequence.sequence_id)
        windows = stream.windows_ready(sequence) if stream is not None else []
        if windows:
            self._vocoder.submit(windows)

    def _retry(self, sequence: Sequence) -> bool:
        """Speak an unsound segment anew with another seed where that helps and nobody has heard it. Whether it does."""
        stream = self._owners.get(sequence.sequence_id)
        verdict = stream.verdict(sequence) if stream is not None else None
        given = sequence.given
        if stream is None or verdict is None or given.sampling.greedy or not stream.may_restart(given.segment):
            return False
        log.warning("event=retried request_id=%s segment=%d verdict=%s", given.request_id, given.segment, verdict)
        self._vocoder.cancel(sequence.sequence_id)
        del self._owners[sequence.sequence_id]
        given = dataclasses.replace(
            given, sequence_id=self._next_sequence_id, sampling=with_another_seed(given.sampling)
        )
        self._next_sequence_id += 1
        again = Sequence(given=given, rule=self.spec.rule, playback=sequence.playback)
        stream.restart(again)
        self._owners[again.sequence_id] = stream
        self._scheduler.add(again)
        self._num_retries += 1
        return True

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        stream = self._owners.get(sequence.sequence_id)
        if stream is None:
            return
        if not isinstance(error, DeclaimError):
            log.error("event=sequence_failed request_id=%s", stream.request_id, exc_info=error)
            wrapped = SequenceFailed(f"the sequence failed inside the engine: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        self._end(stream, "error", error=error)

    def _deliver(self) -> None:
        """Hand decoded windows to their streams, and what is in order to the callers."""
        for decoded in self._vocoder.poll():
            stream = self._owners.get(decoded.sequence_id)
            if stream is None:
                continue
            if decoded.samples is None:
                error = decoded.error or VocoderLost("the vocoder lost a window and gave no reason")
                self._end(stream, "error", error=error)
                continue
            stream.accept(decoded)
        now = time.monotonic()
        for stream in list(self._streams.values()):
            stream.deliver(now)
            if stream.finish_reason is not None:
                self._end(stream, stream.finish_reason)
            elif stream.sink.is_abandoned:
                self._end(stream, "cancelled")
        self._open_held()

    def _end(self, stream: RequestStream, reason: FinishReason, *, error: DeclaimError | None = None) -> None:
        """Take a request out, free all it holds, and tell its caller."""
        self._num_underruns += stream.num_underruns
        del self._streams[stream.request_id]
        for sequence in stream.sequences:
            del self._owners[sequence.sequence_id]
            self._scheduler.remove(sequence)
            self._runner.release(sequence)
            self._vocoder.cancel(sequence.sequence_id)
        with self._lock:
            self._num_open -= len(stream.sequences)
            tenant = stream.sequences[0].given.tenant
            self._num_open_of[tenant] -= len(stream.sequences)
            if not self._num_open_of[tenant]:
                del self._num_open_of[tenant]
            self._open_ids.discard(stream.request_id)
            if stream.request_id in self._listened_ids:
                self._listened_ids.remove(stream.request_id)
                self._capacity.record_listener(time.monotonic() - stream.sequences[0].given.arrived_at)
            self._has_room.notify_all()
        if not self._streams:
            self._scheduler.check_integrity()
        stream.sink.deliver(Finished(reason, stream.codes(), error))

    def _end_everything(self) -> None:
        error = EngineClosed("the engine was closed while the request ran")
        for stream in list(self._streams.values()):
            self._end(stream, "error", error=error)
        for message in (*self._held, *self._inbox):
            if isinstance(message, _Ticket):
                message.sink.deliver(Finished("error", self._no_codes(), error))
        self._held.clear()
        self._inbox.clear()


class _QueueSink:
    """Events for a thread that waits."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.is_abandoned = False

    def deliver(self, event: Event) -> None:
        self.events.put(event)


class _LoopSink:
    """Events for a coroutine. Its loop may be gone by the time an event comes: then nobody waits for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.is_abandoned = False
        self._loop = loop

    def deliver(self, event: Event) -> None:
        if self.is_abandoned:
            return
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.is_abandoned = True


def _new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def _collect(request_id: str, sink: _QueueSink, *, sample_rate_hz: int) -> SpeechResult:
    """Wait for a request's last event. Returns the whole."""
    pieces: list[NDArray[np.float32]] = []
    while True:
        event = sink.events.get()
        if isinstance(event, Finished):
            break
        pieces.append(event.audio)
    return SpeechResult(
        request_id=request_id,
        codes=event.codes,
        audio=np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32),
        sample_rate_hz=sample_rate_hz,
        finish_reason=event.finish_reason,
        error=event.error,
    )


def _raise_unless_whole(request_id: str, event: Finished) -> None:
    if event.error is not None:
        raise event.error
    if event.finish_reason == "cancelled":
        raise Cancelled(f"request {request_id} was cancelled")


def _plan_device(files: ModelFiles, config: EngineConfig) -> tuple[DevicePlan, EngineConfig]:
    """Plan from the configs alone, before a weight is read. Returns the settings with what was chosen."""
    resolved = config.resolve()
    parts = describe_model(
        read_json(files.folder / "config.json"), read_json(files.codec_folder / "config.json"), name=files.name
    )
    if files.speaker_folder is None:
        parts = dataclasses.replace(parts, speaker=None)
    load = Load(
        max_batch=config.max_batch,
        block_size=config.block_size,
        max_step_positions=config.max_step_positions,
        max_chunk_s=config.max_chunk_s,
    )
    is_quantized = (files.folder / QUANTIZATION_NAME).exists()
    plan = plan_device(
        parts,
        probe_device(resolved.torch_device, memory_gb=config.memory_gb),
        load=load,
        dtype="int4" if is_quantized else config.dtype,
        offload=config.offload,
    )
    log.info(
        "event=planned model=%s dtype=%s max_batch=%d streams=%d used_gb=%.3f budget_gb=%.3f offloaded=%s reason=%r",
        files.name,
        plan.precision,
        plan.max_batch,
        plan.num_streams,
        plan.used_bytes / GB,
        plan.memory.budget_bytes / GB,
        plan.is_text_offloaded,
        plan.reason,
    )
    # A folder of int4 weights says itself which of its layers are; activations are as "auto" has them.
    dtype = resolved.dtype if is_quantized else plan.precision
    return plan, dataclasses.replace(resolved, dtype=dtype, max_batch=plan.max_batch)


def _plan_cache(model: SpeechModel, config: EngineConfig, planned: DevicePlan | None) -> MemoryPlan:
    plan = _plan_loaded(model, config) if planned is None else planned.memory
    if config.num_blocks is None:
        return plan
    block_bytes = config.block_size * model.spec.cache.bytes_per_position(model.dtype.itemsize)
    kv_bytes = plan.kv_bytes + (config.num_blocks - plan.num_blocks) * block_bytes
    return dataclasses.replace(plan, num_blocks=config.num_blocks, kv_bytes=kv_bytes)


def _plan_loaded(model: SpeechModel, config: EngineConfig) -> MemoryPlan:
    budget = available_bytes(config.torch_device) if config.memory_gb is None else int(config.memory_gb * GB)
    return plan_memory(
        model.spec,
        element_bytes=model.dtype.itemsize,
        # Weights loaded already are not part of what is still free.
        weight_bytes=0 if config.memory_gb is None else model.weight_bytes,
        budget_bytes=budget,
        block_size=config.block_size,
        max_batch=config.max_batch,
    )


def _make_runner(
    model: SpeechModel, config: EngineConfig, plan: MemoryPlan, progress: Progress
) -> Runner | GraphRunner:
    """Allocates the caches, and captures the graphs where they are used."""
    runner = Runner(
        model,
        num_blocks=plan.num_blocks,
        num_cross_blocks=plan.num_cross_blocks,
        block_size=config.block_size,
        max_batch=config.max_batch,
    )
    if config.eager or not (model.device.type == "cuda" or backend.IS_INTERPRETED):
        return runner
    graphs = GraphRunner(model, runner, block_size=config.block_size, max_batch=config.max_batch)
    graphs.capture(progress)
    return graphs


def _make_vocoder(config: EngineConfig, codec: Codec, recipe: CodecRecipe, *, wake: Wake, plan: DevicePlan) -> Vocoder:
    if config.vocoder == "inline":
        # On the CPU each window is decoded alone, however many there are.
        count = plan.window_batch if plan.device.kind == "cuda" else max(WINDOW_BATCHES)
        return InlineVocoder(codec, wake=wake, max_windows_per_poll=count)
    from declaim.engine.vocoder.ray_pool import RayPoolOptions, RayVocoderPool

    fewest, most = config.vocoder_workers
    options = RayPoolOptions(
        min_workers=fewest,
        max_workers=most,
        cpus_per_worker=config.vocoder_cpus,
        gpus_per_worker=config.vocoder_gpus,
        address=config.ray_address,
    )
    return RayVocoderPool(recipe, options, wake=wake)
