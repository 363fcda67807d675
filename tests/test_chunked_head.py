"""The chunked head against the plain softmax, in value, gradient and in what it holds at a time."""

from collections.abc import Callable

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

from lm.chunked_head import Actions, OutputHead, action_log_probs, head_replaced, target_log_probs
from tests.tiny_lm import ARCHITECTURES

WIDTH, VOCAB, STATES, STOP = 5, 23, 14, 3
LEGAL = torch.tensor([1, 2, 3, 8, 9, 21])
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


def asked(legal: Tensor | None) -> Actions:
    """States where ⊤ is open and closed, and two whose next token is named as ⊤ is."""
    ids = torch.arange(VOCAB) if legal is None else legal
    next_N = torch.randint(len(ids), (STATES,), generator=torch.Generator().manual_seed(2))
    stop = int((ids == STOP).nonzero())
    next_N[next_N == stop] = 0
    next_N[[4, 5]] = stop
    may_stop_N = torch.arange(STATES) % 3 > 0
    return Actions(id_C=legal, stop_column=stop, next_N=next_N, may_stop_N=may_stop_N)


def plain(head: OutputHead, hidden_ND: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """All logits at once, as the policy is defined."""
    logits_NV = head.scale * head.module(hidden_ND)
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    logits_NC = logits_NV if actions.id_C is None else logits_NV[:, actions.id_C]
    closed_NC = torch.zeros_like(logits_NC, dtype=torch.bool)
    closed_NC[~actions.may_stop_N, actions.stop_column] = True
    log_q_NC = logits_NC.masked_fill(closed_NC, -torch.inf).log_softmax(-1)
    return log_q_NC.gather(1, actions.next_N[:, None])[:, 0], log_q_NC[:, actions.stop_column]


def loss(log_probs: tuple[Tensor, Tensor], actions: Actions, seed: int) -> Tensor:
    """Both targets with weights of their own, where they mean something."""
    weight_2N = torch.randn(2, STATES, generator=torch.Generator().manual_seed(seed)).double()
    log_next_N, log_stop_N = log_probs
    is_stop_N = actions.next_N == actions.stop_column
    total = (weight_2N[0] * log_next_N.masked_fill(is_stop_N & ~actions.may_stop_N, 0.0)).sum()
    return total + (weight_2N[1] * torch.where(actions.may_stop_N, log_stop_N, 0.0)).sum()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("legal", [None, LEGAL], ids=["vocabulary", "legal"])
@pytest.mark.parametrize("chunk_entries", [1, 3 * VOCAB, 10_000])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    kind: str, legal: Tensor | None, chunk_entries: int
) -> None:
    head, actions = head_of(kind), asked(legal)
    hidden_ND = torch.randn(STATES, WIDTH).double().requires_grad_(True)
    wanted = [hidden_ND, *(p for p in head.module.parameters() if p.requires_grad)]
    found = action_log_probs(head, hidden_ND, actions, chunk_entries)
    expected = plain(head, hidden_ND, actions)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss(found, actions, 3), wanted)
    for mine, theirs in zip(
        grads, torch.autograd.grad(loss(expected, actions, 3), wanted), strict=True
    ):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("legal", [None, LEGAL], ids=["vocabulary", "legal"])
def test_the_gradient_is_the_slope_of_the_value(kind: str, legal: Tensor | None) -> None:
    head, actions = head_of(kind), asked(legal)
    hidden_ND = torch.randn(STATES, WIDTH).double().requires_grad_(True)
    trained = [p for p in head.module.parameters() if p.requires_grad]

    def value(hidden_ND: Tensor, *trained: Tensor) -> Tensor:
        return loss(action_log_probs(head, hidden_ND, actions, 3 * VOCAB), actions, 4)

    assert torch.autograd.gradcheck(value, (hidden_ND, *trained))


def test_a_token_that_is_nearly_certain_keeps_its_gradient_in_bfloat16() -> None:
    """1 - p is 1e-3 there: less than bfloat16 keeps of a p near 1."""
    matrix = linear(bias=False)
    hidden_ND = torch.randn(1, WIDTH).double()
    with torch.no_grad():
        matrix.weight[7] += hidden_ND[0] * (9 - matrix(hidden_ND)[0, 7]) / hidden_ND.square().sum()
    actions = Actions(
        id_C=None, stop_column=STOP, next_N=torch.tensor([7]), may_stop_N=torch.tensor([True])
    )
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        matrix, state_ND = matrix.to(dtype), hidden_ND.to(dtype).requires_grad_(True)
        log_next_N, _ = action_log_probs(OutputHead(matrix), state_ND, actions)
        grads.append(torch.autograd.grad(log_next_N.sum(), state_ND)[0].double())
    assert log_next_N.dtype == torch.float32 and -1e-1 < log_next_N.item() < -1e-4
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


def test_no_more_than_a_chunk_of_logits_exists_forward_and_backward() -> None:
    states, vocab, chunk_entries = 4000, 5000, 200_000
    for trained in (False, True):
        matrix = nn.Linear(8, vocab, bias=False).requires_grad_(trained)
        actions = Actions(
            id_C=None,
            stop_column=STOP,
            next_N=torch.randint(vocab, (states,)),
            may_stop_N=torch.ones(states, dtype=torch.bool),
        )
        hidden_ND = torch.randn(states, 8, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            log_next_N, log_stop_N = action_log_probs(
                OutputHead(matrix), hidden_ND, actions, chunk_entries
            )
            (log_next_N + log_stop_N).sum().backward()
        sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.nbytes() > 0]
        assert sizes and max(sizes) <= 4 * chunk_entries


def test_the_lm_s_own_log_probabilities_of_targets() -> None:
    head = head_of("bias, scale and softcap")
    hidden_ND = torch.randn(STATES, WIDTH).double()
    source_E = torch.tensor([0, 0, 0, 2, 5, 5, 13])
    target_E = torch.tensor([1, 7, 22, 0, 3, 3, 9])
    expected_E = head.logits(hidden_ND).log_softmax(-1)[source_E, target_E]
    for chunk_entries in (1, 4 * VOCAB, 10_000):
        found_E = target_log_probs(head, hidden_ND, source_E, target_E, chunk_entries)
        torch.testing.assert_close(found_E, expected_E, rtol=1e-12, atol=1e-12)


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
