// Load a speech endpoint with k6, for those whose dashboards and CI live there.
//
//     k6 run -e URL=http://127.0.0.1:8000/v1 -e KEY=sk-... -e RATE=2 -e DURATION=60s benchmarks/k6.js
//
// Requests come at a constant rate that waits for nobody. k6 hands a body over when it is whole, so first audio is told
// by when the first byte of the answer came (http_req_waiting): declaim sends its status line with the first samples,
// servers that send it before look better than they are. What listeners hear (leading silence, under-runs, goodput)
// `declaim bench serve` measures; the texts are the same. Settings, all by -e: URL, KEY, MODEL, VOICE, FORMAT (pcm or
// wav), SAMPLE_RATE, RATE, DURATION, FIRST_AUDIO_MS (the threshold of the 95th percentile).

import http from "k6/http";
import { check } from "k6";
import { Counter, Trend } from "k6/metrics";

const url = __ENV.URL || "http://127.0.0.1:8000/v1";
const format = __ENV.FORMAT || "pcm";
const sampleRate = Number(__ENV.SAMPLE_RATE || 24000);
const sampleBytes = 2;
const headerBytes = format === "wav" ? 44 : 0;

const texts = open("./load/prompts.txt").split("\n").filter((line) => line.trim() !== "");

const firstAudio = new Trend("first_audio", true);
const realTimeFactor = new Trend("real_time_factor");
const audioSeconds = new Counter("audio_seconds");
const refused = new Counter("refused");

export const options = {
  scenarios: {
    speech: {
      executor: "constant-arrival-rate",
      rate: Math.round(60 * Number(__ENV.RATE || 2)),
      timeUnit: "60s",
      duration: __ENV.DURATION || "60s",
      preAllocatedVUs: 32,
      maxVUs: 512,
    },
  },
  thresholds: {
    checks: ["rate>0.99"],
    first_audio: [`p(95)<${Number(__ENV.FIRST_AUDIO_MS || 500)}`],
    real_time_factor: ["p(95)<1"],
  },
};

export default function () {
  const headers = { "Content-Type": "application/json" };
  if (__ENV.KEY) headers.Authorization = `Bearer ${__ENV.KEY}`;
  const body = JSON.stringify({
    model: __ENV.MODEL || "tts-1",
    voice: __ENV.VOICE || "alloy",
    input: texts[Math.floor(Math.random() * texts.length)],
    response_format: format,
  });
  const response = http.post(`${url}/audio/speech`, body, { headers, responseType: "binary", timeout: "120s" });
  if (response.status === 429 || response.status === 503) refused.add(1);
  const audioBytes = response.status === 200 && response.body ? response.body.byteLength - headerBytes : 0;
  const isWhole = check(response, {
    "status is 200": (r) => r.status === 200,
    "there is audio, and whole samples": () => audioBytes > 0 && audioBytes % sampleBytes === 0,
  });
  if (!isWhole) return;
  const seconds = audioBytes / sampleBytes / sampleRate;
  audioSeconds.add(seconds);
  firstAudio.add(response.timings.waiting);
  realTimeFactor.add(response.timings.duration / 1000 / seconds);
}
