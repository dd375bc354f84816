// The playground: one request at a time, heard while it streams. No library, no build step.
const RATE_HZ = 24000;
const LEAD_S = 0.06; // a little in hand before the first sound, so that a late piece is not heard
const MAX_LEAD_S = 0.96; // it doubles at every gap: one wait is better than many
const PEAK_SAMPLES = 240; // of the waveform: 10 ms
const MIN_WIDTH_S = 3; // a waveform grows from the left before it is squeezed
const find = (id) => document.getElementById(id);

const key = find("key");
key.value = sessionStorage.getItem("declaim-key") ?? "";
key.addEventListener("change", () => {
  sessionStorage.setItem("declaim-key", key.value);
  showError(null);
  loadVoices();
});

let settings = { model: "", dialogue: false, controls: {}, instructions: [], languages: [], max_input_chars: 4096, imitates: false };
let speech = null; // the latest: what is being heard, or can be heard again

function headers() {
  return key.value ? { Authorization: `Bearer ${key.value}` } : {};
}

async function errorOf(answer) {
  if (answer.status === 401) {
    key.setAttribute("aria-invalid", "true");
    if (!key.value) return "This server asks for a key: write one into the field Key.";
  }
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

function showError(message) {
  find("error").textContent = message ?? "";
  find("error").hidden = !message;
  if (!message) key.removeAttribute("aria-invalid");
}

// The loudest sample of every 10 ms.
class Peaks {
  constructor() {
    this.values = [];
    this.loudest = 0;
    this.peak = 0;
    this.count = 0;
  }

  push(samples) {
    for (const sample of samples) {
      this.peak = Math.max(this.peak, Math.abs(sample));
      if (++this.count < PEAK_SAMPLES) continue;
      this.values.push(this.peak);
      this.loudest = Math.max(this.loudest, this.peak);
      this.peak = this.count = 0;
    }
  }
}

// Playing: pieces are scheduled one after another on the audio clock, and an <audio> element plays what the clock gives.
class Player {
  constructor() {
    this.context = new AudioContext({ sampleRate: RATE_HZ });
    this.output = this.context.createMediaStreamDestination();
    this.pieces = [];
    this.numSamples = 0;
    this.startedAt = null; // on the audio clock
    this.nextAt = 0;
    this.leadS = LEAD_S;
    this.gaps = 0;
    this.beforeGapS = 0;
    this.rest = new Uint8Array(0);
    find("audio").srcObject = this.output.stream;
    find("audio").play().catch((error) => {
      if (error.name !== "AbortError") showError(`The browser does not play: ${error.message}`);
    });
  }

  // The samples in the next bytes; half a sample waits for its other half.
  push(bytes) {
    const all = new Uint8Array(this.rest.length + bytes.length);
    all.set(this.rest);
    all.set(bytes, this.rest.length);
    const whole = all.length - (all.length % 2);
    this.rest = all.slice(whole);
    const view = new DataView(all.buffer, 0, whole);
    const samples = new Float32Array(whole / 2);
    for (let i = 0; i < samples.length; i++) samples[i] = view.getInt16(2 * i, true) / 32768;
    if (samples.length) this.schedule(samples);
    return samples;
  }

  schedule(samples) {
    const buffer = this.context.createBuffer(1, samples.length, RATE_HZ);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.output);
    const now = this.context.currentTime;
    if (this.startedAt === null) {
      this.startedAt = this.nextAt = now + this.leadS;
    } else if (this.nextAt < now) {
      this.gaps += 1;
      this.leadS = Math.min(MAX_LEAD_S, 2 * this.leadS);
      this.beforeGapS = this.numSamples / RATE_HZ;
      this.startedAt += now + this.leadS - this.nextAt; // words after a gap are spoken later
      this.nextAt = now + this.leadS;
    }
    source.start(this.nextAt);
    this.nextAt += buffer.duration;
    this.pieces.push(samples);
    this.numSamples += samples.length;
  }

  get playedS() {
    if (this.startedAt === null) return 0;
    return Math.max(this.beforeGapS, Math.min(this.numSamples / RATE_HZ, this.context.currentTime - this.startedAt));
  }

  get isOver() {
    return this.startedAt === null || this.context.currentTime >= this.nextAt;
  }

  close() {
    find("audio").srcObject = null;
    return this.context.close();
  }
}

