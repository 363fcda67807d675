"""The sampler draws from exactly the policy that scoring describes, row by row."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lm.actions import ActionSpace, IllegalCompletion, stop_positions
from lm.choice import PolicyDiverged
from lm.sampling import Completion, Request, Sampler
from lm.scoring import completion_log_probs
from tests.conftest import ARCHITECTURES, VOCAB_SIZE

STOP, CALL, MUTE = 1, 3, 4


class Echo:
    """After CALL it inserts three tokens, one of them an action the policy lacks."""

    triggers = frozenset({CALL, MUTE})

    def output(self, completion: Sequence[int]) -> list[int]:
        return [29, CALL, len(completion) % 5 + 2] if completion[-1] == CALL else []


def mixed_requests(count: int) -> list[Request]:
    """Prompts of lengths 2 to 6, each many times, in three temperatures."""
    prompts = [tuple(range(5, 7 + kind)) for kind in range(5)]
    return [
        Request(prompt=prompts[i * 7 % 5], temperature=(1.0, 0.5, 2.0)[i % 3]) for i in range(count)
    ]


def draw(
    model: PreTrainedModel,
    actions: ActionSpace,
    requests: Sequence[Request],
    *,
    tool: Echo | None = None,
    max_rows: int = 16,
    seed: int = 0,
) -> list[Completion]:
    sampler = Sampler(model, actions, tool, max_rows=max_rows)
    return sampler.sample(requests, torch.Generator().manual_seed(seed))


def worst_disagreement(
    model: PreTrainedModel,
    actions: ActionSpace,
    requests: Sequence[Request],
    completions: Sequence[Completion],
) -> float:
    """Largest difference, nats, between the sampler's record and a recomputation."""
    with torch.no_grad():
        scored = completion_log_probs(
            model,
            actions,
            [request.prompt for request in requests],
            [completion.tokens.tolist() for completion in completions],
            [completion.from_tool.tolist() for completion in completions],
        )
    worst = 0.0
    for b, drawn in enumerate(completions):
        log_pf = scored.log_pf_BT[b, : len(drawn.tokens)].numpy()
        log_stop = scored.log_stop_BS[b].numpy()[drawn.stops]
        worst = max(worst, float(np.abs(log_pf - drawn.log_q_token).max(initial=0.0)))
        worst = max(worst, float(np.abs(log_stop - drawn.log_q_stop).max()))
    return worst


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("legal", [None, (2, CALL, MUTE, 5, 9)], ids=["vocabulary", "legal"])
def test_recomputed_log_q_equals_the_record_in_a_ragged_refilled_batch_with_tool_calls(
    tiny_lm: Callable[[str], PreTrainedModel], architecture: str, legal: tuple[int, ...] | None
) -> None:
    model = tiny_lm(architecture)
    actions = ActionSpace(stop_token=STOP, legal_tokens=legal, min_len=2, max_len=9)
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


def enumerable_policy() -> tuple[PreTrainedModel, ActionSpace]:
    """A model over six tokens, and a space of 1 + 4 + 16 + 64 completions."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.4)
    return model, ActionSpace(stop_token=0, legal_tokens=(1, 2, 3, 4), min_len=0, max_len=3)


def exact_probabilities(
    model: PreTrainedModel, actions: ActionSpace, prompt: tuple[int, ...], temperature: float
) -> dict[tuple[int, ...], float]:
    """By one plain forward per prefix: nothing shared with sampler or scorer."""
    found: dict[tuple[int, ...], float] = {}

    def descend(prefix: tuple[int, ...], probability: float) -> None:
        if len(prefix) == actions.max_len:
            found[prefix] = probability
            return
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *prefix]])).logits[0, -1].double() / temperature
        legal = [*(actions.legal_tokens or range(len(logits)))]
        open_actions = [*legal, actions.stop_token] if len(prefix) >= actions.min_len else legal
        p = dict(zip(open_actions, torch.softmax(logits[open_actions], 0).tolist(), strict=True))
        if actions.stop_token in p:
            found[prefix] = probability * p.pop(actions.stop_token)
        for token, p_token in p.items():
            descend((*prefix, token), probability * p_token)

    descend((), 1.0)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("min_len", [0, 2])
def test_samples_follow_the_exact_distribution(temperature: float, min_len: int) -> None:
    model, actions = enumerable_policy()
    actions = ActionSpace(
        stop_token=0, legal_tokens=actions.legal_tokens, min_len=min_len, max_len=3
    )
    exact = exact_probabilities(model, actions, (5, 2), temperature)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-6)

    count = 20_000
    # A second prompt in the same batch, with refills, must not disturb the first.
    requests = [
        Request(prompt=(5, 2) if i % 2 else (3, 1, 1), temperature=temperature)
        for i in range(2 * count)
    ]
    completions = draw(model, actions, requests, max_rows=4096, seed=1)
    seen = Counter(tuple(c.tokens.tolist()) for c in completions[1::2])
    assert seen.keys() <= exact.keys()
    common = {z: p for z, p in exact.items() if p * count >= 5}
    chi2 = sum((seen[z] - p * count) ** 2 / (p * count) for z, p in common.items())
    rest = 1.0 - sum(common.values())
    if rest * count >= 5:
        others = sum(seen[z] for z in exact.keys() - common.keys())
        chi2 += (others - rest * count) ** 2 / (rest * count)
    freedom = len(common) - 1 + (rest * count >= 5)
    # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal; 4 sigma.
    z_score = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z_score < 4.0, (chi2, freedom)


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
    with pytest.raises(ValueError, match="need 0 <= min_len <= max_len"):
        ActionSpace(stop_token=1, legal_tokens=None, min_len=4, max_len=3)
    with pytest.raises(ValueError, match="no token but the stop token"):
        ActionSpace(stop_token=1, legal_tokens=(1,), min_len=0, max_len=3)
    with pytest.raises(ValueError, match="empty prompt"):
        Request(prompt=())
    with pytest.raises(ValueError, match="temperature 0"):
        Request(prompt=(1,), temperature=0.0)
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=3, max_len=3)
    with pytest.raises(ValueError, match="max_position_embeddings of 256"):
        draw(model, actions, [Request(prompt=(2,) * 255)])


def test_a_diverged_policy_is_an_error_not_a_sample(
    tiny_lm: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_lm("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    actions = ActionSpace(stop_token=STOP, legal_tokens=None, min_len=0, max_len=3)
    with pytest.raises(PolicyDiverged, match="not finite"):
        draw(model, actions, [Request(prompt=(2, 3))])


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
