"""Packed log-rewards against the naive definition, and the layout that makes them possible."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from subprocess import run
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lm.prefill import PromptStore
from reward.packed import (
    edge_log_probs,
    score_limits,
    suffix_log_rewards,
)
from reward.packing import gather_scores, lay_out
from reward.request import BadItem, ScoreItem
from tests.naive_rewards import naive_log_rewards
from tests.tiny_lm import ARCHITECTURES, VOCAB_SIZE

NATS = 1e-4
LM = Callable[[str], PreTrainedModel]
Ids = Sequence[int] | NDArray[np.integer] | range


def ids(tokens: Ids) -> NDArray[np.int32]:
    return np.array(tokens, dtype=np.int32)


def item(
    context: Ids,
    completion: Ids,
    answer: Ids,
    stops: Sequence[int] | None = None,
) -> ScoreItem:
    return ScoreItem(
        context=ids(context),
        completion=ids(completion),
        stops=ids(range(len(completion) + 1) if stops is None else stops),
        answer=ids(answer),
    )


def mixed_items(seed: int, count: int = 24) -> list[ScoreItem]:
    """Few contexts, ragged rationales that share prefixes or are equal, gaps in the stops."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, VOCAB_SIZE, size) for size in (1, 2, 9, 17)]
    answers = [rng.integers(0, VOCAB_SIZE, size) for size in (1, 2, 5)]
    items = []
    for _ in range(count):
        length = int(rng.integers(0, 12))
        states = rng.choice(length + 1, rng.integers(1, length + 2), replace=False)
        items.append(
            item(
                contexts[rng.integers(4)],
                rng.integers(0, 2, length),
                answers[rng.integers(3)],
                sorted({*states.tolist(), length}),
            )
        )
    return items


def behind_a_head(items: Sequence[ScoreItem], size: int) -> list[ScoreItem]:
    """With `size` tokens, said to be shared, in front of every context."""
    head = np.random.default_rng(size).integers(0, VOCAB_SIZE, size, dtype=np.int32)
    return [replace(i, context=np.append(head, i.context), shared=size) for i in items]


def assert_same(got: Sequence[NDArray], expected: Sequence[NDArray], nats: float = NATS) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=nats)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_naive_on_every_architecture(
    tiny_lm: LM, architecture: str, attention: str
) -> None:
    model = tiny_lm(architecture)
    if architecture != "gptj":  # has one implementation only
        model.set_attn_implementation(attention)
    items = mixed_items(seed=1)
    expected = naive_log_rewards(model, items)
    assert np.ptp(np.concatenate(expected)) > 10  # sharp enough that an error would show
    assert_same(suffix_log_rewards(model, items, token_budget=600), expected)


@pytest.mark.parametrize("token_budget", [1, 40, 300, 100_000])
def test_the_token_budget_changes_no_score(tiny_lm: LM, token_budget: int) -> None:
    model, items = tiny_lm("llama"), mixed_items(seed=2)
    layout = lay_out(items, token_budget)
    for batch in layout.batches:
        assert batch.peak_tokens <= token_budget or len(batch.rows) == 1
    assert_same(suffix_log_rewards(model, items, token_budget), naive_log_rewards(model, items))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_portions_equal_naive_on_every_architecture(
    tiny_lm: LM, architecture: str, attention: str
) -> None:
    model = tiny_lm(architecture)
    if architecture != "gptj":
        model.set_attn_implementation(attention)
    items = mixed_items(seed=5)
    with mock.patch("reward.packing.ONE_PASS_WIDTH", 20), mock.patch("reward.packing.PORTION", 8):
        batches = lay_out(items, token_budget=200).batches
        assert {batch.portion for batch in batches} == {None, 8}
        assert max(len(batch.rows) for batch in batches if batch.portion) > 1
        assert max(batch.num_passes for batch in batches) > 4
        scores = suffix_log_rewards(model, items, token_budget=200)
    assert_same(scores, naive_log_rewards(model, items))


@pytest.mark.parametrize("portion", [8, 384])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_all_contexts_begin_with_is_read_once(
    tiny_lm: LM, architecture: str, portion: int
) -> None:
    model, size = tiny_lm(architecture), 20
    plain = mixed_items(seed=6)
    items = behind_a_head(plain, size)
    heads = PromptStore(model, max_prompts=1)
    read: list[int] = []  # tokens, of each pass
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    with (
        mock.patch("reward.packing.ONE_PASS_WIDTH", 20 if portion == 8 else 512),
        mock.patch("reward.packing.PORTION", portion),
        mock.patch.object(model, "forward", counted),
    ):
        layout = lay_out(items, token_budget=300)
        edges = [edge_log_probs(model, batch, heads) for batch in layout.batches]
    assert_same(gather_scores(items, layout, edges), naive_log_rewards(model, items))
    assert len(layout.batches) > 1
    passes = sum(batch.num_passes for batch in layout.batches)
    assert len(read) == passes + 1  # the head's
    longest = max(len(i.context) for i in plain)
    assert read[0] == size and read[1] <= longest  # and what is behind it by itself


