"""What a scorer is asked: which X the frozen LM reads, and what it scores behind Z."""

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.prompts import Prompt
from actors.reward_query import DirectScorer, RewardKind, RewardQuery
from reward.request import ScoreItem
from tasks.posterior.weights import log_rewards

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


def test_a_likelier_wrong_answer_lowers_the_reward_of_its_prefix_alone() -> None:
    """log R = log p(z Y) - penalty where log p(z Y') > log p(z Y), at each stop state by itself."""
    prompt = Prompt(key="a", text="a", prompt=(1, 2), answer=(8, 9))
    answers = {(8, 9): (8, 3, 4), (8, 3, 4): (8, 9)}
    query = RewardQuery(kind="suffix", stop_token=8, rivals=answers, rival_penalty=50.0)
    log_p = {(8, 9): [-3.0, -5.0, -7.0], (8, 3, 4): [-3.0, -4.5, -9.0]}  # a tie, wrong, right

    def frozen_lm(item: ScoreItem) -> NDArray[np.float32]:
        assert item.context.tolist() == [1, 2] and item.completion.tolist() in ([4], [4, 5])
        return np.array(log_p[tuple(item.answer.tolist())], dtype=np.float32)[item.stops]

    stops = np.array([0, 1, 2], dtype=np.int32)
    item = query.item(prompt, (4, 5), stops)
    scores = DirectScorer(frozen_lm).submit(query.asked([item, item])).result(1.0)
    [log_r, again] = query.judged(scores)
    assert log_r.tolist() == again.tolist() == [-3.0, -55.0, -7.0]
    assert log_r.dtype == np.float32
    whole = log_rewards([(4,), (4, 5)], prompt, query, lambda items: [frozen_lm(i) for i in items])
    assert whole.tolist() == [-55.0, -7.0]
