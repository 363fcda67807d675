"""Share of the learner's CPU time that the agreement gate takes from honest actors, by cause.

Real parts in one process, without Ray: `actors` actors sample, each with the weights of `age`
versions ago (0-4: each batch of another age), and the learner takes a step. Counted is the CPU time
of the learner's own thread, on one thread, so that every share is of one and the same run:

    first        all is compared, in the first draws
    due          comparisons that the schedule asks for
    alarm        comparisons of actors that were heard to differ more than before
    hearing      what the learner's own pass says of its samplers
    admission    the rest: what to compare, and what became of it

`steady` is the share behind the first draws, `whole` that of a run of 300 steps.

    python bench/agreement.py [--json] [--model FOLDER] [--steps N] [--ages AGE ...]

FOLDER holds a causal LM in Hugging Face format, in place of the seed LM.
"""

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from actors.actor import RolloutActor
from actors.weight_sources import PublishedWeights
from buffer.memory import MemoryStore
from buffer.trajectory import Trajectory
from cluster.config.file import load_config
from cluster.config.schema import RunConfig
from cluster.run import assembly
from cluster.run.directory import RunDirectory
from cluster.run.local import twin
from cluster.run.session import BufferAddress
from learner.agreement.gate import AgreementGate
from learner.engine import TorchEngine
from learner.learner import Learner
from learner.step_metrics import Tally
from reward.lockstep import UnshardedRank
from reward.replica import RewardReplica

