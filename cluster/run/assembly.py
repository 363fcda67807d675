"""Builds the parts of a run from its configuration, over Ray and in one process alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from actors.actor import RolloutActor
from actors.demonstrations import DEMONSTRATION, hinted_demonstrations, seed_demonstrations
from actors.engine import NativeEngine, vllm_engine
from actors.prompts import PromptStream
from actors.protocols import RolloutEngine, Scorer, TrajectorySink
from actors.reward_query import DirectScorer
from actors.weight_sources import LaggingWeights, WeightSource
from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import Replay, ReplayBuffer
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory, merged_folder
from cluster.run.imitation import Learned, imitation
from cluster.run.session import BufferAddress
from learner.agreement.gate import AgreementGate
from learner.agreement.policy_history import PastPolicies
from learner.agreement.quarantine import Quarantine
from learner.checkpoint import Checkpoints
from learner.config import LearnerConfig
from learner.engine import Engine
from learner.learner import Companion, Learner, WeightSink
from learner.log_z import attach_log_z
from learner.objectives import db, ppo, raptb, subtb, tb
from learner.objectives.base import Objective
from lm.adapter import adapter_bytes, load_adapter_bytes, read_adapter, save_adapter
from lm.config import LMConfig
from lm.merged import check_adaptable, save_merged
from lm.model import LanguageModel, attach_adapter
from lm.shared import SharedModel
from reward.probe import check_base
from reward.terms import TermScorer, build_terms
from tasks.registry import build_task
from tasks.task import Task

MakeEngine = Callable[[Any, LearnerConfig], Engine]


def build_buffer(config: RunConfig, *, run: str, place: BufferAddress) -> ReplayBuffer:
    """A client of the run's replay buffer, once it has been answered."""
    if place.memory is not None:
        return ReplayBuffer(place.memory, config=config.buffer)
    client = connect(place.url, password=place.password, timeout_s=config.buffer.timeout_s)
    return ReplayBuffer(RedisStore(client, run=run), config=config.buffer)


def build_actor(
    config: RunConfig,
    *,
    policy: Callable[[int], RolloutEngine],
    task: Task,
    name: str,
    seed: Sequence[int],
    buffer: TrajectorySink,
    scorer: Scorer,
    weights: WeightSource,
) -> RolloutActor:
    """A rollout actor that begins with the base's weights and takes up the learner's itself.

    Args:
        policy: makes one, of the base LM, from the seed of its draws.
    """
    prompt_seed, behaviour_seed, sampler_seed = np.random.SeedSequence(seed).spawn(3)
    if lag := config.actors.lag_versions:
        weights = LaggingWeights(weights, lag=lag, max_lag=config.max_lag_versions)
    return RolloutActor(
        name=name,
        task_name=task.name,
        query=task.reward_query,
        is_correct=task.verdict,
        prompts=PromptStream(task.prompts, np.random.default_rng(prompt_seed)),
        policy=policy(int(sampler_seed.generate_state(1)[0])),
        scorer=scorer_of(config, task, scorer),
        buffer=buffer,
        weights=weights,
        config=config.actors,
        rng=np.random.default_rng(behaviour_seed),
        # Of the base: with a start of its own the policy was never that.
        awaits_weights=config.learner.traits.on_policy and config.learner.start_from is not None,
    )


def model_policy(
    config: RunConfig, base: LanguageModel, task: Task, *, steady: bool = True
) -> Callable[[int], NativeEngine]:
    """Makes our own engine around a base LM, which becomes the engine's, from a seed.

    Args:
        steady: draws depend on the seed alone, and not on how long tools take.
    """
    return lambda seed: NativeEngine(
        base,
        task.actions,
        task.tool,
        lora=config.lora,
        max_rows=config.actors.max_rows,
        seed=seed,
        steady=steady,
        tool_timeout_s=config.actors.tool_timeout_s,
    )


def vllm_policy(config: RunConfig, task: Task) -> Callable[[int], RolloutEngine]:
    """Makes an engine of vLLM, which loads the base LM itself, from a seed."""
    asked = [*(prompt.prompt for prompt in task.prompts), *(hint.shown for hint in task.hints)]
    return lambda seed: vllm_engine(
        config.lm,
        config.actors,
        task.actions,
        task.tool,
        lora=config.lora,
        longest_prompt=max(map(len, asked)),
        seed=seed,
    )


def scorer_of(config: RunConfig, task: Task, replicas: Scorer, *, strict: bool = False) -> Scorer:
    """Who scores this task: the reward replicas, with the configured terms, or the task itself.

    Args:
        strict: whether a verifier that fails is an error, rather than an item without a reward.
    """
    if task.log_reward is not None:
        return DirectScorer(task.log_reward)
    terms = build_terms(config.reward, config.lm)
    return replicas if terms is None else TermScorer(replicas, terms, strict=strict)


def verifier_failures(actor: RolloutActor) -> int:
    """Calls of an actor's verifiers that raised, hung or gave no score."""
    return actor.scorer.terms.failures if isinstance(actor.scorer, TermScorer) else 0


