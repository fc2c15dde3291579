"""Hands, ears and eyes: keys alone, the player, details, signing in, and what axe-core says of each state."""

import importlib.util
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.async_api import Browser, expect

from service.sandbox.faults import ErrorFrame, FaultPlan
from service.sandbox.recogniser import NumberedWords
from tests.e2e.page.stand import Screen, screen, serving, tone_wav
from tests.marked import marked_wav

pytestmark = pytest.mark.asyncio(loop_scope="package")

KEY = "correct-horse-battery-staple"
FOCUSED = "document.activeElement.id || document.activeElement.className"


async def test_the_whole_way_with_keys_alone(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=4) as service, screen(browser, service.url) as tab:
        keys = tab.page.keyboard
        await tab.open()
        await _tab_to(tab, "choose")
        assert await tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        async with tab.page.expect_file_chooser() as waiting:
            await keys.press("Enter")
        await (await waiting.value).set_files(
            {"name": "talk.wav", "mimeType": "audio/wav", "buffer": marked_wav(40_000)}
        )
        await tab.sees("#sheet-name", "talk.wav")
        await keys.press("Enter")  # the focus is on the button
        await tab.page.wait_for_url("**/view")
        assert await tab.page.evaluate(FOCUSED) == "title"
        await tab.until("document.querySelectorAll('#log .turn').length > 4")
        await keys.press("k")
        await keys.press("k")
        chosen = int(await tab.page.evaluate("document.activeElement.dataset.index"))
        await keys.press("j")
        assert int(await tab.page.evaluate("document.activeElement.dataset.index")) == chosen + 1
        await keys.press("l")
        await expect(tab.of("#jump")).to_be_hidden()
        await keys.press("d")
        await expect(tab.of("#details")).to_be_visible()
        assert await tab.page.evaluate(FOCUSED) == "details-close"
        await keys.press("Escape")
        await expect(tab.of("#details")).to_be_hidden()
        await keys.press("?")
        await tab.sees("#keys", "5 seconds back, forward")
        await keys.press("Escape")
        await keys.press("/")
        assert await tab.page.evaluate(FOCUSED) == "search"
        await keys.type("l d ?")  # letters are text here
        await expect(tab.of("#search")).to_have_value("l d ?")
        await keys.press("Escape")
        await expect(tab.of("#jobs li")).to_have_count(1)
        await tab.of("#title").focus()
        await _tab_to(tab, "cancel")
        await keys.press("Enter")
        await tab.sees("#card", "Canceled")


async def _tab_to(tab: Screen, element: str) -> None:
    for _ in range(40):
        if await tab.page.evaluate("document.activeElement.id") == element:
            return
        await tab.page.keyboard.press("Tab")
    raise AssertionError(f"#{element} cannot be reached with the Tab key")


async def test_the_sound_keeps_step_with_the_stream(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=1, recogniser=NumberedWords) as service, screen(browser, service.url) as tab:
        await tab.send(tone_wav(5))
        await tab.sees("#sentence", "Live")
        assert not any(url.endswith("/audio") for url in tab.requests), "nothing is loaded until somebody listens"
        await tab.of("#sound").click()
        await tab.until("document.getElementById('position').textContent >= '00:02'")
        drift = await tab.page.evaluate("""() => new Promise((done) => new MutationObserver(() => {
          const [minutes, seconds] = document.getElementById('position').textContent.split(':').map(Number);
          done(window.ear.currentTime - minutes * 60 - seconds);
        }).observe(document.getElementById('position'), {childList: true, characterData: true, subtree: true}))""")
        assert -1 < drift < 1.2, "the clock shows whole seconds"
        assert not await tab.page.evaluate("window.ear.paused")
        await tab.of("#sound").click()
        assert await tab.page.evaluate("window.ear.paused")
        await tab.done()


async def test_words_are_marked_as_they_are_heard_and_a_click_goes_there(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=10) as service, screen(browser, service.url) as tab:
        await tab.send(marked_wav(12_000))
        await tab.done()
        await tab.page.mouse.click(*await _place_of(tab, "w22"))
        marked = "[...CSS.highlights.get('heard')].map(String).join()"
        await tab.until(f"{marked} === 'w22' || {marked} === 'w23'")
        assert 4.3 < await tab.page.evaluate("window.ear.currentTime") < 5.2
        await expect(tab.of(".turn.now")).to_have_attribute("data-index", "5")
        await tab.page.keyboard.press("Space")
        await tab.until("window.ear.paused")
        at = await tab.page.evaluate("window.ear.currentTime")
        await tab.page.keyboard.press("ArrowRight")
        await tab.until(f"window.ear.currentTime >= {at + 4.9}")
        await tab.of("#rate").click()
        assert await tab.page.evaluate("window.ear.playbackRate") == 1.25
        box = await tab.of("#wave").bounding_box()
        assert box is not None
        await tab.page.mouse.click(box["x"] + box["width"] / 4, box["y"] + 20)
        await tab.until("Math.abs(window.ear.currentTime - 3) < 0.5")
        await tab.of("#wave").focus()
        await tab.page.keyboard.press("Home")
        await tab.until("window.ear.currentTime < 1")


