"""One timer wheel per process: calls each stream's `send` when its chunk is due; never awaits. FLOOR 2.

A callback gets the current time and returns when it wants to be called next, or None when it is done. It is called at
the first tick at or after that time, never before. Ticks are 5 ms apart: fine enough for 20 ms of lateness, coarse
enough to cost nothing. A callback that raises is dropped and its exception kept on the handle: one broken stream must
not stop the others.
"""

import asyncio
from collections.abc import Callable
from math import ceil

from service.ports import Clock

TICK = 0.005

Send = Callable[[float], float | None]


class Timer:
    """A place on the wheel."""

    __slots__ = ("canceled", "error", "send")

    def __init__(self, send: Send) -> None:
        """Made by `Pacer.add`."""
        self.send = send
        self.canceled = False
        self.error: Exception | None = None

    def cancel(self) -> None:
        """Not called any more; what is queued stays on the wheel until its tick."""
        self.canceled = True


class Pacer:
    """The wheel. `on_tick` is told how late each tick came, in seconds of this clock."""

    def __init__(self, clock: Clock, on_tick: Callable[[float], None] = lambda _late: None) -> None:
        """Starts with the first stream and rests when there is none."""
        self._clock = clock
        self._on_tick = on_tick
        self._slots: dict[int, list[Timer]] = {}
        self._tick = 0  # the next tick to be looked at
        self._running: asyncio.TimerHandle | None = None

    def add(self, due: float, send: Send) -> Timer:
        """Call `send` at `due` (clock seconds), then whenever it says."""
        timer = Timer(send)
        if self._running is None:
            self._tick = int(self._clock.now() / TICK)
        self._place(timer, due)
        if self._running is None:
            self._schedule()
        return timer

    def _place(self, timer: Timer, due: float) -> None:
        tick = max(ceil(due / TICK), self._tick)
        self._slots.setdefault(tick, []).append(timer)

    def _schedule(self) -> None:
        delay = self._clock.real(self._tick * TICK - self._clock.now())
        # Never under a millisecond: uvloop rounds such timers down to zero and would spin.
        self._running = asyncio.get_running_loop().call_later(max(delay, 0.001), self._turn)

    def _turn(self) -> None:
        now = self._clock.now()
        self._on_tick(now - self._tick * TICK)
        while self._tick * TICK <= now:
            due = self._slots.pop(self._tick, ())
            self._tick += 1
            for timer in due:
                if timer.canceled:
                    continue
                try:
                    again = timer.send(self._clock.now())
                except Exception as exc:  # noqa: BLE001 - the wheel outlives any one stream
                    timer.error, timer.canceled = exc, True
                    continue
                if again is not None:
                    self._place(timer, again)
        if self._slots:
            self._schedule()
        else:
            self._running = None
