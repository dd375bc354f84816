// The stock `openai` package against BASE_URL with KEY: writes what it heard into FOLDER, prints what it saw as JSON.
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const [baseURL, apiKey, folder] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const asked = { model: "gpt-4o-mini-tts", voice: "alloy", input: "Hello from Node." };
const seen = {};

seen.models = (await client.models.list()).data.map((model) => model.id);

const whole = await client.audio.speech.create({ ...asked, instructions: "Calmly.", speed: 1.25, seed: 5 });
await writeFile(`${folder}/whole.mp3`, Buffer.from(await whole.arrayBuffer()));
seen.type = whole.headers.get("content-type");

// The parameters that the package knows, and ours, which it passes on.
const speech = await client.audio.speech.create({ ...asked, response_format: "wav", seed: 5 });
await writeFile(`${folder}/whole.wav`, Buffer.from(await speech.arrayBuffer()));

const { data, response, request_id } = await client.audio.speech.create({ ...asked, response_format: "pcm" }).withResponse();
seen.sameResponse = data === response;
seen.requestId = request_id;
seen.chunks = 0;
for await (const chunk of data.body) seen.chunks += chunk.length > 0;

const events = await client.audio.speech.create({ ...asked, response_format: "pcm", stream_format: "sse" });
const lines = (await events.text()).split("\n").filter((line) => line.startsWith("data: "));
seen.events = lines.map((line) => JSON.parse(line.slice(6)).type);

const leaving = new AbortController();
const left = await client.audio.speech.create(
  { ...asked, input: "One sentence after another. ".repeat(40), response_format: "pcm" },
  { signal: leaving.signal },
);
await left.body.getReader().read();
leaving.abort();

async function errorOf(promise) {
  const error = await promise.then(() => null, (error) => error);
  return { name: error?.constructor.name, status: error?.status, code: error?.code, param: error?.param, message: error?.message };
}
seen.wrongKey = await errorOf(new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 }).audio.speech.create(asked));
seen.wrongSpeed = await errorOf(client.audio.speech.create({ ...asked, speed: 9 }));
seen.wrongModel = await errorOf(client.audio.speech.create({ ...asked, model: "nobody" }));

console.log(JSON.stringify(seen));
