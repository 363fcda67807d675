"""What each part of a run will need of memory, found before anything starts and without weights.

The code that learns and scores runs on a model without numbers (lm/memory.py) at the longest
prompts and completions of the task; what it makes is counted. The rest is arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.engine import vllm_cache_bytes
from cluster.config.placement import Placement
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from learner.memory import adapter_bytes_held, update_bytes
from lm.hub import load_tokenizer
from lm.memory import device_memory_bytes, draw_bytes, kv_cache_bytes, prefill_bytes
from lm.model import (
    CausalLM,
    LanguageModel,
    attach_adapter,
    build_without_weights,
    device_of,
    is_large,
    vocab_size,
)
from lm.prefill import kept_prompts
from reward.memory import longest_items, scoring_bytes
from tasks.registry import build_task
from tasks.task import QuestionTask, Task

# Of a process, in MB: Python with torch, transformers and Ray, as it stands before it loads a
# model, and what CUDA keeps of a device for itself. Measured.
PROCESS_MB = 600.0
CUDA_MB = 500.0
# Tokens of prompts that vLLM reads in one pass.
_VLLM_PREFILL = 2048
# What a record has besides its tokens and its numbers for each of them, and bytes of these.
_RECORD_BYTES, _RECORD_BYTES_PER_TOKEN = 400, 22

# What makes a cause smaller.
REMEDIES = {
    "CUDA": "share the GPU with fewer processes",
    "weights": 'take lm.dtype = "bfloat16" or a smaller lm.model',
    "shard of the weights": "raise reward.ranks",
    "adapter": "lower lora.rank",
    "adapted weights": "narrow lora.targets",
    "adapter and optimizer": "lower lora.rank",
    "passes": "lower the section's token_budget, or set learner.checkpointing = true",
    "cache": "lower {rows} or task.max_len",
    "worked examples": "lower task.reward_demonstrations",
    "rows that wait for tools": "lower {rows} or task.max_len",
    "prompts": 'take lm.dtype = "bfloat16" or a smaller lm.model',
    "draws": "lower {rows}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """A part of the run: how many processes, and what each holds, MB by cause."""

    part: str
    number: int
    placement: Placement
    memory_mb: Mapping[str, float]  # of its device, which may be the host
    host_mb: float  # of the host besides
    sent_mb: float  # over the network, per optimizer step

    @property
    def total_mb(self) -> float:
        return sum(self.memory_mb.values())

    @property
    def largest(self) -> str:
        """The cause that takes most."""
        return max(self.memory_mb, key=lambda cause: self.memory_mb[cause])

    @property
    def remedy(self) -> str:
        """What makes that smaller."""
        section = "evaluation" if self.part == "evaluator" else "actors"
        return REMEDIES[self.largest].format(rows=f"{section}.max_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All parts, and the base model they share."""

    model: str
    parameters: int
    on_gpu: bool
    parts: tuple[PartPlan, ...]

    def misfits(self, device_mb: float) -> list[str]:
        """A sentence for each part that its share of a GPU of this size does not hold.

        Where there are no GPUs, for all parts together, which share the host.
        """
        if not self.on_gpu:
            needed = sum(part.number * part.total_mb for part in self.parts)
            return (
                [] if needed <= device_mb else [f"all parts need {_gb(needed)} of {_gb(device_mb)}"]
            )
        shares = ((part, min(part.placement.gpus or 1.0, 1.0) * device_mb) for part in self.parts)
        return [
            f"{part.part} needs {_gb(part.total_mb)} and has {_gb(share)}; most of it is "
            f"{part.largest} ({_gb(part.memory_mb[part.largest])}): {part.remedy}, or give "
            "it more of a GPU"
            for part, share in shares
            if part.total_mb > share
        ]


