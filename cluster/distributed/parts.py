"""What processes of a distributed run are built from: models, or an experiment's stand-ins.

DeepSpeed is imported by the processes that need it: it takes seconds, and there are few of them.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from actors.protocols import RolloutEngine
from cluster.config.schema import RunConfig
from cluster.run import assembly
from learner.config import LearnerConfig
from learner.engine import Engine
from lm.hub import load_tokenizer
from lm.model import LanguageModel, load_base
from lm.process_group import Rendezvous
from lm.spelling import Decode
from reward.lockstep import Rank, UnshardedRank
from tasks.registry import build_task
from tasks.task import Task


class RolloutParts(NamedTuple):
    """What a rollout actor is built from."""

    task: Task
    policy: Callable[[int], RolloutEngine]  # makes one from the seed of its draws
    decode: Decode | None  # tokens as text, for the log; None: nothing worth reading is written


class Parts:
    """The configured models. An experiment may hand its run a subclass, which travels pickled."""

    gated = True  # whether samplers are held to the learner's own log q

    def rollout(self, config: RunConfig) -> RolloutParts:
        if config.actors.engine == "vllm":
            tokenizer = load_tokenizer(config.lm)
            task = build_task(config.task, tokenizer, seed=config.seed)
            return RolloutParts(task, assembly.vllm_policy(config, task), tokenizer.decode)
        base, task = assembly.load_task(config)
        policy = assembly.model_policy(config, base, task, steady=False)
        return RolloutParts(task, policy, base.tokenizer.decode)

    def reward_rank(self, config: RunConfig, meet: Callable[[], Rendezvous]) -> Rank:
        """One rank of a replica; `meet` gives up the port that was kept free, and names it."""
        if config.reward.ranks == 1:
            return UnshardedRank(load_base(config.lm).model)
        from reward.deepspeed_rank import RewardRank

        return RewardRank(config.lm, meet)

    def learner_base(self, config: RunConfig) -> tuple[LanguageModel, Task]:
        """The language model that the learner's adapter sits on, and the task in its tokens."""
        return assembly.load_task(config)

    def engine(
        self,
        config: RunConfig,
        model: nn.Module,
        settings: LearnerConfig,
        meet: Callable[[], Rendezvous],
    ) -> Engine:
        """What takes the optimizer steps of one learner rank; `meet` as of a reward rank."""
        from learner.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, settings, meet())
