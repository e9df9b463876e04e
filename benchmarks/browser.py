"""What a real browser says of the pages of a static site, and what is wrong with their HTML.

Headless Chromium from the system's packages opens every page by a ``file:`` address, in a light and a dark theme and at several widths, and
is asked for console errors, overflow, contrast, charts without a table and the outline. It is driven over two pipes; nothing is fetched.
`malformed` reads the text of a page and needs no browser.

    python benchmarks/browser.py SITE [--screenshots DIR]

prints the faults of every ``index.html`` under SITE and exits with 1 if there are any.
"""

import argparse
import base64
import contextlib
import html.entities
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

Theme = Literal["light", "dark"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (360, 1200)
THEMES: tuple[Theme, ...] = ("light", "dark")
HEIGHT = 800
TALLEST_SCREENSHOT = 12_000
SECONDS = 30.0  # for one answer of the browser, or one page to load
SECONDS_TO_START = 60.0
SECONDS_TO_END = 5.0
FEW_REPORTS = 6
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that asks for something elsewhere gets nothing, and is reported
    "--remote-debugging-pipe",
)


class BrowserError(RuntimeError):
    """The browser did not start, did not answer in time, or refused a command."""


@dataclass(frozen=True)
class LowContrast:
    """Text that stands out too little from what is behind it."""

    selector: str
    ratio: float
    needed: float
    text: str


@dataclass(frozen=True)
class Seen:
    """One page in one theme at one width.

    Attributes
    ----------
    console : tuple of str
        Errors, warnings, exceptions, violations of the page's policy, failed loads, and loads from elsewhere.
    overflow_px : int
        How far the page reaches beyond the right edge, with every ``<details>`` closed or open, whichever is more.
    widest : tuple of str
        What reaches furthest, with the pixels beyond the edge.
    contrast : tuple of LowContrast
        Text below WCAG AA; one for each selector and ratio, though many elements may share them.
    charts_without_table : tuple of str
        Pictures in a figure or section that no table follows under the same heading and in the same section.
    unnamed_images : tuple of str
        Images without ``alt``, and pictures with ``role=img`` without a name.
    skipped_headings : tuple of str
        Headings more than one level below the one before.
    """

    page: str
    theme: Theme
    width: int
    console: tuple[str, ...]
    overflow_px: int
    widest: tuple[str, ...]
    contrast: tuple[LowContrast, ...]
    charts_without_table: tuple[str, ...]
    h1: int
    lang: str
    unnamed_images: tuple[str, ...]
    duplicate_ids: tuple[str, ...]
    skipped_headings: tuple[str, ...]
    empty_links: tuple[str, ...]

    def faults(self) -> list[str]:
        """Everything that is wrong, one line each; empty for a clean page."""
        lines = [f"console: {line}" for line in self.console]
        if self.overflow_px:
            lines.append(f"overflow of {self.overflow_px} px: {'; '.join(self.widest) or 'cause unknown'}")
        lines += [f"contrast {c.ratio:.2f}, needed {c.needed:g}: {c.selector} {c.text!r}" for c in self.contrast]
        lines += [f"chart without table: {x}" for x in self.charts_without_table]
        if self.h1 != 1:
            lines.append(f"{self.h1} h1 headings, not one")
        if not self.lang:
            lines.append("no language")
        lines += [f"image without a name: {x}" for x in self.unnamed_images]
        lines += [f"duplicate id: {x}" for x in self.duplicate_ids]
        lines += [f"heading skips a level: {x}" for x in self.skipped_headings]
        lines += [f"empty link: {x}" for x in self.empty_links]
        return lines


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


def look(
    chromium: str,
    root: Path,
    pages: Sequence[str],
    *,
    widths: Sequence[int] = WIDTHS,
    themes: Sequence[Theme] = THEMES,
    screenshots: Path | None = None,
) -> list[Seen]:
    """Open pages in one browser, each in every theme at every width, and say what is seen.

    Parameters
    ----------
    chromium : str
        Path of the browser, as from `find_chromium`.
    root : Path
        Folder of the site.
    pages : sequence of str
        Paths of the pages, relative to ``root``.
    widths : sequence of int
        Widths of the window in CSS pixels.
    themes : sequence of {'light', 'dark'}
        What ``prefers-color-scheme`` is to say.
    screenshots : Path or None
        Folder for pictures of the whole pages, as a visitor first sees them.

    Returns
    -------
    list of Seen
        In the order of pages, then themes, then widths.

    Raises
    ------
    FileNotFoundError
        If a page does not exist.
    BrowserError
        If the browser does not start or does not answer in time. It is ended in any case.
    """
    paths = {page: (root / page).resolve(strict=True) for page in pages}
    if screenshots is not None:
        screenshots.mkdir(parents=True, exist_ok=True)
    seen = []
    with _started(chromium) as browser:
        for page, path in paths.items():
            with browser.tab() as tab:
                for theme in themes:
                    for width in widths:
                        picture = None
                        if screenshots is not None:
                            picture = screenshots / f"{page.replace('/', '_')}-{theme}-{width}.png"
                        seen.append(_look_once(tab, page, path.as_uri(), theme, width, picture))
    return seen


