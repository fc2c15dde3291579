"""The whole way of a file through the page, in a real browser."""

import asyncio
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from service.sandbox.faults import Drop, ErrorFrame, FaultPlan
from service.sandbox.recogniser import NumberedWords
from tests.e2e.page.stand import SAMPLES, Screen, screen, serving, tone_wav
from tests.marked import marked_wav, words

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_a_dropped_file_of_real_speech_is_read_along(browser: Browser, tmp_path: Path) -> None:
    from service.sandbox.speech import SpeechModel

    async with serving(tmp_path, speed=3, recogniser=SpeechModel()) as service, screen(browser, service.url) as tab:
        await tab.open()
        await tab.drop("jfk.wav", (SAMPLES / "jfk.wav").read_bytes())
        await tab.sees("#facts", "11 seconds · 16 kHz · mono · 16-bit · 352 kB")
        await tab.of("#send").click()
        await tab.page.wait_for_url("**/view")
        await tab.sees("#sentence", "Live")
        await tab.until("document.querySelector('#partials .turn') !== null")
        assert await tab.of("#partials").get_attribute("aria-hidden") == "true"
        await tab.until("document.querySelectorAll('#log .turn').length > 0")
        assert await tab.of("#log").get_attribute("aria-live") == "polite"
        await tab.done()
        said = await tab.turns()
        assert "ask what you can do for your country" in " ".join(said).lower()
        # The address is the job: the same text after a reload, and in another tab.
        await tab.page.reload()
        await tab.done()
        assert await tab.turns() == said
        async with screen(browser, service.url) as other:
            await other.page.goto(tab.page.url)
            await other.done()
            assert await other.turns() == said


async def test_every_word_is_shown_once_and_partials_give_way(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=4) as service, screen(browser, service.url) as tab:
        await tab.send(marked_wav(10_000))
        await tab.until("(document.querySelector('#partials .tail')?.textContent ?? '') !== ''")
        await tab.page.reload()
        await tab.done()
        assert await tab.words() == words(50)
        await expect(tab.of("#partials .turn")).to_have_count(0)
        await expect(tab.of("#steps")).to_be_hidden()
        assert sum("/events" in url for url in tab.requests) == 2, "one stream, and one after the reload"
        await expect(tab.of("#jobs [aria-current] .about span").first).to_have_text("00:10")


async def test_a_header_problem_shows_before_a_byte_is_sent(browser: Browser, tmp_path: Path) -> None:
    async with (
        serving(tmp_path) as service,
        screen(browser, service.url, permissions=["clipboard-read", "clipboard-write"]) as tab,
    ):
        await tab.open()
        await tab.choose("it's an interview.mp3", b"ID3" + bytes(3000))
        await tab.sees("#trouble", "This is an MP3")
        command = (
            r"ffmpeg -i 'it'\''s an interview.mp3' -ar 16000 -ac 1 -sample_fmt s16 'it'\''s an interview-mono.wav'"
        )
        await expect(tab.of("#ffmpeg")).to_have_text(command)
        await expect(tab.of("#send")).to_be_hidden()
        await tab.of("#copy-ffmpeg").click()
        await tab.sees("#copy-ffmpeg", "Copied")
        assert await tab.page.evaluate("navigator.clipboard.readText()") == command
        assert not any("filename=" in url for url in tab.requests)
        # What only the server can know is told in its words, with the same file ready to be sent again.
        await tab.choose("short.wav", tone_wav(1))
        await tab.page.route(
            "**/jobs?filename=*",
            lambda route: route.fulfill(
                status=429, json={"code": "queue_full", "detail": "9 jobs are waiting already."}
            ),
        )
        await tab.of("#send").click()
        await tab.sees("#trouble", "9 jobs are waiting already.")
        await tab.page.unroute("**/jobs?filename=*")
        await tab.of("#send").click()
        await tab.page.wait_for_url("**/view")


async def test_stereo_is_asked_about_and_split_turns_say_their_channel(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, recogniser=NumberedWords) as service, screen(browser, service.url) as tab:
        await tab.open()
        await tab.choose("call.wav", tone_wav(7, channels=2))
        await tab.sees(
            "#question-text", "Stereo: two channels. Mix them, take the first, or transcribe each on its own?"
        )
        await tab.page.get_by_label("Each on its own").check()
        await tab.of("#send").click()
        await tab.done()
        assert set(await tab.of("#log .who").all_text_contents()) == {"Ch 1", "Ch 2"}
        await expect(tab.of("#sandbox-mark")).to_be_visible()


async def test_the_reader_may_scroll_up_and_come_back(browser: Browser, tmp_path: Path) -> None:
    async with (
        serving(tmp_path, speed=20) as service,
        screen(browser, service.url, viewport={"width": 900, "height": 480}) as tab,
    ):
        await tab.send(marked_wav(120_000))
        at_end = "(box => box.scrollHeight - box.scrollTop - box.clientHeight < 30)(document.getElementById('reading'))"
        await tab.until("document.querySelectorAll('#log .turn').length > 14")
        assert await tab.page.evaluate(at_end)
        await tab.of("#reading").hover()
        await tab.page.mouse.wheel(0, -260)
        await expect(tab.of("#jump")).to_be_visible()
        top = "document.querySelector('.turn[data-index=\"9\"]').getBoundingClientRect().top"
        before = await tab.page.evaluate(top)
        await tab.until("/ · ([3-9]|[1-9][0-9]+) new/.test(document.getElementById('jump-text').textContent)")
        assert await tab.page.evaluate(top) == before, "nothing above the reader's eye moves"
        await tab.of("#jump").click()
        await expect(tab.of("#jump")).to_be_hidden()
        await tab.until(at_end)
        await tab.until("document.querySelectorAll('#log .turn').length > 60")
        assert await tab.page.evaluate(at_end), "it follows again"