function wavOf(pieces, numSamples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * numSamples));
  const ascii = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  ascii(0, "RIFF");
  view.setUint32(4, 36 + 2 * numSamples, true);
  ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE_HZ, true);
  view.setUint32(28, 2 * RATE_HZ, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  ascii(36, "data");
  view.setUint32(40, 2 * numSamples, true);
  let at = 44;
  for (const piece of pieces)
    for (const sample of piece) {
      view.setInt16(at, Math.max(-32768, Math.min(32767, Math.round(sample * 32768))), true);
      at += 2;
    }
  return new Blob([view], { type: "audio/wav" });
}

// What is asked.
function text() {
  if (find("panel-dialogue").hidden) return find("text").value;
  return [...find("turns").children]
    .map((turn) => [turn.querySelector("select").value, turn.querySelector("input").value.trim()])
    .filter(([, line]) => line)
    .map(([speaker, line]) => `[${speaker}] ${line}`)
    .join(" ");
}

function bodyOf(format) {
  const body = { model: settings.model, voice: find("voice").value || "default", input: text(), speed: Number(find("speed").value) };
  if (find("seed").value !== "") body.seed = Number(find("seed").value);
  for (const name of ["instructions", "language"]) if (find(name).value.trim()) body[name] = find(name).value.trim();
  for (const field of find("dials").querySelectorAll("input")) if (field.value.trim()) body[field.name] = dialOf(field.value.trim());
  if (format === "pcm") return { ...body, response_format: "pcm", stream_format: "sse", word_timestamps: true };
  return { ...body, response_format: format };
}

// A name, a number, or numbers with commas between.
function dialOf(value) {
  const numbers = value.split(",").map(Number);
  if (numbers.some(Number.isNaN)) return value;
  return numbers.length === 1 ? numbers[0] : numbers;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
  }
}

// As the OpenAI clients do: a server that is full for the moment, with what was just stopped perhaps, is asked again.
const MAX_ASKS = 3;
const LONGEST_WAIT_MS = 5000;
async function askPatiently(path, asked) {
  for (let i = 1; ; i++) {
    const answer = await fetch(path, asked);
    const waitMs = Number(answer.headers.get("retry-after-ms"));
    if (answer.status !== 503 || i === MAX_ASKS || !waitMs || waitMs > LONGEST_WAIT_MS) return answer;
    await new Promise((resolve) => setTimeout(resolve, waitMs));
  }
}

async function speak() {
  forget();
  showError(null);
  const format = find("format").value;
  const began = performance.now();
  const mine = {
    abort: new AbortController(), isOpen: true, player: null, peaks: new Peaks(), words: [], firstMs: null, endMs: null,
    url: null,
  };
  speech = mine;
  find("stop").disabled = false;
  find("ended").textContent = "waiting…";
  try {
    const asked = { method: "POST", signal: mine.abort.signal, body: JSON.stringify(bodyOf(format)) };
    if (format === "pcm") mine.player = new Player(); // while the click still counts as one
    animate();
    asked.headers = { ...headers(), "Content-Type": "application/json" };
    const answer = await askPatiently("/v1/audio/speech", asked);
    if (!answer.ok) throw new Error(await errorOf(answer));
    find("ended").textContent = "speaking…";
    if (format === "pcm") await hear(mine, answer, began);
    else await fetchWhole(mine, answer, began, format);
  } catch (error) {
    if (speech !== mine || error.name === "AbortError") return;
    showError(error.message);
    find("ended").textContent = "error";
  } finally {
    mine.isOpen = false;
    if (speech === mine) keepWav(mine);
  }
}

