"""What a scorer is asked: which X the frozen LM reads, and what it scores behind Z."""

import numpy as np
import pytest

from actors.prompts import Prompt
from actors.reward_query import RewardKind, RewardQuery

STOPS = np.array([1, 2], dtype=np.int32)


@pytest.mark.parametrize(("kind", "scored_behind_z"), [("suffix", [8, 9]), ("stop", [0])])
def test_the_frozen_lm_reads_the_scored_prompt_and_the_policy_its_own(
    kind: RewardKind, scored_behind_z: list[int]
) -> None:
    query = RewardQuery(kind=kind, stop_token=0, context=(7,))
    plain = Prompt(key="a", text="a", prompt=(1, 2, 3), answer=(8, 9))
    shown_more = Prompt(key="b", text="b", prompt=(1, 2, 3), answer=(8, 9), scored=(1,))
    for prompt, context in ((plain, [7, 1, 2, 3]), (shown_more, [7, 1])):
        item = query.item(prompt, (4, 5), STOPS)
        assert item.context.tolist() == context
        assert item.completion.tolist() == [4, 5]
        assert item.answer.tolist() == scored_behind_z
    assert shown_more.prompt == (1, 2, 3)
