"""The RIFF/WAVE parser: bytes in as they arrive; format, extent of the audio and warnings out. FLOOR 0.

Received bytes decide and header sizes are hints: nothing is allocated, sought or believed because a header says so. At
most 40 bytes are held at a time and all else is skipped by arithmetic, so a feed inside the audio costs the same for
ten bytes as for a gigabyte. The verdict depends on the bytes alone, never on how they were cut into pieces; a fault is
raised at the first byte that proves it. Where the audio ends is known at `finish`: a size may be a pipe's, or wrong.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from service.core.errors import InvalidAudio
from service.core.formats import AudioFormat, check_channels, conversion, read_fmt
from service.core.magic import LENGTH, check_container

__all__ = ["AudioFormat", "AudioWarning", "WavInfo", "WavParser", "check_channels", "warnings_for"]

HEADER_BUDGET: Final = 1 << 20
MAX_CHUNKS: Final = 1_024
MIN_FMT: Final = 16
MAX_FMT: Final = 4_096

# In the contract's order, which is also the order they are given in; `converted` follows them.
_WARNINGS: Final = (
    "streamed_header",
    "riff_size_mismatch",
    "truncated_data",
    "partial_frame",
    "missing_pad_byte",
    "trailing_bytes",
    "extra_data_chunk",
    "byterate_mismatch",
)
_KNOWN_CHUNKS: Final = frozenset(
    b"data,fmt ,LIST,fact,ds64,bext,JUNK,junk,PAD ,FLLR,PEAK,cue ,smpl,inst,plst,iXML,axml,chna,id3 ,ID3 ,DISP,cart,"
    b"umid,acid,afsp,levl,_PMX,qlty,mext,link,slnt,wavl,note,labl,ltxt".split(b",")
)
_SIZE: Final = struct.Struct("<I")
_SIZES_64: Final = struct.Struct("<QQ")
_UNTOLD: Final = frozenset((0, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF))
_ENDLESS: Final = 1 << 80  # past the end of any file, and above any sum of header sizes


@dataclass(frozen=True, slots=True)
class AudioWarning:
    """Something odd that was mended: a warning code of the contract, and what was found and done."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class WavInfo:
    """A file that can be streamed: `frames` whole frames from byte `data_start` on."""

    format: AudioFormat
    data_start: int
    frames: int
    warnings: tuple[AudioWarning, ...]

    @property
    def data_bytes(self) -> int:
        return self.frames * self.format.frame_bytes

    @property
    def duration_ms(self) -> int:
        """Whole milliseconds, rounded down: no position within it lies past the audio."""
        return self.frames * 1_000 // self.format.sample_rate


def warnings_for(info: WavInfo, option: str) -> tuple[AudioWarning, ...]:
    """The warnings of the file, then `converted` if it is not sent as it is under this option `channels`."""
    if not info.format.converted:
        return info.warnings
    done = conversion(info.format, option)
    return (*info.warnings, AudioWarning("converted", f"Not sent as it is: {done}."))


