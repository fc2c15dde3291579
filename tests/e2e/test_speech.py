"""Real speech through the whole service: the command line, a real uvicorn, real sockets, and the sandbox's recogniser."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jiwer
import pytest
from whisper_normalizer.english import EnglishTextNormalizer

SAMPLES = Path(__file__).parent.parent / "samples"
normalise = EnglishTextNormalizer()


def reference(name: str) -> str:
    """What is said in a sample, from the README beside it."""
    row = re.search(rf"^\| {re.escape(name)} \| [\d.]+ \| (.+?) \|", (SAMPLES / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    return row[1]


@pytest.mark.parametrize("name", ["librivox_0880.wav", "ps_goforward.wav"])
def test_what_was_said_is_what_is_written(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "service", "transcribe", str(SAMPLES / name), "--format", "json"],
        capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SAMPLES.parents[1])},
    )  # fmt: skip
    transcript = json.loads(run.stdout)
    assert transcript["complete"]
    assert transcript["model"] == "sandbox"
    assert transcript["turns"][0]["words"]
    error = jiwer.wer(normalise(reference(name)), normalise(transcript["text"]))
    assert error < 0.15, transcript["text"]
    assert "[Partial]" in run.stderr or "[Partial]" in run.stdout
