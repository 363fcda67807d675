"""SubTB: its linear-time sum over pairs, and the log Z that its root has from the group."""

import pytest
import torch
from torch import Tensor

from learner.objectives.base import ObjectiveInput
from learner.objectives.potential import estimate_log_z
from learner.objectives.subtb import SubTB, pair_sums
from tests.objective_family import Member, between_states, gradients, ragged_batch
from tests.tabular_toy import loss_of


@pytest.mark.parametrize("decay", [0.01, 0.3, 1.1, 2.0])
def test_every_lambda_equals_brute_force(decay: float) -> None:
    batch = ragged_batch(root_stops="mixed")
    member = Member(SubTB(decay), between_states(lambda distance: decay ** (distance - 1)))
    loss, expected = loss_of(batch, member.objective), member.brute_force(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for mine, brute in zip(gradients(loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(mine, brute, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_a_large_common_offset_does_not_cancel_in_float32(decay: float) -> None:
    phi_BN = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).double()
    real_BN = torch.ones(3, 20, dtype=torch.bool)
    exact = pair_sums(phi_BN, real_BN, decay)
    shifted = pair_sums((phi_BN + 1024).float(), real_BN, decay)
    torch.testing.assert_close(shifted.double(), exact, rtol=1e-3, atol=0)


def test_gradient_of_the_decayed_sum_passes_a_numerical_check() -> None:
    phi_BN = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    real_BN = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    assert torch.autograd.gradcheck(lambda phi: pair_sums(phi, real_BN, 0.7), (phi_BN,))


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_memory_kept_for_backward_is_linear_in_length(decay: float) -> None:
    def saved_bytes(tokens: int) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        stop_BS = torch.ones(4, tokens + 1, dtype=torch.bool)
        batch = ObjectiveInput(
            torch.randn(4, tokens, requires_grad=True),
            torch.randn(4, tokens + 1, requires_grad=True),
            torch.randn(4, tokens + 1),
            stop_BS,
            torch.arange(4),
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = SubTB(decay)(batch)
        value.total.backward()
        return sum(saved.values())

    assert saved_bytes(2048) / saved_bytes(1024) == pytest.approx(2.0, rel=0.02)


def test_time_does_not_grow_with_the_number_of_pairs() -> None:
    # 2 x 20,001 states make 4e8 pairs: a pair matrix would need 1.6 GB.
    phi_BN = torch.randn(2, 20_001, requires_grad=True)
    pair_sums(phi_BN, torch.ones(2, 20_001, dtype=torch.bool), 0.99).sum().backward()
    assert phi_BN.grad is not None and phi_BN.grad.isfinite().all()


def test_one_trajectory_per_prompt_estimates_its_own_log_z() -> None:
    phi_B = torch.tensor([3.0, 5.0, 11.0])
    alone_B = estimate_log_z(phi_B, torch.tensor([0, 1, 2]))
    together_B = estimate_log_z(phi_B, torch.tensor([1, 0, 1]))
    assert alone_B.tolist() == [-3.0, -5.0, -11.0]
    assert together_B.tolist() == [-7.0, -5.0, -7.0]
