"""The chunked head against the plain softmax, in value, gradient and in what it holds at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lm.action_distribution import ActionDistribution
from lm.actions import ActionSpace
from lm.chunked_head import OutputHead, action_log_probs, head_replaced, target_log_probs
from tests.tiny_lm import ARCHITECTURES

WIDTH, VOCAB, STATES, STOP = 5, 23, 14, 3
LEGAL = (1, 2, 8, 9, 21)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "pad_token_id": 0}
FINISHED: list[PretrainedConfig] = [
    Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    CohereConfig(**SMALL, logit_scale=0.25),
    GraniteConfig(**SMALL, logits_scaling=3.0),
]
LM = Callable[[str], PreTrainedModel]


class Adapted(nn.Module):
    """A frozen matrix with a trained adapter around it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear(bias=True)
        self.down, self.up = (
            nn.Parameter(torch.randn(shape).double()) for shape in ((2, WIDTH), (VOCAB, 2))
        )

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + hidden @ self.down.T @ self.up.T


def linear(*, bias: bool) -> nn.Linear:
    return nn.Linear(WIDTH, VOCAB, bias=bias).double().requires_grad_(False)


def head_of(kind: str) -> OutputHead:
    torch.manual_seed(1)
    match kind:
        case "matrix":
            return OutputHead(linear(bias=False))
        case "bias, scale and softcap":
            return OutputHead(linear(bias=True), scale=3.0, softcap=1.5)
        case "trained matrix":
            return OutputHead(linear(bias=True).requires_grad_(True), softcap=1.5)
        case "adapter":
            return OutputHead(Adapted())
    raise ValueError(kind)


HEADS = ("matrix", "bias, scale and softcap", "trained matrix", "adapter")


# Two states have no next token and name ⊤ in its place.
NEXT = torch.tensor([1, 2, 8, 9, STOP, STOP, 21, 1, 2, 8, 9, 21, 1, 2])
MAY_STOP = np.arange(STATES) % 3 > 0


def policy(legal: tuple[int, ...] | None, vocab_size: int = VOCAB) -> ActionDistribution:
    actions = ActionSpace(stop_token=STOP, legal_tokens=legal, min_len=0, max_len=9)
    return ActionDistribution(actions, vocab_size, torch.device("cpu"))


