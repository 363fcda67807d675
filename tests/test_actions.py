"""Which actions are open in which state, and which completions that leaves possible."""

import pytest

from lm.actions import ActionSpace, IllegalCompletion

TOKENS = [2, 3, 4, 5, 7, 8]


def test_stop_positions_leave_out_short_prefixes_and_text_a_tool_is_inserting() -> None:
    marks = [False, False, True, True, False, True]
    from_zero = ActionSpace(stop_token=1, legal_tokens=None, min_len=0, max_len=9)
    from_two = ActionSpace(stop_token=1, legal_tokens=None, min_len=2, max_len=9)
    assert from_zero.stop_positions(TOKENS, marks).tolist() == [0, 1, 4, 6]
    assert from_two.stop_positions(TOKENS, marks).tolist() == [4, 6]
    assert from_zero.stop_positions([], []).tolist() == [0]


def test_a_stop_may_be_tied_to_the_end_of_a_tools_text_or_to_max_len() -> None:
    actions = ActionSpace(
        stop_token=1, legal_tokens=None, min_len=0, max_len=7, stop_after_tool=True
    )
    assert actions.stop_positions(TOKENS, [False, False, True, True, False, True]).tolist() == [
        4,
        6,
    ]
    assert actions.stop_positions([*TOKENS, 3], [False, True, *[False] * 5]).tolist() == [2, 7]
    with pytest.raises(IllegalCompletion, match="not right after a tool's text"):
        actions.check([2, 3, 4], [False, True, False])


def test_stops_may_be_tied_to_tokens_or_to_every_kth_of_them() -> None:
    marks = [False, False, True, True, False, True]
    behind, every, both = (
        ActionSpace(stop_token=1, legal_tokens=None, min_len=1, max_len=6, **narrowed)
        for narrowed in (
            {"stop_behind": frozenset({3, 5})},
            {"stop_every": 2},
            {"stop_behind": frozenset({3, 5, 7}), "stop_every": 2},
        )
    )
    # A state inside a tool's text is none, and at max_len ⊤ is forced.
    assert behind.stop_positions(TOKENS, marks).tolist() == [4, 6]
    assert behind.stop_positions(TOKENS, [False] * 6).tolist() == [2, 4, 6]
    assert every.stop_positions(TOKENS, marks).tolist() == [1, 6]
    assert every.stop_positions(TOKENS, [False] * 6).tolist() == [1, 3, 5, 6]
    assert both.stop_positions(TOKENS, [False] * 6).tolist() == [5, 6]
    assert [behind.may_stop(2, token, False) for token in (3, 4)] == [True, False]
    with pytest.raises(IllegalCompletion, match=r"certain tokens \(stop_behind\)$"):
        behind.check([2], [False])
    with pytest.raises(IllegalCompletion, match=r"a multiple of 2 tokens \(stop_every\)$"):
        every.check([2, 3], [False] * 2)
    with pytest.raises(ValueError, match="stop_every=0"):
        ActionSpace(stop_token=1, legal_tokens=None, min_len=1, max_len=6, stop_every=0)


def test_the_columns_are_the_support_of_the_softmax() -> None:
    actions = ActionSpace(stop_token=4, legal_tokens=(1, 3), min_len=0, max_len=2)
    assert actions.columns(6).tolist() == [1, 3, 4]
    free = ActionSpace(stop_token=4, legal_tokens=None, min_len=0, max_len=2)
    assert free.columns(6).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("completion", "marks", "complaint"),
    [
        ([2, 9, 3], [False] * 3, "token 9 at place 1"),
        ([2, 1, 3], [False] * 3, "token 1 at place 1"),
        ([2], [False], "shorter than min_len=2"),
        ([2, 3, 2, 3, 2], [False] * 5, "beyond max_len=4"),
        ([2, 3], [False], "2 tokens but 1 from_tool marks"),
    ],
)
def test_completions_the_policy_cannot_produce_are_refused(
    completion: list[int], marks: list[bool], complaint: str
) -> None:
    actions = ActionSpace(stop_token=1, legal_tokens=(2, 3), min_len=2, max_len=4)
    with pytest.raises(IllegalCompletion, match=complaint):
        actions.check(completion, marks)


def test_impossible_action_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="need 0 <= min_len <= max_len"):
        ActionSpace(stop_token=1, legal_tokens=None, min_len=4, max_len=3)
    with pytest.raises(ValueError, match="no token but the stop token"):
        ActionSpace(stop_token=1, legal_tokens=(1,), min_len=0, max_len=3)
    outside = ActionSpace(stop_token=6, legal_tokens=(1,), min_len=0, max_len=3)
    with pytest.raises(ValueError, match=r"token ids \[6.*vocabulary of 6"):
        outside.columns(6)
