"""Any accepted sample format → what AssemblyAI takes: 16-bit little-endian mono, block by block. FLOOR 0.

Between the bytes of the file and those of the wire everything is in units of a 16-bit sample: whole numbers where the
encoding has no more to give, else float64, rounded once at the very end (half to even), after mixing and resampling.
Blocks may end anywhere, even within a sample: however the file is cut, the bytes that come out are the same.
"""

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import soxr

from service.core.formats import AudioFormat

_Raw = npt.NDArray[Any]
_Samples = npt.NDArray[np.int16] | npt.NDArray[np.float64]


class Converter:
    """One channel of a file, or the mean of them all, on its way upstream at `fmt.upstream_rate`."""

    def __init__(self, fmt: AudioFormat, channel: int | Literal["mix"] = 0) -> None:
        """`channel` is counted from 0."""
        self._fmt = fmt
        self._channel = channel
        self._rest = b""
        self._resampler: soxr.ResampleStream | None = None
        if fmt.upstream_rate != fmt.sample_rate:
            self._resampler = soxr.ResampleStream(fmt.sample_rate, fmt.upstream_rate, 1, dtype="float64")

    def convert(self, block: bytes, *, last: bool = False) -> bytes:
        """The next block as it goes upstream; with `last`, also what the resampler kept, less an unfinished frame."""
        data = self._rest + block if self._rest else block
        whole = len(data) - len(data) % self._fmt.frame_bytes
        data, self._rest = data[:whole], data[whole:]
        if not self._fmt.converted:
            return data
        samples = self._pick(data)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples.astype(np.float64), last=last)
        return _rounded(samples).tobytes()

    def _pick(self, data: bytes) -> _Samples:
        dtype, decode = _DECODERS[self._fmt.encoding]
        raw = np.frombuffer(data, dtype).reshape(-1, self._fmt.channels)
        if self._channel != "mix":
            return decode(raw[:, self._channel])
        total = np.zeros(len(raw))
        for channel in range(self._fmt.channels):
            total += decode(raw[:, channel])
        total /= self._fmt.channels
        return total


def decode(encoding: str, data: bytes) -> _Samples:
    """All samples of whole frames, channel after channel, in units of a 16-bit sample."""
    dtype, decoder = _DECODERS[encoding]
    return decoder(np.frombuffer(data, dtype))


def _rounded(samples: _Samples) -> npt.NDArray[np.int16]:
    if samples.dtype == np.float64:
        samples = np.clip(np.rint(samples), -32_768, 32_767)
    return samples.astype("<i2", copy=False)


def _from_s16(raw: _Raw) -> _Samples:
    return raw


def _from_u8(raw: _Raw) -> _Samples:
    return (raw.astype(np.int16) - 128) << 8


def _from_s24(raw: _Raw) -> _Samples:
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 1:] = np.ascontiguousarray(raw).view(np.uint8).reshape(-1, 3)
    return _from_s32(wide.view("<i4")[:, 0])


def _from_s32(raw: _Raw) -> _Samples:
    return raw / 65_536.0


def _from_float(raw: _Raw) -> _Samples:
    with np.errstate(invalid="ignore"):  # a signalling NaN is made as silent as any other
        samples = np.clip(raw.astype(np.float64), -1.0, 1.0)
    return np.nan_to_num(samples, copy=False) * 32_768.0


def _from_alaw(raw: _Raw) -> _Samples:
    return _ALAW[raw]


def _from_mulaw(raw: _Raw) -> _Samples:
    return _MULAW[raw]


# G.711: a byte is a sign, a segment and a step in it, kept with bits inverted. https://www.itu.int/rec/T-REC-G.711
def _alaw(byte: int) -> int:
    byte ^= 0x55
    segment, step = (byte >> 4) & 7, (byte & 0xF) << 4
    size = (step + 0x108) << (segment - 1) if segment else step + 8
    return size if byte & 0x80 else -size


def _mulaw(byte: int) -> int:
    byte ^= 0xFF
    size = ((((byte & 0xF) << 3) + 0x84) << ((byte >> 4) & 7)) - 0x84
    return -size if byte & 0x80 else size


_ALAW: Final = np.array([_alaw(byte) for byte in range(256)], np.int16)
_MULAW: Final = np.array([_mulaw(byte) for byte in range(256)], np.int16)

_DECODERS: Final[dict[str, tuple[str, Callable[[_Raw], _Samples]]]] = {
    "pcm_u8": ("u1", _from_u8),
    "pcm_s16le": ("<i2", _from_s16),
    "pcm_s24le": ("V3", _from_s24),
    "pcm_s32le": ("<i4", _from_s32),
    "pcm_f32le": ("<f4", _from_float),
    "pcm_f64le": ("<f8", _from_float),
    "pcm_alaw": ("u1", _from_alaw),
    "pcm_mulaw": ("u1", _from_mulaw),
}
