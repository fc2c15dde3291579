"""The upload body against a fake `receive`: every form that is accepted, every fault with its code, bounded time."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive

from service.core.errors import CallerError
from service.web.upload import MULTIPART_OVERHEAD, PIECE, ClientDisconnected, Pace, UploadBody

BOUNDARY = "XboundaryX"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
LIMIT = 10_000_000
AUDIO = b"RIFF....WAVE\r\n--Xbound\r\r\n-- almost a boundary \x00\xff" * 3


def part(head: str, value: bytes) -> bytes:
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"


def file_part(value: bytes = AUDIO, name: str = "audio.wav") -> bytes:
    return part(f'name="file"; filename="{name}"', value)


END = f"--{BOUNDARY}--\r\n".encode()


def receiving(pieces: Sequence[bytes], *, disconnect: bool = False) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append(
        {"type": "http.disconnect"} if disconnect else {"type": "http.request", "body": b"", "more_body": False}
    )
    queue = iter(messages)

    async def receive() -> Message:
        return next(queue)

    return receive


def upload(
    receive: Receive, kind: str | None = MULTIPART, length: int | None = None, limit: int = LIMIT, **options: Any
) -> UploadBody:
    headers = [] if kind is None else [(b"content-type", kind.encode())]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return UploadBody({"type": "http", "headers": headers}, receive, limit, **options)


async def read(body: UploadBody) -> bytes:
    data = b""
    async for chunk in body.chunks():
        assert 0 < len(chunk) <= PIECE + 300  # a piece, and the boundary look-behind of the one before
        data += chunk
    return data


async def refused(*pieces: bytes, **options: Any) -> str:
    with pytest.raises(CallerError) as caught:
        await read(upload(receiving(pieces), **options))
    return str(caught.value.code)


async def never() -> Message:
    raise AssertionError("nothing may be read")


def refused_unread(**options: Any) -> str:
    with pytest.raises(CallerError) as caught:
        upload(never, **options)
    return str(caught.value.code)


# --- what is accepted ------------------------------------------------------------------------------------------------


async def test_fields_before_and_after_the_file() -> None:
    body = part('name="mode"', b"balanced") + file_part() + part('name="keyterms_prompt"', "Käse".encode()) + END
    form = upload(receiving([body]), length=len(body))
    assert await read(form) == AUDIO
    assert form.fields == [("mode", "balanced"), ("keyterms_prompt", "Käse")]
    assert (form.filename, form.raw_length) == ("audio.wav", None)


async def test_one_byte_at_a_time() -> None:
    body = part('name="mode"', b"balanced") + file_part() + part('name="chunk_ms"', b"") + END
    form = upload(receiving([bytes([byte]) for byte in body]))
    assert await read(form) == AUDIO
    assert form.fields == [("mode", "balanced"), ("chunk_ms", "")]


@settings(max_examples=60)
@given(audio=st.binary(min_size=1) | st.text("\r\n-Xboundary").map(str.encode), data=st.data())
def test_any_split_gives_the_same(audio: bytes, data: st.DataObject) -> None:
    body = file_part(audio) + part('name="a"', b"1") + END
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8)))
    pieces = [body[i:j] for i, j in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    if f"\r\n--{BOUNDARY}".encode() in audio:
        return
    form = upload(receiving(pieces))
    assert asyncio.run(read(form)) == audio
    assert form.fields == [("a", "1")]


async def test_a_boundary_cut_anywhere_is_found_and_what_only_begins_like_one_is_audio() -> None:
    boundary = f"\r\n--{BOUNDARY}".encode()
    for cut in range(len(boundary)):
        inside = b"audio" + boundary[:cut]
        audio = inside + b"\r\n-more"
        body = file_part(audio) + part('name="a"', b"1") + END
        begun, real = body.index(inside) + len(inside), body.index(boundary) + cut
        pieces = [body[: begun - cut], body[begun - cut : begun], body[begun:real], body[real:]]
        form = upload(receiving(pieces))
        assert await read(form) == audio
        assert form.fields == [("a", "1")]


@pytest.mark.parametrize("kind", ["audio/wav", "audio/x-wav; codec=1", "application/octet-stream", "Audio/WAV", None])
async def test_a_raw_body(kind: str | None) -> None:
    form = upload(receiving([b"RI", b"", b"FF"]), kind, 4)
    assert await read(form) == b"RIFF"
    assert (form.fields, form.filename, form.raw_length) == ([], None, 4)


@pytest.mark.parametrize(
    ("raw", "name"),
    [("C:\\x\\a.wav", "a.wav"), ("../../etc/passwd", "passwd"), ("\u202ena\x1bme.wav", "name.wav"), ("ü.wav", "ü.wav")],
)
async def test_file_names_are_cleaned(raw: str, name: str) -> None:
    form = upload(receiving([file_part(name=raw) + END]))
    await read(form)
    assert form.filename == name


@pytest.mark.parametrize("head", ['name="file"', 'name="file"; filename=""'])
async def test_a_file_without_a_name(head: str) -> None:
    form = upload(receiving([part(head, AUDIO) + END]))
    assert await read(form) == AUDIO
    assert form.filename is None


async def test_an_epilogue_is_ignored() -> None:
    assert await read(upload(receiving([file_part() + END, b"epilogue"]))) == AUDIO


async def test_a_long_message_does_not_hold_the_loop() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    audio = os.urandom(16 * PIECE)
    assert await read(upload(receiving([file_part(audio) + END]))) == audio
    counter.cancel()
    assert turns >= 16


# --- what the headers prove ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "multipart/mixed; boundary=x"]
)
def test_other_types_are_refused_unread(kind: str) -> None:
    assert refused_unread(kind=kind) == "unsupported_media_type"


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'x' * 300}"]
)
def test_a_boundary_is_needed(kind: str) -> None:
    assert refused_unread(kind=kind) == "malformed_multipart"


def test_a_content_length_over_the_limit_is_refused_unread() -> None:
    assert refused_unread(kind="audio/wav", length=LIMIT + 1) == "upload_too_large"
    assert refused_unread(length=LIMIT + MULTIPART_OVERHEAD + 1) == "upload_too_large"


def test_an_encoded_body_is_refused_unread() -> None:
    scope = {"type": "http", "headers": [(b"content-type", b"audio/wav"), (b"content-encoding", b"gzip")]}
    with pytest.raises(CallerError) as caught:
        UploadBody(scope, never, LIMIT)
    assert caught.value.code == "unsupported_media_type"


# --- what the body shows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MULTIPART, "audio/wav"])
async def test_the_limit_counts_the_files_bytes(kind: str) -> None:
    def body(size: int) -> list[bytes]:
        return [file_part(bytes(size)) + END] if kind == MULTIPART else [bytes(size)]

    assert len(await read(upload(receiving(body(1000)), kind, limit=1000))) == 1000
    assert await refused(*body(1001), kind=kind, limit=1000) == "upload_too_large"


async def test_what_surrounds_the_file_is_limited_too() -> None:
    assert await refused(file_part() + END, *[bytes(PIECE)] * 20, limit=1000) == "upload_too_large"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        file_part(),
        file_part() + END[:-4],
        file_part()[:-5],
        f"--{BOUNDARY}\r\nContent-Dispo".encode(),
    ],
)
async def test_a_body_cut_short(body: bytes) -> None:
    assert await refused(body) == "truncated_upload"


async def test_fewer_bytes_than_promised() -> None:
    assert await refused(b"RIFF", kind="audio/wav", length=5) == "truncated_upload"


async def test_no_file() -> None:
    assert await refused(part('name="mode"', b"balanced") + END) == "missing_file"
    assert await refused(part('name="file"; filename=""', b"") + END) == "missing_file"
    assert await refused(END) == "missing_file"
    assert await refused(kind="audio/wav") == "missing_file"


async def test_more_than_one_file() -> None:
    assert await refused(file_part() + file_part() + END) == "too_many_files"
    assert await refused(file_part() + part('name="other"; filename="b.wav"', AUDIO) + END) == "unknown_option"


@pytest.mark.parametrize(
    "body",
    [
        b"preamble" + file_part() + END,
        f"--{BOUNDARY}\r\n\r\nno headers\r\n".encode() + END,
        part("filename=x", b""),
        f"--{BOUNDARY}\r\nContent-Disposition: attachment; name=file\r\n\r\n".encode(),
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"\r\ncontent-disposition: x\r\n\r\n'.encode(),
        part('name="file"\r\nContent-Transfer-Encoding: base64', AUDIO),
        f"--{BOUNDARY}\r\nbad header\r\n\r\n".encode(),
        f"--{BOUNDARY}\r\n".encode() + b"".join(b"X%d: y\r\n" % i for i in range(20)),
        f"--{BOUNDARY}\r\nX: {'y' * 5000}\r\n\r\n".encode(),
        b"".join(part(f'name="a{i}"', b"") for i in range(10_000)) + END,
    ],
)
async def test_malformed_bodies(body: bytes) -> None:
    assert await refused(body) == "malformed_multipart"


async def test_field_values_are_bounded_text() -> None:
    form = upload(receiving([part('name="prompt"', b"x" * 8192) + file_part() + END]))
    assert await read(form) == AUDIO
    assert await refused(part('name="prompt"', b"x" * 8193) + file_part() + END) == "bad_option"
    assert await refused(part('name="prompt"', b"\xff") + file_part() + END) == "bad_option"


async def test_a_client_that_leaves() -> None:
    with pytest.raises(ClientDisconnected):
        await read(upload(receiving([file_part()], disconnect=True)))


# --- time ------------------------------------------------------------------------------------------------------------


async def test_near_boundary_data_is_given_up_soon() -> None:
    near = b"\r\n--b_" * (5 * 2**20 // 6)
    head = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    started = time.process_time()
    pieces = [head, *(near[i : i + PIECE] for i in range(0, len(near), PIECE))]
    assert await refused(*pieces, kind="multipart/form-data; boundary=b") == "malformed_multipart"
    assert time.process_time() - started < 1


async def test_honest_data_stays_far_within_the_budget() -> None:
    audio = os.urandom(5 * 2**20)
    started = time.process_time()
    assert await read(upload(receiving([file_part(audio) + END]))) == audio
    assert time.process_time() - started < 0.2


def pausing(*pieces: tuple[float, bytes]) -> Receive:
    queue = iter(pieces)

    async def receive() -> Message:
        seconds, body = next(queue, (0.0, b""))
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": body, "more_body": bool(body)}

    return receive


PACE = Pace(first_byte=0.1, stall=0.2, stall_bytes=100, total=0.5)


@pytest.mark.parametrize(
    "pieces",
    [
        [(0.15, b"x")],
        [(0.0, b"x" * 1000), (0.3, b"x")],
        [(0.05, b"x")] * 8,
        [(0.05, b"x" * 100)] * 20,
    ],
    ids=["first byte", "stalls after haste", "too slow", "too long in all"],
)
async def test_slow_clients_are_given_up(pieces: list[tuple[float, bytes]]) -> None:
    with pytest.raises(CallerError) as caught:
        await read(upload(pausing(*pieces), "audio/wav", pace=PACE))
    assert caught.value.code == "truncated_upload"


async def test_a_slow_store_is_not_held_against_the_client() -> None:
    body = upload(pausing((0.05, b"x"), (0.05, b"y"), (0.05, b"z")), "audio/wav", pace=PACE)
    data = b""
    async for chunk in body.chunks():
        data += chunk
        await asyncio.sleep(0.25)
    assert data == b"xyz"
