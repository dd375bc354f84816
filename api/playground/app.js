// The playground: one request at a time, heard while it streams. No library, no build step.
const RATE_HZ = 24000;
const LEAD_S = 0.06; // a little in hand before the first sound, so that a late piece is not heard
const find = (id) => document.getElementById(id);

const key = find("key");
key.value = sessionStorage.getItem("declaim-key") ?? "";
key.addEventListener("change", () => {
  sessionStorage.setItem("declaim-key", key.value);
  loadVoices();
});

let settings = { model: "", dialogue: false, controls: [], max_input_chars: 4096, imitates: false };
let speech = null; // what is being heard

function headers() {
  return key.value ? { Authorization: `Bearer ${key.value}` } : {};
}

async function errorOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

function showError(message) {
  find("error").textContent = message ?? "";
  find("error").hidden = !message;
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
    this.underruns = 0;
    this.rest = new Uint8Array(0);
    find("audio").srcObject = this.output.stream;
    this.playing = find("audio").play().catch((error) => {
      if (error.name !== "AbortError") showError(`The browser does not play: ${error.message}`);
    });
  }

  push(bytes) {
    const all = new Uint8Array(this.rest.length + bytes.length);
    all.set(this.rest);
    all.set(bytes, this.rest.length);
    const whole = all.length - (all.length % 2);
    this.rest = all.slice(whole);
    const view = new DataView(all.buffer, 0, whole);
    const samples = new Float32Array(whole / 2);
    for (let i = 0; i < samples.length; i++) samples[i] = view.getInt16(2 * i, true) / 32768;
    if (!samples.length) return;
    const buffer = this.context.createBuffer(1, samples.length, RATE_HZ);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.output);
    const now = this.context.currentTime;
    if (this.startedAt === null) {
      this.startedAt = this.nextAt = now + LEAD_S;
    } else if (this.nextAt < now) {
      this.underruns += 1;
      this.startedAt += now - this.nextAt; // words after a gap are spoken later
      this.nextAt = now;
    }
    source.start(this.nextAt);
    this.nextAt += buffer.duration;
    this.pieces.push(samples);
    this.numSamples += samples.length;
  }

  get playedS() {
    if (this.startedAt === null) return 0;
    return Math.max(0, Math.min(this.numSamples / RATE_HZ, this.context.currentTime - this.startedAt));
  }

  get isOver() {
    return this.startedAt !== null && this.context.currentTime >= this.nextAt;
  }

  close() {
    find("audio").srcObject = null;
    return this.context.state === "closed" ? undefined : this.context.close();
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
  for (const field of find("controls").querySelectorAll("input, select"))
    if (field.value !== "") body[field.name] = field.tagName === "SELECT" ? field.value : Number(field.value);
  if (format === "pcm") return { ...body, response_format: "pcm", stream_format: "sse", word_timestamps: true };
  return { ...body, response_format: format };
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

async function speak() {
  await stop();
  showError(null);
  const format = find("format").value;
  const began = performance.now();
  const mine = { abort: new AbortController(), player: null, words: [], firstMs: null, endMs: null, url: null };
  speech = mine;
  for (const id of ["first-audio", "rtf", "duration", "ended"]) find(id).textContent = "–";
  find("words").replaceChildren();
  find("download").hidden = true;
  find("speak").disabled = true;
  find("stop").disabled = false;
  try {
    const asked = { method: "POST", signal: mine.abort.signal, body: JSON.stringify(bodyOf(format)) };
    if (format === "pcm") mine.player = new Player(); // while the click still counts as one
    const answer = await fetch("/v1/audio/speech", { ...asked, headers: { ...headers(), "Content-Type": "application/json" } });
    if (!answer.ok) throw new Error(await errorOf(answer));
    if (format === "pcm") await hear(mine, answer, began);
    else await fetchWhole(mine, answer, began, format);
  } catch (error) {
    if (error.name !== "AbortError") showError(error.message);
    if (mine.player !== null && mine.player.startedAt === null) mine.player.close();
  } finally {
    find("speak").disabled = false;
  }
}

async function hear(mine, answer, began) {
  const player = mine.player;
  requestAnimationFrame(() => draw(mine));
  let done = null;
  for await (const event of eventsOf(answer)) {
    if (event.type === "speech.audio.delta") {
      const bytes = Uint8Array.from(atob(event.audio), (c) => c.charCodeAt(0));
      if (mine.firstMs === null) mine.firstMs = performance.now() - began;
      player.push(bytes);
    } else if (event.type === "speech.word") addWord(mine, event);
    else if (event.type === "error") throw new Error(event.error.message);
    else if (event.type === "speech.audio.done") done = event;
    mine.endMs = performance.now() - began;
    showFigures(mine);
  }
  if (done === null) throw new Error("The stream broke off before its end.");
  const dry = player.underruns ? `, ran dry ${player.underruns} times` : "";
  find("ended").textContent = (done.finish_reason ?? "stop") + dry;
  mine.url = URL.createObjectURL(wavOf(player.pieces, player.numSamples));
  offer(mine.url, "speech.wav");
}

async function fetchWhole(mine, answer, began, format) {
  const pieces = [];
  const reader = answer.body.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    if (mine.firstMs === null) mine.firstMs = performance.now() - began;
    pieces.push(value);
  }
  mine.endMs = performance.now() - began;
  mine.url = URL.createObjectURL(new Blob(pieces, { type: answer.headers.get("content-type") }));
  offer(mine.url, `speech.${format}`);
  const audio = find("audio");
  audio.src = mine.url;
  audio.onloadedmetadata = () => showFigures(mine, audio.duration);
  await audio.play();
  find("ended").textContent = "stop";
  find("stop").disabled = true;
}

