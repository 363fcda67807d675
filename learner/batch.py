"""Groups of trajectories as padded tensors, split so that each part fits into memory.

Shapes: B trajectories, T tokens of the longest completion, S = T + 1 states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.replay import Group
from buffer.trajectory import Trajectory
from lm.actions import ActionSpace, IllegalCompletion
from lm.packing import SHARED_WIDTH, pack


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Whole groups, one row per trajectory; `distinct` are the rows to run the model on."""

    trajectories: tuple[Trajectory, ...]
    distinct: tuple[Trajectory, ...]  # each (prompt, completion) once
    row_B: Tensor  # int64, a trajectory's place in `distinct`
    group_B: Tensor  # int64, 0 .. number of prompts - 1
    stop_BS: Tensor  # bool, the policy may stop here
    log_reward_BS: Tensor  # nats, untempered; 0 where stop_BS is False
    chosen_BT: Tensor  # bool, the policy chose this token: neither a tool's nor padding
    behaviour_log_prob_BT: Tensor  # nats, as the sampler recorded: for the agreement gate and PPO
    behaviour_log_stop_BS: Tensor


def merge_prompts(groups: Sequence[Group]) -> list[Group]:
    """One group per prompt, in the order of first appearance: log Z belongs to the prompt."""
    by_prompt: dict[str, list[Group]] = {}
    for group in groups:
        by_prompt.setdefault(group.prompt_key, []).append(group)
    return [
        Group(
            prompt_key=key,
            fresh=tuple(chain.from_iterable(group.fresh for group in same)),
            replayed=tuple(chain.from_iterable(group.replayed for group in same)),
        )
        for key, same in by_prompt.items()
    ]


def check_actions(groups: Sequence[Group], actions: ActionSpace) -> None:
    """Raise IllegalCompletion for a trajectory that was sampled under other rules.

    Stop states where the policy cannot stop, or the reverse, would enter the loss with a
    log-probability that means nothing.
    """
    for trajectory in chain.from_iterable((*g.fresh, *g.replayed) for g in groups):
        actions.check(trajectory.completion.tolist(), trajectory.from_tool.tolist())
        expected = actions.stop_positions(trajectory.completion, trajectory.from_tool)
        if not np.array_equal(trajectory.stops, expected):
            raise IllegalCompletion(
                f"trajectory {trajectory.id} of {trajectory.actor!r} stops at "
                f"{trajectory.stops.tolist()[:8]}.. where the learner's action space has "
                f"{expected.tolist()[:8]}..; actors and learner must share the task's settings"
            )


def plan_micro_batches(
    groups: Sequence[Group], *, token_budget: int, num_ranks: int
) -> list[list[Group]]:
    """Parts of at most `token_budget` columns, balanced, a multiple of the ranks if it can.

    A group stays in one part, because what it says about its prompt needs it whole: a group above
    the budget is a part of its own, for `split_rows`. Every rank computes the same plan.
    """
    sizes = [_size(group) for group in groups]
    widest_first = sorted(range(len(groups)), key=lambda number: -sizes[number][1])
    num_parts = num_ranks
    while True:
        parts: list[list[int]] = [[] for _ in range(num_parts)]
        shapes = [(0, 0)] * num_parts
        for number in widest_first:
            grown = [_join(shape, sizes[number]) for shape in shapes]
            lightest = min(range(num_parts), key=lambda part: grown[part][0] * grown[part][1])
            parts[lightest].append(number)
            shapes[lightest] = grown[lightest]
        fits = max(rows * width for rows, width in shapes) <= token_budget
        if fits or num_parts >= len(groups):
            return [[groups[number] for number in sorted(part)] for part in parts if part]
        num_parts += num_ranks


def collate(groups: Sequence[Group], device: torch.device) -> Batch:
    """Pad groups of distinct prompts into one batch. Raises ValueError for none."""
    trajectories = tuple(t for group in groups for t in (*group.fresh, *group.replayed))
    if not trajectories:
        raise ValueError("no trajectories to collate")
    sizes = [len(group.fresh) + len(group.replayed) for group in groups]
    rows, tokens = len(trajectories), max(t.completion.size for t in trajectories)
    stop_BS = np.zeros((rows, tokens + 1), dtype=np.bool_)
    log_reward_BS, log_stop_BS = np.zeros((2, rows, tokens + 1), dtype=np.float32)
    chosen_BT = np.zeros((rows, tokens), dtype=np.bool_)
    log_pf_BT = np.zeros((rows, tokens), dtype=np.float32)
    for row, trajectory in enumerate(trajectories):
        length = trajectory.completion.size
        stop_BS[row, trajectory.stops] = True
        log_reward_BS[row, trajectory.stops] = trajectory.log_reward
        log_stop_BS[row, trajectory.stops] = trajectory.behaviour_log_stop
        chosen_BT[row, :length] = ~trajectory.from_tool
        log_pf_BT[row, :length] = trajectory.behaviour_log_prob
    distinct: dict[tuple[bytes, ...], int] = {}
    row_B = [distinct.setdefault(content(t), len(distinct)) for t in trajectories]
    first_B = [row_B.index(row) for row in range(len(distinct))]

    def to_device(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        trajectories=trajectories,
        distinct=tuple(trajectories[row] for row in first_B),
        row_B=to_device(np.array(row_B, dtype=np.int64)),
        group_B=to_device(np.repeat(np.arange(len(groups)), sizes)),
        stop_BS=to_device(stop_BS),
        log_reward_BS=to_device(log_reward_BS),
        chosen_BT=to_device(chosen_BT),
        behaviour_log_prob_BT=to_device(log_pf_BT),
        behaviour_log_stop_BS=to_device(log_stop_BS),
    )


def content(trajectory: Trajectory) -> tuple[bytes, ...]:
    """Equal for trajectories that the model sees alike."""
    arrays = (trajectory.prompt, trajectory.completion, trajectory.from_tool)
    return tuple(array.tobytes() for array in arrays)


def split_rows(batch: Batch, token_budget: int) -> list[slice]:
    """The rows of `distinct` in as few even parts as hold `token_budget` columns each.

    A part of one row may be larger.
    """
    rows = len(batch.distinct)
    num_parts = min(rows, -(-_columns(batch.distinct) // token_budget))
    while True:
        ends = [rows * part // num_parts for part in range(num_parts + 1)]
        parts = [slice(start, end) for start, end in pairwise(ends)]
        if num_parts == rows or all(
            _columns(batch.distinct[part]) <= token_budget for part in parts
        ):
            return parts
        num_parts += 1


def _columns(rows: Sequence[Trajectory]) -> int:
    height, width = _packed_shape(rows)
    return height * width


def _size(group: Group) -> tuple[int, int]:
    """Rows and width of a group's pass."""
    distinct = {content(t): t for t in (*group.fresh, *group.replayed)}
    return _packed_shape(list(distinct.values()))


def _packed_shape(rows: Sequence[Trajectory]) -> tuple[int, int]:
    """Rows and width of the pass over these trajectories, as completions of a prompt share it."""
    packing = pack(
        [t.prompt.tolist() for t in rows],
        [t.completion.tolist() for t in rows],
        shared_width=SHARED_WIDTH,
    )
    height, width = packing.ids_RW.shape
    return height, width


def _join(shape: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return shape[0] + other[0], max(shape[1], other[1])
