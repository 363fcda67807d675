"""A tool, mixed requests and an enumerable model, for the tests of sampling and scoring."""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lm.actions import ActionSpace
from lm.sampling import Completion, Request, Sampler
from lm.scoring import completion_log_probs

STOP, CALL, MUTE = 1, 3, 4


def closed_actions(actions: ActionSpace, vocab_size: int, may_stop: bool) -> torch.Tensor:
    """[V] True where the policy has no support."""
    closed = torch.ones(vocab_size, dtype=torch.bool)
    closed[torch.from_numpy(actions.columns(vocab_size))] = False
    closed[actions.stop_token] = not may_stop
    return closed


class Echo:
    """After CALL it inserts three tokens, one of them an action the policy lacks."""

    triggers = frozenset({CALL, MUTE})

    def output(self, completion: Sequence[int]) -> list[int]:
        return [29, CALL, len(completion) % 5 + 2] if completion[-1] == CALL else []


class Slow(Echo):
    """Speaks once it is let to."""

    def __init__(self) -> None:
        self.may_speak = threading.Event()

    def output(self, completion: Sequence[int]) -> list[int]:
        assert self.may_speak.wait(10.0)
        return super().output(completion)


class Fragile(Echo):
    """Fails on what holds a 9."""

    def output(self, completion: Sequence[int]) -> list[int]:
        if 9 in completion:
            raise KeyError("nine")
        return super().output(completion)


class Broken(Echo):
    """Fails always."""

    def output(self, completion: Sequence[int]) -> list[int]:
        raise KeyError("nine")


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
