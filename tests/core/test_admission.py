"""The load guard: when it closes, when it opens again, and what it always lets through."""

import pytest

from service.core.admission import ALWAYS, LoadGuard, Second

CALM = Second(chunks=1000, late=0, busy=0.3)
BUSY = Second(chunks=1000, late=0, busy=0.9)
LATE = Second(chunks=1000, late=11, busy=0.5)
OTHERS = Second(chunks=1000, late=300, busy=0.3)  # of somebody else's making
GRAVE = Second(chunks=1000, late=300, busy=0.3, grave=11)
NEITHER = Second(chunks=1000, late=7, busy=0.7)  # not calm enough to open, not bad enough to close
IDLE = Second(chunks=0, late=0, busy=0.0)


@pytest.mark.parametrize(
    ("seconds", "opens"),
    [
        ([CALM] * 20, True),
        ([NEITHER] * 20, True),
        ([IDLE] * 20, True),
        ([BUSY] * 2, True),
        ([BUSY] * 3, False),
        ([CALM, CALM, BUSY, BUSY, BUSY], False),
        ([BUSY, BUSY, IDLE, BUSY], True),
        ([LATE] * 4, True),
        ([LATE] * 5, False),
        ([CALM, LATE, CALM, CALM, CALM], True),
        ([Second(1000, 60, 0.5), CALM, CALM, CALM, CALM], False),
        ([OTHERS] * 20, True),
        ([GRAVE] * 5, False),
        ([GRAVE] * 20, False),
        ([GRAVE] * 5 + [OTHERS] * 5, True),
        ([LATE] * 5 + [OTHERS] * 5, True),
        ([BUSY] * 3 + [CALM] * 4, False),
        ([BUSY] * 3 + [CALM] * 5, True),
        ([BUSY] * 3 + [NEITHER] * 50, False),
        ([BUSY] * 3 + [CALM, CALM, CALM, CALM, NEITHER, CALM, CALM, CALM, CALM], False),
        ([LATE] * 5 + [IDLE] * 5, True),
        ([BUSY] * 3 + [CALM] * 5 + [BUSY] * 2, True),
        ([BUSY] * 3 + [CALM] * 5 + [BUSY] * 3, False),
    ],
)
def test_opens_and_closes(seconds: list[Second], opens: bool) -> None:
    """Overload closes it, only lasting calm opens it."""
    guard = LoadGuard()
    changes = [guard.feed(second) for second in seconds]
    assert guard.open is opens
    assert (sum(changes) % 2 == 0) is opens, "each change is told once"


def test_a_few_streams_are_taken_in_any_case() -> None:
    """A machine that is always too slow still does its jobs, a few at a time."""
    guard = LoadGuard()
    assert guard.admits(10_000)
    for _ in range(3):
        guard.feed(BUSY)
    assert [guard.admits(streams) for streams in (0, ALWAYS - 1, ALWAYS, 1000)] == [True, True, False, False]
