"""Which actions are open in which state, and which completions that leaves possible."""

import numpy as np
import pytest

from lm.actions import ActionSpace, IllegalCompletion, stop_positions


def test_stop_positions_leave_out_short_prefixes_and_text_a_tool_is_inserting() -> None:
    marks = [False, False, True, True, False, True]
    assert stop_positions(marks, 0).tolist() == [0, 1, 4, 6]
    assert stop_positions(marks, 2).tolist() == [4, 6]
    assert stop_positions([], 0).tolist() == [0]


def test_the_mask_is_the_support_of_the_softmax() -> None:
    actions = ActionSpace(stop_token=4, legal_tokens=(1, 3), min_len=0, max_len=2)
    assert np.flatnonzero(actions.mask(6, True)).tolist() == [1, 3, 4]
    assert np.flatnonzero(actions.mask(6, False)).tolist() == [1, 3]
    free = ActionSpace(stop_token=4, legal_tokens=None, min_len=0, max_len=2)
    assert np.flatnonzero(~free.mask(6, False)).tolist() == [4]


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