async function hear(mine, answer, began) {
  let done = null;
  for await (const event of eventsOf(answer)) {
    if (speech !== mine || mine.player === null) return; // stopped
    if (event.type === "speech.audio.delta") {
      if (mine.firstMs === null) mine.firstMs = performance.now() - began;
      mine.peaks.push(mine.player.push(Uint8Array.from(atob(event.audio), (c) => c.charCodeAt(0))));
    } else if (event.type === "speech.word") addWord(mine, event);
    else if (event.type === "error") throw new Error(event.error.message);
    else if (event.type === "speech.audio.done") done = event;
    mine.endMs = performance.now() - began;
    showFigures(mine);
  }
  if (done === null) throw new Error("The stream broke off before its end.");
  const { gaps } = mine.player;
  find("ended").textContent = (done.finish_reason ?? "stop") + (gaps ? `, ${gaps} ${gaps > 1 ? "gaps" : "gap"}` : "");
}

async function fetchWhole(mine, answer, began, format) {
  const pieces = [];
  const reader = answer.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (speech !== mine) return;
    if (done) break;
    if (mine.firstMs === null) mine.firstMs = performance.now() - began;
    pieces.push(value);
  }
  mine.endMs = performance.now() - began;
  const blob = new Blob(pieces, { type: answer.headers.get("content-type") });
  offer(mine, blob, `speech.${format}`);
  find("ended").textContent = "stop";
  const audio = find("audio");
  audio.src = mine.url;
  await audio.play();
  const decoded = await new OfflineAudioContext(1, 1, RATE_HZ).decodeAudioData(await blob.arrayBuffer());
  if (speech !== mine) return;
  mine.peaks.push(decoded.getChannelData(0));
  showFigures(mine, decoded.duration);
  animate();
}

function offer(mine, blob, name) {
  mine.url = URL.createObjectURL(blob);
  find("download").href = mine.url;
  find("download").download = name;
  find("download").hidden = false;
}

// What was streamed, whole or not, can be downloaded.
function keepWav(mine) {
  if (mine.player?.numSamples && mine.url === null)
    offer(mine, wavOf(mine.player.pieces, mine.player.numSamples), "speech.wav");
}

// The stream was played to its end, or stopped: from now on the <audio> element plays what was kept.
function endPlayer(mine) {
  mine.player.close();
  mine.player = null;
  if (mine.url !== null) find("audio").src = mine.url;
}

function stop() {
  const mine = speech;
  if (mine === null) return;
  if (mine.isOpen) find("ended").textContent = "stopped";
  mine.abort.abort();
  find("audio").pause();
  if (mine.player !== null) {
    keepWav(mine);
    endPlayer(mine);
  }
  find("stop").disabled = true;
  find("speak").focus();
}

// Before the next one.
function forget() {
  const last = speech;
  speech = null;
  for (const id of ["first-audio", "rtf", "duration", "ended"]) find(id).textContent = "–";
  find("words").replaceChildren();
  find("download").hidden = true;
  if (last === null) return;
  last.abort.abort();
  last.player?.close();
  find("audio").pause();
  find("audio").removeAttribute("src");
  if (last.url !== null) URL.revokeObjectURL(last.url);
}

// What is shown.
function showFigures(mine, audioS = mine.player.numSamples / RATE_HZ) {
  if (mine.firstMs !== null) find("first-audio").textContent = `${mine.firstMs.toFixed(0)} ms`;
  if (audioS > 0) {
    find("duration").textContent = `${audioS.toFixed(2)} s`;
    find("rtf").textContent = (mine.endMs / 1000 / audioS).toFixed(2);
  }
}

function addWord(mine, event) {
  const span = document.createElement("span");
  span.textContent = event.word;
  mine.words.push({ start: event.start, end: event.end, span });
  find("words").append(span, " ");
}

let frame = 0;
function animate() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    const audio = find("audio");
    if (speech?.player && !speech.isOpen && speech.player.isOver) endPlayer(speech);
    const isPlaying = speech?.player || !(audio.paused || audio.ended);
    draw(speech, speech?.player ? speech.player.playedS : audio.currentTime, isPlaying);
    find("stop").disabled = !(speech?.isOpen || isPlaying);
    if (speech?.isOpen || isPlaying) animate();
  });
}