def _look_once(tab: "_Tab", page: str, address: str, theme: Theme, width: int, picture: Path | None) -> Seen:
    size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    tab.call("Emulation.setDeviceMetricsOverride", size)
    tab.call("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    tab.navigate(address)
    tab.evaluate("document.fonts.ready.then(() => new Promise((done) => setTimeout(() => done(null), 20)))")
    if picture is not None:
        picture.write_bytes(tab.screenshot())
    found = tab.evaluate(MEASURE)
    return Seen(
        page,
        theme,
        width,
        tab.complaints(),
        found["overflow_px"],
        tuple(found["widest"]),
        tuple(LowContrast(**c) for c in found["contrast"]),
        tuple(found["charts_without_table"]),
        found["h1"],
        found["lang"],
        tuple(found["unnamed_images"]),
        tuple(found["duplicate_ids"]),
        tuple(found["skipped_headings"]),
        tuple(found["empty_links"]),
    )


# -- the browser's process and its two pipes -------------------------------------------------------------------

# Moves the two ends it is given to descriptors 3 and 4, where the browser looks for them, and becomes the browser.
BECOME = """
import fcntl, os, sys
ends = [int(x) for x in sys.argv[1:3]]
high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
for end in ends:
    os.close(end)
for place, end in zip((3, 4), high):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


@contextlib.contextmanager
def _started(chromium: str) -> Iterator["_Browser"]:
    """A browser with a fresh profile that is gone, with everything it started, when the block ends."""
    with contextlib.ExitStack() as held:
        # Whatever outlives its parent for a moment may still write there.
        temporary = tempfile.TemporaryDirectory(prefix="weighbridge-browser-", ignore_cleanup_errors=True)
        folder = Path(held.enter_context(temporary))
        errors = folder / "stderr"
        to_browser = _pipe(held)
        from_browser = _pipe(held)
        theirs = (to_browser.reads, from_browser.writes)
        become = [sys.executable, "-I", "-S", "-c", BECOME, *map(str, theirs)]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*become, chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=theirs,
                env={**os.environ, "TMPDIR": str(folder)},
                start_new_session=True,
            )
        browser = _Browser(to_browser.writes, from_browser.reads, errors)
        try:
            to_browser.close_read()
            from_browser.close_write()
            browser.call("Browser.getVersion", seconds=SECONDS_TO_START)
            yield browser
        finally:
            browser.end()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
            process.wait()


class _Ends:
    """The two ends of a pipe."""

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe()
        self._open = {self.reads, self.writes}

    def close_read(self) -> None:
        self._close(self.reads)

    def close_write(self) -> None:
        self._close(self.writes)

    def close(self) -> None:
        self.close_read()
        self.close_write()

    def _close(self, end: int) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)


def _pipe(held: contextlib.ExitStack) -> _Ends:
    ends = _Ends()
    held.callback(ends.close)
    return ends


class _Browser:
    """The DevTools protocol: JSON messages, each ended by a zero byte."""

    def __init__(self, writes: int, reads: int, errors: Path) -> None:
        self._writes, self._reads, self._errors = writes, reads, errors
        self._left = b""
        self._messages: list[dict[str, Any]] = []
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def call(
        self,
        method: str,
        parameters: Mapping[str, Any] | None = None,
        session: str | None = None,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """Send a command and wait for its answer; what happens meanwhile is added to ``events``."""
        self._last += 1
        number = self._last
        message: dict[str, Any] = {"id": number, "method": method, "params": dict(parameters or {})}
        if session is not None:
            message["sessionId"] = session
        deadline = time.monotonic() + (SECONDS if seconds is None else seconds)
        self._send(json.dumps(message).encode() + b"\0", method)
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") != number:
                self.events.append(answer)
            elif "error" in answer:
                raise BrowserError(f"{method}: {answer['error'].get('message')}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def wait(self, method: str, session: str, what: Mapping[str, Any]) -> None:
        """Wait until an event has happened, now or since the last that was forgotten."""
        deadline = time.monotonic() + SECONDS
        checked = 0
        while True:
            for event in self.events[checked:]:
                given = event.get("params", {})
                if (
                    event.get("method") == method
                    and event.get("sessionId") == session
                    and what.items() <= given.items()
                ):
                    return
            checked = len(self.events)
            self.events.append(self._receive(deadline, method))

    @contextlib.contextmanager
    def tab(self) -> Iterator["_Tab"]:
        """A page of its own, closed when the block ends."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = _Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.call("Page.setLifecycleEventsEnabled", {"enabled": True})
        yield tab
        self.call("Target.closeTarget", {"targetId": target})

    def end(self) -> None:
        """Ask the browser to end, and give it a moment until it has let go of its pipe."""
        deadline = time.monotonic() + SECONDS_TO_END
        with contextlib.suppress(BrowserError):
            self.call("Browser.close", seconds=SECONDS_TO_END)
            while True:
                self._receive(deadline, "Browser.close")

    def _send(self, data: bytes, method: str) -> None:
        try:
            while data:
                data = data[os.write(self._writes, data) :]
        except BrokenPipeError as e:
            raise self._gone(method) from e

    def _receive(self, deadline: float, method: str) -> dict[str, Any]:
        poll = select.poll()
        poll.register(self._reads, select.POLLIN)
        while not self._messages:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise BrowserError(f"{method}: the browser did not answer in time{self._said()}")
            data = os.read(self._reads, 1 << 20)
            if not data:
                raise self._gone(method)
            *whole, self._left = (self._left + data).split(b"\0")
            self._messages = [json.loads(text) for text in whole]
        return self._messages.pop(0)

    def _gone(self, method: str) -> BrowserError:
        return BrowserError(f"{method}: the browser has ended{self._said()}")

    def _said(self) -> str:
        said = self._errors.read_text(errors="replace").strip()[-1000:]
        return f"; it said: {said}" if said else ""


class _Tab:
    """One page of the browser."""

    def __init__(self, browser: _Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def navigate(self, address: str) -> None:
        self._browser.events.clear()
        answer = self.call("Page.navigate", {"url": address})
        if answer.get("errorText"):
            raise BrowserError(f"{address}: {answer['errorText']}")
        loaded = {"name": "load", "loaderId": answer["loaderId"]}
        self._browser.wait("Page.lifecycleEvent", self._session, loaded)

    def evaluate(self, expression: str) -> Any:
        wanted = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", wanted)
        if "exceptionDetails" in answer:
            raise BrowserError(f"the script of the measurement failed: {_exception(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], TALLEST_SCREENSHOT), "scale": 1}
        wanted = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.call("Page.captureScreenshot", wanted)["data"])

    def complaints(self) -> tuple[str, ...]:
        """What the page's console, policy and loads complained of since it was opened."""
        lines: list[str] = []
        asked: dict[str, str] = {}
        failed: set[str] = set()
        events = [e for e in self._browser.events if e.get("sessionId") == self._session]
        for method, p in ((e["method"], e["params"]) for e in events):
            if method == "Network.requestWillBeSent":
                asked[p["requestId"]] = p["request"]["url"]
                if p["request"]["url"].partition(":")[0] not in ("file", "data", "blob"):
                    lines.append(f"load from elsewhere: {p['request']['url']}")
            elif method == "Network.loadingFailed" and not p.get("canceled"):
                failed.add(p["requestId"])
                why = p.get("blockedReason") or p["errorText"]
                lines.append(f"failed load: {asked.get(p['requestId'], p['type'])}: {why}")
            elif method == "Runtime.exceptionThrown":
                lines.append(f"exception: {_exception(p['exceptionDetails'])}")
            elif method == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                said = " ".join(str(a.get("value", a.get("description", a["type"]))) for a in p["args"])
                lines.append(f"console.{p['type']}: {said}")
        for p in (e["params"]["entry"] for e in events if e["method"] == "Log.entryAdded"):
            if p["level"] in ("error", "warning") and p.get("networkRequestId") not in failed:
                lines.append(f"{p['source']} {p['level']}: {p['text']}")
        return tuple(dict.fromkeys(lines))


def _exception(details: Mapping[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details.get("text"))


# -- what is measured inside the page --------------------------------------------------------------------------

# Colours are [red, green, blue, alpha]. A text is carried upwards through its ancestors as a pair: the colour of a point of the text, and that
# of a point beside it; each ancestor puts its background under both, then applies its opacity to both.
MEASURE = r"""(() => {
const CLEAR = [0, 0, 0, 0];
const SKIPPED = new Set(['script', 'style', 'noscript', 'template', 'title', 'desc', 'metadata', 'option']);
const SHAPES = 'path, rect, circle, ellipse, polygon';

const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
const known = new Map();
function colour(text) {
  if (!known.has(text)) known.set(text, parse(text));
  return known.get(text);
}
function parse(text) {
  if (!text || text === 'none' || text.startsWith('url(')) return CLEAR;
  const plain = /^rgba?\(([^)]+)\)/.exec(text);
  if (plain) {
    const [r, g, b, a = 1] = plain[1].split(/[\s,\/]+/).map(Number);
    return [r, g, b, a];
  }
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = '#000';
  pen.fillStyle = text;
  pen.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
function over(top, under) {
  const alpha = top[3] + under[3] * (1 - top[3]);
  if (alpha === 0) return CLEAR;
  return [...[0, 1, 2].map((i) => (top[i] * top[3] + under[i] * under[3] * (1 - top[3])) / alpha), alpha];
}
const faded = (c, share) => [c[0], c[1], c[2], c[3] * share];
function luminance(c) {
  const [r, g, b] = c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
}

function name(e) {
  return e.localName + (e.id ? '#' + e.id : '') + [...e.classList].map((c) => '.' + c).join('');
}
function selector(e) {
  const parts = [];
  for (let n = e; n && n !== document.body && n !== document.documentElement && parts.length < 4; n = n.parentElement) {
    parts.unshift(name(n));
    if (n.id) break;
  }
  return parts.join(' > ') || name(e);
}
const shortened = (text) => text.replace(/\s+/g, ' ').trim().slice(0, 60);

const canvas = (() => {  // the colour under the root, which a dark colour scheme changes
  const probe = document.createElement('span');
  probe.style.setProperty('background-color', 'Canvas', 'important');
  document.documentElement.append(probe);
  const found = colour(getComputedStyle(probe).backgroundColor);
  probe.remove();
  return found;
})();
function grounds(e, style) {  // what one element may have behind its content: one colour, or each of a gradient's
  if (e instanceof SVGElement && e.ownerSVGElement) return [CLEAR];
  const plain = colour(style.backgroundColor);
  if (!style.backgroundImage.includes('gradient(')) return [plain];
  const stops = style.backgroundImage.match(/(?:rgba?|color|oklch|oklab|lch|lab|hsla?)\([^()]*\)/g) || [];
  return stops.length ? stops.slice(0, 8).map((s) => over(colour(s), plain)) : [plain];
}
function worst(element, ink, layers) {
  let pairs = [[ink, CLEAR]];
  for (const layer of layers) pairs = pairs.map(([t, u]) => [over(t, layer), over(u, layer)]);
  for (let e = element; e; e = e.parentElement) {
    const style = getComputedStyle(e);
    const share = Number(style.opacity);
    pairs = grounds(e, style).flatMap((g) => pairs.map(([t, u]) => [faded(over(t, g), share), faded(over(u, g), share)])).slice(0, 64);
  }
  return Math.min(...pairs.map(([t, u]) => contrast(over(t, canvas), over(u, canvas))));
}

const cut = new Map();
function cutAway(e) {  // for screen readers only, or left of and above the page
  if (!e || e === document.documentElement) return false;
  if (!cut.has(e)) {
    const style = getComputedStyle(e);
    const box = e.getBoundingClientRect();
    cut.set(e, /^inset\((?:50|100)%/.test(style.clipPath) || style.clip.startsWith('rect(0px, 0px, 0px') || style.clip.startsWith('rect(1px, 1px, 1px')
      || (style.overflowX !== 'visible' && (box.width <= 1 || box.height <= 1))
      || cutAway(e.parentElement));
  }
  return cut.get(e);
}
const reachable = (box) => box.width > 0 && box.height > 0 && box.right + scrollX > 0 && box.bottom + scrollY > 0;

const low = new Map();
function check(where, element, style, ink, layers, size, text) {
  if (ink[3] === 0) return;
  const needed = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
  const ratio = worst(element, ink, layers);
  if (ratio >= needed) return;
  const shown = Math.floor(ratio * 100) / 100;
  const key = [where, shown, needed].join('|');
  if (!low.has(key)) low.set(key, {selector: where, ratio: shown, needed, text: shortened(text)});
}
function behind(element, style) {  // what an SVG draws under a text: its halo, then the shapes before it, nearest first
  const layers = [];
  if (style.paintOrder.startsWith('stroke') && parseFloat(style.strokeWidth) >= 2) layers.push(faded(colour(style.stroke), Number(style.strokeOpacity)));
  const box = element.getBoundingClientRect();
  const outermost = (e) => (e.ownerSVGElement ? outermost(e.ownerSVGElement) : e);
  const root = outermost(element);
  for (const shape of [...root.querySelectorAll(SHAPES)].reverse()) {
    if (!(shape.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
    if (shape.closest('defs, symbol, clipPath, mask, pattern, marker') || !shape.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const matrix = shape.getScreenCTM();
    if (!matrix) continue;
    const point = new DOMPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2).matrixTransform(matrix.inverse());
    if (!shape.isPointInFill(point)) continue;
    const own = getComputedStyle(shape);
    layers.push(faded(colour(own.fill), Number(own.fillOpacity) * Number(own.opacity)));
  }
  return layers;
}
function checkTexts() {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element || SKIPPED.has(element.localName) || element.closest(':disabled')) continue;
    if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) || cutAway(element)) continue;
    const drawn = element instanceof SVGElement;
    range.selectNodeContents(node);
    if (drawn ? !reachable(element.getBoundingClientRect()) : ![...range.getClientRects()].some(reachable)) continue;
    const style = getComputedStyle(element);
    let size = parseFloat(style.fontSize);
    if (!drawn) {
      check(selector(element), element, style, colour(style.color), [], size, node.data);
      continue;
    }
    const matrix = element.getScreenCTM && element.getScreenCTM();
    if (matrix) size *= Math.hypot(matrix.a, matrix.b);
    check(selector(element), element, style, faded(colour(style.fill), Number(style.fillOpacity)), behind(element, style), size, node.data);
  }
  for (const element of document.body.querySelectorAll('*')) {
    for (const which of ['::before', '::after']) {
      const style = getComputedStyle(element, which);
      const text = /^"(.*)"$/s.exec(style.content);
      if (!text || !text[1].trim() || style.display === 'none' || style.visibility !== 'visible') continue;
      if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) || cutAway(element) || !reachable(element.getBoundingClientRect())) continue;
      const ink = faded(colour(style.color), Number(style.opacity));
      check(selector(element) + which, element, style, ink, [colour(style.backgroundColor)], parseFloat(style.fontSize), text[1]);
    }
  }
}

function overflow() {
  const px = Math.max(0, document.documentElement.scrollWidth - innerWidth);
  if (!px) return {px, widest: []};
  const far = new Map();
  const held = (e) => {  // inside something that scrolls or cuts off by itself
    for (let n = e.parentElement; n && n !== document.body; n = n.parentElement) if (getComputedStyle(n).overflowX !== 'visible') return true;
    return false;
  };
  const note = (e, right) => {
    if (right + scrollX > innerWidth + 0.5 && e && !held(e)) far.set(e, Math.max(far.get(e) || 0, right + scrollX - innerWidth));
  };
  for (const e of document.body.querySelectorAll('*')) note(e, e.getBoundingClientRect().right);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    range.selectNodeContents(node);
    const e = node.parentElement;
    const cuts = e && e !== document.body && getComputedStyle(e).overflowX !== 'visible';
    if (node.data.trim() && !cuts) note(e, range.getBoundingClientRect().right);
  }
  const inner = [...far].filter(([e, by]) => ![...far].some(([o, more]) => o !== e && e.contains(o) && more >= by - 0.5));
  inner.sort((a, b) => b[1] - a[1]);
  return {px, widest: inner.slice(0, 5).map(([e, by]) => `${selector(e)} (+${Math.ceil(by)} px)`)};
}

const HEADINGS = [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')];
const rank = (h) => Number(h.localName[1]);
const after = (a, b) => Boolean(a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING);
function withoutTable(chart) {
  if (!chart.closest('figure, section')) return false;
  const section = chart.closest('section, article, main') || document.body;
  const outer = HEADINGS.filter((h) => !h.closest('figure'));
  const above = outer.filter((h) => after(h, chart)).pop();
  const end = outer.find((h) => after(chart, h) && rank(h) <= (above ? rank(above) : 6));
  return ![...section.querySelectorAll('table')].some((t) => after(chart, t) && !(end && after(end, t)));
}
const named = (e) => e.getAttribute('aria-label') || (e.getAttribute('aria-labelledby') || '').split(/\s+/).some((id) => id && document.getElementById(id));

const first = overflow();
for (const details of document.querySelectorAll('details')) details.open = true;
const second = overflow();
const more = second.px > first.px ? second : first;
checkTexts();
const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
return {
  overflow_px: more.px,
  widest: more.widest,
  contrast: [...low.values()],
  charts_without_table: [...document.querySelectorAll('svg[role=img]')].filter(withoutTable).map(selector),
  h1: document.querySelectorAll('h1').length,
  lang: document.documentElement.lang,
  unnamed_images: [
    ...[...document.querySelectorAll('img, area[href], input[type=image]')].filter((e) => !e.hasAttribute('alt') && !named(e)),
    ...[...document.querySelectorAll('[role=img]:not(img)')].filter((e) => !named(e) && !e.querySelector(':scope > title')),
  ].map(selector),
  duplicate_ids: [...new Set(ids.filter((id, i) => ids.indexOf(id) !== i))],
  skipped_headings: HEADINGS.filter((h, i) => rank(h) > (i ? rank(HEADINGS[i - 1]) : 0) + 1).map((h) => `${selector(h)} "${shortened(h.textContent)}"`),
  empty_links: [...document.querySelectorAll('a[href]')].filter((a) => !a.textContent.trim() && !named(a) && ![...a.querySelectorAll('[alt]')].some((e) => e.alt) && ![...a.querySelectorAll('svg')].some(named))
    .map((a) => `${selector(a)} (${a.getAttribute('href')})`),
};
})()"""


# -- the text of a page ----------------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VOID = _names("area base br col embed hr img input link meta source track wbr")
BLOCK = _names(
    "address article aside blockquote details dialog div dl fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup hr main menu "
    "nav ol p pre search section table ul"
)
HEADING = _names("h1 h2 h3 h4 h5 h6")
INLINE = _names("abbr b bdi bdo cite code data dfn em i kbd mark q s samp small span strong sub sup time u var")
PHRASING_ONLY = INLINE | HEADING | {"p", "pre", "label", "button", "legend"}
INTERACTIVE = _names("a button details embed iframe label select textarea")
OTHER = _names(
    "a audio body button canvas caption colgroup datalist dd del dt head html iframe ins label legend li map math meter noscript object optgroup "
    "option output picture progress rp rt ruby script select slot style summary svg tbody td template textarea tfoot th thead title tr video"
)
KNOWN = VOID | BLOCK | INLINE | OTHER
ANYWHERE = frozenset({"script", "template"})
CHILDREN: dict[str, frozenset[str]] = {
    "html": frozenset({"head", "body"}),
    "head": _names("base link meta noscript style title"),
    "table": _names("caption colgroup thead tbody tfoot tr"),
    "colgroup": frozenset({"col"}),
    "thead": frozenset({"tr"}),
    "tbody": frozenset({"tr"}),
    "tfoot": frozenset({"tr"}),
    "tr": frozenset({"td", "th"}),
    "ul": frozenset({"li"}),
    "ol": frozenset({"li"}),
    "menu": frozenset({"li"}),
    "dl": frozenset({"dt", "dd", "div"}),
    "select": frozenset({"option", "optgroup", "hr"}),
}
PARENTS: dict[str, frozenset[str]] = {
    "head": frozenset({"html"}),
    "body": frozenset({"html"}),
    "title": frozenset({"head"}),
    "caption": frozenset({"table"}),
    "colgroup": frozenset({"table"}),
    "col": frozenset({"colgroup"}),
    "thead": frozenset({"table"}),
    "tbody": frozenset({"table"}),
    "tfoot": frozenset({"table"}),
    "tr": _names("table thead tbody tfoot"),
    "td": frozenset({"tr"}),
    "th": frozenset({"tr"}),
    "li": frozenset({"ul", "ol", "menu"}),
    "dt": frozenset({"dl", "div"}),
    "dd": frozenset({"dl", "div"}),
    "summary": frozenset({"details"}),
    "figcaption": frozenset({"figure"}),
    "legend": frozenset({"fieldset"}),
    "option": _names("select datalist optgroup"),
}
FIRST = frozenset({"caption", "legend", "summary"})
REFERRING = (
    "for",
    "aria-controls",
    "aria-describedby",
    "aria-details",
    "aria-errormessage",
    "aria-flowto",
    "aria-labelledby",
    "aria-owns",
    "headers",
    "list",
)
FOREIGN = frozenset({"svg", "math"})
URL_OF_ID = re.compile(r"url\(\s*['\"]?#([^'\")\s]+)")


def malformed(html: str) -> list[str]:
    """What is wrong with the text of an HTML document: stricter than browsers, which repair in silence.

    Every element that is not void has to be closed, though HTML allows some ends to be left out. Found are: a missing doctype or title; unclosed,
    stray and crossed tags; unknown elements; repeated and broken attributes; ``<p>`` and inline elements around blocks; wrong children and parents of
    tables, lists and figures, and text between their parts; links inside links; bare ``<`` and unknown entities; ids that repeat, are empty or
    hold spaces; and links, labels and ``aria-`` attributes that point to an id that is not there.

    Parameters
    ----------
    html : str
        The whole document.

    Returns
    -------
    list of str
        One sentence each, with its line; empty if nothing is wrong.
    """
    parser = _Strict()
    parser.feed(html)
    parser.close()
    return parser.ended()


@dataclass
class _Open:
    tag: str
    line: int
    children: int = 0


class _Strict(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self._open: list[_Open] = []
        self._faults: list[tuple[int, str]] = []
        self._ids: dict[str, int] = {}
        self._pointers: list[tuple[int, str, str]] = []
        self._doctype = False
        self._titles = 0
        self._began = False

    def ended(self) -> list[str]:
        for element in self._open:
            self._say(f"<{element.tag}> is never closed", element.line)
        for line, attribute, name in self._pointers:
            if name not in self._ids:
                self._say(f"{attribute} points to #{name}, which is not there", line)
        if self._titles != 1:
            self._say(f"{self._titles} titles, not one", 1)
        return [f"line {line}: {fault}" for line, fault in sorted(self._faults, key=lambda x: x[0])]

    def handle_decl(self, decl: str) -> None:
        if decl.lower() != "doctype html" or self._began:
            self._say(f"<!{decl}> is not the one doctype at the start")
        self._doctype = self._began = True

    def unknown_decl(self, data: str) -> None:
        if not self._foreign():
            self._say(f"unknown declaration <![{data[:20]}")

    def handle_pi(self, data: str) -> None:
        self._say(f"a processing instruction <?{data[:20]}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs)
        if tag not in VOID or self._foreign():
            self._open.append(_Open(tag, self.getpos()[0]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs)
        if tag not in VOID and tag not in FOREIGN and not self._foreign():
            self._say(f"<{tag}/> closes nothing in HTML")
            self._open.append(_Open(tag, self.getpos()[0]))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID and not self._foreign():
            self._say(f"</{tag}>, which has no end")
        elif self._open and self._open[-1].tag == tag:
            self._open.pop()
        elif any(element.tag == tag for element in self._open):
            while self._open[-1].tag != tag:
                element = self._open.pop()
                self._say(f"</{tag}> closes it before <{element.tag}> of line {element.line} is closed")
            self._open.pop()
        else:
            self._say(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        self._before_all()
        inside = self._open[-1].tag if self._open else None
        if inside in ("script", "style"):
            return
        if inside is None or (inside in CHILDREN and not self._foreign()):
            self._say(f"text {data.strip()[:30]!r} directly in {'no element' if inside is None else f'<{inside}>'}")
        if "<" in data:
            self._say(f"a bare < in {data.strip()[:30]!r}")

    def handle_entityref(self, name: str) -> None:
        if f"{name};" not in html.entities.html5:
            self._say(f"&{name}; is no entity")

    def _start(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._before_all()
        self._attributes(tag, attrs)
        parent = self._open[-1] if self._open else None
        if parent is not None:
            parent.children += 1
        if self._foreign():
            if tag in BLOCK | INLINE | {"img", "br"}:
                self._say(f"<{tag}> breaks out of <svg> or <math>")
            return
        if tag == "title":
            self._titles += 1
        if tag not in KNOWN and "-" not in tag:
            self._say(f"<{tag}> is no element of HTML")
        self._nesting(tag, parent)

    def _nesting(self, tag: str, parent: _Open | None) -> None:
        if parent is None:
            if tag != "html":
                self._say(f"<{tag}> outside <html>")
            return
        allowed = CHILDREN.get(parent.tag)
        if allowed is not None and tag not in allowed | ANYWHERE:
            self._say(f"<{parent.tag}> may not hold <{tag}>")
        elif tag in PARENTS and parent.tag not in PARENTS[tag]:
            self._say(f"<{tag}> may not stand in <{parent.tag}>")
        if tag in FIRST and parent.children > 1:
            self._say(f"<{tag}> is not the first in <{parent.tag}>")
        around = [element.tag for element in self._open]
        if tag in BLOCK:
            wrong = [outer for outer in around if outer in PHRASING_ONLY]
            if wrong:
                self._say(f"<{wrong[-1]}> may not hold <{tag}>")
            elif "summary" in around and tag not in HEADING:
                self._say(f"<summary> may not hold <{tag}>")
        if tag in INTERACTIVE:
            wrong = [outer for outer in around if outer in ("a", "button")]
            if wrong:
                self._say(f"<{wrong[-1]}> may not hold <{tag}>")

    def _attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self._say(f"<{tag}> has {name} more than once")
        line = self.getpos()[0]
        for name, value in attrs:
            if re.search(r"[\"'<=\x00-\x1f]", name):
                self._say(f"<{tag}> has a broken attribute {name!r}")
            text = value or ""
            if name == "id":
                if not text or re.search(r"\s", text):
                    self._say(f"<{tag}> has an id that is empty or holds spaces: {text!r}")
                if text in self._ids:
                    self._say(f"id {text!r} again, first in line {self._ids[text]}")
                self._ids.setdefault(text, line)
            elif name in REFERRING:
                self._pointers += [(line, name, one) for one in text.split()]
            elif name in ("href", "xlink:href") and text.startswith("#") and text not in ("#", "#top"):
                self._pointers.append((line, name, text[1:]))
            self._pointers += [(line, name, one) for one in URL_OF_ID.findall(text)]

    def _foreign(self) -> bool:
        for element in reversed(self._open):
            if element.tag in FOREIGN:
                return True
            if element.tag == "foreignobject":
                return False
        return False

    def _before_all(self) -> None:
        if not self._began:
            self._began = True
            self._say("no doctype at the start")

    def _say(self, fault: str, line: int | None = None) -> None:
        self._faults.append((self.getpos()[0] if line is None else line, fault))


# -- the command -----------------------------------------------------------------------------------------------


def pages_of(site: Path) -> list[str]:
    """Every ``index.html`` under a site, and its reports where they are few; sorted."""
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("index.html"))
    reports = sorted(p.relative_to(site).as_posix() for p in site.glob("reports/*/*/report.html"))
    return pages + (reports if len(reports) <= FEW_REPORTS else [])


def faults_of(seen: Sequence[Seen]) -> dict[str, dict[str, list[str]]]:
    """The faults of each page, each with where it was seen; nothing for clean pages."""
    found: dict[str, dict[str, list[str]]] = {}
    for one in seen:
        for fault in one.faults():
            found.setdefault(one.page, {}).setdefault(fault, []).append(f"{one.theme} {one.width}")
    return found


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    site: Path = arguments.site
    chromium = find_chromium()
    if chromium is None:
        print("No Chromium is installed.", file=sys.stderr)
        return 2
    pages = pages_of(site)
    if not pages:
        print(f"No pages under {site}.", file=sys.stderr)
        return 2
    started = time.monotonic()
    seen = look(chromium, site, pages, screenshots=arguments.screenshots)
    faults = faults_of(seen)
    for page in pages:
        for fault in malformed((site / page).read_text(encoding="utf-8")):
            faults.setdefault(page, {})[f"HTML {fault}"] = []
    for page, found in faults.items():
        print(page)
        for fault, where in found.items():
            always = len(where) in (0, len(WIDTHS) * len(THEMES))
            print(f"  {fault}" if always else f"  {fault} [{', '.join(where)}]")
    count = sum(map(len, faults.values()))
    seconds = time.monotonic() - started
    print(f"{count} faults in {len(faults)} of {len(pages)} pages, {len(seen)} views, {seconds:.1f} s", file=sys.stderr)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