def test_contexts_that_begin_otherwise_are_read_whole(tiny_lm: LM) -> None:
    model = tiny_lm("llama")
    items = behind_a_head(mixed_items(seed=7), 20) + behind_a_head(mixed_items(seed=8), 24)
    items += mixed_items(seed=9)
    assert_same(suffix_log_rewards(model, items, 2000), naive_log_rewards(model, items))
    short = [replace(one, shared=len(one.context)) for one in items]  # more than is before Z
    assert_same(suffix_log_rewards(model, short, 300), naive_log_rewards(model, short))


def test_passes_made_for_other_ranks_change_no_score(tiny_lm: LM) -> None:
    model = tiny_lm("llama")
    for token_budget in (1, 1000):
        [batch] = lay_out([item([1, 2, 3], [7, 8, 9], [4, 5, 6])], token_budget).batches
        longer = replace(batch, min_passes=batch.num_passes + 2)
        with mock.patch.object(model, "forward", wraps=model.forward) as forward:
            expected = edge_log_probs(model, batch)
            passes = forward.call_count
            assert passes == batch.num_passes
            np.testing.assert_allclose(edge_log_probs(model, longer), expected, rtol=0, atol=1e-5)
            assert forward.call_count == passes + longer.num_passes


def test_a_stop_reward_is_the_probability_of_prefix_and_stop_token(tiny_lm: LM) -> None:
    model, items = tiny_lm("gpt2"), mixed_items(seed=3)
    stopping = [replace(one, answer=np.array([7], np.int32)) for one in items]
    expected = naive_log_rewards(model, stopping)
    assert_same(suffix_log_rewards(model, stopping, token_budget=300), expected)


