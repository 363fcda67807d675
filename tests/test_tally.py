"""What the learner's own pass says of those who sampled: every row counts, for its own sampler."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from buffer.replay import Group
from learner.agreement.comparison import num_decisions
from learner.batch import collate
from learner.objectives.base import ObjectiveValue
from learner.step_metrics import Tally
from tests.learner_toy import make_trajectory

ALONE: Any = SimpleNamespace(gather=lambda values: [list(values)])  # the only rank


def test_the_gap_of_a_sampler_is_over_all_its_rows_of_all_micro_batches() -> None:
    parts = [
        [("a", 3, 0.5), ("a", 3, -1.0), ("b", 3, 0.25), ("a", 4, 2.0)],
        [("a", 3, 0.125), ("taught", 0, 9.0)],
        [("taught", 0, 9.0)],
    ]
    groups = [
        Group(
            prompt_key="short",
            fresh=tuple(
                make_trajectory(
                    "short",
                    (1,) * (1 + row % 2),
                    actor=actor,
                    policy_version=version,
                    behaviour="demonstration" if actor == "taught" else "on_policy",
                )
                for row, (actor, version, _) in enumerate(part)
            ),
            replayed=(),
        )
        for part in parts
    ]
    tally = Tally(groups, version=4)
    expected: dict[tuple[str, int], list[float]] = {}
    for part, group in zip(parts, groups, strict=True):
        batch = collate([group], torch.device("cpu"))
        shift_B1 = torch.tensor([[shift] for _, _, shift in part])  # recorded log q is 0
        inputs: Any = SimpleNamespace(
            log_pf_BT=shift_B1.expand_as(batch.behaviour_log_prob_BT),
            log_stop_BS=shift_B1.expand_as(batch.behaviour_log_stop_BS),
        )
        tally.add(batch, inputs, ObjectiveValue(torch.zeros(()), {}), factor=1.0)
        for (actor, version, shift), trajectory in zip(part, group.fresh, strict=True):
            expected.setdefault((actor, version), []).extend([shift] * num_decisions(trajectory))
    metrics = tally.gathered(ALONE)
    del expected["taught", 0]
    assert tally.gaps.keys() == expected.keys()
    for pair, shifts in expected.items():
        gap = tally.gaps[pair]
        square = sum(shift**2 for shift in shifts) / len(shifts)
        assert gap.decisions == len(shifts)
        assert gap.mean_nats == pytest.approx(sum(shifts) / len(shifts))
        assert gap.rms_nats == pytest.approx(square**0.5)
    assert metrics["agreement/max_nats"] == metrics["agreement/mean_nats"] == 2.0