class WavParser:
    """Feed it the file in pieces of any size, then `finish`. One that has raised is spent."""

    def __init__(self, *, max_duration_s: float, total_bytes: int | None = None) -> None:
        """With `total_bytes`, the length of the whole file if known, one that is too long is refused at its header."""
        self.format: AudioFormat | None = None
        self._max_duration_s = max_duration_s
        self._total_bytes = total_bytes
        # Either `_skip` bytes are passed over, or `_held` fills up to `_want` bytes, which `_then` is given.
        self._pos = 0
        self._skip = 0
        self._held = bytearray()
        self._want = LENGTH
        self._then: Callable[[bytes], None] = self._on_container
        # The chunk last begun: where its header is, where its body ends by its own word.
        self._chunks = 0
        self._chunk_at, self._chunk_end, self._chunk_odd = 0, LENGTH, False
        self._pad_due = False
        self._riff64 = False
        self._riff_size = 0
        self._ds64: tuple[int, int] | None = None
        self._data_start: int | None = None
        self._data_size = 0
        self._data_end = _ENDLESS
        self._too_long_at = _ENDLESS
        self._found: dict[str, str] = {}

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes; raise `InvalidAudio` as soon as they prove a fault."""
        # Released even when this raises: a caller's bytearray must not stay locked by a traceback.
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                if self._skip:
                    step = min(self._skip, len(view) - at)
                    self._skip -= step
                else:
                    step = min(self._want - len(self._held), len(view) - at)
                    self._held += view[at : at + step]
                at += step
                self._pos += step
                if self._pos >= self._too_long_at:
                    raise self._too_long()
                if len(self._held) == self._want:
                    head = bytes(self._held)
                    self._held.clear()
                    self._then(head)

    def finish(self) -> WavInfo:
        """Say what the file is, now that it has ended; raise `InvalidAudio` if it cannot be streamed."""
        if self._data_start is None or self.format is None:
            raise self._without_data()
        received = min(self._pos, self._data_end) - self._data_start
        frames, partial = divmod(received, self.format.frame_bytes)
        if not frames:
            raise InvalidAudio("empty_audio", f"The data chunk holds {received} bytes: not one whole frame.")
        if self._pos < self._data_end < _ENDLESS:
            told = f"The data chunk says {self._data_size:,} bytes, {received:,} arrived"
            self._note("truncated_data", f"{told}; those are used.")
        if partial:
            self._note("partial_frame", f"The last {partial} bytes are no whole frame; they are dropped.")
        self._check_tail()
        self._check_riff_size()
        warnings = tuple(AudioWarning(code, self._found[code]) for code in _WARNINGS if code in self._found)
        return WavInfo(self.format, self._data_start, frames, warnings)

    def _expect(self, want: int, then: Callable[[bytes], None]) -> None:
        self._want, self._then = want, then

    def _on_container(self, head: bytes) -> None:
        check_container(head)
        self._riff64 = not head.startswith(b"RIFF")
        (self._riff_size,) = _SIZE.unpack_from(head, 4)
        self._expect(8, self._on_chunk)

    def _on_chunk(self, head: bytes) -> None:
        if self._pad_due:
            self._pad_due = False
            if not _is_header(head):
                self._held += head[1:]
                return
            self._note_missing_pad()
        name, (size,) = head[:4], _SIZE.unpack_from(head, 4)
        if self._data_start is not None and not _is_printable(name):
            self._note_trailing(self._pos - 8)
            self._skip = _ENDLESS
            return
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise InvalidAudio("too_many_chunks", f"The file has more than {MAX_CHUNKS:,} chunks.")
        self._chunk_at = self._pos - 8
        if self._data_start is not None:
            if name == b"data":
                self._note("extra_data_chunk", f"Byte {self._chunk_at:,} begins another data chunk; the first is used.")
            self._open(size)
            self._skip_body()
        elif name == b"data":
            self._open_data(size)
        else:
            self._open_header(name, size)

    def _open(self, size: int) -> None:
        self._chunk_end, self._chunk_odd = self._pos + size, bool(size & 1)

    def _skip_body(self) -> None:
        self._skip = self._chunk_end - self._pos
        self._pad_due = self._chunk_odd
        self._expect(8, self._on_chunk)

    def _open_header(self, name: bytes, size: int) -> None:
        self._open(size)
        if name == b"fmt " and not MIN_FMT <= size <= MAX_FMT:
            raise InvalidAudio("bad_fmt", f"The fmt chunk says {size:,} bytes; it has 16 to 4,096.")
        if self._chunk_end > HEADER_BUDGET:
            what = f"the chunk at byte {self._chunk_at:,} says {size:,} bytes"
            raise InvalidAudio("missing_data", f"No data chunk begins within the first MiB: {what}.")
        if name == b"fmt ":
            self._expect(min(size, 40), self._on_fmt)
        elif name == b"ds64" and self._riff64 and size >= _SIZES_64.size:
            self._expect(_SIZES_64.size, self._on_ds64)
        else:
            self._skip_body()

    def _on_ds64(self, body: bytes) -> None:
        self._ds64 = _SIZES_64.unpack(body)
        self._skip_body()

    def _on_fmt(self, body: bytes) -> None:
        fmt, byte_rate, align = read_fmt(body)
        if self.format not in (None, fmt):
            raise InvalidAudio("bad_fmt", f"Two fmt chunks disagree: {self.format} and {fmt}.")
        self.format = fmt
        right_rate, right_align = fmt.sample_rate * fmt.frame_bytes, fmt.frame_bytes
        if (byte_rate, align) != (right_rate, right_align):
            told = f"The fmt chunk says {byte_rate:,} bytes a second and {align} a frame"
            self._note("byterate_mismatch", f"{told}; {fmt} makes {right_rate:,} and {right_align}, which are used.")
        self._skip_body()

    def _open_data(self, size: int) -> None:
        if self.format is None:
            raise InvalidAudio("missing_fmt", f"The data chunk at byte {self._chunk_at:,} comes before any fmt chunk.")
        if size == 0xFFFF_FFFF and self._ds64:
            size = self._ds64[1]
        if 0 < size < self.format.frame_bytes:
            raise InvalidAudio("empty_audio", f"The data chunk has {size} bytes: not one whole frame.")
        self._data_start, self._data_size = self._pos, size
        if size not in _UNTOLD:
            self._data_end = self._pos + size
        self._limit(self._data_start, self.format)
        self._open(self._data_end - self._pos)
        if size:
            self._skip_body()
        else:
            self._expect(4, self._on_untold_data)

    def _on_untold_data(self, head: bytes) -> None:
        # 0 is a pipe's size, or a crashed recorder's, unless another chunk follows at once: then there is no audio.
        if head in _KNOWN_CHUNKS:
            raise InvalidAudio("empty_audio", "The data chunk is empty.")
        self._skip_body()

    def _limit(self, data_start: int, fmt: AudioFormat) -> None:
        allowed = int(min(self._max_duration_s * fmt.sample_rate, _ENDLESS))  # the bound may be infinite
        limit = data_start + (allowed + 1) * fmt.frame_bytes
        if limit > self._data_end:
            return
        self._too_long_at = limit
        if self._total_bytes is not None and self._total_bytes >= limit:
            raise self._too_long()

    def _too_long(self) -> InvalidAudio:
        limit = f"{self._max_duration_s:,.10g} s"
        return InvalidAudio("too_long", f"The audio is longer than {limit}. Split it into shorter files.")

    def _note(self, code: str, message: str) -> None:
        self._found.setdefault(code, message)

    def _note_missing_pad(self) -> None:
        odd = f"The chunk that ends at byte {self._chunk_end:,} has an odd size"
        self._note("missing_pad_byte", f"{odd} and no pad byte after it; none is skipped.")

    def _note_trailing(self, start: int) -> None:
        self._note("trailing_bytes", f"What begins at byte {start:,} is no whole chunk; it is ignored.")

    def _without_data(self) -> InvalidAudio:
        if self._pos < LENGTH:
            check_container(bytes(self._held))
        if self._pos < self._chunk_end or len(self._held) > self._pad_due:
            return InvalidAudio("truncated_header", f"The file ends at byte {self._pos:,}, before its audio begins.")
        if self.format is None:
            return InvalidAudio("missing_fmt", "The file has no fmt chunk, so its samples cannot be read.")
        return InvalidAudio("missing_data", "The file has no data chunk, so there is no audio in it.")

    def _check_tail(self) -> None:
        if self._pos < self._data_end:
            return
        if self._pos < self._chunk_end:
            self._note_trailing(self._chunk_at)
        elif self._pad_due and not self._held:
            self._note_missing_pad()
        elif len(self._held) > self._pad_due:
            self._note_trailing(self._pos - len(self._held) + self._pad_due)

    def _check_riff_size(self) -> None:
        size = self._ds64[0] if self._ds64 and self._riff_size == 0xFFFF_FFFF else self._riff_size
        if size in _UNTOLD or self._data_size in _UNTOLD:
            told = f"The header does not tell its sizes (RIFF {size:#x}, data {self._data_size:#x})"
            self._note("streamed_header", f"{told}; the bytes that arrived are used.")
            return
        end = size + 8
        if self._pos < self._chunk_end:
            # Cut short: the header may well have been right about what was there before.
            agrees = end >= self._chunk_end or end == self._chunk_at
        else:
            agrees = self._chunk_end <= end <= self._chunk_end + self._chunk_odd
        if not agrees and end != self._pos:
            told = f"The RIFF header puts the end at byte {end:,}, {self._pos:,} bytes arrived"
            self._note("riff_size_mismatch", f"{told}; its size is ignored.")


def _is_printable(name: bytes) -> bool:
    return all(0x20 <= byte <= 0x7E for byte in name)


def _is_header(head: bytes) -> bool:
    """Whether the 8 bytes after an odd chunk are a chunk header at once, with no pad byte; a pad is not always 0."""
    if head[:4] in _KNOWN_CHUNKS:
        return True
    return _is_printable(head[:4]) and head[1:5] not in _KNOWN_CHUNKS and not _is_printable(head[1:5])