TASK = "tasks/arithmetic.toml"
WHOLE = 300  # steps
# As tasks/real/arithmetic.toml has it.
PRETRAINED = (
    "task.max_len=56",
    "learner.groups_per_step=4",
    "learner.learning_rate=5e-4",
    "learner.token_budget=1024",
    "learner.checkpointing=false",
)
CAUSES = ("first", "due", "alarm", "hearing", "admission")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`age` versions from an actor's weights to the learner's; None: from 0 to 4, by chance."""

    age: int | None
    actors: int = 4
    model: str = ""  # "": the seed LM
    steps: int = WHOLE


class Spending:
    """CPU seconds of this thread, each second counted once: for the innermost that is open."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[Mapping[str, float]] = []
        self._since_s = 0.0

    @contextmanager
    def on(self, shares: Mapping[str, float]) -> Iterator[None]:
        """What is spent inside goes to these, in these parts."""
        self._book()
        self._open.append(shares)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def taken(self) -> dict[str, float]:
        """What was spent since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def _book(self) -> None:
        now_s = time.thread_time()
        for name, share in (self._open[-1] if self._open else {}).items():
            self.seconds[name] += share * (now_s - self._since_s)
        self._since_s = now_s


class Archive:
    """What the learner has published: its sink, and the source of actors that are `age` late."""

    def __init__(self) -> None:
        self.age = 0
        self._kept: deque[PublishedWeights] = deque(maxlen=32)

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        self._kept.append(PublishedWeights(version, data, checksum))

    def newer_than(self, version: int) -> PublishedWeights:
        """Whatever the actor has: several that sample in turns share one engine."""
        return self._kept[max(len(self._kept) - 1 - self.age, 0)]


def config_of(case: Case) -> RunConfig:
    per_actor = max(1, (4 if case.model else 8) // case.actors)
    changes = [f"actors.groups_per_batch={per_actor}", f"learner.steps={WHOLE}"]
    if case.model:
        changes += [f"lm.model={case.model}", *PRETRAINED]
    return load_config(TASK, changes)


@contextmanager
def cast(config: RunConfig) -> Iterator[tuple[Learner, RolloutActor, Archive]]:
    """A learner, and an actor that takes the parts of all of them, one after the other."""
    base, task = assembly.load_task(config)
    buffer = assembly.build_buffer(config, run="bench", place=BufferAddress(memory=MemoryStore()))
    archive = Archive()
    scorer = RewardReplica(UnshardedRank(twin(base).model), [], config.reward, name="reward-0")
    with tempfile.TemporaryDirectory() as folder:
        learner = assembly.build_learner(
            config,
            base=twin(base),
            task=task,
            directory=RunDirectory("bench", root=Path(folder)),
            make_engine=TorchEngine,
            buffer=buffer,
            weights=archive,
            warn=print,
        )
        actor = assembly.build_actor(
            config,
            policy=assembly.model_policy(config, twin(base, own_weights=True), task),
            task=task,
            name="actor-0",
            seed=(config.seed, 0),
            buffer=buffer,
            scorer=scorer,
            weights=archive,
        )
        learner.publish()
        yield learner, actor, archive
        scorer.close(5.0)


def causes(gate: AgreementGate, trajectories: list[Trajectory]) -> dict[str, float]:
    """Why these are compared, as shares."""
    if gate.tolerance.calibrating:
        return {"first": 1.0}
    why = Counter("alarm" if gate.schedule.alarmed(t.actor) else "due" for t in trajectories)
    return {name: number / len(trajectories) for name, number in why.items()}


@contextmanager
def watched(gate: AgreementGate, spending: Spending) -> Iterator[Counter[str]]:
    """Books what the gate spends; yields how many trajectories were compared, by cause."""
    compared: Counter[str] = Counter()

    def booked(method: Callable[..., Any], cause: str) -> Callable[..., Any]:
        def inner(*arguments: Any) -> Any:
            with spending.on({cause: 1.0}):
                return method(*arguments)

        return inner

    compare = gate._compare

    def comparing(trajectories: list[Trajectory], version: int) -> Any:
        shares = causes(gate, trajectories)
        compared.update({name: round(s * len(trajectories)) for name, s in shares.items()})
        with spending.on(shares):
            return compare(trajectories, version)

    tally_compare = Tally._compare
    with (
        mock.patch.object(gate, "_admit", booked(gate._admit, "admission")),
        mock.patch.object(gate, "keep", booked(gate.keep, "admission")),
        mock.patch.object(gate, "hear", booked(gate.hear, "hearing")),
        mock.patch.object(gate, "_compare", comparing),
        mock.patch.object(Tally, "_compare", booked(tally_compare, "hearing")),
    ):
        yield compared


def measure(case: Case) -> dict[str, object]:
    """One run, as a row."""
    rng = np.random.default_rng(0)
    spending, steps = Spending(), []
    with cast(config_of(case)) as (learner, actor, archive):
        assert learner.gate is not None
        with watched(learner.gate, spending) as compared:
            wrong = 0.0
            for _ in range(case.steps):
                for number in range(case.actors):
                    actor.name = f"actor-{number}"
                    archive.age = int(rng.integers(5)) if case.age is None else case.age
                    actor.step()
                    actor.flush()
                first = learner.gate.tolerance.calibrating
                with spending.on({"learning": 1.0}):
                    wrong += learner.step()["agreement/quarantined"]
                    learner.publish()
                steps.append((first, spending.taken()))
    return row_of(case, steps) | {"compared": dict(compared), "quarantined": wrong}


def row_of(case: Case, steps: list[tuple[bool, dict[str, float]]]) -> dict[str, object]:
    """Shares in per cent, of a run that goes on as it did behind its first draws."""
    names = ("learning", *CAUSES)
    first, steady = (
        {name: sum(s.get(name, 0.0) for is_first, s in steps if is_first == of) for name in names}
        for of in (True, False)
    )
    number = sum(is_first for is_first, _ in steps)
    times = (WHOLE - number) / max(len(steps) - number, 1)
    whole = {name: first[name] + times * steady[name] for name in names}
    of_whole = {name: round(100 * whole[name] / sum(whole.values()), 2) for name in CAUSES}
    of_steady = 100 * sum(steady[n] for n in CAUSES) / max(sum(steady.values()), 1e-9)
    return {
        "model": Path(case.model).name or "seed LM",
        "actors": case.actors,
        "age": "0-4" if case.age is None else str(case.age),
        "steps": case.steps,
        "step_ms": round(1e3 * sum(whole.values()) / WHOLE),
        "steady": round(of_steady, 2),
        "whole": round(sum(of_whole.values()), 2),
        **of_whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", default="", metavar="FOLDER", help="a pretrained LM")
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--steps", type=int, default=WHOLE)
    parser.add_argument("--ages", nargs="+", default=["0", "4", "0-4"], help="versions, or 0-4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for age in arguments.ages:
        case = Case(
            age=None if age == "0-4" else int(age),
            actors=arguments.actors,
            model=arguments.model,
            steps=arguments.steps,
        )
        rows.append(measure(case))
        if not arguments.json:
            print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
