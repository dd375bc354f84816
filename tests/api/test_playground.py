"""The playground in a real browser: headless Chromium, driven like a person who types, presses and listens."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from declaim.api.app import create_app
from declaim.api.gate import OpenGate
from declaim.api.page import build_page_router
from declaim.api.serving import Serving
from declaim.api.voices import VoiceStore, build_voices_router
from declaim.engine import SpeechRequest
from declaim.engine.errors import Overloaded, SequenceFailed
from declaim.engine.spec import ControlSpec, ModelSpec
from tests.api.asgi_server import served
from tests.api.fake_engine import FakeEngine, Script, eventually
from tests.api.test_live_server import gauge, serve
from tests.api.test_server import make_key, migrated

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="Chromium is not installed: apt-get install -y chromium chromium-driver",
)

TEXT = "The birch canoe slid on the smooth planks."
QUIET = "--disable-background-networking --disable-component-update --disable-sync --disable-quic --no-first-run"
# Hears what the <audio> element plays, and writes down which words were marked while it played.
LISTEN = """
window.heard = { loudest: 0, marked: [] };
const audio = document.getElementById("audio");
audio.addEventListener("playing", () => {
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(audio.captureStream()).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  setInterval(() => {
    analyser.getFloatTimeDomainData(samples);
    for (const sample of samples) window.heard.loudest = Math.max(window.heard.loudest, Math.abs(sample));
  }, 20);
}, { once: true });
new MutationObserver(() => {
  const word = document.querySelector("#words .now")?.textContent;
  if (word && !audio.paused && window.heard.marked.at(-1) !== word) window.heard.marked.push(word);
}).observe(document.getElementById("words"), { subtree: true, attributes: true });
"""
# Of everything visible: the colour of its text, or of its border where it is a field, and what is behind.
COLOURS = """
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  if (!element.checkVisibility() || element.disabled) continue;
  const style = getComputedStyle(element);
  const name = element.id || element.className || element.tagName;
  const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  if (hasText || element.value) found.push([name, 4.5, style.color, behind(element)]);
  if (element.placeholder) found.push([name, 4.5, getComputedStyle(element, "::placeholder").color, behind(element)]);
  if (element.matches("textarea, select, input:not([type=range])"))
    found.push([name, 3, style.borderTopColor, behind(element.parentElement)]);
}
const canvas = document.getElementById("wave");
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
for (let at = 0; at < pixels.length; at += 4)
  if (pixels[at + 3] === 255) found.push(["wave", 3, `rgb(${pixels.slice(at, at + 3)})`, behind(canvas)]);
const unique = new Set(found.map((each) => JSON.stringify(each)));
return [...unique].map((each) => JSON.parse(each));
"""


@dataclass(frozen=True, slots=True)
class Page:
    """The page in a browser."""

    browser: Any
    downloads: Path
    url: str
    key: str = ""

    def open(self, *, key: str | None = None) -> Page:
        """A fresh page whose model is ready; `key` is what was typed the last time."""
        self.browser.get(self.url)
        self.browser.execute_script(f"sessionStorage.setItem('declaim-key', '{self.key if key is None else key}')")
        self.browser.refresh()
        self.until(lambda: self["speak"].is_enabled())
        self.browser.execute_script(LISTEN)
        return self

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait. Asking costs the browser something: ten times a second is enough."""
        try:
            WebDriverWait(self.browser, 45, poll_frequency=0.1).until(lambda _: condition())
        except TimeoutException:
            shown = "; ".join(self[name].text for name in ("load", "error", "ended"))
            raise AssertionError(f"the page does not come so far: {shown}") from None

    def until_played(self) -> None:
        """Wait until all is said, and can be downloaded."""
        script = "return !document.getElementById('download').hidden && document.getElementById('stop').disabled"
        self.until(lambda: self.browser.execute_script(script))

    def write(self, text: str) -> None:
        """As if it were pasted."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.browser.execute_script(script, self["text"], text)

    def type(self, text: str) -> None:
        self["text"].clear()
        self["text"].send_keys(text)

    def press(self, *keys: str) -> str:
        """Keys, to what has the focus; gives the id of what has it then."""
        self.browser.switch_to.active_element.send_keys(*keys)
        return str(self.browser.switch_to.active_element.get_attribute("id"))

    @property
    def heard(self) -> dict[str, Any]:
        return dict(self.browser.execute_script("return window.heard"))

    def is_playing(self) -> bool:
        return bool(self.browser.execute_script("return !arguments[0].paused", self["audio"]))

    def download(self, name: str) -> np.ndarray:
        """Press Download, which saves a file of this name; gives its samples, which are speech and not silence."""
        file = self.downloads / name
        self["download"].click()
        self.until(file.is_file)
        audio, rate_hz = soundfile.read(file, dtype="float32")
        file.unlink()
        assert rate_hz == 24_000 and 0.01 < np.sqrt(np.mean(audio**2)) < 0.5
        return audio

    def emulate(self, *, scheme: str = "light", width: int = 1100) -> None:
        """A colour scheme and a window; what is painted afterwards is painted so."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))"
        self.browser.execute_async_script(frames)

    def complaints(self) -> list[str]:
        """What the browser wrote to its console since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage {QUIET}".split():
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.set_script_timeout(20)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server with the embedded voice, and a key of it."""
    folder = tmp_path_factory.mktemp("server")
    database = migrated(folder)
    key = make_key(database)
    database.close()
    with serve("inline", folder) as (url, _):
        yield url, key