def plan_run(config: RunConfig, *, on_gpu: bool) -> Plan:
    """What the parts of the run need.

    Args:
        on_gpu: whether models are held by GPUs; else the host is their device.

    Raises what the rooms raise about the model, its tokenizer and the task's data.
    """
    tokenizer = load_tokenizer(config.lm)
    task = build_task(config.task, tokenizer, seed=config.seed)
    base = build_without_weights(config.lm)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    weights_mb = _mb(sum(parameter.nbytes for parameter in base.parameters()))
    unidentified = LanguageModel(model=base, tokenizer=tokenizer, fingerprint="")
    # Scoring is counted first, on a base that carries no adapter yet.
    scorer = _scorer_memory(config, base, task, weights_mb) if config.reward_replicas else {}
    policy = attach_adapter(unidentified, config.lora, config.seed)
    adapter_mb = _mb(sum(p.nbytes for p in policy.parameters() if p.requires_grad))
    shared = {"weights": weights_mb, "adapter": 2 * adapter_mb}
    adapted = _adapted_bytes(policy) if config.lm.dtype == "float32" else 0
    actor = shared | _actor_memory(config, base, task, adapted)
    evaluator = shared | _evaluator_memory(config, base, task, adapted)
    learner = _learner_memory(config, policy, task, weights_mb)
    cluster, scorers = config.cluster, config.reward_replicas * config.reward.ranks
    published_mb = adapter_mb / (2 if config.learner.publish_dtype == "bfloat16" else 1)
    learner_sends = published_mb + 2 * _step_records_mb(config, task)
    parts = (
        ("rollout actor", config.rollout_actors, cluster.actor_placement, actor, published_mb),
        ("reward rank", scorers, cluster.reward_placement, scorer, 0.0),
        ("learner rank", config.learner.ranks, cluster.learner_placement, learner, learner_sends),
        ("evaluator", 1, cluster.actor_placement, evaluator, 0.0),
    )
    return Plan(
        model=config.lm.model,
        parameters=parameters,
        on_gpu=on_gpu,
        parts=tuple(
            PartPlan(
                part=part,
                number=number,
                placement=placement,
                memory_mb=({"CUDA": CUDA_MB} if on_gpu else {}) | memory,
                # Loading passes through the host, of a shard a tensor at a time.
                host_mb=PROCESS_MB + (memory.get("weights", 0.0) if on_gpu else 0.0),
                sent_mb=sent_mb,
            )
            for part, number, placement, memory, sent_mb in parts
            if number
        ),
    )


def check_memory_here(config: RunConfig) -> None:
    """Raise UserError where this machine cannot hold the parts of a run of a large model."""
    if is_large(build_without_weights(config.lm)):
        device = device_of(config.lm)
        check_memory(
            plan_run(config, on_gpu=device.type == "cuda"), _mb(device_memory_bytes(device))
        )


def check_memory(plan: Plan, device_mb: float) -> None:
    """Raise UserError where a device of this size cannot hold a part."""
    if misfits := plan.misfits(device_mb):
        raise UserError(
            f"{plan.model} does not fit: {'; '.join(misfits)} ('amortize plan' has more)"
        )


def _actor_memory(config: RunConfig, base: CausalLM, task: Task, adapted: int) -> dict[str, float]:
    """Above weights and adapter; of vLLM without the CUDA graphs that it captures."""
    rows, prompt = config.actors.max_rows, _longest_prompt(task)
    columns = prompt + task.actions.max_len
    if config.actors.engine == "native":
        memory = _sampler_memory(base, rows=rows, prompt=prompt, columns=columns, adapted=adapted)
        if task.tool is not None:  # all of them, while the cache stays as large as it was
            logits = 4 * rows * vocab_size(base)
            waiting = kv_cache_bytes(base, rows=rows, columns=columns) + logits
            memory["rows that wait for tools"] = _mb(waiting)
        return memory
    return {
        "draws": _mb(draw_bytes(base, rows=rows)),
        "cache": _mb(vllm_cache_bytes(base, max_rows=rows, columns=columns)),
        "prompts": _mb(prefill_bytes(base, tokens=_VLLM_PREFILL)),
    }


