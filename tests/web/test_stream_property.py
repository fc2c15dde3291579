"""Whatever is spoken, a browser's EventSource and a reader of lines get from the real server what the log has."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.job import Status
from service.intake import new_id
from tests.doubles import a_turn, add_job, append, parse_event_stream
from tests.web.served import Served, serving

ODD = ["", "\u2028", "\u2029", "\r", "\n", "\r\n\r\n", "\0", "\x85", "\ufeff", "data: x", ": x", " x", "id: 7\n\n", "event:error", '"', "\\", "\\ud800", "\\udfff\\n", "😀"]  # fmt: skip
WORDS = st.lists(st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5)


async def compare(served: Served, job_id: str, texts: list[str], cut: int) -> None:
    store = served.runtime.store
    await add_job(store, job_id)
    for index, text in enumerate(texts):
        await append(store, job_id, ("turn.final", {"turn": a_turn(index, text=text)}))
    await append(store, job_id, ("job.canceled", {"job": {}}), status=Status.CANCELED)
    log = await store.events_after(job_id, 0, 1000)
    after = cut % len(log)  # where a client comes back
    url, resume = f"/jobs/{job_id}/events", {"Last-Event-ID": str(after)} if after else {}
    stream = await served.http.get(url, headers=resume)
    expected = [(event.type, event.json.decode(), str(event.seq)) for event in log[after:]]
    assert parse_event_stream(stream.content) == expected
    lines = await served.http.get(url, headers=resume | {"Accept": "application/x-ndjson"})
    assert [line for line in lines.content.split(b"\n") if line] == [event.json for event in log[after:]]
    heard = [msgspec.json.decode(event.json)["turn"]["transcript"] for event in log if event.type == "turn.final"]
    assert heard == texts


def test_what_is_told_is_what_is_kept(tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        served = runner.run(stack.enter_async_context(serving(tmp_path)))

        @settings(max_examples=25, derandomize=True)
        @given(st.lists(WORDS.map("".join), max_size=6), st.integers(0, 100))
        def check(texts: list[str], cut: int) -> None:
            runner.run(compare(served, new_id(served.runtime.clock.utc_ms()), texts, cut))

        try:
            check()
        finally:
            runner.run(stack.aclose())