@pytest.fixture
def page(server: tuple[str, str], browser: Any, downloads: Path) -> Page:
    return Page(browser, downloads, *server).open()


def test_typed_text_is_heard_again_and_again_and_its_words_are_marked(page: Page) -> None:
    page.complaints()
    page.type(TEXT)
    assert page["count"].text == f"{len(TEXT)} of 4096 characters"
    page["speak"].click()
    page.until(page.is_playing)
    page.until_played()
    seconds = len(page.download("speech.wav")) / 24_000
    assert 1.5 < seconds < 6.0
    assert page["words"].text == TEXT and page.heard["loudest"] > 0.05
    # A busy machine may leave out a short one.
    marked, words = page.heard["marked"], TEXT.split()
    assert len(marked) > len(words) / 2 and [word for word in words if word in marked] == marked
    assert re.fullmatch(r"\d+ ms", page["first-audio"].text) and float(page["rtf"].text) > 0
    assert page["duration"].text == f"{seconds:.2f} s" and page["ended"].text.startswith("stop")
    page.browser.execute_script("window.heard.marked = []; arguments[0].play()", page["audio"])
    page.until(lambda: "canoe" in page.heard["marked"])
    assert page.complaints() == []


def test_stop_ends_the_sound_and_the_work_and_keeps_what_was_made(page: Page, server: tuple[str, str]) -> None:
    page.write(f"{TEXT} " * 12)
    page["speak"].click()
    page.until(lambda: page.heard["loudest"] > 0.05 and len(page.heard["marked"]) > 1)
    page["stop"].click()
    assert not page.is_playing() and not page["stop"].is_enabled()
    assert eventually(lambda: gauge(server[0], "declaim_streams") == 0)
    assert page["ended"].text == "stopped" and not page["error"].is_displayed()
    assert 0.2 < len(page.download("speech.wav")) / 24_000 < 25.0


def test_pressing_speak_again_begins_again(page: Page) -> None:
    page.write(f"{TEXT} " * 4)
    page["speak"].click()
    page.until(lambda: page["words"].text)
    page.type("Begin again.")
    page["speak"].click()
    page.until_played()
    assert page["words"].text == "Begin again." and not page["error"].is_displayed()
    assert len(page.download("speech.wav")) / 24_000 < 3.0


def test_a_wrong_key_is_said_and_a_right_one_helps(page: Page) -> None:
    page.open(key="")
    page.until(lambda: page["error"].text == "This server asks for a key: write one into the field Key.")
    page.open(key="sk-declaim-wrong")
    page["speak"].click()
    page.until(lambda: page["ended"].text == "error")
    assert "API key" in page["error"].text and page["error"].get_attribute("role") == "alert"
    assert page["key"].get_attribute("aria-invalid") == "true"
    page["key"].clear()
    page["key"].send_keys(page.key, Keys.TAB)
    page.until(lambda: len(Select(page["voice"]).options) > 10)
    assert not page["error"].is_displayed() and page["key"].get_attribute("aria-invalid") is None
    page.type("Now it speaks.")
    page["speak"].click()
    page.until(lambda: page["words"].text == "Now it speaks.")
    assert not page["error"].is_displayed()


