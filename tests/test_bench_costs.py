"""The benchmarks of delivery and upload can be run: a few subscribers, a small file, nothing asserted of how fast."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import delivery, upload
from tests.bench.harness import Report, stop
from tests.bench.streams import FarEnd


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarEnd]:
    far = FarEnd(tmp_path, tls=False)
    yield far
    stop(far.process)


def test_delivery(far: FarEnd, tmp_path: Path) -> None:
    report = Report("delivery")
    delivery.compare(report, far, channels=1, counts=(2,), rounds=1, seconds=0.5)
    delivery.burst(report, far, streams=1, counts=(2,), seconds=0.5)
    report.write(tmp_path)
    spread, pace = json.loads((tmp_path / "delivery.json").read_text())["tables"]
    assert [row[:2] for row in spread["rows"]] == [[2, "ours"], [2, "dicts"], [2, "bytes"]]
    assert all(row[3] > 0 and row[8] > 0 for row in spread["rows"])  # events, and their delay
    assert [row[0] for row in pace["rows"]] == [0, 2]
    assert all(row[3] > 0 for row in pace["rows"])


def test_upload(far: FarEnd, tmp_path: Path) -> None:
    report = Report("upload")
    upload.compare(report, far, tmp_path, (1.0,), rounds=1)
    upload.pace(report, far, upload.wav(tmp_path, 1.0), streams=1, seconds=0.5)
    report.write(tmp_path)
    uploads, pace = json.loads((tmp_path / "upload.json").read_text())["tables"]
    assert [row[1] for row in uploads["rows"]] == ["ours", "UploadFile", "UploadFile, bare", "ours without SHA-256"]
    assert all(row[2] > 0 for row in uploads["rows"][:3])
    assert [row[0] for row in pace["rows"]] == ["nothing", "1 MB"]


def test_a_percentile_of_a_histogram() -> None:
    none = {"0.005": 0.0, "0.01": 0.0, "+Inf": 0.0}
    assert delivery.p99_ms(none, {"0.005": 100.0, "0.01": 100.0, "+Inf": 100.0}) == pytest.approx(4.95)
    assert delivery.p99_ms(none, {"0.005": 98.0, "0.01": 100.0, "+Inf": 100.0}) == pytest.approx(7.5)