function offer(url, name) {
  find("download").href = url;
  find("download").download = name;
  find("download").hidden = false;
}

async function stop() {
  const last = speech;
  speech = null;
  find("stop").disabled = true;
  if (last === null) return;
  last.abort.abort();
  await last.player?.close();
  find("audio").pause();
  if (last.url !== null) URL.revokeObjectURL(last.url);
  find("audio").removeAttribute("src");
}

// What is shown.
function showFigures(mine, audioS = mine.player === null ? 0 : mine.player.numSamples / RATE_HZ) {
  if (mine.firstMs !== null) find("first-audio").textContent = `${mine.firstMs.toFixed(0)} ms`;
  if (Number.isFinite(audioS) && audioS > 0) {
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

function draw(mine) {
  if (speech !== mine) return;
  const player = mine.player;
  const canvas = find("wave");
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  const paint = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const playedS = player.playedS;
  const heard = (playedS * RATE_HZ) / Math.max(1, player.numSamples);
  const perColumn = Math.max(1, Math.ceil(player.numSamples / canvas.width));
  let column = 0;
  let peak = 0;
  let count = 0;
  const middle = canvas.height / 2;
  const finish = () => {
    paint.fillStyle = column < heard * (player.numSamples / perColumn) ? style.getPropertyValue("--accent") : style.getPropertyValue("--soft");
    paint.fillRect(column, middle - peak * middle, 1, Math.max(1, 2 * peak * middle));
    column += 1;
    peak = count = 0;
  };
  for (const piece of player.pieces)
    for (const sample of piece) {
      peak = Math.max(peak, Math.abs(sample));
      if (++count === perColumn) finish();
    }
  if (count) finish();
  for (const word of mine.words) {
    word.span.className = playedS >= word.end ? "said" : playedS >= word.start ? "now" : "";
  }
  if (mine.url !== null && player.isOver) {
    for (const word of mine.words) word.span.className = "said";
    find("stop").disabled = true;
    player.close();
    find("audio").src = mine.url; // to be heard again
    return;
  }
  requestAnimationFrame(() => draw(mine));
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
  const answer = await fetch("/playground/settings.json");
  if (!answer.ok) return setTimeout(loadSettings, 1000); // the model is still loading; the header says how far
  settings = await answer.json();
  find("model").textContent = settings.model;
  find("own-voice").parentElement.hidden = !settings.imitates;
  find("tab-dialogue").hidden = !settings.dialogue;
  const grid = find("controls").querySelector("div");
  grid.replaceChildren(...settings.controls.map(controlOf));
  find("controls").hidden = !settings.controls.length;
  countChars();
  await loadVoices();
}

function controlOf(control) {
  const label = document.createElement("label");
  label.title = control.description;
  label.append(control.name.replaceAll("_", " "));
  let field;
  if (control.names.length) {
    field = document.createElement("select");
    field.append(new Option("as the model likes", ""), ...control.names.map((name) => new Option(name)));
  } else {
    field = document.createElement("input");
    Object.assign(field, { type: "number", min: control.low, max: control.high, step: "any" });
    field.placeholder = control.default?.[0] ?? "";
  }
  field.name = control.name;
  label.append(field);
  return label;
}

async function showLoad() {
  try {
    const ready = await fetch("/ready");
    if (ready.status !== 200) {
      const { stage, percent } = await ready.json();
      find("load").textContent = `${stage} ${percent} %`;
    } else {
      const gauges = Object.fromEntries(
        [...(await (await fetch("/metrics")).text()).matchAll(/^(declaim_[a-z_]+) ([0-9.e+-]+)$/gm)].map(([, name, value]) => [name, Number(value)]),
      );
      const used = (100 * gauges.declaim_kv_blocks_used) / Math.max(1, gauges.declaim_kv_blocks_total);
      find("load").textContent =
        `${gauges.declaim_running_sequences} speaking, ${gauges.declaim_waiting_sequences} waiting, cache ${used.toFixed(0)} %`;
    }
  } catch {
    find("load").textContent = "the server does not answer";
  }
  setTimeout(showLoad, document.hidden ? 10000 : 2000);
}

function countChars() {
  find("count").textContent = `${[...find("text").value].length} of ${settings.max_input_chars} characters`;
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
  remove.addEventListener("click", () => turn.remove());
  turn.append(speaker, input, remove);
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
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") choose(name === "text" && settings.dialogue ? "dialogue" : "text");
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
find("upload").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = new FormData();
  form.append("name", find("voice-name").value);
  form.append("audio_sample", find("voice-file").files[0]);
  form.append("transcript", find("voice-transcript").value);
  find("upload-status").textContent = "encoding…";
  const answer = await fetch("/v1/audio/voices", { method: "POST", body: form, headers: headers() });
  find("upload-status").textContent = answer.ok ? "ready" : await errorOf(answer);
  if (answer.ok) {
    const { id } = await answer.json();
    await loadVoices();
    find("voice").value = id;
  }
});
showLoad();
loadSettings();