async def test_cancel_keeps_the_text_and_retry_goes_on_from_there(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=4) as service, screen(browser, service.url) as tab:
        await tab.send(marked_wav(16_000))
        await tab.until("document.querySelectorAll('#log .turn').length > 3")
        await tab.of("#cancel").click()
        await tab.sees("#card", "Canceled")
        await tab.sees("#sentence", "Canceled at")
        kept = await tab.turns()
        assert len(kept) > 3
        assert (await tab.words()) == words(len(await tab.words())), "finals that came after the cancel too"
        await tab.of("#card").get_by_role("button", name="Retry from here").click()
        await tab.sees("#sentence", "Live")
        assert (await tab.turns())[: len(kept)] == kept, "the text stays while it goes on"
        await tab.done()
        heard = await tab.words()
        assert list(dict.fromkeys(heard)) == words(80), "nothing is missing"


async def test_a_refused_key_is_told_in_a_card(browser: Browser, tmp_path: Path) -> None:
    faults = FaultPlan({"1": [ErrorFrame(name="bad_key")]})
    async with serving(tmp_path, faults=faults) as service, screen(browser, service.url) as tab:
        await tab.send(tone_wav(4))
        await tab.sees("#card", "AssemblyAI refused the key")
        await tab.sees("#card", "Check ASSEMBLYAI_API_KEY")
        await tab.sees("#card", "Nothing was streamed. The upload is kept.")
        await tab.sees("#card", "upstream_auth · upstream 1008")
        await tab.of("#card").get_by_role("button", name="Retry").click()
        await tab.done()
        await expect(tab.of("#card")).to_be_hidden()


async def test_a_lost_session_is_told_and_heals_without_clearing_text(browser: Browser, tmp_path: Path) -> None:
    faults = FaultPlan({"1": [Drop(at_ms=6000)], "2-4": [ErrorFrame(name="internal")]})
    async with serving(tmp_path, speed=5, faults=faults) as service, screen(browser, service.url) as tab:
        await tab.send(marked_wav(12_000))
        await tab.sees("#sentence", "Connection to AssemblyAI lost. Resuming from 00:0")
        assert len(await tab.turns()) > 4
        assert await tab.of("#mark").get_attribute("data-tone") == "amber"
        await tab.done()
        assert await tab.words() == words(60)


async def test_downloads_are_marked_partial_while_it_runs(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=4) as service, screen(browser, service.url) as tab:
        await tab.send(marked_wav(10_000), "board call.wav")
        await tab.until("document.querySelectorAll('#log .turn').length > 1")
        name, text = await _download(tab, "txt")
        assert name.startswith("board call.partial-")
        assert "w0 w1 w2 w3" in text.lower()
        assert "w49" not in text.lower()
        await tab.done()
        for kind, told in {"txt": "[Turn #1]:", "srt": "00:00:00,", "vtt": "WEBVTT", "json": '"complete":true'}.items():
            name, text = await _download(tab, kind)
            assert name == f"board call.{kind}"
            assert told in text.replace('": ', '":')
        name, text = await _download(tab, "wav")
        assert (name, text[:4]) == ("board call.wav", "RIFF")


async def _download(tab: Screen, kind: str) -> tuple[str, str]:
    await tab.of("#downloads summary").click()
    await expect(tab.of("#partial-note")).to_be_visible(visible="Live" in await tab.of("#sentence").inner_text())
    async with tab.page.expect_download() as waiting:
        await tab.of(f"#downloads [data-format={kind}]").click()
    download = await waiting.value
    data = await asyncio.to_thread((await download.path()).read_bytes)
    return download.suggested_filename, data.decode("latin-1")


async def test_delete_asks_first(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path) as service, screen(browser, service.url) as tab:
        job_id = await tab.send(tone_wav(3))
        await tab.done()
        for answer in ("Keep it", "Delete"):
            await tab.of("#more-menu summary").click()
            await tab.of("#delete").click()
            await tab.sees("#confirm", "Delete audio.wav?")
            await tab.of("#confirm").get_by_role("button", name=answer).click()
        await tab.page.wait_for_url(f"{service.url}/")
        await expect(tab.of("#jobs li")).to_have_count(0)
        await tab.open(f"/jobs/{job_id}/view")
        await tab.sees("#title", "No such job")


async def test_the_list_of_jobs_is_searched(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path) as service, screen(browser, service.url) as tab:
        for name in ("stand-up monday.wav", "board.wav"):
            await tab.send(tone_wav(1), name)
        await expect(tab.of("#jobs li")).to_have_count(2)
        await tab.page.keyboard.press("/")
        await tab.page.keyboard.type("monday")
        await expect(tab.of("#jobs li")).to_have_count(1)
        await tab.page.keyboard.press("Enter")
        await tab.page.keyboard.press("Enter")
        await tab.sees("#title", "stand-up monday.wav")