def plain(
    head: OutputHead, hidden_ND: Tensor, legal: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """All logits at once, as the policy is defined."""
    logits_NV = head.scale * head.module(hidden_ND)
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    closed_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    if legal is not None:
        closed_NV[:] = True
        closed_NV[:, [*legal, STOP]] = False
    closed_NV[~MAY_STOP, STOP] = True
    log_q_NV = logits_NV.masked_fill(closed_NV, -torch.inf).log_softmax(-1)
    return log_q_NV.gather(1, NEXT[:, None])[:, 0], log_q_NV[:, STOP]


def loss(log_probs: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """Both targets with weights of their own, where they mean something."""
    weight_2N = torch.randn(2, STATES, generator=torch.Generator().manual_seed(seed)).double()
    log_next_N, log_stop_N = log_probs
    may_stop_N = torch.from_numpy(MAY_STOP)
    total = (weight_2N[0] * torch.where((NEXT != STOP) | may_stop_N, log_next_N, 0.0)).sum()
    return total + (weight_2N[1] * torch.where(may_stop_N, log_stop_N, 0.0)).sum()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("legal", [None, LEGAL], ids=["vocabulary", "legal"])
@pytest.mark.parametrize("chunk_entries", [1, 3 * VOCAB, 10_000])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    kind: str, legal: tuple[int, ...] | None, chunk_entries: int
) -> None:
    head = head_of(kind)
    hidden_ND = torch.randn(STATES, WIDTH).double().requires_grad_(True)
    wanted = [hidden_ND, *(p for p in head.module.parameters() if p.requires_grad)]
    found = action_log_probs(head, hidden_ND, policy(legal), NEXT, MAY_STOP, chunk_entries)
    expected = plain(head, hidden_ND, legal)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss(found, 3), wanted)
    for mine, theirs in zip(grads, torch.autograd.grad(loss(expected, 3), wanted), strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("legal", [None, LEGAL], ids=["vocabulary", "legal"])
def test_the_gradient_is_the_slope_of_the_value(kind: str, legal: tuple[int, ...] | None) -> None:
    head = head_of(kind)
    hidden_ND = torch.randn(STATES, WIDTH).double().requires_grad_(True)
    trained = [p for p in head.module.parameters() if p.requires_grad]

    def value(hidden_ND: Tensor, *trained: Tensor) -> Tensor:
        found = action_log_probs(head, hidden_ND, policy(legal), NEXT, MAY_STOP, 3 * VOCAB)
        return loss(found, 4)

    assert torch.autograd.gradcheck(value, (hidden_ND, *trained))


def test_a_token_that_is_nearly_certain_keeps_its_gradient_in_bfloat16() -> None:
    """1 - p is 1e-3 there: less than bfloat16 keeps of a p near 1."""
    matrix = linear(bias=False)
    hidden_ND = torch.randn(1, WIDTH).double()
    with torch.no_grad():
        matrix.weight[7] += hidden_ND[0] * (9 - matrix(hidden_ND)[0, 7]) / hidden_ND.square().sum()
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        matrix, state_ND = matrix.to(dtype), hidden_ND.to(dtype).requires_grad_(True)
        log_next_N, _ = action_log_probs(
            OutputHead(matrix), state_ND, policy(None), torch.tensor([7]), np.array([True])
        )
        grads.append(torch.autograd.grad(log_next_N.sum(), state_ND)[0].double())
    assert log_next_N.dtype == torch.float32 and -1e-1 < log_next_N.item() < -1e-4
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


def test_no_more_than_a_chunk_of_logits_exists_forward_and_backward() -> None:
    states, vocab, chunk_entries = 4000, 5000, 200_000
    for trained in (False, True):
        matrix = nn.Linear(8, vocab, bias=False).requires_grad_(trained)
        hidden_ND = torch.randn(states, 8, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            log_next_N, log_stop_N = action_log_probs(
                OutputHead(matrix),
                hidden_ND,
                policy(None, vocab),
                torch.randint(vocab, (states,)),
                np.ones(states, dtype=np.bool_),
                chunk_entries,
            )
            (log_next_N + log_stop_N).sum().backward()
        sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.nbytes() > 0]
        assert sizes and max(sizes) <= 4 * chunk_entries


def test_the_lm_s_own_log_probabilities_of_targets() -> None:
    head = head_of("bias, scale and softcap")
    hidden_ND = torch.randn(STATES, WIDTH).double()
    source_E = np.array([0, 0, 0, 2, 5, 5, 13])
    target_E = np.array([1, 7, 22, 0, 3, 3, 9])
    expected_E = head.logits(hidden_ND).log_softmax(-1)[source_E, target_E]
    for chunk_entries in (1, 4 * VOCAB, 10_000):
        found_E = target_log_probs(head, hidden_ND, source_E, target_E, chunk_entries)
        torch.testing.assert_close(found_E, expected_E, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
def test_logits_of_some_tokens_come_in_chunks_and_of_all_without_a_copy_of_the_head(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, hidden_ND = head_of(kind), torch.randn(STATES, WIDTH).double()
    expected_NV = head.logits(hidden_ND)
    rows: list[int] = []  # of each logits tensor of the whole vocabulary
    finished = OutputHead._finished

    def counted(self: OutputHead, raw: Tensor) -> Tensor:
        rows.extend([len(raw)] * (raw.shape[1] == VOCAB))
        return finished(self, raw)

    monkeypatch.setattr(OutputHead, "_finished", counted)
    monkeypatch.setattr("lm.chunked_head.CHUNK_ENTRIES", 4 * VOCAB)
    for legal in (torch.tensor(LEGAL), torch.arange(VOCAB)):
        found_NC = head.logits_of(hidden_ND, legal)
        torch.testing.assert_close(found_NC, expected_NV[:, legal], rtol=1e-12, atol=1e-12)
        if len(legal) < VOCAB:
            assert rows == ([] if head.frozen_linear else [4, 4, 4, 2])
    rows.clear()
    monkeypatch.setattr(OutputHead, "linear_logits", None)  # which takes rows of the head
    head.logits_of(hidden_ND, torch.arange(VOCAB))
    assert rows == [STATES]


@pytest.mark.parametrize("config", FINISHED, ids=lambda config: config.model_type)
def test_a_head_finishes_its_logits_as_the_architecture_does(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    check_logits(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapter on the head"])
def test_a_pass_gives_its_hidden_states_in_place_of_logits(
    tiny_lm: LM, architecture: str, adapted: bool
) -> None:
    model = tiny_lm(architecture)
    if adapted:
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        # B = 0 would hide an adapter that is passed over.
        model = get_peft_model(model, LoraConfig(target_modules=[head], init_lora_weights=False))
    check_logits(model.eval())


@torch.no_grad()
def check_logits(model: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    hidden: list[Tensor] = []
    with head_replaced(model, hidden.append):
        model(input_ids=ids)
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(OutputHead.of(model).logits(hidden[0]), logits, rtol=1e-5, atol=1e-6)
