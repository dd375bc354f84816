"""A voice agent's mouth: a language model's tokens go into the WebSocket as they come, and are spoken clause by clause.

Any OpenAI-compatible chat server gives the tokens. Audio goes to a wav file here; Ctrl-C barges in, as a caller would.

    python examples/voice_agent.py --llm http://localhost:11434/v1 --llm-model llama3.2 "Tell me about birches."
    python examples/voice_agent.py --echo "Without a language model, this text is fed word by word."
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
import wave
from collections.abc import AsyncIterator

import aiohttp
from openai import AsyncOpenAI


async def tokens_of(arguments: argparse.Namespace) -> AsyncIterator[str]:
    """What is to be said, in pieces."""
    if arguments.echo:
        for word in arguments.prompt.split():
            await asyncio.sleep(0.05)
            yield f"{word} "
        return
    client = AsyncOpenAI(base_url=arguments.llm, api_key=arguments.key)
    answer = await client.chat.completions.create(
        model=arguments.llm_model, messages=[{"role": "user", "content": arguments.prompt}], stream=True
    )
    async for part in answer:
        if part.choices and part.choices[0].delta.content:
            yield part.choices[0].delta.content


async def feed(socket: aiohttp.ClientWebSocketResponse, arguments: argparse.Namespace) -> None:
    async for token in tokens_of(arguments):
        await socket.send_json({"type": "input.text", "text": token})
    await socket.send_json({"type": "input.done"})


async def run(arguments: argparse.Namespace) -> None:
    headers = {"Authorization": f"Bearer {arguments.key}"}
    url = f"{arguments.url}/audio/speech/stream"
    began_s = time.perf_counter()
    async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=headers) as socket:
        await socket.send_json(
            {"type": "session.config", "model": "tts-1", "voice": arguments.voice, "response_format": "pcm"}
        )
        feeding = asyncio.create_task(feed(socket, arguments))

        def barge_in() -> None:
            feeding.cancel()
            asyncio.ensure_future(socket.send_json({"type": "input.cancel"}))

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, barge_in)
        with wave.open(arguments.out, "wb") as file:
            file.setparams((1, 2, 24_000, 0, "NONE", ""))
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    if not file.getnframes():
                        print(f"first audio {time.perf_counter() - began_s:.2f} s after the first token was asked for")
                    file.writeframes(message.data)
                    continue
                event = json.loads(message.data)
                if event["type"] == "audio.start":
                    print(f"speaking: {event.get('sentence_text', '')}")
                elif event["type"] == "error":
                    raise SystemExit(event.get("message") or event)
                elif event["type"] in ("session.done", "audio.cancelled"):
                    print(event["type"])
                    break
        feeding.cancel()
    print(f"written: {arguments.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--voice", default="alloy")
    parser.add_argument("--llm", default="http://localhost:11434/v1")
    parser.add_argument("--llm-model", default="llama3.2")
    parser.add_argument("--echo", action="store_true", help="speak the prompt itself")
    parser.add_argument("--out", default="agent.wav")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
