// The Vercel AI SDK (`ai`, `@ai-sdk/openai`) against BASE_URL with KEY: writes what it heard into FOLDER, prints JSON.
import { writeFile } from "node:fs/promises";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, experimental_generateSpeech as generateSpeech } from "ai";

const [baseURL, apiKey, folder] = process.argv.slice(2);
const openai = createOpenAI({ baseURL, apiKey });
const asked = { model: openai.speech("tts-1"), text: "Hello from the Vercel AI SDK.", voice: "alloy", maxRetries: 0 };
const seen = {};

const byDefault = await generateSpeech(asked);
await writeFile(`${folder}/default.mp3`, byDefault.audio.uint8Array);
seen.mediaType = byDefault.audio.mediaType;
seen.format = byDefault.audio.format;
seen.warnings = byDefault.warnings;
seen.requestId = byDefault.responses[0].headers["x-request-id"];

const chosen = await generateSpeech({ ...asked, outputFormat: "wav", speed: 1.25, instructions: "Calmly." });
await writeFile(`${folder}/chosen.wav`, chosen.audio.uint8Array);
seen.chosenMediaType = chosen.audio.mediaType;

const wrong = createOpenAI({ baseURL, apiKey: "sk-wrong" }).speech("tts-1");
const error = await generateSpeech({ ...asked, model: wrong }).then(() => null, (error) => error);
seen.wrongKey = { isCallError: APICallError.isInstance(error), status: error?.statusCode, message: error?.message };

console.log(JSON.stringify(seen));