def _evaluator_memory(
    config: RunConfig, base: CausalLM, task: Task, adapted: int
) -> dict[str, float]:
    """Above weights and adapter, of what is drawn; worked examples are not foreseen."""
    held_out = [item.prompt for files in task.held_out.values() for file in files for item in file]
    prompt = max(len(each.prompt) for each in (*task.prompts, *held_out))
    columns = prompt + task.actions.max_len
    if isinstance(task, QuestionTask):  # the LM answers behind X Z
        prompt = len(task.reward_query.context) + columns
        columns = prompt + task.answer_actions.max_len
    rows = config.evaluation.max_rows
    return _sampler_memory(base, rows=rows, prompt=prompt, columns=columns, adapted=adapted)


def _sampler_memory(
    base: CausalLM, *, rows: int, prompt: int, columns: int, adapted: int
) -> dict[str, float]:
    """Of our own sampler above weights and adapter: `rows` texts of so many columns.

    Args:
        prompt: tokens of the longest.
        adapted: bytes of the weights that an adapter is folded into, which are kept as they were.
    """
    kept = kept_prompts(rows)
    memory = {
        "draws": draw_bytes(base, rows=rows),
        "cache": kv_cache_bytes(base, rows=rows, columns=columns),
        "prompts": kv_cache_bytes(base, rows=kept, columns=prompt)
        + prefill_bytes(base, tokens=kept * prompt),
    }
    if adapted:
        memory["adapted weights"] = adapted
    return {cause: _mb(size) for cause, size in memory.items()}


def _scorer_memory(
    config: RunConfig, base: CausalLM, task: Task, weights_mb: float
) -> dict[str, float]:
    actions, ranks = task.actions, config.reward.ranks
    context = len(task.reward_query.context)
    items = longest_items(
        context=context + max(len(prompt.scored_prompt) for prompt in task.prompts),
        length=actions.max_len,
        answer=max(1, *(len(prompt.answer) for prompt in task.prompts)),
        stops=range(actions.min_len, actions.max_len + 1, actions.stop_every),
        number=config.actors.group_size,
        vocab_size=vocab_size(base),
    )
    passes = {"passes": _mb(scoring_bytes(base, items, config.reward.token_budget))}
    if ranks == 1:
        if context:  # read once, and kept
            passes["worked examples"] = _mb(kv_cache_bytes(base, rows=1, columns=context))
        return {"weights": weights_mb} | passes
    return {"shard of the weights": weights_mb / ranks} | passes


def _learner_memory(
    config: RunConfig, policy: Any, task: Task, weights_mb: float
) -> dict[str, float]:
    passes = update_bytes(
        policy,
        task.actions,
        config.learner,
        prompt_length=_longest_prompt(task),
        group_size=_group_size(config),
    )
    return {
        "weights": weights_mb,
        "adapter and optimizer": _mb(adapter_bytes_held(policy)),
        "passes": _mb(passes),
    }


def _longest_prompt(task: Task) -> int:
    return max(len(prompt.prompt) for prompt in task.prompts)


def _group_size(config: RunConfig) -> int:
    """Trajectories of a prompt in a step."""
    return config.actors.group_size + config.learner.replayed_per_group


def _step_records_mb(config: RunConfig, task: Task) -> float:
    """Of the trajectories of a step."""
    tokens = _longest_prompt(task) + task.actions.max_len
    number = config.learner.groups_per_step * _group_size(config)
    return _mb(number * (_RECORD_BYTES + _RECORD_BYTES_PER_TOKEN * tokens))


def _adapted_bytes(policy: Any) -> int:
    """Of the weights that an adapter changes."""
    layers = (getattr(module, "base_layer", None) for module in policy.modules())
    return sum(layer.weight.nbytes for layer in layers if layer is not None)


def _mb(size: float) -> float:
    return size / 2**20


def _gb(mb: float) -> str:
    return f"{mb / 1024:.1f} GB"
