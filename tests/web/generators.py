"""What schemathesis cannot think of by itself: a WAV. Loaded by its own process, see test_schemathesis."""

import schemathesis
from hypothesis import strategies as st

from tests.web.served import wav

WAVS = st.sampled_from([wav(0.1), wav(1), wav(0.1) + b"odd", wav()[:60], b"", b"RIFX"])
schemathesis.openapi.format("binary", WAVS)
schemathesis.openapi.media_type("audio/wav", WAVS)
schemathesis.openapi.media_type("application/octet-stream", WAVS)
