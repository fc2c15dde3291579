"""The benchmarks of a cluster can be run: few events for a moment, nothing asserted of how fast."""

from tests.bench import cluster_bus


def test_bus() -> None:
    """Heard by two processes."""
    figures = cluster_bus.measure("ours", 200, seconds=0.5)
    assert figures["published"] > 0
    assert 0 < figures["p50"] <= figures["p99"]
    assert min(figures[part] for part in ("publish", "receive", "server")) > 0
