"""Decoding methods against exact enumeration of a model with a handful of completions."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lm.action_distribution import PolicyDiverged, nucleus
from lm.actions import ActionSpace
from lm.decoding import BeamSearch, Hypothesis
from lm.sampling import Request, Sampler
from tests.sampling_toy import enumerable_policy, exact_probabilities

PROMPTS = [(5, 2), (3, 1, 1), (5, 2, 4, 4)]
LEGAL = (1, 2, 3, 4)


def space(min_len: int = 0) -> ActionSpace:
    return ActionSpace(stop_token=0, legal_tokens=LEGAL, min_len=min_len, max_len=3)


def search(
    beams: int, *, groups: int = 1, penalty: float = 0.0, min_len: int = 0, max_rows: int = 999
) -> list[list[Hypothesis]]:
    model, _ = enumerable_policy()
    searcher = BeamSearch(
        model, space(min_len), beams=beams, groups=groups, penalty=penalty, max_rows=max_rows
    )
    return searcher.search(PROMPTS)


def by_hand(
    prompt: tuple[int, ...], min_len: int, groups: int, width: int, penalty: float
) -> list[Hypothesis]:
    """Diverse beam search over lists, with one plain forward for each prefix."""
    model, _ = enumerable_policy()
    running: list[list[tuple[tuple[int, ...], float, float]]]
    ended: list[list[tuple[tuple[int, ...], float, float]]]
    running, ended = [[((), 0.0, 0.0)] for _ in range(groups)], [[] for _ in range(groups)]
    for length in range(4):
        taken: Counter[int] = Counter()
        for group in range(groups):
            ways = []
            for tokens, score, log_q in running[group]:
                if length == 3:
                    ended[group].append((tokens, score, log_q))
                    continue
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double()
                actions = [*LEGAL, *([0] if length >= min_len else [])]
                log_p = logits[actions].log_softmax(0).tolist()
                ways += [
                    ((*tokens, a), score + lp - penalty * taken[a] * (a != 0), log_q + lp)
                    for a, lp in zip(actions, log_p, strict=True)
                ]
            ways.sort(key=lambda way: -way[1])
            ended[group] += [(z[:-1], s, q) for z, s, q in ways[:width] if z[-1] == 0]
            ended[group] = sorted(ended[group], key=lambda way: -way[1])[:width]
            running[group] = [way for way in ways if way[0][-1] != 0][:width]
            if len(ended[group]) == width:
                running[group] = [way for way in running[group] if way[1] > ended[group][-1][1]]
            taken.update(z[-1] for z, _, _ in running[group])
    found = [Hypothesis(tokens=z, log_q=q) for group in ended for z, _, q in group]
    return sorted(found, key=lambda one: -one.log_q)


def same(found: list[Hypothesis], expected: list[Hypothesis]) -> bool:
    """In any order where log q is equal."""
    return sorted((h.tokens, round(h.log_q, 4)) for h in found) == sorted(
        (h.tokens, round(h.log_q, 4)) for h in expected
    )


@pytest.mark.parametrize("min_len", [0, 2])
def test_a_beam_as_wide_as_there_are_completions_ranks_them_all(min_len: int) -> None:
    model, _ = enumerable_policy()
    for prompt, found in zip(PROMPTS, search(100, min_len=min_len), strict=True):
        exact = exact_probabilities(model, space(min_len), prompt, 1.0)
        assert len(found) == len(exact) == 85 - (5 if min_len else 0)
        assert [h.tokens for h in found] == sorted(exact, key=lambda z: -exact[z])
        log_p = torch.tensor(list(exact.values())).log().sort(descending=True).values.tolist()
        assert [h.log_q for h in found] == pytest.approx(log_p, abs=1e-4)


@pytest.mark.parametrize("rule", [{"stop_behind": frozenset({1, 3})}, {"stop_every": 2}])
def test_beams_end_where_the_policy_may_stop_alone(rule: dict[str, Any]) -> None:
    model, _ = enumerable_policy()
    actions = replace(space(), **rule)
    searcher = BeamSearch(model, actions, beams=100, groups=1, penalty=0.0, max_rows=999)
    expected = {
        z
        for length in range(4)
        for z in itertools.product(LEGAL, repeat=length)
        if length == 3
        or ("stop_behind" in rule and z and z[-1] in (1, 3))
        or ("stop_every" in rule and length in (0, 2))
    }
    for found in searcher.search(PROMPTS):
        assert {h.tokens for h in found} == expected
        assert sum(math.exp(h.log_q) for h in found) == pytest.approx(1.0, abs=1e-4)


def test_one_beam_takes_the_likeliest_action_each_time() -> None:
    model, actions = enumerable_policy()
    for prompt, [found] in zip(PROMPTS, search(1), strict=True):
        tokens: tuple[int, ...] = ()
        while len(tokens) < actions.max_len:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            best = max((*LEGAL, 0), key=lambda action: float(logits[action]))
            if best == 0:
                break
            tokens = (*tokens, best)
        assert found.tokens == tokens


@pytest.mark.parametrize("min_len", [0, 1])
@pytest.mark.parametrize(
    ("groups", "width", "penalty"),
    [(1, 2, 0.0), (1, 7, 0.0), (2, 2, 0.4), (3, 1, 1.0), (4, 3, 0.2), (5, 1, 0.0)],
)
def test_groups_choose_as_by_hand(groups: int, width: int, penalty: float, min_len: int) -> None:
    found = search(groups * width, groups=groups, penalty=penalty, min_len=min_len)
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert same(one, by_hand(prompt, min_len, groups, width, penalty))


def test_a_single_group_is_plain_beam_search_whatever_the_penalty() -> None:
    assert search(6, groups=1, penalty=2.0) == search(6)
    # Without a penalty every group is the same search of its own.
    for grouped, plain in zip(search(6, groups=3), search(2), strict=True):
        assert grouped == sorted(plain * 3, key=lambda one: -one.log_q)


def test_a_penalty_makes_groups_differ() -> None:
    for plain, diverse in zip(search(5, groups=5), search(5, groups=5, penalty=2.0), strict=True):
        assert len({one.tokens for one in plain}) == 1 < len({one.tokens for one in diverse})


def test_prompts_that_wait_for_room_get_what_they_would_have_got_at_once() -> None:
    for waiting, together in zip(search(5, max_rows=1), search(5), strict=True):
        assert same(waiting, together)


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "gpt_neox", "qwen2"])
def test_log_q_is_that_of_the_plain_text(
    architecture: str, tiny_lm: Callable[[str], PreTrainedModel]
) -> None:
    model = tiny_lm(architecture)
    actions = ActionSpace(stop_token=1, legal_tokens=None, min_len=1, max_len=5)
    searcher = BeamSearch(model, actions, beams=6, groups=3, penalty=0.5, max_rows=99)
    for prompt, found in zip(PROMPTS, searcher.search(PROMPTS), strict=True):
        assert len(found) == 6
        for one in found:
            log_q = 0.0
            for at, action in enumerate((*one.tokens, 1)[: actions.max_len]):
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *one.tokens[:at]]])).logits[0, -1]
                if at < actions.min_len:
                    logits[1] = -torch.inf
                log_q += float(logits.log_softmax(0)[action])
            assert one.log_q == pytest.approx(log_q, abs=1e-3)


@pytest.mark.parametrize("top_p", [0.5, 0.8, 0.95])
def test_samples_of_a_nucleus_have_its_support_and_frequencies(top_p: float) -> None:
    model, actions = enumerable_policy()
    prompt, count = PROMPTS[0], 10_000
    exact: dict[tuple[int, ...], float] = {}

    def descend(prefix: tuple[int, ...], probability: float) -> None:
        if len(prefix) == actions.max_len:
            exact[prefix] = probability
            return
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *prefix]])).logits[0, -1].double()
        p = dict(zip((*LEGAL, 0), logits[[*LEGAL, 0]].softmax(0).tolist(), strict=True))
        kept: dict[int, float] = {}
        for action in sorted(p, key=lambda action: -p[action]):
            if sum(kept.values()) >= top_p:
                break
            kept[action] = p[action]
        for action, p_action in kept.items():
            share = probability * p_action / sum(kept.values())
            if action == 0:
                exact[prefix] = share
            else:
                descend((*prefix, action), share)

    descend((), 1.0)
    sampler = Sampler(model, actions, None, max_rows=4096)
    requests = [Request(prompt=prompt, top_p=top_p), Request(prompt=prompt)] * count
    drawn = sampler.sample(requests, torch.Generator().manual_seed(1))
    seen = Counter(tuple(one.tokens.tolist()) for one in drawn[::2])
    assert seen.keys() <= exact.keys()
    for completion, p in exact.items():
        assert abs(seen[completion] / count - p) < 5 * (p * (1 - p) / count) ** 0.5
    # Its neighbours in the batch draw from everything.
    assert {tuple(one.tokens.tolist()) for one in drawn[1::2]} - exact.keys()


def test_a_nucleus_holds_at_least_its_mass_and_one_action() -> None:
    p = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.1, 0.6, 0.3]])
    kept = nucleus(p, torch.tensor([0.61, 1e-9, 1.0]))
    assert torch.equal(kept > 0, torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1]]).bool())


def test_what_cannot_be_searched_is_refused() -> None:
    model, actions = enumerable_policy()
    with pytest.raises(ValueError, match="5 beams make no 2 groups"):
        BeamSearch(model, actions, beams=5, groups=2, penalty=0.0, max_rows=9)
    with pytest.raises(ValueError, match="-1 nats would reward sameness"):
        BeamSearch(model, actions, beams=4, groups=2, penalty=-1, max_rows=9)
    searcher = BeamSearch(model, actions, beams=2, groups=1, penalty=0.0, max_rows=9)
    assert searcher.search([]) == []
    with pytest.raises(ValueError, match="empty prompt"):
        searcher.search([()])
    with pytest.raises(ValueError, match="context"):
        searcher.search([(1,) * 62])
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(PolicyDiverged, match="not finite"):
        searcher.search([(1,)])


@pytest.mark.parametrize("top_p", [0.0, 1.1])
def test_a_nucleus_of_no_mass_is_refused(top_p: float) -> None:
    with pytest.raises(ValueError, match="top_p"):
        Request(prompt=(1,), top_p=top_p)
