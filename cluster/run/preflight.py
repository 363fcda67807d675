"""What is checked before anything starts, so that a mistake costs a second and not a run.

Each room raises its own errors; this calls them in order of price.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.engine import check_engine
from buffer.config import BufferConfig
from buffer.connection import connect
from buffer.endpoint import ports
from buffer.executable import find_executable
from buffer.folder import configured_password
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.run.assembly import identity_of
from cluster.run.directory import RunDirectory
from cluster.run.identity import check_same_run, identity_of_run
from cluster.run.imitation import imitation
from cluster.run.plan import check_memory_here
from cluster.run.resources import Node, check_fit
from learner.log_z import check_log_z
from lm.adapter import AdapterMismatch, load_adapter, load_adapter_bytes, read_adapter
from lm.merged import check_adaptable
from lm.model import LanguageModel, attach_adapter, context_limit, inspect_base
from reward.terms import build_terms
from tasks.registry import build_task
from tasks.task import QuestionTask, Task


def check_before_start(
    config: RunConfig,
    directory: RunDirectory,
    *,
    resume: bool,
    address: str | None,
    local: bool,
) -> dict[str, Any]:
    """Check all that can be known of a run before its first process; writes nothing.

    Args:
        address: of a Ray cluster that exists; None starts one on this machine.

    Returns what the run is known by when it goes on: `cluster.run.identity`. Raises UserError, and
    what the rooms raise about Redis, the models, the data and the objective.
    """
    directory.check(resume=resume)
    if config.buffer.kind == "memory" and not local:
        raise UserError(
            'buffer.kind = "memory" keeps the buffer in one process, which the parts of a run over '
            "Ray are not: add --local, or leave it out"
        )
    if local:
        check_local(config)
    elif address is None:
        # Ray counts this machine's GPUs itself, when it starts.
        cpus = config.cluster.cpus or os.cpu_count() or 1
        check_fit(config, [Node(cpus, float("inf"))])
    check_buffer(config.buffer)
    here = local or address is None
    if here:
        check_engine(config.actors)
        check_memory_here(config)
    # The cluster's nodes have the GPUs; this machine need not have one.
    elsewhere = config if here else config.changed({"lm.device": "cpu"})
    if any(directory.checkpoints.glob("step-*")):  # which a run that goes on starts from
        elsewhere = elsewhere.changed({"learner.start_from": None})
    weights = check_model_and_data(elsewhere, fetch=here)
    identity = identity_of_run(config, weights)
    if resume:
        check_same_run(directory, identity, weights)
    return identity


def check_local(config: RunConfig) -> None:
    """Raise UserError when one process would have to be several."""
    counts = {"reward.ranks": config.reward.ranks, "learner.ranks": config.learner.ranks}
    several = [f"{name} = {count}" for name, count in counts.items() if count > 1]
    if several:
        raise UserError(
            f"--local is one process, but {' and '.join(several)}: set to 1, or leave --local out"
        )


def check_buffer(config: BufferConfig) -> None:
    """Raise unless the Redis of `config` answers, or one could be started as it says."""
    if config.kind == "memory":
        return
    password = configured_password(config)
    if config.url is not None:
        connect(config.url, password=password, timeout_s=config.timeout_s).close()
        return
    find_executable()
    next(ports(config, last=0))


def check_model_and_data(config: RunConfig, *, fetch: bool = True) -> dict[str, str]:
    """Raise unless the model's files are whole and every file of the task is such as it can use.

    No weights are held: what only they tell is checked where they are loaded, `load_task`.

    Args:
        fetch: whether to download weights that are not here, which only workers need.

    Returns what a checkpoint of the run is known by.
    """
    if (terms := build_terms(config.reward, config.lm)) is not None:
        terms.check()
    base = inspect_base(config.lm, fetch=fetch)
    check_adaptable(base, config.lora)
    task = build_task(config.task, base.tokenizer, seed=config.seed)
    check_log_z(config.learner, task.actions)
    check_room(config, task)
    check_lengths(config, task, context_limit(base.model))
    if config.learner.traits.imitates:
        imitation(config, base, task)
    if config.learner.traits.trains_model:
        policy = Path(str(config.em.policy))
        check_adapter(policy)
        load_adapter(base, policy)
    if config.learner.start_from is not None:
        check_start(config, base, Path(config.learner.start_from))
    task.check_evaluation(config.evaluation.split)
    return identity_of(config, base, task)


def check_room(config: RunConfig, task: Task) -> None:
    """Raise UserError where the buffer could not keep each prompt's best trajectory."""
    prompts, capacity = len({prompt.key for prompt in task.prompts}), config.buffer.capacity
    if prompts > capacity and not config.learner.traits.imitates:
        raise UserError(
            f"buffer.capacity ({capacity}) is below the {prompts} prompts of task {task.name!r}, "
            "each of which is to keep its best trajectory: raise it"
        )


def check_lengths(config: RunConfig, task: Task, limit: int) -> None:
    """Raise UserError where a prompt leaves a model of `limit` positions no room.

    Those to be measured on count too, and are read here; worked examples in front of them
    (`evaluation.shots`), and what a tool writes behind the last step, are not foreseen.
    """
    longest = task.actions.max_len
    for text, length in _lengths(task, config.evaluation.max_items):
        if (needed := longest + length) > limit:
            raise UserError(
                f"task {task.name!r}: prompt {text[:60]!r} needs {needed} positions with a "
                f"completion of max_len = {longest} and its answer, the model has {limit}: take "
                "the prompt out, shorten it, or lower task.max_len"
            )


def _lengths(task: Task, measured: int | None) -> Iterator[tuple[str, int]]:
    """Text of each prompt, and tokens of it and its answer as whoever reads most of it does."""
    context = len(task.reward_query.context)
    files = [file[:measured] for split in task.held_out.values() for file in split]
    held_out = [item.prompt for file in files for item in file]
    for prompt in (*task.prompts, *held_out):
        scored = context + len(prompt.scored_prompt) + max(len(prompt.answer), 1)
        yield prompt.text, max(len(prompt.prompt), scored)
    if isinstance(task, QuestionTask):  # whose questions the LM answers in its own words
        for prompt in held_out:
            yield prompt.text, context + len(prompt.prompt) + task.answer_actions.max_len


def check_start(config: RunConfig, base: LanguageModel, folder: Path) -> None:
    """Raise UserError unless training can start with the adapter in `folder`, put on `base`."""
    check_adapter(folder)
    policy = attach_adapter(base, config.lora, config.seed)
    try:
        load_adapter_bytes(policy, read_adapter(folder, base.fingerprint))
    except AdapterMismatch as error:
        raise UserError(
            f"learner.start_from = {str(folder)!r}: {error}; [lora] must have that adapter's "
            "shape, and lm.model its base"
        ) from error


def check_adapter(folder: Path) -> None:
    """Raise UserError unless `folder` looks like one; whose it is, only loading tells."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds no adapter (no adapter_config.json): give the 'adapter' folder of a "
            f"run, or name the run with --run"
        )