def test_an_mp3_plays_when_it_is_whole(page: Page) -> None:
    page.complaints()
    page.type("This is an mp3.")
    Select(page["format"]).select_by_visible_text("mp3")
    page["speak"].click()
    page.until(lambda: page.heard["loudest"] > 0.05)
    page.until(lambda: not page["stop"].is_enabled())
    assert 0.5 < len(page.download("speech.mp3")) / 24_000 < 4.0
    assert any(name == "wave" for name, *_ in page.browser.execute_script(COLOURS)), "no waveform"
    assert page.complaints() == []


def test_a_keyboard_is_enough(page: Page) -> None:
    page.browser.execute_script("document.activeElement.blur()")
    order = [page.press(Keys.TAB) for _ in range(7)]
    assert order == ["text", "voice", "format", "speed", "seed", "key", "speak"]
    outline = page.browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", page["speak"])
    assert outline == "solid"
    page.write(f"{TEXT} " * 4)
    page["speak"].send_keys(Keys.ENTER)
    page.until(lambda: page.heard["loudest"] > 0.05)
    assert page.press(Keys.TAB) == "stop"
    assert page.press(Keys.ENTER) == "speak", "a button that is disabled loses the focus"
    assert page["ended"].text == "stopped"
    page.type("From the text itself.")
    page.press(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page["words"].text == "From the text itself.")


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        channels = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_everything_can_be_read_in_both_schemes_and_on_a_phone(page: Page) -> None:
    page.type(TEXT)
    page["speak"].click()
    page.until(lambda: page.heard["marked"])
    try:
        for scheme in ("light", "dark"):
            page.emulate(scheme=scheme)
            found = page.browser.execute_script(COLOURS)
            assert {"text", "count", "load", "wave", "speak", "ended"} <= {name for name, *_ in found}
            poor = [(*each, round(contrast(*each[2:]), 2)) for each in found if contrast(*each[2:]) < each[1]]
            assert poor == [], scheme
        page.emulate(width=320)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 320
    finally:
        page.emulate()


def test_everything_that_is_used_has_a_name(page: Page) -> None:
    named = {
        element.get_attribute("id"): element.accessible_name
        for element in page.browser.find_elements("css selector", "input, select, textarea, button, audio, canvas")
        if element.is_displayed()
    }
    assert len(named) == 10 and all(named.values()), named
    assert named["text"] == "Text" and named["voice"].startswith("Voice") and named["key"] == "Key"
    assert page.browser.find_element("css selector", "html").get_attribute("lang") == "en" and page.browser.title


class Actor(FakeEngine):
    """Speaks dialogues, imitates."""

    @property
    def spec(self) -> ModelSpec:
        return replace(super().spec, supports_dialogue=True)


@contextmanager
def serving(folder: Path, engine: FakeEngine) -> Iterator[str]:
    """A server in this process."""
    database = migrated(folder)
    serving = Serving(lambda: engine)
    voices = VoiceStore(serving.engine, database)
    routers = [
        build_voices_router(voices, OpenGate(), check_open=serving.engine),
        build_page_router(serving, max_input_chars=4096),
    ]
    try:
        with served(create_app(serving, voices=voices, routers=routers)) as address:
            assert eventually(lambda: serving.stage == "ready")
            yield f"http://{address}/"
    finally:
        voices.close()
        database.close()


def test_a_stream_that_breaks_is_told_and_its_beginning_kept(browser: Any, downloads: Path, tmp_path: Path) -> None:
    engine = Actor(Script(num_chunks=4, fail_after=3, delay_s=0.2, failure=SequenceFailed("the voice broke")))
    with serving(tmp_path, engine) as url:
        page = Page(browser, downloads, url).open()
        page["speak"].click()
        page.until_played()
        assert "the voice broke" in page["error"].text and page["ended"].text == "error"
        assert len(page.download("speech.wav")) > 4_000
        page.browser.get("about:blank")


