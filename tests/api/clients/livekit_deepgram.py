"""livekit-plugins-deepgram's stock TTS against HOST:PORT, fed word by word. Prints what it heard as JSON."""

from __future__ import annotations

import asyncio
import json
import sys

import aiohttp
from livekit.plugins import deepgram


async def main(address: str, text: str) -> None:
    async with aiohttp.ClientSession() as session:
        speaker = deepgram.TTS(api_key="acme", base_url=f"http://{address}/v1/speak", http_session=session)
        async with speaker.stream() as stream:
            for word in text.split(" "):
                stream.push_text(word + " ")
            stream.end_input()
            frames = [event.frame async for event in stream]
        await speaker.aclose()
    num_bytes = sum(len(frame.data.tobytes()) for frame in frames)
    print(json.dumps({"num_bytes": num_bytes, "sample_rate": frames[0].sample_rate}))


asyncio.run(main(sys.argv[1], " ".join(sys.argv[2:])))
