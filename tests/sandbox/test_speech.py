"""The real recogniser on real speech, and what stands in for it."""

import asyncio
import re
import sys
import wave
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soxr

from service.sandbox import recogniser
from service.sandbox.app import run_sandbox
from service.sandbox.recogniser import NumberedWords, Opening, default_recogniser, numeral, spread
from service.sandbox.speech import SpeechModel
from tests.sandbox.client import PRO, US, Talk, assert_ends_well, converse, silence

SAMPLES = Path(__file__).parent.parent / "samples"


def reference(name: str) -> str:
    row = next(
        line for line in (SAMPLES / "README.md").read_text(encoding="utf-8").splitlines() if f"| {name} |" in line
    )
    return row.split("|")[3].strip()


def audio(name: str) -> bytes:
    with wave.open(str(SAMPLES / name)) as file:
        return bytes(file.readframes(file.getnframes()))


def errors(said: str, name: str) -> float:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"[a-z]+", text.lower().replace("mr.", "mister")))

    return float(jiwer.wer(plain(reference(name)), plain(said)))


def said(talk: Talk) -> str:
    return " ".join(turn["transcript"] for turn in talk.finals)


async def test_real_speech_is_recognised_on_both_families() -> None:
    # Four times as fast: every message takes the same way, only the waiting is shorter.
    async with run_sandbox(recogniser=SpeechModel(), speed=4) as sandbox, asyncio.TaskGroup() as group:
        long = group.create_task(converse(sandbox.url, audio("librivox_0870.wav"), PRO, pace=0.025))
        short = group.create_task(converse(sandbox.url, audio("ps_something.wav"), US, pace=0.025))
    for talk, name in ((long.result(), "librivox_0870.wav"), (short.result(), "ps_something.wav")):
        assert_ends_well(talk)
        assert talk.partials
        assert errors(said(talk), name) < 0.15
    words = long.result().finals[0]["words"]
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert 0 <= times[0] < 500
    assert 6500 < times[-1] <= 7200


async def test_a_pause_ends_a_turn_without_terminate_and_other_rates_are_heard() -> None:
    speech = np.frombuffer(audio("ps_goforward.wav"), "<i2")
    slow = soxr.resample(speech, 16000, 8000).astype("<i2").tobytes()
    listener = SpeechModel()(Opening(1, 8000))
    heard = [one for at in range(0, len(slow), 1600) for one in await listener.feed(slow[at : at + 1600])]
    heard += await listener.feed(silence(1500, 8000))
    finals = [one for one in heard if one.end_of_turn]
    assert errors(" ".join(word.text for one in finals for word in one.words), "ps_goforward.wav") < 0.3
    assert not await listener.flush()
    assert [one for at in range(50) for one in await listener.feed(silence(100, 8000))] == []
    await listener.close()


async def test_long_speech_is_read_in_segments() -> None:
    # Fourteen seconds without a pause of 700 ms: one turn, read in two pieces.
    speech = audio("librivox_0870.wav")[3200:-3200] * 2
    listener = SpeechModel()(Opening(1, 16000))
    heard = [one for at in range(0, len(speech), 16000) for one in await listener.feed(speech[at : at + 16000])]
    heard += await listener.flush()
    (final,) = [one for one in heard if one.end_of_turn]
    text = " ".join(word.text for word in final.words)
    assert text.lower().count("prudently") == 2
    starts = [word.start for word in final.words]
    assert starts == sorted(starts)


def test_without_the_extra_words_are_numbered_and_stderr_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(default_recogniser(), SpeechModel)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "moonshine_voice", None)
    monkeypatch.setattr(recogniser.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    assert default_recogniser() is NumberedWords
    assert "pip install '.[sandbox]'" in capsys.readouterr().err


async def test_numbered_words_count_the_audio() -> None:
    listener = NumberedWords(Opening(1, 8000))
    heard = await listener.feed(silence(400 * 20, 8000))
    finals = [one for one in heard if one.end_of_turn]
    assert [len(one.words) for one in finals] == [8, 8]
    (rest,) = await listener.flush()
    assert [(word.text, word.start, word.end) for word in rest.words][-1] == ("twenty", 7600, 8000)
    assert await listener.flush() == ()


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (1, "one"),
        (12, "twelve"),
        (20, "twenty"),
        (21, "twenty-one"),
        (105, "one-hundred-five"),
        (27_000, "twenty-seven-thousand"),
    ],
)
def test_numerals(number: int, word: str) -> None:
    assert numeral(number) == word


def test_numerals_are_distinct() -> None:
    assert len({numeral(number) for number in range(30_000)}) == 30_000


def test_spread_keeps_words_inside_and_in_order() -> None:
    words = spread("a bcd ef", 100, 700)
    assert [(word.text, word.start, word.end) for word in words] == [
        ("a", 100, 200),
        ("bcd", 200, 500),
        ("ef", 500, 700),
    ]
    assert spread("", 0, 10) == ()