def test_a_server_that_is_full_for_a_moment_is_asked_again_and_one_that_stays_so_is_told(
    browser: Any, downloads: Path, tmp_path: Path
) -> None:
    engine = Actor(Script(refuse=Overloaded("the queue is full", retry_after_s=0.2)))
    with serving(tmp_path, engine) as url:
        page = Page(browser, downloads, url).open()
        page["speak"].click()
        page.until(lambda: page["ended"].text == "error")
        assert "the queue is full" in page["error"].text and len(engine.requests) == 3
        page["speak"].click()
        assert eventually(lambda: len(engine.requests) == 4)
        engine.script = Script(num_chunks=4)
        page.until_played()
        assert not page["error"].is_displayed() and len(page.download("speech.wav")) > 4_000
        page.browser.get("about:blank")


def test_the_embedded_voice_imitates_nobody_and_speaks_alone(page: Page) -> None:
    assert not page["own-voice"].is_displayed() and not page["tabs"].is_displayed()


def test_a_dialogue_is_written_by_turns_and_a_voice_is_uploaded(browser: Any, downloads: Path, tmp_path: Path) -> None:
    engine = Actor()
    with serving(tmp_path, engine) as url:
        page = Page(browser, downloads, url).open()
        page["tab-text"].send_keys(Keys.ARROW_RIGHT)
        assert page["panel-dialogue"].is_displayed() and not page["panel-text"].is_displayed()
        page["add-turn"].click()
        page.browser.switch_to.active_element.send_keys("So did I.", Keys.ENTER)
        page.until(lambda: engine.requests)
        assert engine.requests[0].text == "[S1] Did you hear that? [S2] Every word of it. [S1] So did I."
        page.until_played()

        time_s = np.arange(3 * 24_000) / 24_000
        soundfile.write(
            tmp_path / "me.wav", 0.3 * np.sin(2 * np.pi * 200 * time_s) * np.sin(2 * np.pi * time_s), 24_000
        )
        assert page["own-voice"].is_displayed()
        page["voice-name"].send_keys("Me")
        page["voice-file"].send_keys(str(tmp_path / "me.wav"))
        page["voice-transcript"].send_keys("What I said.")
        page["voice-consent"].send_keys(str(tmp_path / "me.wav"))
        page["consent-language"].send_keys(Keys.ENTER)
        page.until(lambda: page["upload-status"].text not in ("", "uploading…"))
        assert page["upload-status"].text == "ready"
        assert Select(page["voice"]).first_selected_option.text == "Me"
        page["speak"].click()
        page.until(lambda: len(engine.requests) > 1)
        assert len(engine.encoded) == 1
        page.browser.get("about:blank")


class Moody(FakeEngine):
    """Has dials, words and languages, and a speaker encoder."""

    @property
    def spec(self) -> ModelSpec:
        mood = ControlSpec("weights of two", 0.0, 1.0, None, length=2, names={"glad": (1.0, 0.0)})
        return replace(
            super().spec,
            embeds_voices=True,
            controls={"emotion": mood, "speaking_rate": ControlSpec("sounds a second", 1.0, 40.0, (15.0,))},
            instructions={"slowly": {"speaking_rate": (10.0,)}},
            languages=("en-gb", "yue", "en-gb-x-rp"),
        )


def test_a_models_dials_words_and_languages_are_shown_and_sent(browser: Any, downloads: Path, tmp_path: Path) -> None:
    engine = Moody()

    def spoken(page: Page) -> SpeechRequest:
        count = len(engine.requests)
        page["speak"].click()
        page.until(lambda: len(engine.requests) > count)
        page.until_played()
        return engine.requests[-1]

    with serving(tmp_path, engine) as url:
        page = Page(browser, downloads, url).open()
        page.complaints()
        assert page["words-known"].text == "Words it acts on: slowly"
        languages = [option.text for option in Select(page["language"]).options]
        assert languages[0] == "as the text is written" and "Cantonese (yue)" in languages and len(languages) == 4
        assert not spoken(page).controls and engine.requests[-1].language is None
        emotion, rate = page["dials"].find_elements("css selector", "input")
        page["instructions"].send_keys("slowly")
        Select(page["language"]).select_by_value("en-gb-x-rp")
        emotion.send_keys("glad")
        asked = spoken(page)
        assert asked.controls == {"emotion": "glad", "speaking_rate": (10.0,)} and asked.language == "en-gb-x-rp"
        emotion.clear()
        emotion.send_keys("0.5, 1")
        rate.send_keys("22.5")
        assert spoken(page).controls == {"emotion": (0.5, 1), "speaking_rate": 22.5}
        assert not page["voice-transcript"].get_attribute("required")
        assert not page.complaints()