function draw(mine, playedS, isPlaying) {
  for (const word of mine?.words ?? [])
    word.span.className = !isPlaying ? "" : playedS >= word.end ? "said" : playedS >= word.start ? "now" : "";
  const canvas = find("wave");
  const paint = canvas.getContext("2d");
  const scale = devicePixelRatio;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const { values, loudest } = mine?.peaks ?? { values: [], loudest: 0 };
  const style = getComputedStyle(canvas);
  const numBars = Math.floor(canvas.width / (3 * scale));
  const perBar = Math.max(values.length, (MIN_WIDTH_S * RATE_HZ) / PEAK_SAMPLES) / numBars;
  const playedBars = (playedS * RATE_HZ) / PEAK_SAMPLES / perBar;
  const middle = canvas.height / 2;
  for (let bar = 0; bar < numBars && bar * perBar < values.length; bar++) {
    let peak = 0;
    for (let i = Math.floor(bar * perBar); i < Math.min(values.length, (bar + 1) * perBar); i++) peak = Math.max(peak, values[i]);
    const half = Math.max(scale / 2, (0.9 * middle * peak) / Math.max(0.05, loudest));
    paint.fillStyle = style.getPropertyValue(bar < playedBars || !isPlaying ? "--accent" : "--edge");
    paint.fillRect(3 * scale * bar, middle - half, 2 * scale, 2 * half);
  }
}

// The server.
async function loadVoices() {
  const answer = await fetch("/v1/audio/voices", { headers: headers() });
  if (!answer.ok) return showError(await errorOf(answer));
  const chosen = find("voice").value;
  find("voice").replaceChildren(
    ...(await answer.json()).voices.map((voice) => new Option(voice.name ?? voice.id, voice.id ?? voice.name)),
  );
  if ([...find("voice").options].some((option) => option.value === chosen)) find("voice").value = chosen;
}

async function loadSettings() {
  settings = await (await fetch("/playground/settings.json")).json();
  find("model").textContent = settings.model;
  find("own-voice").hidden = !settings.imitates;
  find("tabs").hidden = !settings.dialogue;
  find("speak").disabled = false;
  find("voice-transcript").required = settings.needs_transcript;
  showControls();
  countChars();
  await loadVoices();
}

function showControls() {
  const { controls, instructions, languages } = settings;
  find("dials").replaceChildren(...Object.entries(controls).flatMap(([name, control]) => controlOf(name, control)));
  find("in-words").hidden = find("words-known").hidden = !instructions.length;
  find("instruction-words").replaceChildren(...instructions.map((word) => new Option(word)));
  find("words-known").textContent = `Words it acts on: ${instructions.join(", ")}`;
  find("in-language").hidden = !languages.length;
  const named = new Intl.DisplayNames([navigator.language, "en"], { type: "language" });
  const choices = languages.map((tag) => new Option(`${nameOf(named, tag)} (${tag})`, tag));
  find("language").append(...choices.sort((a, b) => a.text.localeCompare(b.text)));
  find("told").hidden = !instructions.length && !languages.length;
  find("controls").hidden = find("told").hidden && !Object.keys(controls).length;
}

function nameOf(named, tag) {
  try {
    return named.of(tag);
  } catch (error) {
    return tag; // some tags are the model's and no standard's
  }
}

function controlOf(name, control) {
  const label = document.createElement("label");
  label.title = control.description;
  label.append(name.replaceAll("_", " "));
  const field = Object.assign(document.createElement("input"), { name, autocomplete: "off" });
  const parts = [label];
  if (control.names.length) {
    const names = Object.assign(document.createElement("datalist"), { id: `names-of-${name}` });
    names.append(...control.names.map((each) => new Option(each)));
    field.setAttribute("list", names.id);
    field.placeholder = `${control.names[0]}, or ${control.length} weights`;
    parts.push(names);
  } else {
    const range = `${control.low} to ${control.high}`;
    field.inputMode = "decimal";
    field.placeholder = control.default === null ? range : `${control.default[0]} (${range})`;
  }
  label.append(field);
  return parts;
}

function setLoad(state, text) {
  find("load").dataset.state = state;
  find("load").textContent = text;
}

