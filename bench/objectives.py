"""Steps and seconds until a policy is within 0.05 of the exact posterior, for each objective.

The whole loop in one process (sampler, packed scorer, replay buffer on a real Redis, learner) on
the enumerable toy with at most three letters, 85 completions for each of its four prompts. Distance
is total variation, the mean over the prompts, measured every ten steps, which is not timed. The
learning rate falls linearly to zero over the 300 steps that a run has at most, as it does in
tasks/toy.toml. Seconds are of this process's CPU, on one thread, so that it does not matter
what else runs. 64 trajectories a step, from one of these behaviours:

    on_policy  the policy itself
    mixed      1/4 the policy, 1/2 tempered at 0.5 to 2, 1/4 replayed (the paper's mixture)
    uniform    every action alike, whatever the policy says

Normalisation is that of the batch, and for the mixture that of each trajectory, too. Figures are
over the seeds: the median, and in brackets the least and the most; `-` is "not within 300 steps".

    python bench/objectives.py [--json] [--seeds N] [--only TEXT] [--workers N]
"""

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from buffer.server import RedisServer
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.run import assembly as roles
from cluster.run.directory import RunDirectory
from cluster.run.local import LocalRun
from cluster.run.session import BufferAddress
from lm.model import vocab_size
from lm.next_action import NextLogits
from reward.terms import build_terms
from tasks.posterior.divergence import total_variation
from tasks.posterior.enumeration import PrefixTree, Support
from tasks.posterior.weights import log_reward_of, log_rewards
from tasks.task import Task

