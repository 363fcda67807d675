"""Model compute replaced by waits: what `amortize throughput --simulate` puts in place of LMs.

Here is all that is simulated: the policy's decode steps, the frozen LM's scoring calls, and the
learner's forward and backward passes. Everything around them is what a run has: actors, Ray, the
reward replica's queue and layout, Redis, the weight store, the learner's draws and publications.
"""

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.protocols import RolloutEngine
from cluster.config.experiments import SimulationConfig
from cluster.config.schema import RunConfig
from cluster.distributed.parts import Parts, RolloutParts
from learner.config import LearnerConfig
from learner.engine import Engine
from lm.adapter import decode_adapter
from lm.config import LoRAConfig
from lm.hub import load_tokenizer
from lm.model import LanguageModel, freeze
from lm.new_model import fresh_llama
from lm.process_group import Rendezvous
from lm.sampling import Completion, Ended, Request
from lm.weight_files import fingerprint
from reward.packing import MicroBatch
from reward.request import ScoreLimits
from tasks.registry import build_task
from tasks.task import Task

# Shape of the model that the simulated adapter sits on; its rank makes up the size.
_WIDTH, _LAYERS, _MLP_WIDTH, _VOCABULARY = 256, 4, 704, 64
_BYTES_PER_RANK = 4 * _LAYERS * (4 * 2 * _WIDTH + 3 * (_WIDTH + _MLP_WIDTH))
_LOG_PROBABILITY = -1.0  # nats, of everything that a simulated model says


def load_simulated_task(config: RunConfig) -> Task:
    """The real task in the real tokens of the configured LM, whose weights are never read."""
    return build_task(config.task, load_tokenizer(config.lm), seed=config.seed)


class SimulatedPolicy(RolloutEngine):
    """Waits as long as decoding takes, and returns random legal completions of `max_len` tokens.

    One decode step a token, for all rows of the cache at once. The tool is never called.
    """

    def __init__(self, config: RunConfig, task: Task, seed: int) -> None:
        triggers = () if task.tool is None else task.tool.triggers
        legal = task.actions.columns(len(load_tokenizer(config.lm)))
        self._tokens = np.setdiff1d(legal, [task.actions.stop_token, *triggers]).astype(np.int32)
        self._actions = task.actions
        self._max_rows = config.actors.max_rows
        self._decode_step_s = config.throughput.simulation.decode_step_ms / 1e3
        self._rng = np.random.default_rng(seed)
        self._numbers = itertools.count()
        self._steps_left: dict[int, int] = {}  # of each request; the oldest ones have places
        self._step_ends_s = 0.0

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """See `RolloutEngine`."""
        numbers = [next(self._numbers) for _ in requests]
        self._steps_left |= dict.fromkeys(numbers, self._actions.max_len)
        return numbers

    def poll(self) -> list[Ended]:
        """One decode step."""
        now, step_s = time.monotonic(), self._decode_step_s
        late_s = now - self._step_ends_s  # waits that are too long do not add up
        self._step_ends_s = now + step_s - (late_s if late_s < step_s else 0.0)
        time.sleep(self._step_ends_s - now)
        rows = list(itertools.islice(self._steps_left, self._max_rows))
        for number in rows:
            self._steps_left[number] -= 1
        ended = [number for number in rows if self._steps_left[number] <= 0]
        for number in ended:
            del self._steps_left[number]
        return [(number, self._completion()) for number in ended]

    def load(self, adapter: bytes) -> None:
        """Read them, as every policy must; there is no model to change."""
        decode_adapter(adapter)

    def _completion(self) -> Completion:
        length = self._actions.max_len
        from_tool = np.zeros(length, dtype=np.bool_)
        tokens = self._rng.choice(self._tokens, length)
        stops = self._actions.stop_positions(tokens, from_tool)
        log_q_stop = np.full(len(stops), _LOG_PROBABILITY, dtype=np.float32)
        log_q_stop[-1] = 0.0  # forced
        return Completion(
            tokens=tokens,
            from_tool=from_tool,
            log_q_token=np.full(length, _LOG_PROBABILITY, dtype=np.float32),
            stops=stops,
            log_q_stop=log_q_stop,
        )


class SimulatedRank:
    """A rank of a reward replica that waits once for each scoring call."""

    def __init__(self, config: RunConfig) -> None:
        vocabulary = len(load_tokenizer(config.lm))
        self.limits = ScoreLimits(vocab_size=vocabulary, max_length=1 << 20)
        self._call_s = config.throughput.simulation.score_call_ms / 1e3

    def forward(self, share: Sequence[MicroBatch]) -> list[NDArray[np.float32]]:
        """Log-probabilities of all edges of each micro-batch: all the same."""
        time.sleep(self._call_s)
        return [
            np.full(sum(row.num_edges for row in batch.rows), _LOG_PROBABILITY, dtype=np.float32)
            for batch in share
        ]


class SimulatedEngine:
    """A real engine, its ranks and its collectives, but for the update, which is a wait."""

    def __init__(self, engine: Engine, *, update_s: float) -> None:
        self._update_s = update_s
        self.rank = engine.rank
        self.num_ranks = engine.num_ranks
        self.gather = engine.gather
        self.broadcast = engine.broadcast
        self.state = engine.state
        self.load_state = engine.load_state
        self.close = engine.close

    def update(self, losses: Sequence[Callable[[], Tensor]], *, learning_rate: float) -> float:
        """Wait; no loss is computed, and the gradient counts as zero."""
        time.sleep(self._update_s)
        return 0.0


class SimulatedParts(Parts):
    """Waits in place of models; the engine and its collectives are real."""

    gated = False  # log q is made up on both sides

    def rollout(self, config: RunConfig) -> RolloutParts:
        """A policy that waits; what it writes is random."""
        task = load_simulated_task(config)
        return RolloutParts(task, lambda seed: SimulatedPolicy(config, task, seed), decode=None)

    def reward_rank(self, config: RunConfig, meet: Callable[[], object]) -> SimulatedRank:
        """A rank that meets nobody."""
        return SimulatedRank(config)

    def learner_base(self, config: RunConfig) -> tuple[LanguageModel, Task]:
        """A small model for the adapter of `simulated_lora` to sit on; no pass is ever made."""
        model = fresh_llama(
            vocab_size=_VOCABULARY,
            width=_WIDTH,
            layers=_LAYERS,
            heads=4,
            mlp_width=_MLP_WIDTH,
            max_positions=64,
            end_token=0,
            seed=config.seed,
        )
        freeze(model)
        base = LanguageModel(
            model=model, tokenizer=load_tokenizer(config.lm), fingerprint=fingerprint(model)
        )
        return base, load_simulated_task(config)

    def engine(
        self,
        config: RunConfig,
        model: nn.Module,
        settings: LearnerConfig,
        meet: Callable[[], Rendezvous],
    ) -> SimulatedEngine:
        """The real one, whose updates wait."""
        engine = super().engine(config, model, settings, meet)
        return SimulatedEngine(engine, update_s=config.throughput.simulation.update_ms / 1e3)


def simulated_lora(config: SimulationConfig) -> LoRAConfig:
    """An adapter of about `adapter_mb` megabytes on the wire, in fp32."""
    return LoRAConfig(rank=max(1, round(config.adapter_mb * 1e6 / _BYTES_PER_RANK)), targets="auto")


def decode_steps(config: RunConfig) -> int:
    """Steps that a simulated policy waits for with a batch."""
    waves = -(-config.actors.batch_size // config.actors.max_rows)
    return waves * load_simulated_task(config).actions.max_len