async function showLoad() {
  try {
    const ready = await fetch("/ready");
    if (ready.status !== 200) {
      const { stage, percent } = await ready.json();
      setLoad("busy", `${stage} ${percent} %`);
    } else {
      if (!settings.model) await loadSettings();
      const metrics = await (await fetch("/metrics")).text();
      const gauges = Object.fromEntries(
        [...metrics.matchAll(/^declaim_([a-z_]+) ([0-9.e+-]+)$/gm)].map(([, name, value]) => [name, Number(value)]),
      );
      const { running_sequences: running, waiting_sequences: waiting } = gauges;
      const used = (100 * gauges.kv_blocks_used) / Math.max(1, gauges.kv_blocks_total);
      const parts = [running || waiting ? `${running} speaking` : "idle", `${waiting} waiting`, `KV cache ${used.toFixed(0)} %`];
      setLoad(waiting ? "busy" : "ready", parts.join(" · "));
    }
  } catch {
    setLoad("down", "the server does not answer");
  }
  setTimeout(showLoad, document.hidden ? 10000 : 2000);
}

function countChars() {
  const count = [...find("text").value].length;
  find("count").textContent = `${count} of ${settings.max_input_chars} characters`;
  find("count").classList.toggle("over", count > settings.max_input_chars);
}

function addTurn(line = "") {
  const turn = document.createElement("li");
  const speaker = document.createElement("select");
  speaker.append(new Option("S1"), new Option("S2"));
  speaker.value = find("turns").children.length % 2 ? "S2" : "S1";
  speaker.setAttribute("aria-label", "Speaker");
  const input = document.createElement("input");
  input.value = line;
  input.setAttribute("aria-label", "Line");
  const remove = document.createElement("button");
  remove.type = "button";
  remove.textContent = "Remove";
  remove.addEventListener("click", () => {
    turn.remove();
    find("add-turn").focus();
  });
  const row = document.createElement("div");
  row.className = "turn";
  row.append(speaker, input, remove);
  turn.append(row);
  find("turns").append(turn);
  return input;
}

function choose(tab) {
  for (const name of ["text", "dialogue"]) {
    const isChosen = tab === name;
    find(`tab-${name}`).setAttribute("aria-selected", String(isChosen));
    find(`tab-${name}`).tabIndex = isChosen ? 0 : -1;
    find(`panel-${name}`).hidden = !isChosen;
  }
  find(`tab-${tab}`).focus();
}

for (const name of ["text", "dialogue"]) {
  find(`tab-${name}`).addEventListener("click", () => choose(name));
  find(`tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") choose(name === "text" ? "dialogue" : "text");
  });
}
find("add-turn").addEventListener("click", () => addTurn().focus());
addTurn("Did you hear that?");
addTurn("Every word of it.");
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  speak();
});
find("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("form").requestSubmit();
});
find("stop").addEventListener("click", stop);
find("text").addEventListener("input", countChars);
find("speed").addEventListener("input", () => (find("speed-shown").textContent = Number(find("speed").value).toFixed(2)));
async function send(path, fields) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  const answer = await fetch(path, { method: "POST", body, headers: headers() });
  if (!answer.ok) throw new Error(await errorOf(answer));
  return (await answer.json()).id;
}

let consent = { file: null, id: null }; // kept, so that a second try does not store it again
async function upload() {
  const name = find("voice-name").value;
  const file = find("voice-consent").files[0];
  find("upload-status").textContent = "uploading…";
  try {
    if (consent.file !== file) {
      const language = find("consent-language").value;
      consent = { file, id: await send("/v1/audio/voice_consents", { name, language, recording: file }) };
    }
    const sample = { audio_sample: find("voice-file").files[0], transcript: find("voice-transcript").value };
    const id = await send("/v1/audio/voices", { name, consent: consent.id, ...sample });
    await loadVoices();
    find("voice").value = id;
    find("upload-status").textContent = "ready";
  } catch (error) {
    find("upload-status").textContent = error.message;
  }
}

find("consent-language").value = navigator.language;
find("upload").addEventListener("submit", (event) => {
  event.preventDefault();
  upload();
});
for (const name of ["play", "pause", "seeked"]) find("audio").addEventListener(name, animate);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", animate);
new ResizeObserver(animate).observe(find("wave"));
showLoad();
