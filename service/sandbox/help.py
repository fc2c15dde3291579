"""The text of `turnwire sandbox --help`: the formats of script and fault files, with an example of each step.

The examples are data and a test reads them with the very loaders, so the help cannot promise what the files do not do.
"""

from service.sandbox import script
from service.sandbox.faults import ERRORS

FAULT_EXAMPLE = """\
{
  "sessions": {
    "1": [{"do": "refuse", "status": 503, "retry_after": 2}],
    "2": [{"do": "error", "name": "too_many"}],
    "3": [{"do": "drop", "at_ms": 1500}],
    "4-5": [{"do": "error", "name": "cancelled", "at_ms": 2000}, {"do": "pings", "every": 1}],
    "*": [{"do": "duplicate_final", "turn": 0}]
  }
}
"""

STEP_EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "the handshake": [
        ('{"do": "refuse", "status": 429, "retry_after": 3}', "answer with this HTTP status; also `location`, `body`"),
        ('{"do": "hang_upgrade", "seconds": 30}', "take the connection, answer late"),
        ('{"do": "wrong_accept"}', "101 with a wrong Sec-WebSocket-Accept"),
    ],
    "how it opens": [
        ('{"do": "no_begin"}', "never say Begin"),
        ('{"do": "delay_begin", "seconds": 5}', ""),
        ('{"do": "no_configuration"}', "Begin without `configuration`, as until 2026"),
        ('{"do": "expires_in", "seconds": 60}', "short `expires_at`, kept with 3008"),
    ],
    "how it ends early (with a moment; before Begin if none is given)": [
        ('{"do": "error", "name": "bad_key"}', "Error frame and close; names below, or `code` and `text`"),
        ('{"do": "error", "code": 3005, "text": "Session Cancelled: An error occurred", "at_ms": 900}', ""),
        ('{"do": "error", "name": "cancelled", "with_type": false, "with_code": false}', "an old bare frame"),
        ('{"do": "error", "name": "expired", "close": false, "on": "begin"}', "no close after it"),
        ('{"do": "error", "name": "bad_key", "close_code": 1011, "reason": "x"}', "another close than the frame said"),
        ('{"do": "close", "code": 1011, "reason": "bye", "at_ms": 900}', "a close without Error frame"),
        ('{"do": "eof", "at_ms": 900}', "FIN without a close frame"),
        ('{"do": "drop", "at_ms": 900}', "RST"),
    ],
    "how it hangs (with a moment; after Begin if none is given; dropped after `seconds`, default 120)": [
        ('{"do": "stop_reading", "at_ms": 900}', "reads no more, still speaks of what it has"),
        ('{"do": "silent", "at_ms": 900, "seconds": 60}', "half-open: neither reads nor speaks nor answers pings"),
        ('{"do": "mute", "at_ms": 900}', "reads and answers pings, says nothing more; to the end"),
    ],
    "what it says besides (with a moment; after Begin if none is given)": [
        ('{"do": "send", "text": "{\\"type\\": \\"Warning\\"}", "times": 2}', "any text frame"),
        ('{"do": "unknown_type", "times": 3}', ""),
        ('{"do": "malformed", "times": 3}', "a text frame that is not JSON"),
        ('{"do": "binary", "times": 3}', ""),
        ('{"do": "huge", "megabytes": 30}', "one text frame of that size"),
        ('{"do": "pong", "times": 5}', "unasked"),
        ('{"do": "ping", "times": 20000}', "a storm"),
        ('{"do": "pings", "every": 1}', "one each second, all along"),
    ],
    "what happens to its turns (`turn` is the turn_order; every turn without it)": [
        ('{"do": "duplicate_final", "turn": 0}', "the final twice"),
        ('{"do": "late_twin", "turn": 0}', "the final again, after that of the next turn"),
        ('{"do": "swap_finals", "turn": 0}', "the final only after that of the next turn"),
        ('{"do": "late_partial", "turn": 0}', "a partial after the final"),
        ('{"do": "revise_turn", "turn": 0, "text": "Other words."}', "a second final with another text"),
        ('{"do": "speaker_revision", "turn": 0, "label": "B"}', "SpeakerRevision right after the final"),
    ],
    "how it answers Terminate": [
        ('{"do": "late_termination", "seconds": 20}', ""),
        ('{"do": "no_termination"}', "`then`: hang (default), close (1000), eof or drop"),
        ('{"do": "no_close"}', "Termination, and the connection stays open"),
    ],
}


def _steps() -> str:
    lines: list[str] = []
    for heading, examples in STEP_EXAMPLES.items():
        lines.append(f"  {heading}")
        lines += [f"    {example}{'   ' + meaning if meaning else ''}" for example, meaning in examples]
    return "\n".join(lines)


def _errors() -> str:
    return "\n".join(f"    {name}: {code} {text}" for name, (code, text) in ERRORS.items())


FAULT_HELP = f"""\
Fault file (--faults): JSON, {{"sessions": {{WHICH: [STEP, ...]}}}}. WHICH is a session's number, counted from 1 as they
knock, a range (3-5, 6-) or * for all others. The moment of a step is `at_ms` (audio received) or `on`: open (before
Begin), begin (right after it) or terminate.
Example:
{FAULT_EXAMPLE}
Steps:
{_steps()}
  names of errors
{_errors()}
"""

HELP = f"{script.HELP}\n{FAULT_HELP}"