async def _place_of(tab: Screen, word: str) -> tuple[float, float]:
    x, y = await tab.page.evaluate(
        """(word) => {
          const walker = document.createTreeWalker(document.getElementById("log"), NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const at = walker.currentNode.data.indexOf(word);
            if (at < 0) continue;
            const range = new Range();
            range.setStart(walker.currentNode, at);
            range.setEnd(walker.currentNode, at + word.length);
            const box = range.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
          }
          return null;
        }""",
        word,
    )
    return x, y


async def test_details_show_sessions_coverage_and_every_event(browser: Browser, tmp_path: Path) -> None:
    options: dict[str, Any] = {"permissions": ["clipboard-read", "clipboard-write"]}
    async with serving(tmp_path, speed=4) as service, screen(browser, service.url, **options) as tab:
        job_id = await tab.send(marked_wav(10_000))
        await tab.of("#details-open").click()
        await tab.until("document.querySelectorAll('#frames li').length > 5")
        await tab.of("#pause").click()
        held = await tab.of("#frames li").count()
        turns = len(await tab.turns())
        await tab.until(f"document.querySelectorAll('#log .turn').length > {turns + 1}")
        assert await tab.of("#frames li").count() == held, "paused"
        await tab.of("#pause").click()
        await tab.done()
        await tab.of("#with-passing").uncheck()
        await tab.sees("#frames li >> nth=0", "job.completed")
        ids = [int(text) for text in await tab.of("#frames .frame-id").all_text_contents()]
        assert ids == list(range(len(ids), 0, -1)), "every durable event, newest first"
        await tab.of("#frames summary").nth(2).click()
        await tab.of("#frames").get_by_role("button", name="Copy as curl").click()
        command = await tab.page.evaluate("navigator.clipboard.readText()")
        assert command == f"curl -N -H 'Last-Event-ID: {ids[2] - 1}' {service.url}/jobs/{job_id}/events"
        await tab.sees("#coverage", "Complete")
        await tab.sees("#sessions", "sandbox")
        await tab.sees("#warnings", "None.")


async def test_a_place_in_the_queue_is_told(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=1, max_streams=1) as service, screen(browser, service.url) as tab:
        await service.kit.submit(tone_wav(60))
        waiting = await service.kit.submit(tone_wav(60))
        await service.kit.submit(tone_wav(60))
        await tab.open(f"/jobs/{waiting.id}/view")
        await tab.sees("#sentence", "Queued, next in line. It starts by itself.")
        await expect(tab.of("#steps [aria-current=step]")).to_have_text("Validate")
        await tab.of("#cancel").click()
        await tab.sees("#sentence", "Canceled at 00:00")


async def test_signing_in_keeps_the_key_in_the_tab_and_out_of_urls(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=2, api_keys=f"me:{KEY}") as service, screen(browser, service.url) as tab:
        await tab.open()
        await expect(tab.of("#sign-in")).to_be_visible()
        await tab.of("#key").fill("not the key")
        await tab.page.keyboard.press("Enter")
        await tab.sees("#key-trouble", "A key is one word")
        await tab.of("#key").fill("wrong-horse")
        await tab.page.keyboard.press("Enter")
        await tab.sees("#key-trouble", "This key is not known here.")
        await tab.of("#key").fill(KEY)
        await tab.page.keyboard.press("Enter")
        await expect(tab.of("#sign-in")).to_be_hidden()
        await tab.sees("#curl", 'Authorization: Bearer $TURNWIRE_KEY"')
        job_id = await tab.send(marked_wav(8_000))
        await tab.sees("#sentence", "Live")
        await tab.page.reload()
        await tab.done()
        assert len(await tab.words()) == 40
        await tab.of("#play").click()
        await tab.until("window.ear.currentTime > 0.2")
        async with tab.page.expect_download():
            await tab.of("#downloads summary").click()
            await tab.of("#downloads [data-format=srt]").click()
        assert not any(KEY in url for url in tab.requests)
        assert all("token=" in url for url in tab.requests if "/events" in url or "/audio" in url or ".srt" in url)
        async with screen(browser, service.url) as other:
            await other.open(f"/jobs/{job_id}/view")
            await expect(other.of("#sign-in")).to_be_visible()
        await tab.of("#sign-out").click()
        await expect(tab.of("#sign-in")).to_be_visible()
        assert await tab.page.evaluate("sessionStorage.length + localStorage.length") == 0