def seed_buffer(
    config: RunConfig, *, task: Task, scorer: Scorer, buffer: ReplayBuffer, policy: RolloutEngine
) -> int:
    """Put the task's demonstrations into replay, and what the base LM, as which `policy` begins,
    writes behind its hints; how many.

    Again, by an actor that was replaced or a run that goes on, it adds what is not there: nothing
    is drawn for prompts of which replay holds what was drawn behind a hint before.
    """
    hinted = []
    if task.hinted_draws:
        given = {(each.prompt.key, each.completion) for each in task.demonstrations}
        held = buffer.held(list({hint.prompt.key for hint in task.hints}))
        drawn = {
            each.prompt_key
            for each in held
            if each.behaviour == DEMONSTRATION
            and (each.prompt_key, tuple(each.completion.tolist())) not in given
        }
        hints = [hint for hint in task.hints if hint.prompt.key not in drawn]
        hinted = hinted_demonstrations(hints, policy, draws=task.hinted_draws) if hints else []
    return seed_demonstrations(
        [*task.demonstrations, *hinted],
        task=task.name,
        actions=task.actions,
        query=task.reward_query,
        is_correct=task.verdict,
        scorer=scorer_of(config, task, scorer, strict=True),
        buffer=buffer,
        token_budget=config.reward.token_budget,
        timeout_s=config.actors.score_timeout_s,
    )


def build_objective(config: LearnerConfig) -> Objective:
    """The configured objective, one that learns from rewards."""
    match config.objective:
        case "subtb":
            return subtb.SubTB(decay=config.subtb_lambda, normalisation=config.normalisation)
        case "db":
            return db.DetailedBalance(normalisation=config.normalisation)
        case "raptb":
            return raptb.RootedPrefixBalance(normalisation=config.normalisation)
        case "tb":
            return tb.TrajectoryBalance()
        case "ppo":
            return ppo.ClippedPolicyGradient(clip=config.ppo_clip, kl=config.ppo_kl)
        case "sft" | "joint":
            raise ValueError(f"objective {config.objective!r} imitates: see imitation.py")


def build_learner(
    config: RunConfig,
    *,
    base: LanguageModel,
    task: Task,
    directory: RunDirectory,
    make_engine: MakeEngine,
    buffer: Replay,
    weights: WeightSink,
    warn: Callable[[str], None],
    gated: bool = True,
    companion: Companion | None = None,
) -> Learner:
    """One rank of the learner, where an earlier one of the run has left off: `Learner.take_up`.

    Args:
        gated: whether samplers are held to the learner's own log q.
        companion: the rest of the run, where it goes back with the learner.
    """
    model = attach_adapter(base, config.lora, config.seed)
    log_z = attach_log_z(model) if config.learner.log_z == "learned" else None
    if imitates := config.learner.traits.imitates:
        learned = imitation(config, base, task)
    else:
        objective = build_objective(config.learner)
        learned = Learned(replay=buffer, actions=task.actions, objective=objective)
    gate = None
    if gated and not imitates:
        gate = AgreementGate(
            replay=buffer,
            model=model,
            actions=task.actions,
            past=PastPolicies(model, max_age=config.buffer.max_age),
            quarantine=Quarantine(directory.quarantine),
            config=config.learner,
            warn=warn,
        )
    store = Checkpoints(
        directory.checkpoints,
        identity=identity_of(config, base, task),
        keep=config.learner.checkpoints_kept,
    )
    version = 0 if store.latest() else _start(config, base, model, gate)
    learner = Learner(
        model=model,
        actions=learned.actions,
        replay=gate or learned.replay,
        engine=make_engine(model, config.learner),
        objective=learned.objective,
        config=config.learner,
        weights=weights,
        rng=np.random.default_rng([config.seed, 1]),
        checkpoints=store,
        log_z=log_z,
        gate=gate,
        companion=companion,
        version=version,
    )
    learner.take_up()
    return learner


def _start(
    config: RunConfig, base: LanguageModel, model: nn.Module, gate: AgreementGate | None
) -> int:
    """The version of the weights that learning starts with, once they are in `model`.

    Before there is an engine: DeepSpeed's copies them as it begins.
    """
    if config.learner.start_from is None:
        return 0
    if gate is not None:  # actors sample with these until they have fetched others
        gate.keep(0, adapter_bytes(model))
    folder = Path(config.learner.start_from)
    load_adapter_bytes(model, read_adapter(folder, base.fingerprint))
    return 1


def identity_of(config: RunConfig, base: LanguageModel, task: Task) -> dict[str, str]:
    """What a run must share with a checkpoint to go on from it: the base by its weights."""
    lora = config.lora.model_dump_json()
    identity = {"base": base.fingerprint, "lora": lora, "task": task.name}
    learned_log_z = {"log_z": "learned"} if config.learner.log_z == "learned" else {}
    return identity | learned_log_z


def save_result(config: RunConfig, learner: Learner, base: LanguageModel, adapter: Path) -> None:
    """Leave the adapter; of an M-step also the language model that it made: `merged_folder`."""
    save_adapter(learner.model, adapter, base.fingerprint)
    if config.learner.traits.trains_model:
        save_merged(config.lm, adapter_bytes(learner.model), merged_folder(adapter))


def load_task(config: RunConfig) -> tuple[LanguageModel, Task]:
    """The base, and the task in its tokens."""
    base = shared_model(config).base
    return base, build_task(config.task, base.tokenizer, seed=config.seed)


def shared_model(config: RunConfig) -> SharedModel:
    """The base, held against plain passes, and its adapter tried, once it is loaded."""

    def check(lm: LMConfig, base: LanguageModel) -> None:
        check_base(lm, base)
        check_adaptable(base, config.lora)

    return SharedModel(config.lm, check)
