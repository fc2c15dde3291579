"""Scripted transcripts: data in, turns out, at the times they say."""

from pathlib import Path

import pytest

from service.sandbox.app import run_sandbox
from service.sandbox.recogniser import Opening
from service.sandbox.script import EXAMPLE, PlanFileError, Script, ScriptedTurn, load_script
from tests.sandbox.client import PRO, US, converse, silence


def write(path: Path, text: str) -> Path:
    file = path / "script.json"
    file.write_text(text, encoding="utf-8")
    return file


async def test_the_example_of_the_help_is_heard(tmp_path: Path) -> None:
    factory = load_script(write(tmp_path, EXAMPLE))
    async with run_sandbox(recogniser=factory, speed=40) as sandbox:
        talk = await converse(sandbox.url, silence(12_000), f"{PRO}&speaker_labels=true")
        short = await converse(sandbox.url, silence(3_900), US)
    assert [turn["transcript"] for turn in talk.finals] == [
        "Harbor Point Claims, good morning.",
        "Hello, I would like to report some damage.",
        "Sorry to hear that.",
        "It was the rain.",
        "It was the rain.",
        "It was the train.",
    ]
    assert [turn["turn_order"] for turn in talk.finals] == [0, 1, 2, 3, 3, 3]
    assert [turn["speaker_label"] for turn in talk.finals[:3]] == ["PENDING", "B", "PENDING"]
    assert (talk.finals[1]["words"][0]["start"], talk.finals[1]["words"][-1]["end"]) == (3000, 6200)
    revised = {item["turn_order"]: item["speaker_label"] for item in talk.of("SpeakerRevision")[0]["revisions"]}
    assert revised == {0: "A", 2: "A"}
    # Audio that ends in mid-turn: Terminate flushes what was heard of it, the rest is never said.
    assert [turn["transcript"] for turn in short.finals] == ["harbor point claims good morning", "hello i"]


async def test_sessions_can_have_scripts_of_their_own() -> None:
    factory = Script([ScriptedTurn("First.")], [ScriptedTurn("Second.", start_ms=100, end_ms=500)])
    heard = []
    for ordinal in (1, 2, 3):
        recogniser = factory(Opening(ordinal, 8000))
        heard += [one.words[0] for one in await recogniser.feed(silence(1000, 8000)) if one.end_of_turn]
        assert await recogniser.flush() == ()
    assert [word.text for word in heard] == ["First.", "Second.", "Second."]
    assert (heard[1].start, heard[1].end) == (100, 500)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"turns": [{"text": ""}]}', "length >= 1"),
        ('{"turns": [{"text": "  "}]}', "turn 1: its text has no word"),
        ('{"turns": [{"text": "a", "end": 3}]}', "unknown field `end`"),
        ('{"turns": [{"text": "a", "start_ms": 5, "end_ms": 5}]}', "turn 1: ends at 5 ms, not after its start"),
        ('{"turns": [{"text": "a b"}, {"text": "c", "start_ms": 3}]}', "turn 2: starts at 3 ms, before"),
        ("{}", "give either `turns` or `sessions`"),
    ],
)
def test_a_bad_script_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PlanFileError) as refused:
        load_script(write(tmp_path, text))
    assert str(tmp_path) in str(refused.value)
    assert complaint in str(refused.value)
