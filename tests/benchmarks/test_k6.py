"""The k6 file does what it says: its function runs in Node with stand-ins for k6's modules, against a fake peer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .fake_peer import FakePeer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "k6.js"
NODE = shutil.which("node")

# k6's http is synchronous; Node's is not, so that the stand-in asks by a process.
HTTP = """
import { spawnSync } from "node:child_process";
const ASK = `
  const [url, body, headers] = JSON.parse(process.argv[1]);
  fetch(url, { method: "POST", body, headers }).then(async (r) =>
    console.log(JSON.stringify([r.status, Buffer.from(await r.arrayBuffer()).toString("base64")])));
`;
export default {
  post(url, body, { headers, responseType }) {
    if (responseType !== "binary") throw new Error("audio is no text");
    const done = spawnSync(process.execPath, ["-e", ASK, JSON.stringify([url, body, headers])], { encoding: "utf8" });
    const [status, data] = JSON.parse(done.stdout);
    const bytes = Buffer.from(data, "base64");
    const whole = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
    return { status, body: whole, timings: { waiting: 7, duration: 500 } };
  },
};
"""
K6 = """
export const failed = [];
export const check = (value, checks) => {
  const wrong = Object.entries(checks).filter(([, holds]) => !holds(value)).map(([name]) => name);
  failed.push(...wrong);
  return wrong.length === 0;
};
"""
METRICS = """
export const added = {};
class Metric { constructor(name) { this.name = name; } add(value) { (added[this.name] ??= []).push(value); } }
export class Counter extends Metric {}
export class Trend extends Metric {}
"""
MAIN = """
import { readFileSync } from "node:fs";
globalThis.__ENV = JSON.parse(process.argv[2]);
globalThis.open = (path) => readFileSync(new URL(path, import.meta.url), "utf8");
const script = await import("./k6.js");
const { failed } = await import("k6");
const { added } = await import("k6/metrics");
script.default();
console.log(JSON.stringify({ failed, added, options: script.options }));
"""


def run_k6(folder: Path, **settings: str) -> dict[str, Any]:
    """One call of the script's function."""
    modules = folder / "node_modules" / "k6"
    modules.mkdir(parents=True)
    exports = {".": "./index.js", "./http": "./http.js", "./metrics": "./metrics.js"}
    (modules / "package.json").write_text(json.dumps({"name": "k6", "type": "module", "exports": exports}))
    for name, text in (("index.js", K6), ("http.js", HTTP), ("metrics.js", METRICS)):
        (modules / name).write_text(text)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "main.js").write_text(MAIN)
    shutil.copy(SCRIPT, folder / "k6.js")
    shutil.copytree(SCRIPT.parent / "load", folder / "load", ignore=lambda _, names: set(names) - {"prompts.txt"})
    assert NODE is not None
    done = subprocess.run(
        [NODE, "main.js", json.dumps(settings)], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node")


def test_a_text_is_asked_for_and_its_audio_measured(tmp_path: Path) -> None:
    with FakePeer(num_chunks=5, every_s=0.0) as peer:
        result = run_k6(tmp_path, URL=peer.url, KEY="sk-1", RATE="0.5")
    assert peer.keys == ["Bearer sk-1"] and peer.texts[0] in (SCRIPT.parent / "load" / "prompts.txt").read_text()
    assert result["failed"] == []
    assert result["added"] == {"audio_seconds": [0.5], "first_audio": [7], "real_time_factor": [1]}
    scenario = result["options"]["scenarios"]["speech"]
    assert scenario["rate"] / 60 == 0.5 and scenario["timeUnit"] == "60s"


def test_a_refusal_is_counted_and_measures_nothing(tmp_path: Path) -> None:
    with FakePeer(refuse=429) as peer:
        result = run_k6(tmp_path, URL=peer.url)
    assert peer.keys == [None]
    assert result["failed"] == ["status is 200", "there is audio, and whole samples"]
    assert result["added"] == {"refused": [1]}
