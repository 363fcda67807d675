"""What each process of a run is made of: from the configuration to wired objects.

A run over Ray and a run in one process build the same parts here; only the ports between them
differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.actor import RolloutActor
from actors.policy import SamplingPolicy
from actors.ports import Scorer, WeightSource
from actors.prompts import PromptStream
from actors.seeding import seed_demonstrations
from buffer.connection import connect
from buffer.replay import ReplayBuffer
from cluster.config import RunConfig
from learner.batch import Collator
from learner.deepspeed_engine import DeepSpeedEngine
from learner.learner import Learner, WeightSink
from learner.subtb import SubTB
from lm.model import attach_adapter, load_base
from reward.rank import RewardRank
from reward.replica import Peer, RewardReplica
from tasks.registry import build_task


def build_buffer(config: RunConfig, run: str, url: str, password: str) -> ReplayBuffer:
    """A client of the run's replay buffer."""
    client = connect(url, password=password, timeout_s=config.buffer.timeout_s)
    return ReplayBuffer(client, run=run, config=config.buffer)


def build_actor(
    config: RunConfig,
    *,
    name: str,
    seed: Sequence[int],
    buffer: ReplayBuffer,
    scorer: Scorer,
    weights: WeightSource,
) -> RolloutActor:
    """A rollout actor with the base LM as its policy; it takes up the learner's weights itself."""
    base = load_base(config.lm)
    task = build_task(config.task, base.tokenizer)
    prompt_seed, behaviour_seed, sampler_seed = np.random.SeedSequence(seed).spawn(3)
    return RolloutActor(
        name=name,
        task_name=task.name,
        reward_context=task.reward_context,
        verdict=task.verdict,
        prompts=PromptStream(task.prompts, np.random.default_rng(prompt_seed)),
        policy=SamplingPolicy(
            base,
            task.actions,
            task.tool,
            max_rows=config.actors.max_rows,
            seed=int(sampler_seed.generate_state(1)[0]),
        ),
        scorer=scorer,
        buffer=buffer,
        weights=weights,
        config=config.actors,
        rng=np.random.default_rng(behaviour_seed),
    )
