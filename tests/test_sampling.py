"""The sampler draws from exactly the policy that scoring describes, row by row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lm.action_distribution import ActionDistribution, PolicyDiverged
from lm.actions import ActionSpace
from lm.sampling import Request, Sampler
from tests.sampling_toy import CALL, MUTE, STOP, Echo, draw, mixed_requests, worst_disagreement
from tests.tiny_lm import ARCHITECTURES, VOCAB_SIZE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("legal", "rule"),
    [
        (None, {}),
        ((2, CALL, MUTE, 5, 9), {}),
        ((2, CALL, MUTE, 5, 9), {"stop_after_tool": True}),
        ((2, CALL, MUTE, 5, 9), {"stop_behind": frozenset({5, 9})}),
        ((2, CALL, MUTE, 5, 9), {"stop_every": 3}),
    ],
    ids=["vocabulary", "legal", "stop after tool", "stop behind", "stop every"],
)
def test_recomputed_log_q_equals_the_record_in_a_ragged_refilled_batch_with_tool_calls(
    tiny_lm: Callable[[str], PreTrainedModel],
    architecture: str,
    legal: tuple[int, ...] | None,
    rule: dict[str, Any],
) -> None:
    model = tiny_lm(architecture)
    actions = ActionSpace(
        stop_token=STOP,
        legal_tokens=legal,
        min_len=2,
        max_len=9,
        **rule,
    )
    requests = mixed_requests(70)
    completions = draw(model, actions, requests, tool=Echo(), max_rows=16)

    lengths = [len(c.tokens) for c in completions]
    called = [bool(c.from_tool.any()) for c in completions]
    forced = [len(c.tokens) >= actions.max_len for c in completions]
    assert any(called) and not all(called), "the batch must mix rows with and without tool output"
    assert any(forced) and not all(forced) and len(set(lengths)) > 3
    assert worst_disagreement(model, actions, requests, completions) < 1e-4


def test_the_record_is_taken_at_temperature_one(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("llama")
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=6)
    requests = [Request(prompt=(5, 6), temperature=3.0)] * 20
    completions = draw(model, actions, requests)
    assert worst_disagreement(model, actions, requests, completions) < 1e-4


def test_a_tool_call_in_one_row_does_not_touch_the_other_rows(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    """Each row is replayed alone, through a batch of one, along the path it took in company."""
    model = tiny_lm("qwen2")
    actions = ActionSpace(stop_token=STOP, legal_tokens=(2, CALL, 5, 9), min_len=1, max_len=8)
    requests = mixed_requests(24)
    together = draw(model, actions, requests, tool=Echo(), max_rows=24)
    assert sum(bool(c.from_tool.any()) for c in together) > 3
    for request, completion in zip(requests, together, strict=True):
        assert worst_disagreement(model, actions, [request], [completion]) < 1e-5


def test_completions_come_in_the_order_of_requests(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    """Nearly greedy, so that a prompt determines its completion."""
    model = tiny_lm("llama")
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=5)
    requests = [Request(prompt=(2 + i % 11, 2 + i // 11), temperature=1e-3) for i in range(80)]
    alone = [draw(model, actions, [request])[0] for request in requests]
    together = draw(model, actions, requests, max_rows=7)
    assert len({tuple(c.tokens) for c in alone}) > 10
    for one, other in zip(alone, together, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()


def test_equal_prompts_are_prefilled_once(
    tiny_lm: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lm("llama")
    prompt_rows: list[int] = []
    forward = model.forward

    def counting(*args: object, **kwargs: torch.Tensor) -> object:
        if kwargs["input_ids"].shape[1] > 1:
            prompt_rows.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=5)
    requests = [Request(prompt=(5, 6, 7 + i % 3)) for i in range(60)]
    draw(model, actions, requests, max_rows=8)
    assert sum(prompt_rows) == 3


def test_rows_that_end_are_refilled_or_dropped_not_padded_along(
    tiny_lm: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lm("llama")
    fed = 0
    forward = model.forward

    def counting(*args: object, **kwargs: torch.Tensor) -> object:
        nonlocal fed
        fed += kwargs["input_ids"].numel()
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    actions = ActionSpace(stop_token=STOP, legal_tokens=(2, 5, 9), min_len=0, max_len=12)
    requests = [Request(prompt=(5, 6), temperature=2.0)] * 64
    completions = draw(model, actions, requests, max_rows=16)
    lengths = [len(c.tokens) for c in completions]
    assert min(lengths) < 6 < max(lengths)
    # Every token is fed once, except the last one of a forced stop; the prompt's two come once.
    assert fed == sum(length - (length == actions.max_len) for length in lengths) + 2


def test_lengths_stay_within_bounds_and_tool_output_is_whole(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("gpt2")
    actions = ActionSpace(stop_token=STOP, legal_tokens=(2, CALL, 5), min_len=3, max_len=6)
    completions = draw(model, actions, mixed_requests(120), tool=Echo())
    assert any(len(c.tokens) > actions.max_len for c in completions)
    for completion in completions:
        chosen = np.flatnonzero(~completion.from_tool)
        assert len(completion.tokens) >= actions.min_len
        assert chosen.max() < actions.max_len
        calls = [t for t in chosen if completion.tokens[t] == CALL]
        for call in calls:
            inserted = completion.from_tool[call + 1 : call + 4]
            assert inserted.tolist() == [True] * 3
            assert completion.tokens[call + 1 : call + 3].tolist() == [29, CALL]
        assert completion.from_tool.sum() == 3 * len(calls)
        assert completion.stops.tolist() == [
            t
            for t in range(3, len(completion.tokens) + 1)
            if t == len(completion.tokens) or not completion.from_tool[t]
        ]
        if completion.stops[-1] >= actions.max_len:
            assert completion.log_q_stop[-1] == 0.0


def test_illegal_tokens_and_the_stop_token_are_never_chosen(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    legal = (2, CALL, 7)
    actions = ActionSpace(stop_token=STOP, legal_tokens=legal, min_len=4, max_len=8)
    requests = [Request(prompt=(9, 10), temperature=50.0)] * 300
    completions = draw(tiny_lm("llama"), actions, requests, tool=Echo(), max_rows=300)
    chosen = {int(t) for c in completions for t in c.tokens[~c.from_tool]}
    assert chosen == set(legal)


def test_the_same_seed_gives_the_same_completions(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=6)
    first, second, other = (
        [c.tokens.tolist() for c in draw(tiny_lm("gpt2"), actions, mixed_requests(30), seed=seed)]
        for seed in (4, 4, 5)
    )
    assert first == second != other


def test_nothing_requested_gives_nothing_and_max_len_zero_gives_empty_completions(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=0)
    assert draw(tiny_lm("llama"), actions, []) == []
    (only,) = draw(tiny_lm("llama"), actions, [Request(prompt=(5,))])
    assert only.tokens.tolist() == [] and only.stops.tolist() == [0]
    assert only.log_q_stop.tolist() == [0.0]


def test_bad_input_is_named(tiny_lm: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_lm("gpt2")
    with pytest.raises(ValueError, match=r"token ids \[31, 99\].*vocabulary of 31"):
        draw(model, ActionSpace(stop_token=1, legal_tokens=(2, 31, 99), min_len=0, max_len=3), [])
    with pytest.raises(ValueError, match="empty prompt"):
        Request(prompt=())
    with pytest.raises(ValueError, match="temperature 0"):
        Request(prompt=(1,), temperature=0.0)
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=3, max_len=3)
    with pytest.raises(ValueError, match="exceeds the 256 tokens"):
        draw(model, actions, [Request(prompt=(2,) * 255)])
    with pytest.raises(ValueError, match="exceeds the 256 tokens"):
        draw(model, actions, [Request(prompt=(2,) * 300)])


def test_a_diverged_policy_is_an_error_and_leaves_nothing_behind(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("llama")
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=6)
    sampler = Sampler(model, actions, None, max_rows=8)
    generator = torch.Generator().manual_seed(0)
    healthy = model.model.embed_tokens.weight.detach().clone()
    long = [Request(prompt=tuple(range(2, 22)))] * 8
    sampler.sample(long, generator)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(PolicyDiverged, match="not finite"):
        sampler.sample(long, generator)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(healthy)
    requests = mixed_requests(30)
    assert worst_disagreement(model, actions, requests, sampler.sample(requests, generator)) < 1e-4


def test_an_action_of_probability_zero_is_not_drawn_by_vanishing_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda noise, generator: noise.zero_())
    actions = ActionSpace(stop_token=0, legal_tokens=None, min_len=1, max_len=2)
    chooser = ActionDistribution(actions, 4, torch.device("cpu"))
    choice = chooser.choose(torch.zeros(1, 4), [False], [1.0], [1.0], torch.Generator())
    assert choice.token[0] != actions.stop_token


def test_a_sampler_used_again_is_not_disturbed_by_what_its_buffers_still_hold(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("gpt_neox")
    actions = ActionSpace(stop_token=STOP, legal_tokens=(2, CALL, 5, 9), min_len=0, max_len=6)
    sampler = Sampler(model, actions, Echo(), max_rows=12)
    generator = torch.Generator().manual_seed(0)
    for count in (40, 3, 25, 60):
        requests = mixed_requests(count)
        completions = sampler.sample(requests, generator)
        assert worst_disagreement(model, actions, requests, completions) < 1e-4


def test_a_tool_that_leaves_the_vocabulary_is_named(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    class Broken:
        triggers = frozenset(range(VOCAB_SIZE))

        def output(self, completion: Sequence[int]) -> list[int]:
            return [VOCAB_SIZE]

    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=1, max_len=3)
    sampler = Sampler(tiny_lm("llama"), actions, Broken(), max_rows=4)
    with pytest.raises(ValueError, match=r"tool inserted tokens \[31\]"):
        sampler.sample([Request(prompt=(2,))], torch.Generator())