# --- axe-core


@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([("dark", 390), ("light", 1280)], id="dark phone, light desk"),
        pytest.param([("light", 390), ("dark", 1280)], id="light phone, dark desk", marks=pytest.mark.soak),
    ],
)
async def test_axe_finds_nothing_serious_in_any_state(
    browser: Browser, tmp_path: Path, looks: list[tuple[Literal["light", "dark"], int]]
) -> None:
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.submodule_search_locations
    axe = (Path(spec.submodule_search_locations[0]) / "axe.min.js").read_text()
    faults = FaultPlan({"2": [ErrorFrame(name="bad_key")], "3-": [ErrorFrame(name="too_many")]})
    async with (
        serving(tmp_path, speed=6, faults=faults) as service,
        screen(browser, service.url, reduced_motion="reduce") as tab,
    ):
        async for state in _states(tab):
            for scheme, width in looks:
                await tab.page.emulate_media(color_scheme=scheme)
                await tab.page.set_viewport_size({"width": width, "height": 800})
                assert await _axe(tab, axe) == [], f"{state}, {scheme}, {width} px"


async def _states(tab: Screen) -> Any:
    await tab.open()
    yield "empty"
    await tab.choose("a.mp3", b"ID3" + bytes(100))
    yield "header problem"
    await tab.choose("a.wav", tone_wav(1, channels=2))
    yield "stereo question"
    first = await tab.send(marked_wav(12_000))
    await tab.until(
        "document.querySelectorAll('#log .turn').length > 2 && document.querySelector('#partials .turn') !== null"
    )
    yield "live"
    await tab.of("#details-open").click()
    await tab.until("document.querySelectorAll('#frames li').length > 3")
    yield "live with details"
    await tab.of("#details-close").click()
    await tab.done()
    await tab.of("#downloads summary").click()
    yield "completed, menu open"
    await tab.page.keyboard.press("Escape")
    await tab.page.keyboard.press("?")
    yield "keys"
    await tab.page.keyboard.press("Escape")
    await tab.send(tone_wav(4))
    await tab.sees("#card", "refused the key")
    yield "failed"
    await tab.send(tone_wav(4))
    await tab.sees("#sentence", "Waiting for capacity")
    yield "waiting for capacity"
    await tab.open(f"/jobs/{first[:-4]}ffff/view")
    await tab.sees("#title", "No such job")
    yield "no such job"


async def _axe(tab: Screen, source: str) -> list[str]:
    await tab.page.evaluate(source)
    run: Callable[[str], Awaitable[Any]] = tab.page.evaluate
    result = await run("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{found['impact']} {found['id']}: {node['target']} {node['failureSummary']}"
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


async def test_tabs_that_nobody_sees_leave_connections_to_the_one_that_is_seen(
    browser: Browser, tmp_path: Path
) -> None:
    seen = """(seen) => {
      Object.defineProperty(document, "hidden", {configurable: true, get: () => !seen});
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    async with serving(tmp_path, speed=1) as service, screen(browser, service.url) as tab:
        job = await service.kit.submit(marked_wav(30_000))
        address = f"{service.url}/jobs/{job.id}/view"
        others = []
        for _ in range(6):  # as many connections as a browser has for one server
            others.append(await tab.page.context.new_page())
            await others[-1].goto(address)
            await others[-1].wait_for_selector("#log .turn")
            await others[-1].evaluate(seen, False)
        await tab.page.goto(address)
        await tab.sees("#sentence", "Live")
        await others[0].evaluate(seen, True)
        count = "document.querySelectorAll('#log .turn').length"
        behind = await tab.page.evaluate(count)
        await expect(others[0].locator("#log .turn").nth(behind)).to_be_attached()
        heard = [
            word.lower().rstrip(".")
            for turn in await others[0].locator("#log .turn p").all_text_contents()
            for word in turn.split()
        ]
        assert heard == [f"w{n}" for n in range(len(heard))], "what came while it rested is there once"
