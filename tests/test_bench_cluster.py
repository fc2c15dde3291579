"""The benchmarks of a cluster can be run: few events for a moment, nothing asserted of how fast."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import cluster, cluster_bus
from tests.bench.far_end import FarEnd
from tests.bench.harness import stop
from tests.engines.postgres import Postgres
from tests.engines.s3 import S3


def test_bus() -> None:
    """Heard by two processes."""
    figures = cluster_bus.measure("ours", 200, seconds=0.5)
    assert figures["published"] > 0
    assert 0 < figures["p50"] <= figures["p99"]
    assert min(figures[part] for part in ("publish", "receive", "server")) > 0


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarEnd]:
    far = FarEnd(tmp_path, tls=False, per_second=10)
    yield far
    stop(far.process)


def test_cluster(far: FarEnd, postgres: Postgres, s3_server: S3) -> None:
    """An API node, a worker and their engines; every event of a job reaches its subscriber."""
    with cluster.cluster(far, postgres, s3_server) as running:
        figures = cluster.measure(running, far, 2, seconds=1)
    assert 0 < figures["p50"] <= figures["p99"]
    assert min(figures[part] for part in ("worker", "api", "nats", "in/s", "out/s")) > 0
    assert {"postgres", "s3", "rows/s"} <= figures.keys()  # the store may rest for a second, and statistics come later
