"""A plain client for the sandbox's tests: it breaks no rule unless told to, and remembers all it hears."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

KEY = {"Authorization": "any-key"}
PRO, US = "speech_model=u3-rt-pro", "speech_model=universal-streaming-english"


def silence(ms: float, rate: int = 16000) -> bytes:
    return b"\0\0" * int(rate * ms / 1000)


@dataclass
class Talk:
    """What a session said and how it ended."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    odd: list[str | bytes] = field(default_factory=list)  # frames that are not JSON text
    code: int | None = None
    reason: str = ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message.get("type") == kind]

    @property
    def finals(self) -> list[dict[str, Any]]:
        return [turn for turn in self.of("Turn") if turn["end_of_turn"]]

    @property
    def partials(self) -> list[dict[str, Any]]:
        return [turn for turn in self.of("Turn") if not turn["end_of_turn"]]

    @property
    def kinds(self) -> list[str]:
        return [str(message.get("type")) for message in self.messages]

    @property
    def error(self) -> tuple[int | None, str]:
        errors = [message for message in self.messages if "error" in message]
        return errors[-1].get("error_code"), errors[-1]["error"]


def dial(url: str, query: str = PRO, headers: dict[str, str] | None = None, **options: Any) -> connect:
    address = f"{url}?{query}" if "sample_rate" in query else f"{url}?sample_rate=16000&{query}"
    options = {"compression": None, "max_size": None, "ping_interval": None, "proxy": None, **options}
    return connect(address, additional_headers=KEY if headers is None else headers, **options)


async def listen(ws: ClientConnection, talk: Talk) -> None:
    """Hear everything until the end."""
    try:
        while True:
            frame = await ws.recv()
            try:
                if isinstance(frame, bytes):
                    raise ValueError
                talk.messages.append(json.loads(frame))
            except ValueError:
                talk.odd.append(frame)
    except ConnectionClosed as closed:
        talk.code = closed.rcvd.code if closed.rcvd else 1006
        talk.reason = closed.rcvd.reason if closed.rcvd else ""


async def converse(
    url: str,
    audio: bytes = b"",
    query: str = PRO,
    *,
    headers: dict[str, str] | None = None,
    chunk: int = 3200,
    before: tuple[str, ...] = (),
    after: tuple[str, ...] = ('{"type":"Terminate"}',),
    pace: float = 0.0,
) -> Talk:
    """Send texts, audio in chunks, texts; hear everything until the end."""
    talk = Talk()
    async with dial(url, query, headers) as ws:
        hearing = asyncio.create_task(listen(ws, talk))
        try:
            for text in before:
                await ws.send(text)
            for at in range(0, len(audio), chunk):
                await ws.send(audio[at : at + chunk])
                if pace:
                    await asyncio.sleep(pace)
            for text in after:
                await ws.send(text)
        except ConnectionClosed:
            pass
        async with asyncio.timeout(20):
            await hearing
    return talk


def assert_ends_well(talk: Talk) -> None:
    assert (talk.code, talk.reason) == (1000, "Session Ended")
    assert talk.kinds[0] == "Begin"
    assert talk.kinds[-1] == "Termination"
