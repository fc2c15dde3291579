"""A transcript, a file name, a speaker or an error of AssemblyAI may hold anything: the page shows it and does nothing else."""

from pathlib import Path

import pytest
from playwright.async_api import Browser

from service.sandbox.faults import ErrorFrame, FaultPlan
from service.sandbox.script import Script, ScriptedTurn
from tests.e2e.page.stand import screen, serving, tone_wav

pytestmark = pytest.mark.asyncio(loop_scope="package")

PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    '"><script>alert(1)</script>',
    "'-alert(1)-'",
    "</p></div><iframe src=javascript:alert(1)></iframe>",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>click</a>",
    "<style>*{display:none}</style>",
    "<body onload=alert(1)>",
    "<meta http-equiv=refresh content=0;url=//example.invalid>",
    "<base href=//example.invalid/>",
    "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}",
    "<math><mtext></table></math><img src=x onerror=alert(1)>",
    "<template><script>alert(1)</script></template>",
    "<link rel=stylesheet href=//example.invalid/x.css>",
    "<input autofocus onfocus=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt; said",
    "\u202egnp.exe \u2066 data:text/html,<script>alert(1)</script>",
]
NAME = "<img src=x onerror=alert(1)>.wav"


async def test_nothing_in_a_transcript_is_ever_more_than_text(browser: Browser, tmp_path: Path) -> None:
    turns = [
        ScriptedTurn(text=text, start_ms=i * 300, end_ms=i * 300 + 200, speaker="<b>A</b>")
        for i, text in enumerate(PAYLOADS)
    ]
    async with serving(tmp_path, speed=4, recogniser=Script(turns)) as service, screen(browser, service.url) as tab:
        job = await service.kit.submit(
            tone_wav(7), filename=NAME, speaker_labels="true", metadata='{"<b>": "<script>alert(1)</script>"}'
        )
        await tab.open(f"/jobs/{job.id}/view")
        await tab.of("#details-open").click()
        await tab.done()
        shown = [turn.rstrip(".").casefold() for turn in await tab.turns()]  # the sandbox writes sentences
        assert shown == [payload.casefold() for payload in PAYLOADS]
        await tab.sees("#title", NAME)
        await tab.sees("#jobs", NAME)
        await tab.of("#frames summary").nth(1).click()
        await tab.of("#more-menu summary").click()
        await tab.of("#delete").click()
        await tab.sees("#confirm-title", NAME)
        await tab.page.keyboard.press("Escape")
        made = "document.querySelectorAll('#view :is(script, img, iframe, style, base, link, meta, template, input), #jobs img').length"
        assert await tab.page.evaluate(made) == 0
        assert all(url.startswith(service.url) for url in tab.requests)
        await tab.of("#title").click()
        await tab.page.wait_for_timeout(300)  # what would have loaded has had its time


async def test_an_error_of_upstream_is_text_too(browser: Browser, tmp_path: Path) -> None:
    faults = FaultPlan({"1": [ErrorFrame(code=3006, text="User Input Validation Error: <img src=x onerror=alert(1)>")]})
    async with serving(tmp_path, faults=faults) as service, screen(browser, service.url) as tab:
        await tab.send(tone_wav(2), NAME)
        await tab.sees("#card", "<img src=x onerror=alert(1)>")
        assert await tab.page.evaluate("document.querySelectorAll('#card img').length") == 0
