"""Fault files: what is accepted, what is refused and with which words; the help tells no lies."""

import json
from pathlib import Path

import msgspec
import pytest

from service.sandbox import faults as f
from service.sandbox import script
from service.sandbox.faults import FaultPlan, Step, load_faults
from service.sandbox.help import FAULT_EXAMPLE, HELP, STEP_EXAMPLES
from service.sandbox.script import PlanFileError


def write(path: Path, text: str) -> Path:
    file = path / "faults.json"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_example_of_the_help_loads(tmp_path: Path) -> None:
    plan = load_faults(write(tmp_path, FAULT_EXAMPLE))
    assert plan.steps_for(1) == [f.Refuse(status=503, retry_after=2)]
    assert plan.steps_for(2) == [f.ErrorFrame(name="too_many")]
    assert plan.steps_for(4) == plan.steps_for(5) == [f.ErrorFrame(name="cancelled", at_ms=2000), f.Pings(every=1)]
    assert plan.steps_for(99) == [f.DuplicateFinal(turn=0)]


def test_the_help_has_an_example_of_every_step() -> None:
    examples = [example for section in STEP_EXAMPLES.values() for example, _ in section]
    steps = [msgspec.json.decode(example, type=Step) for example in examples]
    assert {type(step) for step in steps} == set(Step.__args__)
    assert all(example in HELP for example in examples)
    assert script.EXAMPLE in HELP


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "truncated"),
        ('{"session": {}}', "unknown field `session`"),
        ('{"sessions": {"0": []}}', "session '0': write a number"),
        ('{"sessions": {"1": [{"do": "drop"}, {"do": "explode"}]}}', "session '1', step 2: Invalid value 'explode'"),
        ('{"sessions": {"1": [{"do": "drop", "at": 3}]}}', "session '1', step 1: Object contains unknown field `at`"),
        ('{"sessions": {"*": [{"do": "refuse"}]}}', "missing required field `status`"),
        ('{"sessions": {"*": [{"do": "error", "name": "oops"}]}}', "unknown error name 'oops'; one of missing_key"),
        ('{"sessions": {"*": [{"do": "close", "code": 1006}]}}', "1006 cannot be sent"),
        ('{"sessions": {"*": [{"do": "delay_begin", "seconds": -1}]}}', ">= 0"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PlanFileError) as refused:
        load_faults(write(tmp_path, text))
    assert str(tmp_path) in str(refused.value)
    assert complaint in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match=r"nowhere\.json: No such file"):
        load_faults(tmp_path / "nowhere.json")


def test_which_sessions_a_key_means() -> None:
    one, some, rest = [f.Drop()], [f.Eof()], [f.NoBegin()]
    plan = FaultPlan({"2-4": list[Step](some), "3": list[Step](one), "6-": list[Step](rest)})
    got = [plan.steps_for(ordinal) for ordinal in range(1, 8)]
    assert got == [[], some, one, some, [], rest, rest]
    # In-process objects and files are the same thing.
    assert json.loads(msgspec.json.encode(FaultPlan({"1": [f.Drop(at_ms=5)]})))["sessions"]["1"][0]["do"] == "drop"
