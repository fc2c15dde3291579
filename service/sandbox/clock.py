"""The sandbox's time: the machine's monotonic clock, running `speed` times faster.

Every rule that speaks of seconds (pace, delays, inactivity, expiry, billing) asks this clock, so that an accelerated
test meets the same rules as a real one. What leaves the process as Unix time stays honest Unix time.
"""

import asyncio
import time


class Clock:
    """Sandbox seconds."""

    def __init__(self, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError("speed must be greater than 0")
        self.speed = speed

    def now(self) -> float:
        return time.monotonic() * self.speed

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds) / self.speed)

    def unix_in(self, seconds: float) -> float:
        """The Unix time at which `seconds` of sandbox time will have passed."""
        return time.time() + seconds / self.speed