def test_rationales_wider_than_a_row_are_scored_too(tiny_lm: LM) -> None:
    rng = np.random.default_rng(4)
    long = [item([3, 4], rng.integers(0, VOCAB_SIZE, 60), [1, 2, 3, 4, 5, 6]) for _ in range(2)]
    model = tiny_lm("qwen2")
    assert_same(suffix_log_rewards(model, long, 500), naive_log_rewards(model, long))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the model never changes
)
@given(
    drawn=st.lists(
        st.tuples(
            st.sampled_from([(5,), (5, 6, 7)]),
            st.lists(st.integers(0, 2), max_size=7),
            st.sampled_from([(8,), (8, 9, 8)]),
            st.sets(st.integers(0, 7)),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_tree_of_rationales_scores_as_its_branches_do_alone(tiny_lm: LM, drawn: list) -> None:
    items = [
        item(context, z, answer, sorted({*(t for t in stops if t <= len(z)), len(z)}))
        for context, z, answer, stops in drawn
    ]
    model = tiny_lm("llama")
    together = suffix_log_rewards(model, items, 200)
    alone = [suffix_log_rewards(model, [one], 200)[0] for one in items]
    assert_same(together, alone)


def test_what_rationales_share_is_computed_once() -> None:
    prompt, answer = [1, 2, 3], [4, 5, 6]
    stem = item(prompt, [7, 8, 9], answer)
    longer = item(prompt, [7, 8, 9, 10], answer)
    [row] = lay_out([longer, stem, stem], 1000).batches[0].rows
    tokens = 1 + 4
    copies = 5 * (len(answer) - 1)
    assert row.width == tokens + copies
    assert row.num_edges == 4 + 5 * len(answer)


def test_every_column_sees_exactly_its_own_prefix() -> None:
    branches = [item([1, 2], z, [4, 5, 6]) for z in ([7, 8], [7, 8, 9], [7, 3])]
    [row] = lay_out(branches, 1000).batches[0].rows
    columns = row.columns(slice(None), with_stem=True)
    sees = columns.sees_QK
    tokens, positions = np.array(columns.tokens), np.array(columns.positions)
    allowed = {
        (*z[:t], *y) for z in ([7, 8, 9], [7, 3]) for t in range(4) for y in ([], [4], [4, 5])
    }
    texts = set()
    for column in range(row.width):
        seen = np.flatnonzero(sees[column])
        assert list(positions[seen]) == list(range(1, 1 + len(seen)))
        assert seen[-1] == column
        texts.add(tuple(tokens[seen].tolist()[1:]))
    assert texts == allowed
    assert len(texts) == row.width


def test_changing_one_copy_of_the_answer_changes_no_other(tiny_lm: LM) -> None:
    model = tiny_lm("gpt2")
    one = item([1, 2, 3], [7, 8, 9], [4, 5, 6])
    layout = lay_out([one], 1000)
    before = edge_log_probs(model, layout.batches[0])
    [row] = layout.batches[0].rows
    columns = row.columns(slice(None), with_stem=True)
    second = row.stem.width + row.copy_width + np.arange(row.copy_width)
    columns.tokens[second[0]] = 11
    with mock.patch.object(row, "columns", return_value=columns):
        changed = edge_log_probs(model, layout.batches[0]) != before
    own = np.isin(columns.sources, second)
    assert sorted(np.flatnonzero(changed)) == sorted(columns.edges[own])


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_in_portions_are_those_of_the_whole_row(copies: int) -> None:
    branches = [item([1, 2], z, [4, 5, 6]) for z in ([7, 8], [7, 8, 9], [7, 3])]
    [row] = lay_out(branches, 1000).batches[0].rows
    whole, stem = row.columns(slice(None), with_stem=True), row.stem.width
    parts = [
        row.columns(slice(first, first + copies), with_stem=False)
        for first in range(0, row.num_copies, copies)
    ]
    alone = row.columns(slice(0), with_stem=True)
    assert alone.tokens == row.stem.tokens
    np.testing.assert_array_equal(alone.sees_QK, whole.sees_QK[:stem, :stem])
    assert sum((part.tokens for part in parts), alone.tokens) == whole.tokens
    assert sum((part.positions for part in parts), alone.positions) == whole.positions
    start = stem
    for part in parts:
        end = start + len(part.tokens)
        expected = np.concatenate(
            [whole.sees_QK[start:end, :stem], whole.sees_QK[start:end, start:end]], axis=1
        )
        np.testing.assert_array_equal(part.sees_QK, expected)
        assert not whole.sees_QK[start:end, stem:start].any()
        sources = dict(zip(part.edges, part.sources + start, strict=True))
        assert sources == {
            edge: source
            for edge, source in zip(whole.edges, whole.sources, strict=True)
            if start <= source < end
        }
        start = end
    edges = np.concatenate([part.edges for part in (alone, *parts)])
    assert sorted(edges) == list(range(row.num_edges))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answer": ids([])}, "answer is empty"),
        ({"context": ids([])}, "context is empty"),
        ({"completion": ids([1, VOCAB_SIZE])}, r"completion\[1\] is token 31, outside"),
        ({"context": ids([-1])}, r"context\[0\] is token -1, outside"),
        ({"stops": ids([0, 3])}, r"stops \[0, 3\] leave the completion's states 0..2"),
        ({"stops": ids([1, 1])}, "strictly increasing"),
        ({"stops": ids([])}, "strictly increasing"),
        ({"context": ids([1] * 254)}, "is 258 tokens, the model holds 256"),
        ({"answer": np.array([0.5])}, "answer must be one row of token ids"),
    ],
)
def test_an_item_that_cannot_be_scored_is_refused(
    tiny_lm: LM, broken: dict[str, Any], message: str
) -> None:
    good = item([1, 2], [3, 4], [5, 6])
    with pytest.raises(BadItem, match=message):
        suffix_log_rewards(tiny_lm("gpt2"), [good, replace(good, **broken)], 100)


@pytest.mark.parametrize("windows", [(8, 0), (8, 2), (8, 1)], ids=["all", "none", "some"])
def test_texts_longer_than_a_layers_window_are_scored_within_it(windows: tuple[int, int]) -> None:
    window, first = windows
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=first,
    )
    model = Qwen2ForCausalLM(config).eval()
    assert score_limits(model).max_length == 64
    items = mixed_items(seed=5)
    assert max(len(one.context) + len(one.completion) for one in items) > 2 * window
    assert_same(suffix_log_rewards(model, items, 300), naive_log_rewards(model, items))
    items = behind_a_head(items, 20)
    assert_same(suffix_log_rewards(model, items, 300), naive_log_rewards(model, items))


def test_no_items_have_no_scores(tiny_lm: LM) -> None:
    assert suffix_log_rewards(tiny_lm("gpt2"), [], 100) == []


def test_the_packed_scorer_imports_neither_deepspeed_nor_ray_nor_redis() -> None:
    code = (
        "import sys, reward.packed, reward.replica, reward.lockstep;"
        "sys.exit(bool({'deepspeed', 'ray', 'redis'} & sys.modules.keys()))"
    )
    assert run([sys.executable, "-c", code], timeout=100, check=False).returncode == 0
