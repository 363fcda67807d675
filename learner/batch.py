"""Groups of trajectories as padded tensors, split so that each part fits into memory.

Shapes: B trajectories, T tokens of the longest completion, S = T + 1 states.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from buffer.replay import Group
from buffer.trajectory import Trajectory
from lm.actions import ActionSpace, IllegalCompletion
from lm.packing import SHARED_WIDTH, pack
from lm.scoring import completion_log_probs


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
    behaviour_log_prob_BT: Tensor  # nats, as the sampler recorded
    behaviour_log_stop_BS: Tensor


def members(groups: Iterable[Group]) -> Iterator[Trajectory]:
    """Of each group the fresh ones, then the replayed."""
    return chain.from_iterable((*group.fresh, *group.replayed) for group in groups)


def merge_prompts(groups: Sequence[Group]) -> list[Group]:
    """One group per prompt, in the order of first appearance: log Z belongs to the prompt."""
    merged: dict[str, Group] = {}
    for group in groups:
        if (same := merged.get(group.prompt_key)) is not None:
            fresh, replayed = same.fresh + group.fresh, same.replayed + group.replayed
            group = replace(group, fresh=fresh, replayed=replayed)
        merged[group.prompt_key] = group
    return list(merged.values())


def check_actions(groups: Sequence[Group], actions: ActionSpace) -> None:
    """Raise IllegalCompletion for a trajectory that was sampled under other rules.

    Its stop states would enter the loss with a log-probability that means nothing.
    """
    for trajectory in members(groups):
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

    A group stays in one part: what it says about its prompt needs it whole. One above the budget is
    a part of its own, for `split_rows`. Every rank computes the same plan.
    """
    sizes = [_packed_shape(list({content(t): t for t in members([g])}.values())) for g in groups]
    widest_first = sorted(range(len(groups)), key=lambda number: -sizes[number][1])
    num_parts = num_ranks
    while True:
        parts: list[list[int]] = [[] for _ in range(num_parts)]
        shapes = [(0, 0)] * num_parts
        for number in widest_first:
            rows, width = sizes[number]
            grown = [(height + rows, max(widest, width)) for height, widest in shapes]
            lightest = min(range(num_parts), key=lambda part: prod(grown[part]))
            parts[lightest].append(number)
            shapes[lightest] = grown[lightest]
        if max(map(prod, shapes)) <= token_budget or num_parts >= len(groups):
            return [[groups[number] for number in sorted(part)] for part in parts if part]
        num_parts += num_ranks


def collate(groups: Sequence[Group], device: torch.device) -> Batch:
    """Pad groups of distinct prompts into one batch. Raises ValueError for none."""
    trajectories = tuple(members(groups))
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
    num_parts = min(rows, -(-prod(_packed_shape(batch.distinct)) // token_budget))
    while True:
        ends = [rows * part // num_parts for part in range(num_parts + 1)]
        parts = [slice(start, end) for start, end in pairwise(ends)]
        columns = (prod(_packed_shape(batch.distinct[part])) for part in parts)
        if num_parts == rows or all(number <= token_budget for number in columns):
            return parts
        num_parts += 1


def row_log_probs(
    model: nn.Module, actions: ActionSpace, batch: Batch, rows: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model says of these distinct rows, in one pass; see `lm.scoring.LogProbs`.

    Returns:
        log q of the tokens, [D, T], and of stopping, [D, S], padded as the batch; the state behind
        the prompts, [D, H].
    """
    distinct = batch.distinct[rows]
    log_probs = completion_log_probs(
        model,
        actions,
        [t.prompt.tolist() for t in distinct],
        [t.completion.tolist() for t in distinct],
        [t.from_tool.tolist() for t in distinct],
    )
    short = (0, batch.stop_BS.shape[1] - log_probs.log_stop_BS.shape[1])
    log_pf_DT, log_stop_DS = pad(log_probs.log_pf_BT, short), pad(log_probs.log_stop_BS, short)
    return log_pf_DT, log_stop_DS, log_probs.prompt_state_BH


def _packed_shape(rows: Sequence[Trajectory]) -> tuple[int, int]:
    """Rows and width of the pass over these trajectories, as completions of a prompt share it."""
    packing = pack(
        [t.prompt.tolist() for t in rows],
        [t.completion.tolist() for t in rows],
        shared_width=SHARED_WIDTH,
    )
    return len(packing.trees), packing.width
