"""From the messages of a session to PCM16: the two encodings the sandbox can read.

Audio is one stream and messages are only its wrapping, so a sample may be cut in two.
"""

import numpy as np
import numpy.typing as npt

BYTES_PER_SAMPLE = {"pcm_s16le": 2, "pcm_mulaw": 1}


def _mulaw_table() -> npt.NDArray[np.int16]:
    """ITU-T G.711: sign, exponent and mantissa, all inverted."""
    code = ~np.arange(256, dtype=np.uint8)
    magnitude = ((((code & 0x0F).astype(np.int32) << 3) + 0x84) << ((code >> 4) & 0x07).astype(np.int32)) - 0x84
    return np.where(code & 0x80, -magnitude, magnitude).astype("<i2")


_MULAW = _mulaw_table()


class Decoder:
    """One session's audio."""

    def __init__(self, encoding: str) -> None:
        self._mulaw = encoding == "pcm_mulaw"
        self._half = b""

    def decode(self, message: bytes) -> bytes:
        if self._mulaw:
            return _MULAW[np.frombuffer(message, np.uint8)].tobytes()
        if len(message) % 2 or self._half:
            message = self._half + message
            whole = len(message) // 2 * 2
            message, self._half = message[:whole], message[whole:]
        return message
