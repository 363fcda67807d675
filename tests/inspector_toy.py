"""A run as it lies in its folder, with trajectories that say what a test wants them to say."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from buffer.connection import connect
from buffer.redis_store import RedisStore
from buffer.replay import ReplayBuffer
from buffer.server import RedisServer
from buffer.trajectory import Trajectory
from cluster.config.file import load_config, resolved_toml
from cluster.config.schema import RunConfig
from cluster.run.directory import RunDirectory, RunPhase, first_state, write_whole
from lm.config import LMConfig
from lm.hub import load_tokenizer
from tasks.evaluation.evaluation import Evaluation, Example, Metric, Scores

# Spells every byte, so that a rationale can be any text.
TOKENIZER = load_tokenizer(LMConfig(model=load_config("tasks/arithmetic.toml").lm.model))
# What a model, or whoever wrote a data file, might try on the page.
HOSTILE = (
    "<script>document.title='hacked'</script>",
    '"><img src=x onerror="document.title=\'hacked\'">',
    "javascript:document.title='hacked'",
    "</style></title></textarea><svg onload=document.title='hacked'>",
    "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}x{% endfor %}",
    "' onmouseover='document.title=1' x='",
    "&lt;b&gt;&#60;i&#62;",
    "\u202ereversed\u0000\u001b[31m",
)


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def spelled(
    prompt: str,
    rationale: Sequence[tuple[str, bool]],
    *,
    answer: str = " 7",
    log_reward: float = -1.0,
    key: str | None = None,
    **changes: Any,
) -> Trajectory:
    """A trajectory that reads so; `rationale` is pieces of text, each with whether a tool wrote it.

    It may stop in front of each piece of the policy's and at the end.
    """
    completion: list[int] = []
    from_tool: list[bool] = []
    stops: list[int] = []
    for text, by_tool in rationale:
        tokens = encode(text)
        if not by_tool:
            stops.append(len(completion))
        completion += tokens
        from_tool += [by_tool] * len(tokens)
    stops = sorted({*stops, len(completion)})
    fields: dict[str, Any] = {
        "task": "arithmetic",
        "prompt_key": key or prompt,
        "prompt": np.array(encode(prompt), np.int32),
        "answer": np.array(encode(answer), np.int32),
        "completion": np.array(completion, np.int32),
        "from_tool": np.array(from_tool, np.bool_),
        "stops": np.array(stops, np.int32),
        "log_reward": np.linspace(log_reward - 3.0, log_reward, len(stops), dtype=np.float32),
        "behaviour_log_prob": np.where(from_tool, 0.0, -0.25).astype(np.float32),
        "behaviour_log_stop": np.linspace(-2.0, -0.5, len(stops), dtype=np.float32),
        "policy_version": 3,
        "behaviour": "on_policy",
        "temperature": 1.0,
        "actor": "actor-0",
        "created_s": 1_700_000_000.0,
        "correct": None,
    }
    return Trajectory(**(fields | changes))


def sums(count: int) -> list[Trajectory]:
    """Worked sums of several prompts, actors, versions and verdicts, no two alike."""
    made = []
    for number in range(count):
        a, b = number % 7, number % 5
        made.append(
            spelled(
                f"Question: {a} + {b} = ? Answer:",
                [(f" {a} + {b} =", False), (f" {a + b}", True), (f", {number} {number}", False)],
                answer=f". The answer is {a + b}.",
                key=f"{a}+{b}",
                log_reward=-1.0 - number / 7,
                policy_version=number % 11,
                correct=(True, False, None)[number % 3],
                actor=f"actor-{number % 2}",
                created_s=1_700_000_000.0 + number,
            )
        )
    return made


def make_run(root: Path, name: str = "demo", *, phase: RunPhase = "done") -> RunDirectory:
    """A run folder with configuration, state and metrics, driven by this process."""
    directory = RunDirectory(name, root=root)
    directory.path.mkdir(parents=True)
    config = load_config("tasks/arithmetic.toml", ["buffer.near_duplicate_tolerance=0"])
    directory.config_file.write_text(resolved_toml(config), encoding="utf-8")
    rows = [
        {
            "step": step,
            "loss/value": 20 * math.exp(-step / 30) + step % 3,
            "reward/log_mean_nats": -10 + 8 * step / 120,
            "reward/correct_fraction": min(1.0, step / 100),
            "policy/version": float(step),
        }
        for step in range(1, 121)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    directory.metrics_file.write_text(text, encoding="utf-8")
    write_whole(directory.scores_file, scores().model_dump_json())
    state = first_state(name, steps=500)
    directory.write_state(state.model_copy(update={"phase": phase, "step": 120, "version": 12}))
    return directory


def scores() -> Scores:
    """Of the base, wrong, and of the policy, right; what a model writes may be hostile."""

    def measured(step: int, right: bool, rationale: str) -> Evaluation:
        asked = {"question": "Question: 1 + 1 + 3 = ? Answer:", "truth": "5", "right": right}
        example = Example(**asked, rationale=rationale, answer="5" if right else "")
        share = Metric(label="right", value=float(right), better="higher", items=1)
        return Evaluation(
            task="arithmetic",
            temperature=1.0,
            step=step,
            metrics={"right": share},
            examples=(example,),
        )

    return Scores(before=measured(0, False, HOSTILE[0]), after=measured(120, True, "1 + 1 = 2"))


def config_of(directory: RunDirectory) -> RunConfig:
    return load_config(str(directory.config_file))


@contextmanager
def filled(
    directory: RunDirectory, trajectories: Sequence[Trajectory]
) -> Iterator[tuple[RedisServer, ReplayBuffer]]:
    """The run's redis-server and its buffer, holding these trajectories."""
    config = config_of(directory).buffer
    server = RedisServer.start(directory.buffer, run=directory.name, config=config)
    try:
        with connect(server.url, password=server.password, timeout_s=5.0) as client:
            buffer = ReplayBuffer(RedisStore(client, run=directory.name), config=config)
            buffer.seed(trajectories)
            yield server, buffer
    finally:
        server.stop(timeout_s=10.0)
