"""Next actions in one pass against one plain forward for each prefix."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lm.actions import ActionSpace
from lm.next_action import NextLogits, next_logits
from lm.scoring import completion_log_probs
from tests.sampling_toy import closed_actions
from tests.tiny_lm import ARCHITECTURES, VOCAB_SIZE

MakeLM = Callable[[str], PreTrainedModel]
PREFIXES = [(5, 9, 2), (5, 9, 2, 11, 3, 3, 20), (5, 9, 2, 11), (5, 9, 2, 8, 1, 0, 0, 0, 4)]


def plain_logits(model: PreTrainedModel, prefix: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prefix])).logits[0, -1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_each_prefix_alone(tiny_lm: MakeLM, architecture: str) -> None:
    model = tiny_lm(architecture)
    expected = torch.stack([plain_logits(model, prefix) for prefix in PREFIXES])
    torch.testing.assert_close(next_logits(model, PREFIXES), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "prefixes",
    [[(7,)], [(7,), (7,)], [(7, 8), (9,)], [(3, 4, 5)], [(3, 4, 5)] * 3, [(1, 2), (1, 2, 2)]],
)
def test_any_common_beginning_will_do(tiny_lm: MakeLM, prefixes: list[tuple[int, ...]]) -> None:
    model = tiny_lm("llama")
    expected = torch.stack([plain_logits(model, prefix) for prefix in prefixes])
    torch.testing.assert_close(next_logits(model, prefixes), expected, rtol=0, atol=1e-4)


def test_unmasked_probabilities_are_those_of_the_vocabulary(tiny_lm: MakeLM) -> None:
    model = tiny_lm("gpt2")
    every = np.tile(np.arange(VOCAB_SIZE), (len(PREFIXES), 1))
    log_p = NextLogits(model).token_log_probs(PREFIXES, every)
    assert log_p.shape == (len(PREFIXES), VOCAB_SIZE)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(PREFIXES)))
    expected = plain_logits(model, PREFIXES[1]).log_softmax(0)
    torch.testing.assert_close(log_p[1], expected, rtol=0, atol=1e-4)
    some = np.array([[n, 3] for n in range(len(PREFIXES))])
    found = NextLogits(model).token_log_probs(PREFIXES, some)
    assert found.tolist() == log_p.gather(1, torch.from_numpy(some)).tolist()


@pytest.mark.parametrize("legal", [(3, 4, 9, 17), None])
def test_actions_are_a_softmax_over_legal_tokens_and_stop(
    tiny_lm: MakeLM, legal: tuple[int, ...] | None
) -> None:
    model = tiny_lm("llama")
    actions = ActionSpace(stop_token=7, legal_tokens=legal, min_len=0, max_len=9)
    may_stop = [True, False, True, False]
    log_q = NextLogits(model).action_log_probs(actions, PREFIXES, may_stop)
    for prefix, may, row in zip(PREFIXES, may_stop, log_q, strict=True):
        logits = plain_logits(model, prefix).masked_fill(
            closed_actions(actions, VOCAB_SIZE, may), -torch.inf
        )
        expected = logits.log_softmax(0)[torch.from_numpy(actions.columns(VOCAB_SIZE))]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


def test_steps_add_up_to_what_the_scorer_says_of_a_completion(tiny_lm: MakeLM) -> None:
    model = tiny_lm("gptj")
    actions = ActionSpace(stop_token=7, legal_tokens=(3, 4, 9, 17), min_len=2, max_len=6)
    prompt, completion = (5, 9, 2), (3, 17, 17, 9)
    states = range(len(completion) + 1)
    log_q = NextLogits(model).action_log_probs(
        actions, [(*prompt, *completion[:t]) for t in states], [t >= 2 for t in states]
    )
    columns = actions.columns(VOCAB_SIZE).tolist()
    steps = sum(log_q[t, columns.index(token)] for t, token in enumerate((*completion, 7)))
    with torch.no_grad():
        scored = completion_log_probs(model, actions, [prompt], [completion], [(False,) * 4])
    expected = scored.log_pf_BT.sum() + scored.log_stop_BS[0, -1]
    assert float(steps) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("prefixes", [[], [(1, 2), ()], [(1,) * 300]])
def test_prefixes_that_cannot_be_run_are_refused(
    tiny_lm: MakeLM, prefixes: list[tuple[int, ...]]
) -> None:
    with pytest.raises(ValueError, match=r"prefix|context"):
        next_logits(tiny_lm("llama"), prefixes)
