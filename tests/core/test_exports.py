"""Exports: the layouts to the letter, and what holds for the subtitles of any transcript."""

import html
import re
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from service.core.exports import EXPORTS, MAX_CUE_MS, to_json, to_srt, to_txt, to_vtt
from service.core.job import Audio, Coverage, Job, Progress, Session, Status, Turn, TurnWord

TIME = r"(\d\d+):([0-5]\d):([0-5]\d)[.,](\d{3})"


def job(*models: str, coverage: Coverage | None = None) -> Job:
    return Job(
        id="0199c1d2",
        status=Status.PROCESSING,
        created_at="2026-11-21T09:00:00.000Z",
        filename="audio.wav",
        audio=Audio(
            bytes=1, sha256="", duration_ms=7520, sample_rate=16000, channels=1, encoding="pcm_s16le", converted=False
        ),
        options={"speech_model": "u3-rt-pro", "chunk_ms": 100},
        progress=Progress(0, 7520),
        sessions=[Session(id=f"session-{i}", model=model, channel=None, offset_ms=0) for i, model in enumerate(models)],
        coverage=coverage,
    )


def word(text: str, start: int, end: int, speaker: str | None = None) -> TurnWord:
    return TurnWord(text=text, start_ms=start, end_ms=end, confidence=1.0, speaker=speaker)


def turn(index: int, transcript: str, words: list[TurnWord], **members: Any) -> Turn:
    times = {"start_ms": words[0].start_ms if words else 0, "end_ms": words[-1].end_ms if words else 0}
    fixed: dict[str, Any] = {
        "formatted": True,
        "session_id": "session-0",
        "turn_order": index,
        "end_of_turn_confidence": 1.0,
        "language": None,
    }
    return Turn(
        index=index,
        transcript=transcript,
        words=words,
        latency_ms=0,
        **{"speaker": None, "channel": None} | fixed | times | members,
    )


def evenly(text: str, start: int = 0, each: int = 300) -> list[TurnWord]:
    return [word(w, start + i * each, start + i * each + each - 50) for i, w in enumerate(text.split())]


FOX = "The quick brown fox jumps over the lazy dog."
TEST = "It is a common typing test."
TURNS = [turn(0, FOX, evenly(FOX, 480)), turn(1, TEST, evenly(TEST, 4000))]


def test_txt_is_the_layout_of_the_guide() -> None:
    assert to_txt(job("u3-rt-pro"), TURNS).decode() == (
        "AssemblyAI Session ID: session-0\n"
        "Audio file: audio.wav\n"
        "Audio duration: 7.52 seconds\n"
        "\n"
        "Transcription Output\n"
        "[Turn #1]: The quick brown fox jumps over the lazy dog.\n"
        "[Turn #2]: It is a common typing test.\n"
    )


def test_txt_before_the_first_session_and_after_several() -> None:
    assert to_txt(job(), []).decode().startswith("AssemblyAI Session ID: unknown\n")
    assert to_txt(job(), []).decode().endswith("\n\nTranscription Output\n")
    assert to_txt(job("a", "b"), []).decode().startswith("AssemblyAI Session ID: session-0, session-1\n")


def test_a_turn_stays_one_line_and_says_who_spoke() -> None:
    text = to_txt(job(), [turn(0, "one\ntwo\u2028[Turn #2]: three", [], speaker="A", channel=1)]).decode()
    assert text.splitlines()[-1] == "[Turn #1]: Channel 1, Speaker A: one two [Turn #2]: three"


def test_json() -> None:
    covered = Coverage(file_ms=7520, sent_ms=7520, upstream_ms=7520, gaps=[], last_word_ms=7000, complete=True)
    document = msgspec.json.decode(to_json(job("u3-rt-pro", "sandbox", coverage=covered), TURNS))
    assert list(document) == ["job_id", "status", "complete", "model", "sessions", "duration_ms", "text", "turns"]
    assert (document["job_id"], document["status"], document["complete"]) == ("0199c1d2", "processing", True)
    assert (document["model"], document["duration_ms"]) == ("sandbox", 7520)
    assert document["text"] == f"{FOX} {TEST}"
    assert [t["index"] for t in document["turns"]] == [0, 1]
    assert [s["id"] for s in document["sessions"]] == ["session-0", "session-1"]
    early = msgspec.json.decode(to_json(job(), []))
    assert (early["complete"], early["model"], early["text"]) == (False, "u3-rt-pro", "")


def test_srt() -> None:
    assert to_srt(job("u3-rt-pro"), TURNS).decode() == (
        "1\n00:00:00,480 --> 00:00:03,130\nThe quick brown fox jumps over the lazy\ndog.\n"
        "\n"
        "2\n00:00:04,000 --> 00:00:05,750\nIt is a common typing test.\n"
    )  # fmt: skip
    assert to_srt(job(), []) == b""


def test_vtt() -> None:
    text = "Is 1 < 2 & 3 --> 4?"
    assert to_vtt(job("u3-rt-pro"), [turn(0, text, evenly(text), speaker="A<b>")]).decode() == (
        "WEBVTT\n"
        "\n"
        "00:00:00.000 --> 00:00:02.350\n<v Speaker A&lt;b&gt;>Is 1 &lt; 2 &amp; 3 --&gt; 4?\n"
    )  # fmt: skip
    assert to_vtt(job(), []) == b"WEBVTT\n"


