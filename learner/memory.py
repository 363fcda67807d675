"""Memory that an update takes above the weights of base and adapter, without either's numbers."""

from typing import Any

import numpy as np
import torch
from torch import nn

from buffer.replay import Group
from buffer.trajectory import Trajectory
from learner.batch import collate, plan_micro_batches, row_log_probs, split_rows
from learner.config import LearnerConfig
from learner.engine import MOMENTS, trainable_parameters
from lm.actions import ActionSpace
from lm.memory import metered
from lm.model import recompute_activations, vocab_size


def adapter_bytes_held(model: nn.Module) -> int:
    """Bytes of the trainable parameters and of AdamW's float32 moments.

    Their gradients are among what `update_bytes` counts; a publication comes when these are gone.
    """
    parameters = trainable_parameters(model).values()
    return sum(p.nbytes + 4 * len(MOMENTS) * p.numel() for p in parameters)


def update_bytes(
    model: Any,
    actions: ActionSpace,
    config: LearnerConfig,
    *,
    prompt_length: int,
    group_size: int,
) -> int:
    """Most bytes alive at a time in forward and backward passes, gradients of the adapter included.

    The groups are those of a step whose prompts and completions are all as long as they can be.

    Args:
        model: a model with adapter on the meta device; its layers are changed where activations
            are to be recomputed.
        group_size: trajectories of one prompt in a step, replayed ones included.
    """
    if config.recomputes(sum(parameter.numel() for parameter in model.parameters())):
        recompute_activations(model.get_base_model())
    rng, size = np.random.default_rng(0), vocab_size(model)
    groups = [
        longest_group(actions, rng, prompt_length=prompt_length, size=group_size, vocab_size=size)
        for _ in range(config.groups_per_step)
    ]
    parts = plan_micro_batches(groups, token_budget=config.token_budget, num_ranks=config.ranks)
    batch = collate(max(parts, key=len), torch.device("cpu"))
    with metered() as meter:
        for rows in split_rows(batch, config.token_budget)[:2]:  # the second finds the gradients
            log_pf_DT, log_stop_DS, _ = row_log_probs(model, actions, batch, rows)
            (log_pf_DT.sum() + log_stop_DS.sum()).backward()
    return meter.peak_bytes


def longest_group(
    actions: ActionSpace,
    rng: np.random.Generator,
    *,
    prompt_length: int,
    size: int,
    vocab_size: int,
) -> Group:
    """A prompt and `size` completions, as long as they may be, that share no beginning."""
    length, legal = actions.max_len, actions.columns(vocab_size)
    legal = legal[legal != actions.stop_token].astype(np.int32)
    prompt = rng.integers(0, vocab_size, prompt_length, dtype=np.int32)
    nothing_T = np.zeros(length, dtype=np.bool_)

    def trajectory() -> Trajectory:
        completion = rng.choice(legal, length)
        stops = actions.stop_positions(completion, nothing_T)
        return Trajectory(
            task="memory",
            prompt_key=str(prompt[:8]),
            prompt=prompt,
            answer=prompt[:0],
            completion=completion,
            from_tool=nothing_T,
            stops=stops,
            log_reward=np.zeros(len(stops), dtype=np.float32),
            behaviour_log_prob=np.zeros(length, dtype=np.float32),
            behaviour_log_stop=np.zeros(len(stops), dtype=np.float32),
            policy_version=0,
            behaviour="on_policy",
            temperature=1.0,
            actor="none",
            created_s=1.0,
            correct=None,
        )

    return Group(
        prompt_key=str(prompt[:8]), fresh=tuple(trajectory() for _ in range(size)), replayed=()
    )
