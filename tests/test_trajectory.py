"""The wire record: what is packed comes back, and nothing else comes in."""

import pickle
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from buffer.trajectory import (
    MAX_TOKEN,
    MalformedTrajectory,
    Trajectory,
    pack,
    pack_group,
    unpack,
    unpack_group,
)
from tests.buffer_toy import toy_trajectory

ARRAYS = ("prompt", "answer", "completion", "from_tool", "stops")
LOGS = ("log_reward", "behaviour_log_prob", "behaviour_log_stop")
SCALARS = ("task", "prompt_key", "policy_version", "behaviour", "temperature", "actor")


def tokens(max_size: int) -> st.SearchStrategy[np.ndarray]:
    return npst.arrays(np.int32, st.integers(0, max_size), elements=st.integers(0, MAX_TOKEN - 1))


def logs(size: int, *, highest: float) -> st.SearchStrategy[np.ndarray]:
    values = st.floats(-1e6, highest, width=32)
    return npst.arrays(np.float32, size, elements=values)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    """Any trajectory that the rules allow."""
    completion = draw(tokens(12))
    length = completion.size
    from_tool = draw(npst.arrays(np.bool_, length))
    may_stop = [t for t in range(length) if not from_tool[t]]
    chosen = draw(st.lists(st.sampled_from(may_stop), unique=True) if may_stop else st.just([]))
    stops = np.array([*sorted(chosen), length], np.int32)
    text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
    return Trajectory(
        task=draw(text),
        prompt_key=draw(text),
        prompt=draw(tokens(6)),
        answer=draw(tokens(3)),
        completion=completion,
        from_tool=from_tool,
        stops=stops,
        log_reward=draw(logs(stops.size, highest=1e6)),
        behaviour_log_prob=np.float32(~from_tool) * draw(logs(length, highest=0.0)),
        behaviour_log_stop=draw(logs(stops.size, highest=0.0)),
        policy_version=draw(st.integers(0, 2**53 - 1)),
        behaviour=draw(st.sampled_from(["on_policy", "tempered", "demonstration"])),
        temperature=draw(st.floats(0.01, 10.0)),
        actor=draw(text),
        created_s=draw(st.floats(0.0, 1e10)),
        correct=draw(st.none() | st.booleans()),
    )


def same(left: Trajectory, right: Trajectory) -> bool:
    return all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in (*ARRAYS, *LOGS, *SCALARS, "created_s", "correct")
    )


@given(trajectories())
def test_what_is_packed_comes_back(trajectory: Trajectory) -> None:
    again = unpack(pack(trajectory))
    assert same(trajectory, again)
    assert again.id == trajectory.id
    assert pack(again) == pack(trajectory)


@given(st.lists(trajectories(), min_size=1, max_size=4))
def test_a_group_keeps_order_and_multiplicity(group: list[Trajectory]) -> None:
    group = [*group, group[0]]
    again = unpack_group(pack_group([pack(trajectory) for trajectory in group]))
    assert len(again) == len(group)
    assert all(same(left, right) for left, right in zip(group, again, strict=True))


@given(st.binary(max_size=200))
def test_random_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedTrajectory):
        unpack(data)
    with pytest.raises(MalformedTrajectory):
        unpack_group(data)


