"""Teacher-forced log-probabilities against token-by-token ones and against total probability."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lm.actions import ActionSpace, IllegalCompletion
from lm.scoring import completion_log_probs, prompt_state_size
from tests.sampling_toy import closed_actions, enumerable_policy
from tests.tiny_lm import ARCHITECTURES

PROMPTS = [(5, 6), (7, 8, 9, 10, 11), (3,), (5, 6)]
COMPLETIONS = [[2, 3, 29, 30, 9], [9], [2, 2, 2, 9, 9, 2, 5], []]
MARKS = [[False, False, True, True, False], [False], [False] * 5 + [False] * 2, []]


def naive(
    model: PreTrainedModel,
    actions: ActionSpace,
    prompt: Sequence[int],
    completion: Sequence[int],
    marks: Sequence[bool],
) -> tuple[list[float], dict[int, float]]:
    """One unpadded forward per prefix; log q per token and per stop state."""
    log_pf, log_stop = [], {}
    stops = actions.stop_positions(completion, marks).tolist()
    for t in range(len(completion) + 1):
        logits = model(torch.tensor([[*prompt, *completion[:t]]])).logits[0, -1]
        closed = closed_actions(actions, len(logits), actions.stop_states(completion, marks)[t])
        log_q = torch.log_softmax(logits.masked_fill(closed, -torch.inf), 0)
        if t in stops:
            log_stop[t] = 0.0 if t >= actions.max_len else float(log_q[actions.stop_token])
        if t < len(completion):
            log_pf.append(0.0 if marks[t] else float(log_q[completion[t]]))
    return log_pf, log_stop


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("legal", [None, (2, 3, 5, 9)], ids=["vocabulary", "legal"])
def test_one_ragged_pass_equals_token_by_token_scoring(
    tiny_lm: Callable[[str], PreTrainedModel], architecture: str, legal: tuple[int, ...] | None
) -> None:
    model = tiny_lm(architecture)
    actions = ActionSpace(stop_token=1, legal_tokens=legal, min_len=0, max_len=7)
    with torch.no_grad():
        scored = completion_log_probs(model, actions, PROMPTS, COMPLETIONS, MARKS)
        for b in range(len(PROMPTS)):
            log_pf, log_stop = naive(model, actions, PROMPTS[b], COMPLETIONS[b], MARKS[b])
            padded = log_pf + [0.0] * (7 - len(log_pf))
            np.testing.assert_allclose(scored.log_pf_BT[b], padded, atol=1e-5)
            dense = [log_stop.get(t, 0.0) for t in range(8)]
            np.testing.assert_allclose(scored.log_stop_BS[b], dense, atol=1e-5)


def test_stop_is_closed_below_min_len_and_renormalises_the_tokens(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("gpt_neox")
    actions = ActionSpace(stop_token=9, legal_tokens=(2, 3, 5), min_len=2, max_len=4)
    prompts, completions = [(4, 4), (6, 7, 8)], [[2, 3, 5], [5, 5, 2, 2]]
    marks = [[False] * 3, [False] * 4]
    with torch.no_grad():
        scored = completion_log_probs(model, actions, prompts, completions, marks)
        for b in range(2):
            log_pf, log_stop = naive(model, actions, prompts[b], completions[b], marks[b])
            np.testing.assert_allclose(scored.log_pf_BT[b, : len(log_pf)], log_pf, atol=1e-5)
            dense = [log_stop.get(t, 0.0) for t in range(5)]
            np.testing.assert_allclose(scored.log_stop_BS[b], dense, atol=1e-5)
    assert scored.log_stop_BS[1, 4] == 0.0, "forced at max_len"


@pytest.mark.parametrize("min_len", [0, 2])
@pytest.mark.parametrize(
    ("with_tool", "rule"),
    [
        (False, {}),
        (True, {}),
        (True, {"stop_after_tool": True}),
        (False, {"stop_behind": frozenset({1, 3})}),
        (True, {"stop_behind": frozenset({0, 3})}),
        (False, {"stop_every": 2}),
        (True, {"stop_every": 2}),
    ],
    ids=["no tool", "tool", "after tool", "behind", "behind, tool", "every", "every, tool"],
)
def test_all_completions_of_a_small_space_have_total_probability_one(
    min_len: int, with_tool: bool, rule: dict[str, Any]
) -> None:
    """The tool answers token 2 with tokens 5 and 0: neither is legal, 0 even spells stop."""
    model, _ = enumerable_policy()
    actions = ActionSpace(
        stop_token=0,
        legal_tokens=(1, 2, 3, 4),
        min_len=min_len,
        max_len=3,
        **rule,
    )
    completions: list[list[int]] = []
    marks: list[list[bool]] = []

    def descend(prefix: list[int], from_tool: list[bool]) -> None:
        if with_tool and prefix and prefix[-1] == 2 and not from_tool[-1]:
            prefix, from_tool = [*prefix, 5, 0], [*from_tool, True, True]
        behind_tool = bool(from_tool) and from_tool[-1]
        closed = "stop_after_tool" in rule and not behind_tool
        closed |= "stop_behind" in rule and (not prefix or prefix[-1] not in rule["stop_behind"])
        closed |= (len(prefix) - min_len) % rule.get("stop_every", 1) > 0
        closed &= len(prefix) < actions.max_len
        if len(prefix) >= min_len and not closed:
            completions.append(prefix)
            marks.append(from_tool)
        if len(prefix) < actions.max_len:
            for token in (1, 2, 3, 4):
                descend([*prefix, token], [*from_tool, False])

    descend([], [])
    with torch.no_grad():
        scored = completion_log_probs(
            model, actions, [(5, 2)] * len(completions), completions, marks
        )
    last = torch.tensor([len(completion) for completion in completions])
    log_q = scored.log_pf_BT.sum(1) + scored.log_stop_BS.gather(1, last[:, None])[:, 0]
    assert float(log_q.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_every_state_of_a_path_gives_its_actions_total_probability_one() -> None:
    model, actions = enumerable_policy()
    children = [[3, token] for token in (1, 2, 3, 4)]
    with torch.no_grad():
        scored = completion_log_probs(model, actions, [(5,)] * 4, children, [[False] * 2] * 4)
    total = scored.log_pf_BT[:, 1].exp().sum() + scored.log_stop_BS[0, 1].exp()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_the_gradient_equals_that_of_separate_rows_and_is_finite(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("llama").double()
    actions = ActionSpace(stop_token=1, legal_tokens=(2, 3, 5, 9), min_len=0, max_len=7)
    together = completion_log_probs(model, actions, PROMPTS, COMPLETIONS, MARKS)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (whole,) = torch.autograd.grad(
        together.log_pf_BT.sum() + 2 * together.log_stop_BS.sum(), weight
    )
    parts = torch.zeros_like(weight)
    for b in range(len(PROMPTS)):
        one = completion_log_probs(model, actions, [PROMPTS[b]], [COMPLETIONS[b]], [MARKS[b]])
        total = one.log_pf_BT.sum() + 2 * one.log_stop_BS.sum()
        parts += torch.autograd.grad(total, weight)[0]
    assert torch.isfinite(whole).all() and whole.abs().max() > 1e-3
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prompt_state_is_the_last_hidden_state_of_the_prompt_alone(
    tiny_lm: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    model = tiny_lm(architecture)
    actions = ActionSpace(stop_token=1, legal_tokens=None, min_len=0, max_len=7)
    scored = completion_log_probs(model, actions, PROMPTS, COMPLETIONS, MARKS)
    assert not scored.prompt_state_BH.requires_grad
    assert scored.prompt_state_BH.shape == (len(PROMPTS), prompt_state_size(model))
    for prompt, state_H in zip(PROMPTS, scored.prompt_state_BH, strict=True):
        alone = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(state_H, alone.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("legal", [None, (2, 3, 5, 9)], ids=["vocabulary", "legal"])
def test_log_probs_are_float32_under_bfloat16_weights(
    tiny_lm: Callable[[str], PreTrainedModel], legal: tuple[int, ...] | None
) -> None:
    model = tiny_lm("llama").to(torch.bfloat16)
    actions = ActionSpace(stop_token=1, legal_tokens=legal, min_len=0, max_len=4)
    with torch.no_grad():
        scored = completion_log_probs(model, actions, [(5, 6)], [[2, 3]], [[False, False]])
        logits = model(torch.tensor([[5, 6, 2, 3]])).logits[0].float()
    closed = closed_actions(actions, logits.shape[-1], may_stop=True)
    log_q = torch.log_softmax(logits.masked_fill(closed, -torch.inf), -1)
    assert scored.log_pf_BT.dtype == scored.log_stop_BS.dtype == torch.float32
    expected = torch.stack([log_q[1, 2], log_q[2, 3]])
    torch.testing.assert_close(scored.log_pf_BT[0], expected, rtol=0, atol=1e-6)


def test_bad_input_is_named(tiny_lm: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_lm("gpt2")
    actions = ActionSpace(stop_token=1, legal_tokens=(2, 3), min_len=0, max_len=300)
    with pytest.raises(ValueError, match="empty prompt"):
        completion_log_probs(model, actions, [()], [[2]], [[False]])
    with pytest.raises(IllegalCompletion, match="token 7 at place 0"):
        completion_log_probs(model, actions, [(2,)], [[7]], [[False]])
    with pytest.raises(ValueError, match="exceeds the 256 tokens"):
        completion_log_probs(model, actions, [(2,)], [[2] * 256], [[False] * 256])