def test_the_sandbox_says_so() -> None:
    assert to_txt(job("sandbox"), []).decode().splitlines()[3].startswith("Model: sandbox")
    assert b"\n\nNOTE Model: sandbox" in to_vtt(job("sandbox"), TURNS)
    assert b"sandbox" not in to_txt(job("u3-rt-pro"), TURNS) + to_vtt(job("u3-rt-pro"), TURNS)


def test_speakers_split_cues_and_are_named_once_in_srt() -> None:
    words = [word("Hello", 0, 400, "A"), word("there.", 400, 900, "A"), word("Hi!", 1000, 1400, "B")]
    text = to_srt(job(), [turn(0, "Hello there. Hi!", words, speaker="A")]).decode()
    assert "\nSpeaker A: Hello there.\n" in text
    assert "\nSpeaker B: Hi!\n" in text


def test_channels_that_speak_at_once_take_turns() -> None:
    turns = [turn(i, FOX, evenly(FOX), channel=i) for i in (0, 1)]
    cues = parse(to_vtt(job(), turns).decode())
    assert [cue[2][0].split(">")[0] for cue in cues] == ["<v Channel 0", "<v Channel 1"]


def test_a_pause_starts_a_new_cue() -> None:
    cues = parse(to_srt(job(), [turn(0, "One two.", [word("One", 0, 300), word("two.", 5000, 5300)])]).decode())
    assert [(start, end) for start, end, _ in cues] == [(0, 1000), (5000, 6000)]


def test_scripts_without_spaces_are_broken_between_words() -> None:
    words = [word("今日は", i * 300, i * 300 + 300) for i in range(20)]
    cues = parse(to_srt(job(), [turn(0, "今日は" * 20 + "。", words)]).decode())
    assert [line for _, _, lines in cues for line in lines] == ["今日は" * 14, "今日は" * 6 + "。"]


def test_text_that_differs_from_its_words_is_spread_over_their_time() -> None:
    cues = parse(
        to_srt(job(), [turn(0, "[PERSON] called at 9:30.", evenly("john called at nine thirty", 2000))]).decode()
    )
    assert cues == [(2000, 3450, ["[PERSON] called at 9:30."])]


def test_a_turn_without_words_is_still_shown() -> None:
    cues = parse(to_srt(job(), [turn(0, "Hello.", [], start_ms=7000, end_ms=7000)]).decode())
    assert cues == [(7000, 8000, ["Hello."])]


def test_long_recordings_have_long_clocks() -> None:
    assert b"100:00:00.000 --> 100:00:01.000" in to_vtt(job(), [turn(0, "x", [word("x", 360_000_000, 360_000_001)])])


# --- any transcript --------------------------------------------------------------------------------------------------


def milliseconds(groups: tuple[str, ...]) -> int:
    hours, minutes, seconds, ms = map(int, groups)
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms


def parse(text: str) -> list[tuple[int, int, list[str]]]:
    """Blocks between blank lines that have a timing line."""
    cues = []
    for block in text.rstrip("\n").split("\n\n"):
        lines = block.split("\n")
        timing = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if timing is not None:
            match = re.fullmatch(f"{TIME} --> {TIME}", lines[timing])
            assert match, lines[timing]
            cues.append((milliseconds(match.groups()[:4]), milliseconds(match.groups()[4:]), lines[timing + 1 :]))
    return cues


ms = st.integers(0, 60_000)
texts = st.text(min_size=1, max_size=60) | st.text("a .<>&-\n", min_size=1, max_size=200)
words = st.builds(word, texts, ms, ms, st.sampled_from([None, "A", "B", "PENDING"]))


@st.composite
def any_turns(draw: st.DrawFn) -> list[Turn]:
    turns = []
    for index in range(draw(st.integers(0, 4))):
        said = draw(st.lists(words, max_size=30))
        spoken = " ".join(w.text for w in said)
        transcript = draw(st.just(spoken) | texts)
        channel = draw(st.sampled_from([None, 0, 1]))
        turns.append(turn(index, transcript, said, channel=channel, speaker=draw(st.sampled_from([None, "A"]))))
    return turns


def check(cues: list[tuple[int, int, list[str]]]) -> None:
    free = 0
    for start, end, lines in cues:
        assert free <= start < end <= start + MAX_CUE_MS
        assert 1 <= len(lines) <= 2
        assert all(1 <= len(line) <= 42 and line == line.strip() for line in lines)
        free = end


def letters(text: str) -> str:
    return "".join(sorted(re.sub(r"[\s\x00-\x1f\x7f-\x9f]", "", text)))


@given(any_turns())
def test_any_vtt_is_sound_and_says_everything(turns: list[Turn]) -> None:
    text = to_vtt(job(), turns).decode()
    cues = [(s, e, [html.unescape(re.sub("^<v [^>]*>", "", line)) for line in lines]) for s, e, lines in parse(text)]
    check(cues)
    assert letters("".join(line for _, _, lines in cues for line in lines)) == letters(
        "".join(t.transcript for t in turns)
    )


@given(any_turns())
def test_any_srt_is_sound(turns: list[Turn]) -> None:
    text = to_srt(job(), turns).decode()
    cues = parse(text)
    check(cues)
    numbers = [int(block.split("\n")[0]) for block in text.split("\n\n")] if text else []
    assert numbers == list(range(1, len(cues) + 1))


@given(any_turns())
def test_any_txt_has_a_line_a_turn(turns: list[Turn]) -> None:
    assert len(to_txt(job(), turns).decode().splitlines()) == 5 + len(turns)


def test_the_table_of_formats() -> None:
    assert list(EXPORTS) == ["txt", "json", "srt", "vtt"]
    assert all(export.render(job(), TURNS) for export in EXPORTS.values())