@settings(max_examples=150)
@given(trajectories(), st.data())
def test_a_damaged_payload_is_malformed_or_a_valid_record(
    trajectory: Trajectory, data: st.DataObject
) -> None:
    damaged = bytearray(pack(trajectory))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                damaged[place] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[place : place + data.draw(st.integers(1, 9))]
            case "insert":
                damaged[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        if not damaged:
            return
    try:
        survivor = unpack(bytes(damaged))
    except MalformedTrajectory:
        return
    assert same(unpack(pack(survivor)), survivor)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(trajectories(), st.integers(0, 12), JUNK)
def test_a_field_of_any_other_content_is_malformed_or_valid(
    trajectory: Trajectory, field: int, junk: object
) -> None:
    fields = msgpack.unpackb(pack(trajectory))
    fields[field] = junk
    try:
        survivor = unpack(msgpack.packb(fields))
    except MalformedTrajectory:
        return
    assert same(unpack(pack(survivor)), survivor)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("completion", np.array([1, 2, -1], np.int32), "outside"),
        ("completion", np.array([1, 2, MAX_TOKEN], np.int32), "outside"),
        ("completion", np.array([1, 2, 3], np.int64), "int32"),
        ("completion", np.array([[1, 2, 3]], np.int32), "one-dimensional"),
        ("completion", [1, 2, 3], "int32"),
        ("from_tool", np.zeros(4, np.bool_), "4 entries for 3"),
        ("from_tool", np.array([False, False, True]), "stop state lies"),
        ("stops", np.array([], np.int32), "stops"),
        ("stops", np.array([0, 2, 2, 3], np.int32), "rise strictly"),
        ("stops", np.array([0, 1, 2], np.int32), "end at the length 3"),
        ("log_reward", np.zeros(3, np.float32), "entries"),
        ("log_reward", np.array([0, 0, 0, np.inf], np.float32), "not finite"),
        ("log_reward", np.array([np.inf, -np.inf, 0, 0], np.float32), "not finite"),
        ("behaviour_log_prob", np.array([0, np.nan, 0], np.float32), "not finite"),
        ("behaviour_log_prob", np.array([0, 0.5, 0], np.float32), "above 0"),
        ("behaviour_log_stop", np.array([0, 0.5, 0, 0], np.float32), "above 0"),
        ("policy_version", -1, "policy_version"),
        ("policy_version", True, "policy_version"),
        ("behaviour", "greedy", "behaviour"),
        ("temperature", 0.0, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("created_s", float("inf"), "created_s"),
        ("actor", "", "actor"),
        ("task", "x" * 2000, "task"),
        ("correct", 1, "correct"),
    ],
)
def test_a_record_that_cannot_be_is_refused_with_its_reason(
    field: str, value: Any, words: str
) -> None:
    with pytest.raises(MalformedTrajectory, match=words):
        replace(toy_trajectory((1, 2, 3)), **{field: value})


def test_a_log_probability_at_a_tool_token_is_refused() -> None:
    tool = np.array([False, True, False])
    with pytest.raises(MalformedTrajectory, match="tool tokens"):
        replace(
            toy_trajectory((1, 2, 3)),
            from_tool=tool,
            stops=np.array([0, 2, 3], np.int32),
            log_reward=np.zeros(3, np.float32),
            behaviour_log_stop=np.zeros(3, np.float32),
        )


def test_the_id_is_that_of_the_content() -> None:
    trajectory = toy_trajectory((1, 2), prompt="p")
    assert trajectory.id == toy_trajectory((1, 2), log_reward=-9.0, policy_version=5).id
    assert trajectory.id != replace(trajectory, prompt=np.array([7], np.int32)).id
    assert replace(trajectory, task="ab", prompt_key="c").id != (
        replace(trajectory, task="a", prompt_key="bc").id
    ), "fields must not run into each other"
    others = [
        toy_trajectory((1, 2), prompt="q"),
        toy_trajectory((1, 2), task="other"),
        toy_trajectory((2, 1)),
        toy_trajectory((1,)),
    ]
    assert len({trajectory.id, *(other.id for other in others)}) == 5


def test_a_lying_length_costs_no_memory() -> None:
    # An array of 2**32 - 1 entries is announced in five bytes.
    with pytest.raises(MalformedTrajectory, match="bounds"):
        unpack(b"\xdd\xff\xff\xff\xff")


def test_a_tool_mask_of_other_bytes_than_0_and_1_is_malformed() -> None:
    fields = msgpack.unpackb(pack(toy_trajectory((1, 2, 3))))
    fields[5] = b"\x00\x02\x00"
    with pytest.raises(MalformedTrajectory, match="from_tool holds a byte"):
        unpack(msgpack.packb(fields))


def test_arrays_read_from_the_wire_cannot_be_written() -> None:
    trajectory = unpack(pack(toy_trajectory()))
    with pytest.raises(ValueError, match="read-only"):
        trajectory.completion[0] = 5


def test_the_error_pickles() -> None:
    error = MalformedTrajectory("completion is wrong")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
