"""pipecat's stock DeepgramTTSService against HOST:PORT, fed as an LLM feeds it. Prints what it heard as JSON.

Two turns on one socket: the first is interrupted at its first audio if `--interrupt` comes before the text.
"""

from __future__ import annotations

import asyncio
import json
import sys

from pipecat.frames.frames import (
    ErrorFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.deepgram.tts import DeepgramTTSService


class Ear(FrameProcessor):
    """Collects audio until the service says that it has stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = bytearray()
        self.rates: set[int] = set()
        self.errors: list[str] = []
        self.has_begun = asyncio.Event()
        self.is_over = asyncio.Event()

    async def process_frame(self, frame: object, direction: object) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self.audio += frame.audio
            self.rates.add(frame.sample_rate)
            self.has_begun.set()
        if isinstance(frame, ErrorFrame):
            self.errors.append(frame.error)
        if isinstance(frame, (TTSStoppedFrame, ErrorFrame)):
            self.is_over.set()
        await self.push_frame(frame, direction)


async def main(address: str, text: str, *, interrupts: bool) -> None:
    speaker = DeepgramTTSService(api_key="acme", base_url=f"ws://{address}", sample_rate=24_000)
    ear = Ear()
    task = PipelineTask(Pipeline([speaker, ear]), params=PipelineParams(audio_out_sample_rate=24_000))
    running = asyncio.create_task(PipelineRunner(handle_sigint=False).run(task))
    words = [LLMTextFrame(word + " ") for word in text.split(" ")]
    if interrupts:
        await task.queue_frames([LLMFullResponseStartFrame(), *words, LLMFullResponseEndFrame()])
        await asyncio.wait_for(ear.has_begun.wait(), 40)
        await task.queue_frame(InterruptionFrame())
        await asyncio.sleep(0.5)
        ear.is_over.clear()
        ear.audio.clear()
    await task.queue_frames([LLMFullResponseStartFrame(), *words, LLMFullResponseEndFrame()])
    await asyncio.wait_for(ear.is_over.wait(), 40)
    await task.cancel()
    await running
    if ear.errors:
        raise SystemExit(f"errors: {ear.errors}")
    print(json.dumps({"num_bytes": len(ear.audio), "sample_rate": ear.rates.pop()}))


interrupts = sys.argv[2] == "--interrupt"
asyncio.run(main(sys.argv[1], " ".join(sys.argv[3 if interrupts else 2 :]), interrupts=interrupts))