TARGET_TV = 0.05
MAX_STEPS = 300
MEASURED_EVERY = 10
CONFIG = "tasks/toy.toml"
COMMON = ("task.max_len=3", f"learner.steps={MAX_STEPS}")

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "subtb 1.0": ("learner.objective=subtb",),
    "subtb 0.9": ("learner.objective=subtb", "learner.subtb_lambda=0.9"),
    "tb group": ("learner.objective=tb",),
    "tb learned": ("learner.objective=tb", "learner.log_z=learned"),
    "db": ("learner.objective=db",),
    "raptb": ("learner.objective=raptb",),
}
# Without replay its rule against near-duplicates need not be paid for.
NO_REPLAY = ("learner.replayed_per_group=0", "buffer.quota_per_prompt=1")
BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "on_policy": ("actors.on_policy_share=1.0", *NO_REPLAY),
    "mixed": ("actors.group_size=12", "learner.replayed_per_group=4"),
    "uniform": (
        "actors.on_policy_share=0.0",
        "actors.temperature_low=1e6",
        "actors.temperature_high=1e6",
        *NO_REPLAY,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained on what."""

    objective: str
    behaviour: str
    normalisation: str

    def __str__(self) -> str:
        return f"{self.objective}, {self.behaviour}, {self.normalisation}"

    def config(self, seed: int) -> RunConfig:
        overrides = [*COMMON, *OBJECTIVES[self.objective], *BEHAVIOURS[self.behaviour]]
        overrides += [f"learner.normalisation={self.normalisation}", f"seed={seed}"]
        return load_config(CONFIG, overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run: where it got to the target, and how near it was when it was left."""

    steps: int | None
    seconds: float | None
    last_tv: float


def all_cases() -> list[Case]:
    batch = [
        Case(objective=objective, behaviour=behaviour, normalisation="batch")
        for behaviour in BEHAVIOURS
        for objective in OBJECTIVES
    ]
    # TB has one residual for each trajectory.
    trajectory = [
        Case(objective=objective, behaviour="mixed", normalisation="trajectory")
        for objective in OBJECTIVES
        if not objective.startswith("tb")
    ]
    return batch + trajectory


class Distance:
    """Mean total variation over the prompts of a task between a policy and the posterior."""

    def __init__(self, config: RunConfig) -> None:
        self._base, self._task = roles.load_task(config)
        terms = build_terms(config.reward, config.lm)
        score = log_reward_of(self._task, self._base.model, config.reward.token_budget, terms)
        temperature = config.learner.reward_temperature.end
        self._log_p: list[NDArray[np.float64]] = []
        for prompt, support in self._enumerate(self._base.model):
            log_reward_N = log_rewards(support.completions, prompt, self._task.reward_query, score)
            log_weight_N = log_reward_N / temperature
            self._log_p.append(log_weight_N - np.logaddexp.reduce(log_weight_N))
        self._order = [support.completions for _, support in self._enumerate(self._base.model)]

    def of(self, policy: Any) -> float:
        """Between 0 and 1."""
        distances = []
        enumerated = zip(self._enumerate(policy), self._order, self._log_p, strict=True)
        for (_, support), completions, log_p_N in enumerated:
            log_q = dict(zip(support.completions, support.log_q_KN[0], strict=True))
            log_q_N = np.array([log_q[completion] for completion in completions])
            distances.append(total_variation(log_q_N, log_p_N))
        return statistics.mean(distances)

    def _enumerate(self, policy: Any) -> list[tuple[Any, Support]]:
        task: Task = self._task
        supports = []
        for prompt in task.prompts:
            tree = PrefixTree(
                prompt.prompt,
                task.actions,
                task.tool,
                [NextLogits(policy)],
                None,
                vocab_size=vocab_size(policy),
                max_nodes=100_000,
            )
            while not tree.exhausted:
                tree.expand(0.0)
            supports.append((prompt, tree.support()))
        return supports


def measure(case: Case, seed: int) -> Outcome:
    """One run until it is near enough, or has had its steps."""
    quiet()
    config = case.config(seed)
    distance = Distance(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = RedisServer.start(folder / "buffer", run="bench", config=config.buffer)
        try:
            run = LocalRun(
                config,
                directory=RunDirectory("bench", root=folder),
                buffer=BufferAddress(url=server.url, password=server.password),
                report=print,
            )
            # The policy as it is between two steps; adapters are written at the end only.
            policy = run._learner.model
            outcome = train(run.tick, lambda: distance.of(policy))
            run.stop(timeout_s=30.0)
            return outcome
        finally:
            server.stop(timeout_s=30.0)


def train(step: Callable[[], None], distance: Callable[[], float]) -> Outcome:
    seconds, tv = 0.0, math.inf
    for number in range(1, MAX_STEPS + 1):
        start_s = time.process_time()
        step()
        seconds += time.process_time() - start_s
        if number % MEASURED_EVERY == 0 and (tv := distance()) <= TARGET_TV:
            return Outcome(steps=number, seconds=round(seconds, 1), last_tv=round(tv, 4))
    return Outcome(steps=None, seconds=None, last_tv=round(tv, 4))


def quiet() -> None:
    """One thread, and nothing of what libraries have to say."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def row_of(case: Case, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        **asdict(case),
        "seeds": len(outcomes),
        "reached": sum(outcome.steps is not None for outcome in outcomes),
        "steps": spread([outcome.steps for outcome in outcomes]),
        "seconds": spread([outcome.seconds for outcome in outcomes]),
        "last_tv": spread([outcome.last_tv for outcome in outcomes]),
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Median, least and most; None, where the target was not reached, is more than any number."""
    ascending = sorted(math.inf if value is None else value for value in values)
    figures = {
        # Of an even number the upper of the two: no mean with infinity.
        "median": statistics.median_high(ascending),
        "least": ascending[0],
        "most": ascending[-1],
    }
    return {name: None if value == math.inf else value for name, value in figures.items()}


def told(figures: dict[str, float | None]) -> str:
    median, least, most = ("-" if value is None else f"{value:g}" for value in figures.values())
    return f"{median} ({least} .. {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each case")
    parser.add_argument("--only", default="", help='cases with this in their name: "raptb, mixed"')
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if arguments.only in str(case)]
    rows = []
    # Spawned: a fork of a process with threads of its own may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        futures = {
            case: [pool.submit(measure, case, seed) for seed in range(arguments.seeds)]
            for case in cases
        }
        for case, pending in futures.items():
            row = row_of(case, [future.result() for future in pending])
            rows.append(row)
            if not arguments.json:
                figures = {name: told(row[name]) for name in ("steps", "seconds", "last_tv")}
                line = [f"{case!s:<30}", f"reached={row['reached']}/{row['seeds']}"]
                line += [f"{name}={text}" for name, text in figures.items()]
                print("  ".join(line), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
