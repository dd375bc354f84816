// Speak through an unmodified OpenAI client for Node, and write the audio as it comes.
//
//     npm install openai && node examples/openai_client.mjs "Hello from Node."
import { createWriteStream } from "node:fs";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://localhost:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const input = process.argv[2] ?? "Hello from Node.";
const speech = await client.audio.speech.create({ model: "tts-1", voice: "alloy", input, response_format: "opus" });
await pipeline(Readable.fromWeb(speech.body), createWriteStream("hello.opus"));
console.log(`hello.opus: ${speech.headers.get("content-type")}, request ${speech.headers.get("x-request-id")}`);
