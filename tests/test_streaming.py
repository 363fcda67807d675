"""Requests that come while others are under way, and tools that are slow, or fail."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lm.actions import ActionSpace
from lm.cache import SlotCache
from lm.prefill import Prefill
from lm.sampling import Completion, Ended, Request, Sampler
from lm.tools import ToolFault
from tests.sampling_toy import (
    CALL,
    MUTE,
    STOP,
    Broken,
    Echo,
    Fragile,
    Slow,
    mixed_requests,
    worst_disagreement,
)

ACTIONS = ActionSpace(stop_token=STOP, legal_tokens=(2, CALL, MUTE, 5, 9), min_len=1, max_len=9)


def drain(sampler: Sampler, generator: torch.Generator, ended: dict[int, Any]) -> dict[int, Any]:
    deadline_s = time.monotonic() + 60.0
    while not sampler.idle:
        assert time.monotonic() < deadline_s
        ended |= sampler.step(generator)
    return ended


def test_what_is_asked_while_others_are_under_way_is_drawn_from_the_same_law(
    tiny_lm: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generator = tiny_lm("qwen2"), torch.Generator().manual_seed(0)
    prompts_read, widest = 0, 0
    forward = model.forward

    def counting(*args: object, **kwargs: torch.Tensor) -> object:
        nonlocal prompts_read, widest
        rows, columns = kwargs["input_ids"].shape
        prompts_read += rows if columns > 1 else 0
        widest = max(widest, rows if columns == 1 else 0)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    sampler = Sampler(model, ACTIONS, Echo(), max_rows=8)
    requests, ended = mixed_requests(90), dict[int, Completion | ToolFault]()
    numbers, waiting = list[int](), list(requests)
    refilled = 0
    while waiting or not sampler.idle:
        while waiting and len(numbers) - len(ended) < 8:
            refilled += bool(ended)
            numbers += sampler.submit([waiting.pop(0)])
        ended |= sampler.step(generator)
    completions = [ended[number] for number in numbers]
    assert refilled > 60 and widest == 8
    assert prompts_read == len({request.prompt for request in requests})
    monkeypatch.setattr(model, "forward", forward)
    assert all(isinstance(one, Completion) for one in completions)
    assert worst_disagreement(model, ACTIONS, requests, completions) < 1e-4  # type: ignore[arg-type]


def test_few_prompts_are_kept_and_a_group_shares_one(
    tiny_lm: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(0)
    sampler, read = Sampler(model, ACTIONS, None, max_rows=64), list[int]()
    run = Prefill.run

    def counting(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> Prefill:
        read.append(len(prompts))
        return run(model, prompts)

    monkeypatch.setattr(Prefill, "run", counting)
    groups = [[Request(prompt=(2, 5, n % 20, 3 + n // 20))] * 12 for n in range(40)]
    requests = [request for group in groups for request in group]
    numbers, ended = sampler.submit(requests), dict[int, Any]()
    while not sampler.idle:
        ended |= sampler.step(generator)
        assert len(sampler._store._kept) <= 8
    assert sum(read) == len(groups)  # though places for a part of a group become free at a time
    drawn = [ended[number] for number in numbers]
    assert worst_disagreement(model, ACTIONS, requests, drawn) < 1e-4
    read.clear()
    alone = [group[0] for group in groups]
    numbers = sampler.submit(alone)
    sampler.step(generator)
    assert read == [8] * 5  # 40 at once, not in one pass


def test_prompts_are_read_anew_under_other_weights(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(0)
    sampler, requests = Sampler(model, ACTIONS, None, max_rows=8), mixed_requests(8)
    sampler.submit(requests)
    with pytest.raises(AssertionError, match="under way"):
        sampler.forget_prompts()
    drain(sampler, generator, {})
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1.5)
    sampler.forget_prompts()
    numbers = sampler.submit(requests)
    ended = drain(sampler, generator, {})
    completions = [ended[number] for number in numbers]
    assert worst_disagreement(model, ACTIONS, requests, completions) < 1e-4


def test_a_slow_tool_delays_its_own_row_only(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model, generator, tool = tiny_lm("gpt_neox"), torch.Generator().manual_seed(0), Slow()
    sampler = Sampler(model, ACTIONS, tool, max_rows=90, steady=False)
    requests = mixed_requests(90)
    numbers, ended = sampler.submit(requests), dict[int, Any]()
    for _ in range(12):
        ended |= sampler.step(generator)
    before = list(ended.values())
    assert len(before) > 5 and not any(one.from_tool.any() for one in before)
    tool.may_speak.set()
    drain(sampler, generator, ended)
    completions = [ended[number] for number in numbers]
    assert sum(bool(one.from_tool.any()) for one in completions) > 10
    assert worst_disagreement(model, ACTIONS, requests, completions) < 1e-4


def test_draws_depend_on_no_tools_pace_where_they_must_not(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    def drawn(pause_s: float) -> list[list[int]]:
        tool = Echo()
        answer = tool.output

        def output(completion: Sequence[int]) -> list[int]:
            time.sleep(pause_s if len(completion) % 2 else 0.0)
            return answer(completion)

        tool.output = output  # type: ignore[method-assign]
        sampler = Sampler(tiny_lm("llama"), ACTIONS, tool, max_rows=8)
        found = sampler.sample(mixed_requests(20), torch.Generator().manual_seed(1))
        return [one.tokens.tolist() for one in found]

    assert drawn(0.0) == drawn(0.004)


@pytest.mark.parametrize("steady", [True, False])
def test_a_tool_that_fails_ends_its_own_row_and_is_named(
    tiny_lm: Callable[[str], PreTrainedModel], steady: bool
) -> None:
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(0)
    sampler = Sampler(model, ACTIONS, Fragile(), max_rows=16, steady=steady)
    requests = mixed_requests(60)
    numbers = sampler.submit(requests)
    ended = drain(sampler, generator, {})
    faults = [one for one in ended.values() if isinstance(one, ToolFault)]
    assert {one.reason for one in faults} == {"KeyError: 'nine'"} and 3 < len(faults) < 40
    kept = [n for n, number in enumerate(numbers) if isinstance(ended[number], Completion)]
    whole = [ended[numbers[n]] for n in kept]
    assert all(9 not in one.tokens[:at] for one in whole for at in called(one))
    assert worst_disagreement(model, ACTIONS, [requests[n] for n in kept], whole) < 1e-4
    broken = Sampler(model, ACTIONS, Broken(), max_rows=16, steady=steady)
    with pytest.raises(KeyError, match="nine"):  # whatever is drawn the second time
        broken.sample(requests, generator)
    assert broken.idle


class Unsteady(Echo):
    """Fails the first time, and then says what is no token."""

    def __init__(self, said: list[Any]) -> None:
        self.calls, self.said = 0, said

    def output(self, completion: Sequence[int]) -> list[Any]:
        self.calls += 1
        if self.calls == 1:
            raise KeyError("nine")
        return self.said


def test_a_completion_that_a_tool_ended_is_drawn_once_more(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(0)
    requests, tool = mixed_requests(40), Unsteady([])
    drawn = Sampler(model, ACTIONS, tool, max_rows=16).sample(requests, generator)
    assert tool.calls > 5 and worst_disagreement(model, ACTIONS, requests, drawn) < 1e-4
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        Sampler(model, ACTIONS, Unsteady([3.0]), max_rows=16).sample(requests, generator)


def test_a_completion_that_a_tool_ends_twice_is_lost_alone(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(0)
    requests, tool = mixed_requests(200), Fragile()
    sampler = Sampler(model, ACTIONS, tool, max_rows=16)
    ended = sampler.attempt(requests, generator)
    faults = [one for one in ended if isinstance(one, ToolFault)]
    assert {one.reason for one in faults} == {"KeyError: 'nine'"} and 1 < len(faults) < 40
    kept = [n for n, one in enumerate(ended) if isinstance(one, Completion)]
    whole = [one for one in ended if isinstance(one, Completion)]
    assert worst_disagreement(model, ACTIONS, [requests[n] for n in kept], whole) < 1e-4
    assert sampler.idle
    with pytest.raises(KeyError, match="nine"):
        sampler.sample(requests, generator)
    assert sampler.idle


def called(completion: Completion) -> list[int]:
    """Where the policy called."""
    chosen = np.isin(completion.tokens, [CALL, MUTE]) & ~completion.from_tool
    return np.flatnonzero(chosen).tolist()


@pytest.mark.parametrize("steady", [True, False])
def test_a_tool_that_gives_no_answer_in_time_fails(
    tiny_lm: Callable[[str], PreTrainedModel], steady: bool
) -> None:
    generator, tool = torch.Generator().manual_seed(0), Slow()
    model = tiny_lm("llama")
    sampler = Sampler(model, ACTIONS, tool, max_rows=16, steady=steady, tool_timeout_s=0.1)
    sampler.submit(mixed_requests(20))
    ended: list[Ended] = []
    while not sampler.idle:
        ended += sampler.step(generator)
    tool.may_speak.set()
    reasons = {one.reason for _, one in ended if isinstance(one, ToolFault)}
    assert reasons == {"TimeoutError: a tool gave no answer within 0.1 s"}


def test_a_tools_text_that_outgrows_the_model_ends_its_row(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    every = frozenset({2, CALL, MUTE, 5, 9})
    endless: Any = SimpleNamespace(triggers=every, output=lambda _: [7] * 300)
    sampler = Sampler(tiny_lm("llama"), ACTIONS, endless, max_rows=4)
    with pytest.raises(ValueError, match="exceeds the 256 tokens"):
        sampler.sample([Request(prompt=(2,))], torch.Generator().manual_seed(0))


def test_the_cache_grows_with_its_rows(tiny_lm: Callable[[str], PreTrainedModel]) -> None:
    model, generator = tiny_lm("llama"), torch.Generator().manual_seed(0)
    short = ActionSpace(stop_token=STOP, legal_tokens=(2, 5), min_len=1, max_len=200, stop_every=40)
    sampler = Sampler(model, short, None, max_rows=6)
    longest, sizes = 0, []
    for count, temperature in ((2, 1.0), (6, 1.0), (6, 1e-3)):
        requests = [Request(prompt=(3, 4), temperature=temperature)] * count
        drawn = sampler.sample(requests, generator)
        assert worst_disagreement(model, short, requests, drawn) < 1e-4
        cache, longest = sampler._cache, max(longest, *(len(one.tokens) + 2 for one in drawn))
        assert isinstance(cache, SlotCache)
        sizes.append((cache.slots, cache.columns))
        assert longest <= cache.columns <= max(66, 1.5 * longest)
    assert sizes[0] == (2, 66) and sizes[2][0] == 6 and sizes[2][1] > 66, sizes
