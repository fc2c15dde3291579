"""What the page's tests stand on: the whole service on a free port, and a page in a real browser that is watched.

A `Screen` records what must never happen while a page is open (an exception, a dialog, a violation of the
Content-Security-Policy) and `serving` fails the test when any did. Texts are read as a person would: what is shown.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from playwright.async_api import Browser, Locator, Page, expect

from service.web.app import create_app
from service.web.server import HttpServer
from tests import kit
from tests.wavs import chunk, fmt, riff

SAMPLES = Path(__file__).parents[2] / "samples"
PATIENCE_MS = 15_000
expect.set_options(timeout=PATIENCE_MS)

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
const RealAudio = window.Audio;
window.Audio = function () {
  return (window.ear = new RealAudio());
};
"""

DROP = """async ([name, type, encoded]) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, {type}));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer}));
}"""


def tone_wav(seconds: float, *, channels: int = 1, rate: int = 16_000) -> bytes:
    """Something to hear: a tone that comes and goes."""
    t = np.arange(int(seconds * rate)) / rate
    wave = (np.sin(2 * np.pi * 220 * t) * np.sin(np.pi * t) ** 2 * 9000).astype("<i2")
    return riff(fmt(channels=channels, rate=rate), chunk(b"data", np.repeat(wave, channels).tobytes()))


@dataclass
class Screen:
    """One tab."""

    page: Page
    base: str
    trouble: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def open(self, path: str = "/") -> None:
        """Go to an address of the service."""
        await self.page.goto(self.base + path)

    def of(self, selector: str) -> Locator:
        """What a selector finds."""
        return self.page.locator(selector)

    async def choose(self, name: str, data: bytes) -> None:
        """Pick a file."""
        await self.page.set_input_files("#file", {"name": name, "mimeType": "audio/wav", "buffer": data})

    async def drop(self, name: str, data: bytes) -> None:
        """Drop a file onto the page."""
        await self.page.evaluate(DROP, [name, "audio/wav", base64.b64encode(data).decode()])

    async def send(self, data: bytes, name: str = "audio.wav") -> str:
        """Upload a file from the first screen; the id of its job."""
        await self.open()
        await self.choose(name, data)
        await self.of("#send").click()
        await self.page.wait_for_url("**/view")
        return self.page.url.split("/")[-2]

    async def turns(self) -> list[str]:
        """The final turns as they are shown."""
        found: list[str] = await self.page.eval_on_selector_all("#log .turn p", "all => all.map((p) => p.textContent)")
        return found

    async def words(self) -> list[str]:
        """The words of the final turns."""
        return [word.lower().rstrip(".") for turn in await self.turns() for word in turn.split()]

    async def until(self, condition: str, seconds: float = 20) -> None:
        """Wait for an expression of the page to hold. (Playwright's own way would evaluate text inside the page, which its policy forbids.)"""
        async with asyncio.timeout(seconds):
            while not await self.page.evaluate(condition):
                await asyncio.sleep(0.02)

    async def sees(self, selector: str, text: str) -> None:
        """Wait for a text."""
        await expect(self.of(selector)).to_contain_text(text)

    async def done(self, seconds: float = 20) -> None:
        """Wait for the end of the job, and for all of its text."""
        await self.until(
            "document.getElementById('sentence').textContent.startsWith('Done') && document.getElementById('log').ariaBusy === 'false'",
            seconds,
        )

    async def check(self) -> None:
        """Nothing that must never happen did."""
        assert self.trouble == []
        assert await self.page.evaluate("window.violations") == []


@asynccontextmanager
async def screen(browser: Browser, base: str, *, calm: bool = True, **options: Any) -> AsyncIterator[Screen]:
    """A tab of its own; `calm`: fails when anything went wrong in it. `options` are those of a browser context."""
    context = await browser.new_context(
        **{"viewport": {"width": 1280, "height": 800}, "accept_downloads": True, **options}
    )
    try:
        await context.add_init_script(WATCH)
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        shown = Screen(page, base)
        page.on("pageerror", lambda error: shown.trouble.append(f"exception: {error}"))
        page.on("request", lambda request: shown.requests.append(request.url))

        async def refuse(dialog: Any) -> None:
            shown.trouble.append(f"dialog: {dialog.message}")
            await dialog.dismiss()

        page.on("dialog", refuse)
        page.on(
            "filechooser", lambda _: None
        )  # Playwright takes hold of choosers from the first listener on, and not at once
        yield shown
        if calm:
            await shown.check()
    finally:
        await context.close()


@dataclass
class Service:
    """The whole service in this process."""

    kit: kit.Kit
    url: str


@asynccontextmanager
async def serving(tmp_path: Path, **options: Any) -> AsyncIterator[Service]:
    """`options` are those of `kit.running`."""
    async with kit.running(tmp_path, port=0, **options) as running:
        server = HttpServer(running.runtime, create_app(running.runtime))
        task = asyncio.create_task(server.serve(running.worker.drain))
        try:
            yield Service(running, server.url)
        finally:
            server.stop()
            await task
