"""The model card of an exported policy: what it is, what it learned from, how it did, how to load.

In Markdown, with the header that the Hugging Face hub reads.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from cluster.config.schema import RunConfig
from cluster.reports.html_page import templates
from cluster.reports.score_table import after_title, rows
from lm.config import LMConfig
from tasks.evaluation.evaluation import Scores
from tasks.task import Task


def model_card(
    name: str,
    config: RunConfig,
    scores: Scores,
    task: Task,
    *,
    folder: str,
    steps: int | None,
    merged: bool,
    dtype: str,
    texts: bool,
) -> str:
    """The card of what a run has learned.

    Args:
        name: of the run.
        folder: where it lies: an absolute path, or a repository of the hub.
        steps: that it has taken; None: unknown.
        merged: the adapter is folded into the base's weights.
        dtype: of the weights that are exported.
        texts: it writes whole texts, rather than the completions of the task.
    """
    base, learner = Path(config.lm.model), config.learner
    done = "unknown" if steps is None else str(steps)
    weights = "merged into the base's" if merged else "an adapter beside the base"
    facts = {
        "base": base.name if base.is_dir() else config.lm.model,
        "task": task.name,
        "data": ", ".join(_data(config)) or "made by the task",
        "objective": f"{learner.objective}, T = {learner.trained_temperature(steps):g}",
        "steps": f"{done} of {learner.steps}",
        "adapter": f"LoRA, rank {config.lora.rank}, alpha {config.lora.alpha:g}",
        "weights": f"{weights}, {dtype}",
    }
    known = next((one.examples for one in (scores.after, scores.before) if one), ())
    asked = json.dumps(known[0].question if known else "...", ensure_ascii=False)
    environment = templates("cluster.reports", keep_trailing_newline=True)
    return environment.get_template("model_card.md").render(
        name=name,
        folder=folder,
        base=facts["base"],
        base_path=config.lm.model,
        base_options=_base_options(config.lm),
        on_hub=not base.is_dir(),
        facts=facts.items(),
        rows=rows(scores.before, scores.after),
        after_title=after_title(scores.after),
        rank=config.lora.rank,
        prompt=f"tokenizer.bos_token + {asked}" if config.lm.bos is True else asked,
        special_tokens="" if config.lm.bos == "auto" else ", add_special_tokens=False",
        limits=() if texts else tuple(_limits(task)),
        merged=merged,
        texts=texts,
    )


def _base_options(lm: LMConfig) -> str:
    """Arguments with which transformers loads the base as the run did."""
    revision = f"revision={json.dumps(lm.revision)}, " if lm.revision else ""
    code = "trust_remote_code=True, " if lm.trust_remote_code else ""
    return f'{revision}{code}dtype="{lm.dtype}"'


def _data(config: RunConfig) -> Iterator[str]:
    """Names of the files that the run's task was given, without those it is measured on."""
    for key, value in config.task.model_dump(mode="json").items():
        if key not in ("tests", "validation"):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str) and Path(one).is_absolute():
                    yield Path(one).name


def _limits(task: Task) -> Iterator[str]:
    """What of the policy no generation configuration can say."""
    if task.tool is not None:
        yield "They call no tool: where the policy asks for one, its answer must be put in."
    actions = task.actions
    if actions.stop_after_tool:
        yield "The policy stops behind a tool's text only; they may stop anywhere."
    if actions.stop_behind is not None or actions.stop_every != 1:
        yield "The policy stops behind certain tokens only; they may stop anywhere."
    if actions.legal_tokens is not None:
        yield (
            "vLLM does not read `suppress_tokens` of generation_config.json: give the tokens that "
            "are not among them as `allowed_token_ids`."
        )
