"""The learner: draws groups, takes optimizer steps, publishes adapters, keeps checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Protocol

import numpy as np
import torch
from torch import nn

from buffer.replay import DrawRequest, Group, Replay
from learner.agreement.gate import AgreementGate
from learner.batch import Batch, check_actions, collate, merge_prompts, plan_micro_batches
from learner.broadcast import decode_groups, encode_groups, share
from learner.checkpoint import Checkpoints, Snapshot
from learner.config import LearnerConfig
from learner.engine import Engine, NonFiniteUpdate
from learner.log_z import LogZ
from learner.loss import BatchLoss
from learner.objectives.base import Objective
from learner.objectives.potential import at_end, state_potentials
from learner.step_metrics import Tally, describe_cost, describe_groups, describe_quality
from lm.actions import ActionSpace
from lm.adapter import adapter_bytes, checksum
from lm.model import recompute_activations


class WeightSink(Protocol):
    """Where adapters go."""

    def publish(self, data: bytes, *, version: int, checksum: str) -> None:
        """Hand an adapter to the actors."""


class Companion(Protocol):
    """The rest of a run that goes back together with the learner."""

    def save(self) -> bytes:
        """All that it needs to go on from this moment."""

    def restore(self, data: bytes) -> None:
        """Go back to the moment of `save`."""


class StoppedWaiting(RuntimeError):
    """The learner was asked to stop while it waited for groups."""


# A part of this rank's work, and the factor its total enters the loss with.
_MicroBatch = tuple[Batch, float]


@dataclass(kw_only=True, eq=False)
class Learner:
    """One rank of the learner. With several, all ranks make the same calls in the same order.

    Rank 0 alone draws, publishes and writes checkpoints; the other ranks' `replay`, `weights` and
    `checkpoints` are never touched.

    A version names one set of weights for ever. It grows by one with every step; a learner that
    went back to a checkpoint, or to the start, goes on from the highest version that was ever
    published, because actors and buffer hold trajectories of those that are lost.
    """

    model: nn.Module  # base and adapter; only the adapter is trained, by `engine`
    actions: ActionSpace
    replay: Replay
    engine: Engine
    objective: Objective
    config: LearnerConfig
    weights: WeightSink
    rng: np.random.Generator  # chooses what is replayed
    checkpoints: Checkpoints | None = None  # None keeps none
    log_z: LogZ | None = None  # the head inside `model` that learns log Z; None: from the group
    gate: AgreementGate | None = None  # the one in front of `replay`; is told what is published
    # The whole rest of the run, where that is restored with the learner. A version that was lost
    # is then used again, since nothing holds trajectories of it any more.
    companion: Companion | None = None
    version: int = 0  # of the weights in `model`; actors begin with 0, those of the base
    completed_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._loss = BatchLoss(
            model=self.model,
            actions=self.actions,
            objective=self.objective,
            log_z=self.log_z,
            token_budget=self.config.token_budget,
        )
        self._device = next(self.model.parameters()).device
        if self.config.recomputes(sum(parameter.numel() for parameter in self.model.parameters())):
            recompute_activations(self.model)
        self._checkpoint_steps = 0
        self._checkpoint_s = monotonic()

    def run(
        self,
        steps: int,
        stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    ) -> None:
        """Publish, then step until `steps` are completed or `stop()` holds on rank 0.

        Ends with a checkpoint; an error ends it without one.
        """
        self.publish()
        while self._rank_zero_decides(lambda: self.completed_steps < steps and not stop()):
            try:
                on_step(self.step(stop))
            except StoppedWaiting:
                break
            self.checkpoint_when_due()
        self.checkpoint()

    def step(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Take one optimizer step and return its metrics; waits for its groups.

        Raises:
            StoppedWaiting: `stop()` held on rank 0 while it waited.
            BufferStarved: on rank 0; RankZeroFailed on the others.
            NonFiniteUpdate: the gradient is not finite. Weights may be damaged: restore.
        """
        start_s = monotonic()
        groups = merge_prompts(self._draw(stop))
        check_actions(groups, self.actions)
        drawn_s = monotonic()
        temperature = self.config.reward_temperature.at(self.completed_steps)
        rate = self.config.learning_rate_at(self.completed_steps)
        parts = self._split(groups)
        if self.log_z is not None and self.completed_steps == 0:
            self._start_log_z(self.log_z, parts, temperature)
        tally = Tally(groups, self.version)
        losses = [
            loss
            for batch, factor in parts
            for loss in self._loss.losses(batch, factor, temperature, tally)
        ]
        try:
            norm = self.engine.update(losses, learning_rate=rate)
        except NonFiniteUpdate as error:
            raise NonFiniteUpdate(f"version {self.version}, loss {tally.loss}: {error}") from error
        metrics = describe_groups(groups, self.version) | describe_quality(groups, temperature)
        metrics |= describe_cost(groups, against_base=self.objective.traits.needs_base)
        metrics |= tally.gathered(self.engine)
        if self.gate is not None:
            self.gate.hear(groups, tally.gaps, self.version)
            metrics |= self.gate.metrics()
        self.version += 1
        self.completed_steps += 1
        computed_s = monotonic()
        if self.completed_steps % self.config.publish_every_steps == 0:
            self.publish()
        return metrics | {
            "progress/step": float(self.completed_steps),
            "policy/version": float(self.version),
            "optim/grad_norm": norm,
            "optim/learning_rate": rate,
            "optim/reward_temperature": temperature,
            "time/draw_s": drawn_s - start_s,
            "time/compute_s": computed_s - drawn_s,
            "time/publish_s": monotonic() - computed_s,
        }

    def publish(self) -> None:
        if self.engine.rank == 0:
            data = adapter_bytes(self.model, getattr(torch, self.config.publish_dtype))
            if self.checkpoints is not None:
                self.checkpoints.note_published(self.version)
            if self.gate is not None:
                self.gate.keep(self.version, data)
            self.weights.publish(data, version=self.version, checksum=checksum(data))

    def checkpoint_when_due(self) -> None:
        """Checkpoint once there were enough steps or seconds since the last."""
        steps = self.completed_steps - self._checkpoint_steps
        seconds = monotonic() - self._checkpoint_s
        if self._rank_zero_decides(
            lambda: (
                steps >= self.config.checkpoint_every_steps
                or seconds >= self.config.checkpoint_every_s
            )
        ):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save everything that `restore` needs."""
        tensors = self.engine.state() | {"random/torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        facts = {
            "numpy_generator": self.rng.bit_generator.state,
            "completed_steps": self.completed_steps,
        }
        if self.checkpoints is not None and self.engine.rank == 0:
            companion = None if self.companion is None else self.companion.save()
            self.checkpoints.save(Snapshot(self.version, tensors, facts), companion)
        self._checkpoint_steps, self._checkpoint_s = self.completed_steps, monotonic()

    def take_up(self) -> None:
        """Go on from the newest checkpoint; without one begin anew, under versions of its own.

        Raises what Checkpoints.read raises.
        """
        store = self.checkpoints
        if self._rank_zero_decides(lambda: store is not None and store.latest() is not None):
            self.restore()
        elif self.companion is None:
            self.version = max(self.version, self._last_published() + 1)

    def restore(self) -> None:
        """Go on from the newest checkpoint; raises what Checkpoints.read raises."""

        def read() -> bytes:
            if self.checkpoints is None:
                raise FileNotFoundError("this learner keeps no checkpoints to restore from")
            return self.checkpoints.read()

        snapshot = Snapshot.decode(share(self.engine, read))
        tensors = snapshot.tensors
        torch.set_rng_state(tensors.pop("random/torch"))
        cuda_state = tensors.pop("random/cuda", None)
        if cuda_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)
        self.engine.load_state(tensors)
        self.rng.bit_generator.state = snapshot.facts["numpy_generator"]
        self.completed_steps = self._checkpoint_steps = snapshot.facts["completed_steps"]
        self.version = snapshot.version
        rest = self.checkpoints.read_companion() if self.checkpoints and self.companion else None
        if self.companion is not None and rest is not None:
            self.companion.restore(rest)
        elif (published := self._last_published()) > snapshot.version:
            self.version = published + 1

    def _draw(self, stop: Callable[[], bool]) -> list[Group]:
        request = DrawRequest(
            num_groups=self.config.groups_per_step,
            num_replayed=self.config.replayed_per_group,
            version=self.version,
            rng=self.rng,
            timeout_s=self.config.starvation_timeout_s,
            stop=stop,
        )
        if self.engine.num_ranks == 1:
            groups = self.replay.draw(request)
        else:
            groups = decode_groups(
                share(self.engine, lambda: encode_groups(self.replay.draw(request)))
            )
        if not groups:
            raise StoppedWaiting("the learner was stopped while it waited for groups")
        return groups

    def _split(self, groups: Sequence[Group]) -> list[_MicroBatch]:
        """This rank's micro-batches. Every rank knows the whole batch, hence its normaliser.

        Ranks take equally many backward passes: a trajectory of factor 0 fills in for missing ones.
        """
        num_ranks, rank, budget = self.engine.num_ranks, self.engine.rank, self.config.token_budget
        parts = plan_micro_batches(groups, token_budget=budget, num_ranks=num_ranks)
        batches = [collate(part, self._device) for part in parts]
        weight = sum(self.objective.weight(batch.stop_BS).item() for batch in batches)
        factor = 1 / weight if weight > 0 else 1.0
        passes = [
            sum(self._loss.num_passes(batch) for batch in batches[other::num_ranks])
            for other in range(num_ranks)
        ]
        first = replace(groups[0], fresh=batches[0].trajectories[:1], replayed=())
        filler = (collate([first], self._device), 0.0)
        mine = [(batch, factor) for batch in batches[rank::num_ranks]]
        return mine + [filler] * (max(passes) - passes[rank])

    @torch.no_grad()
    def _start_log_z(self, head: LogZ, parts: Sequence[_MicroBatch], temperature: float) -> None:
        """Let a new head begin at what the groups of the first batch estimate on average."""
        total, rows = 0.0, 0.0
        for batch, factor in parts:
            if factor > 0:
                inputs = self._loss.inputs(batch, temperature)
                phi_B = at_end(state_potentials(inputs), inputs.stop_BS)
                total -= phi_B.sum().item()
                rows += len(phi_B)
        sums = self.engine.gather([total, rows])
        head.start(self.engine, sum(s[0] for s in sums) / sum(s[1] for s in sums))

    def _rank_zero_decides(self, decide: Callable[[], bool]) -> bool:
        """Clocks and stop requests differ between ranks; one of them has the say."""
        if self.engine.num_ranks == 1:
            return decide()
        return share(self.engine, lambda: bytes([decide()])) == b"\x01"

    def _last_published(self) -> int:
        """The highest version that anybody may have seen, -1 before the first; rank 0 knows."""

        store = self.checkpoints
        return int(share(self.engine, lambda: b"%d" % (store.last_published() if store else -1)))
