"""One upstream conversation: every legal step, every illegal one, every deadline, and when to rotate."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.session import DRAINING_SECONDS, LIFETIME_SECONDS, OPENING_SECONDS, STEPS, Conversation, State

NOW = 1000.0
PATHS: dict[State, list[str]] = {
    State.OPENING: [],
    State.STREAMING: ["begin"],
    State.DRAINING: ["begin", "finish"],
    State.DONE: ["begin", "finish", "terminated"],
}
STEP: dict[str, Callable[[Conversation], object]] = {
    "begin": lambda conversation: conversation.begin(now=NOW, lifetime=None),
    "finish": lambda conversation: conversation.finish("end", now=NOW),
    "terminated": lambda conversation: conversation.terminated(),
    "end": lambda conversation: conversation.overdue(),
}


def at(state: State) -> Conversation:
    conversation = Conversation(NOW)
    for step in PATHS[state]:
        STEP[step](conversation)
    assert conversation.state == state
    return conversation


def test_the_table_names_every_state_and_no_unknown_step() -> None:
    assert set(STEPS) == set(State)
    assert {step for steps in STEPS.values() for step in steps} == set(STEP)


@pytest.mark.parametrize("step", STEP)
@pytest.mark.parametrize("state", State)
def test_each_step_in_each_state(state: State, step: str) -> None:
    conversation = at(state)
    # Termination that nobody asked for ends a session as any other end does.
    name = "end" if step == "terminated" and state in (State.OPENING, State.STREAMING) else step
    if name in STEPS[state]:
        STEP[step](conversation)
        assert conversation.state == STEPS[state][name]
    else:
        with pytest.raises(KeyError):
            STEP[step](conversation)
        assert conversation.state == state


@given(st.lists(st.sampled_from(sorted(STEP)), max_size=12))
def test_no_walk_leaves_the_table(walk: list[str]) -> None:
    conversation = Conversation(NOW)
    states = [conversation.state]
    for step in walk:
        try:
            STEP[step](conversation)
        except KeyError:
            continue
        states.append(conversation.state)
    order = list(State)
    assert states == sorted(states, key=order.index), "never back"
    assert states.count(State.DONE) <= 1, "nothing follows the end"


def test_begin_has_ten_seconds_and_streaming_no_limit() -> None:
    conversation = Conversation(NOW)
    assert conversation.deadline == NOW + OPENING_SECONDS == 1010
    conversation.begin(now=1005, lifetime=None)
    assert conversation.deadline == float("inf")


def test_termination_has_thirty_seconds_a_second_reason_only_shortens_them() -> None:
    conversation = at(State.STREAMING)
    conversation.finish("end", now=2000)
    assert conversation.deadline == 2000 + DRAINING_SECONDS == 2030
    conversation.finish("cancel", now=2001, within=2)
    assert (conversation.deadline, conversation.reason) == (2003, "end")
    conversation.finish("drain", now=2002, within=60)
    assert conversation.deadline == 2003


def test_how_a_passed_deadline_is_named() -> None:
    assert at(State.OPENING).overdue().kind == "no_begin"
    assert at(State.DRAINING).overdue().kind == "no_termination"


@pytest.mark.parametrize(
    ("lifetime", "at_a_boundary", "anyway"),
    [(None, 10_500, 10_740), (10_800.0, 10_500, 10_740), (99_999.0, 10_500, 10_740), (600.0, 450, 540), (60.0, 45, 54)],
)
def test_rotation_comes_at_a_turn_boundary_first_and_then_anyway(
    lifetime: float | None, at_a_boundary: float, anyway: float
) -> None:
    conversation = Conversation(NOW)
    conversation.begin(now=NOW, lifetime=lifetime)
    for due, speaking in ((at_a_boundary, False), (anyway, True)):
        assert not conversation.should_rotate(NOW + due, speaking=speaking)
        assert conversation.should_rotate(NOW + due + 0.1, speaking=speaking)
    assert not conversation.should_rotate(NOW + at_a_boundary + 0.1, speaking=True)


@given(st.floats(-1e9, 1e9))
def test_no_lifetime_makes_a_session_rotate_at_its_birth(lifetime: float) -> None:
    """Not even that of a server whose clock differs from ours by hours."""
    conversation = Conversation(NOW)
    conversation.begin(now=NOW, lifetime=lifetime)
    assert not conversation.should_rotate(NOW, speaking=False)
    assert conversation.should_rotate(NOW + LIFETIME_SECONDS, speaking=True)


@pytest.mark.parametrize("state", [State.OPENING, State.DRAINING, State.DONE])
def test_only_a_streaming_session_is_rotated(state: State) -> None:
    assert not at(state).should_rotate(NOW + LIFETIME_SECONDS, speaking=False)
