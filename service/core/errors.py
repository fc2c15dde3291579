"""The one error tree, split first by whose fault it is. FLOOR 0.

Every leaf has a stable `code`; its docstring is the public sentence, used when no better `detail` is known. HTTP
statuses live at the edge (`web/problems.py`), close codes in `core/protocol.py`: nothing here knows a transport.

    TurnwireError
    ├── CallerError        the request is wrong; mending it is up to the caller
    │   └── InvalidAudio   one of the audio codes of the contract
    ├── UpstreamError      AssemblyAI said no, said something odd, or went away
    └── OurError           this service, its disk or its database
"""

from inspect import cleandoc
from typing import ClassVar


class TurnwireError(Exception):
    """Something failed."""

    code: ClassVar[str] = "internal"

    def __init__(self, detail: str | None = None) -> None:
        """Keep `detail`, a sentence a user can act on; without one the docstring speaks."""
        self.detail = detail or cleandoc(type(self).__doc__ or "")
        super().__init__(self.detail)


class CallerError(TurnwireError):
    """The request cannot be carried out as it is."""

    def __init__(self, code: str, detail: str) -> None:
        """`code` is one of the contract's codes; `detail` says what to do."""
        self.__dict__["code"] = code
        super().__init__(detail)


class InvalidAudio(CallerError):
    """The upload is not audio that can be streamed; `code` is one of the 415 and 422 audio codes."""


class OurError(TurnwireError):
    """The service could not do its part; nothing was lost, try again."""

    code = "internal"


class StorageFull(OurError):
    """The disk is full. Nothing of this upload was kept; free some space or wait for the retention sweep."""

    code = "storage_full"


class Unavailable(OurError):
    """The database or the audio store does not answer. Nothing was lost; try again in a moment."""

    code = "unavailable"


class AudioMissing(OurError):
    """The stored audio is gone, so this job cannot be streamed."""

    code = "audio_missing"


class AudioCorrupt(OurError):
    """The stored audio no longer matches the SHA-256 taken at upload. Upload the file again."""

    code = "audio_corrupt"


class Fenced(OurError):
    """Another worker has taken this job over; this one must drop it without a word."""

    code = "fenced"


class UpstreamError(TurnwireError):
    """AssemblyAI could not be used; see `code` and `upstream_code`."""

    code = "upstream_unavailable"
