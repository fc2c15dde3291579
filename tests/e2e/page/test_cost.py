"""What the page costs: time from an upstream frame to painted text, memory, and the work of 3,000 turns. Printed, never asserted on."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, CDPSession

from service.core.job import Status, make_event, rfc3339
from service.sandbox.recogniser import NumberedWords
from service.sandbox.wire import Wire
from tests.e2e.page.stand import Screen, Service, screen, serving, tone_wav

pytestmark = pytest.mark.asyncio(loop_scope="package")

# A message posted while a frame is made arrives when it has been painted.
PAINTED = """
window.painted = new Map();
addEventListener("DOMContentLoaded", () => {
  const note = () => {
    const text = document.getElementById("log").textContent + " " + document.getElementById("partials").textContent;
    const fresh = (text.match(/[a-z]+(-[a-z]+)*/gi) ?? []).map((word) => word.toLowerCase()).filter((word) => !window.painted.has(word));
    if (!fresh.length) return;
    const {port1, port2} = new MessageChannel();
    port1.onmessage = () => {
      const now = performance.timeOrigin + performance.now();
      for (const word of fresh) if (!window.painted.has(word)) window.painted.set(word, now);
    };
    port2.postMessage(null);
  };
  for (const id of ["log", "partials"])
    new MutationObserver(note).observe(document.getElementById(id), {childList: true, characterData: true, subtree: true});
});
"""


@pytest.mark.soak
async def test_time_from_upstream_frame_to_painted_text(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, float] = {}  # word → when the first frame that holds it left the sandbox
    send = Wire.send

    async def noted(wire: Wire, message: dict[str, Any] | str | bytes) -> None:
        if isinstance(message, dict) and message["type"] == "Turn":
            for word in re.findall(r"[a-z]+(?:-[a-z]+)*", " ".join(word["text"] for word in message["words"]).lower()):
                sent.setdefault(word, time.time() * 1000)
        await send(wire, message)

    monkeypatch.setattr(Wire, "send", noted)
    async with serving(tmp_path, speed=1, recogniser=NumberedWords) as service, screen(browser, service.url) as tab:
        await tab.page.add_init_script(PAINTED)
        await tab.send(tone_wav(60))
        await tab.done(90)
        painted: dict[str, float] = dict(await tab.page.evaluate("[...window.painted]"))
    _print("upstream frame to paint, ms", sorted(painted[word] - at for word, at in sent.items() if word in painted))


def _print(what: str, values: list[float]) -> None:
    at = [values[min(len(values) - 1, int(len(values) * part))] for part in (0.5, 0.99)]
    print(f"\n{what}: p50 {at[0]:.1f}, p99 {at[1]:.1f}, worst {values[-1]:.1f} (n={len(values)})")


@pytest.mark.soak
async def test_three_thousand_turns_and_twelve_hours(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=20) as service, screen(browser, service.url) as tab:
        job_id = await _long_job(service, tmp_path, turns=3000)
        client = await tab.page.context.new_cdp_session(tab.page)
        await client.send("Performance.enable")
        await tab.open()
        before = await _cost(client)
        began = time.perf_counter()
        await tab.open(f"/jobs/{job_id}/view")
        await tab.until("document.querySelectorAll('#log .turn').length === 3000", seconds=60)
        print(f"\n3,000 turns shown after {time.perf_counter() - began:.2f} s")
        after = await _cost(client)
        print(
            f"heap {before['heap']:.1f} → {after['heap']:.1f} MB, nodes {after['nodes']:.0f}, layout {after['layout']:.2f} s, script {after['script']:.2f} s"
        )
        frames = await tab.page.evaluate("""async () => {
          const box = document.getElementById("reading"), taken = [];
          let last = performance.now();
          for (let i = 0; i < 120; i += 1) {
            box.scrollTop = (box.scrollHeight * ((i * 37) % 120)) / 120;
            await new Promise(requestAnimationFrame);
            taken.push(performance.now() - last);
            last = performance.now();
          }
          return taken.sort((a, b) => a - b);
        }""")
        _print("a frame while leaping through it, ms", frames)


async def _long_job(service: Service, tmp_path: Path, turns: int) -> str:
    """A completed job of twelve hours, written straight into the store: what the page reads is the log."""
    runtime = service.kit.runtime
    job = await service.kit.submit(tone_wav(1))
    await service.kit.follow(job.id)
    record = await runtime.store.get(job.id)
    assert record is not None
    done, now = record.job, runtime.clock.utc_ms()
    hours = 12 * 3_600_000
    done.id = job.id[:-1] + ("0" if job.id[-1] != "0" else "1")
    done.progress.sent_ms = done.progress.total_ms = hours
    done.turn_count = turns
    done.status, done.finished_at = Status.COMPLETED, rfc3339(now)
    events = [make_event(done.id, 1, "job.status", now, {"status": "queued", "stage": None})]
    events += [
        make_event(done.id, index + 2, "turn.final", now, {"turn": _turn(index, hours // turns)})
        for index in range(turns)
    ]
    events.append(make_event(done.id, turns + 2, "job.completed", now, {"job": done}))
    await runtime.store.create(done, events, owner="", created_ms=now)
    return done.id


def _turn(index: int, every: int) -> dict[str, Any]:
    texts = [f"word{index}-{n}" for n in range(18)]
    start = index * every
    words = [
        {
            "text": text,
            "start_ms": start + n * 300,
            "end_ms": start + n * 300 + 280,
            "confidence": 0.97,
            "speaker": None,
        }
        for n, text in enumerate(texts)
    ]
    return {
        "index": index, "start_ms": start, "end_ms": start + 18 * 300, "transcript": " ".join(texts) + ".", "words": words,
        "formatted": True, "session_id": "s", "turn_order": index, "end_of_turn_confidence": 1.0, "language": None,
        "speaker": None, "channel": None, "latency_ms": 600,
    }  # fmt: skip


async def _cost(client: CDPSession) -> dict[str, float]:
    await client.send("HeapProfiler.collectGarbage")
    found = {metric["name"]: metric["value"] for metric in (await client.send("Performance.getMetrics"))["metrics"]}
    return {
        "heap": found["JSHeapUsedSize"] / 1e6, "nodes": found["Nodes"], "layout": found["LayoutDuration"],
        "script": found["ScriptDuration"],
    }  # fmt: skip


@pytest.mark.soak
async def test_memory_while_three_thousand_turns_arrive(browser: Browser, tmp_path: Path) -> None:
    async with serving(tmp_path, speed=40, recogniser=ShortTurns) as service, screen(browser, service.url) as tab:
        job = await service.kit.submit(tone_wav(2410))
        await tab.open(f"/jobs/{job.id}/view")
        client = await tab.page.context.new_cdp_session(tab.page)
        await client.send("Performance.enable")
        for turns in (0, 1000, 2000, 3000):
            await tab.until(f"document.querySelectorAll('#log .turn').length >= {turns}", seconds=100)
            await _tell(tab, turns, await _cost(client))


async def _tell(tab: Screen, turns: int, cost: dict[str, float]) -> None:
    print(
        f"\nat {turns} turns: heap {cost['heap']:.1f} MB, {cost['nodes']:.0f} nodes, layout {cost['layout']:.2f} s, script {cost['script']:.2f} s"
    )


class ShortTurns(NumberedWords):
    """A turn every 0.8 s."""

    WORDS_PER_TURN = 2
