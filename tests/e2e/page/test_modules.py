"""The page's pure modules by themselves, in the browser that runs them: the header reader against the corpus, the fold of
events."""

import base64
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.e2e.page.stand import screen, serving
from tests.wavs import CASES, WavCase

pytestmark = pytest.mark.asyncio(loop_scope="package")

READ = """async (files) => {
  const {readWav} = await import("/page/wav.js");
  const bytes = (encoded) => Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  return Promise.all(files.map(async ([name, encoded]) => [name, await readWav(new File([bytes(encoded)], name))]));
}"""

FOLD = """async (steps) => {
  const {JobState} = await import("/page/job.js");
  const state = new JobState("j");
  return steps.map((step) => {
    if (step.seed) state.seed(structuredClone(step.seed), step.newest);
    else state.apply(step);
    const {status, stage} = state.job ?? {};
    const turns = state.turns.map((turn) => turn.transcript).join(" ");
    return {turns, open: [...state.partials.values()].map((turn) => turn.transcript).join(" "), status, stage, caughtUp: state.caughtUp};
  });
}"""


async def test_the_browser_judges_every_file_of_the_corpus_as_the_server_does(browser: Browser, tmp_path: Path) -> None:
    files = [(case.name, base64.b64encode(case.build()).decode()) for case in CASES]
    async with serving(tmp_path) as service, screen(browser, service.url) as tab:
        await tab.open()
        judged: dict[str, Any] = dict(await tab.page.evaluate(READ, files))
    wrong = [
        f"{case.name}: {case.verdict}, {judged[case.name]['trouble']}"
        for case in CASES
        if not _agrees(case, judged[case.name])
    ]
    assert not wrong, "\n".join(wrong)


def _agrees(case: WavCase, info: dict[str, Any]) -> bool:
    asked = info["trouble"] is None and info["channels"] > 1  # the page asks what to do with them
    refused = info["trouble"] is not None or (asked and case.channels == "reject")
    return refused == (case.verdict != "ok")


def _event(number: int | None, kind: str, **payload: Any) -> dict[str, Any]:
    return {"id": number, "type": kind, **payload}


def _turn(index: int, text: str, order: int | None = None) -> dict[str, Any]:
    return {
        "index": index, "transcript": text, "session_id": "s", "turn_order": index if order is None else order, "latency_ms": 1,
        "end_ms": index, "start_ms": index,
    }  # fmt: skip


def _job(status: str, stage: str | None = None) -> dict[str, Any]:
    return {
        "status": status, "stage": stage, "attempt": 1, "progress": {"sent_ms": 0, "total_ms": 9}, "sessions": [],
        "turn_count": 0, "warnings": [],
    }  # fmt: skip


async def test_the_fold_of_a_log_withdraws_revises_and_starts_anew(browser: Browser, tmp_path: Path) -> None:
    final, partial = "turn.final", "turn.partial"
    steps: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"seed": _job("processing", "streaming"), "newest": 4}, {"caughtUp": False}),
        (_event(1, "job.status", status="queued", stage=None), {"status": "processing", "stage": "streaming"}),
        (_event(2, final, turn=_turn(0, "a")), {"turns": "a"}),
        (_event(2, final, turn=_turn(0, "twice")), {"turns": "a"}),
        (_event(3, "turn.revised", turn=_turn(0, "A")), {"turns": "A", "caughtUp": False}),
        (_event(4, final, turn=_turn(1, "b")), {"turns": "A b", "caughtUp": True}),
        (_event(None, partial, turn=_turn(2, "c")), {"open": "c"}),
        (_event(5, final, turn=_turn(2, "C")), {"turns": "A b C", "open": ""}),
        (_event(None, partial, turn=_turn(3, "d")), {"open": "d"}),
        (
            _event(6, "session.lost", session_id="s", code=None, reason="cut", retry_in_ms=1),
            {"open": "", "turns": "A b C"},
        ),
        (_event(7, "job.status", status="processing", stage="reconnecting"), {"stage": "reconnecting"}),
        (_event(8, "job.restarted", from_turn=1), {"turns": "A"}),
        (_event(9, final, turn=_turn(1, "B")), {"turns": "A B"}),
        # The log is another one: what stood there stays until the new one has been read, then only that counts.
        ({"seed": _job("processing", "streaming"), "newest": 3}, {"turns": "A B"}),
        (_event(None, "stream.reset"), {"turns": "A B", "caughtUp": False}),
        (_event(1, "job.status", status="queued", stage=None), {"turns": "A B"}),
        (_event(2, final, turn=_turn(0, "x")), {"turns": "x B"}),
        (_event(3, "job.warning", code="w", message="m"), {"turns": "x", "caughtUp": True}),
        (_event(4, final, turn=_turn(1, "y")), {"turns": "x y"}),
        (_event(5, "job.canceled", job=_job("canceled")), {"status": "canceled", "turns": "x y"}),
    ]
    async with serving(tmp_path) as service, screen(browser, service.url) as tab:
        await tab.open()
        states = await tab.page.evaluate(FOLD, [step for step, _ in steps])
    for number, ((step, wanted), state) in enumerate(zip(steps, states, strict=True)):
        assert {name: state[name] for name in wanted} == wanted, f"step {number}: {step}"
