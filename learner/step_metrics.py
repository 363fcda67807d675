"""Numbers of one step, added up over micro-batches and ranks."""

from collections.abc import Sequence

from buffer.replay import Group
from learner.agreement.comparison import log_q_gaps
from learner.batch import Batch
from learner.engine import Engine
from learner.objectives.base import ObjectiveInput, ObjectiveValue


class Tally:
    """What only the forward passes know: the loss, and the agreement with the samplers.

    Agreement is over the trajectories that were sampled by exactly the version that is being
    updated: theirs comes free. The gate sees to the others.
    """

    def __init__(self, version: int) -> None:
        self._version = version
        self.loss = 0.0  # of this rank
        self._row_sums: dict[str, float] = {}
        self._rows = 0
        self._gap_sum = 0.0
        self._gap_count = 0
        self._gap_max = 0.0

    def add(
        self, batch: Batch, inputs: ObjectiveInput, value: ObjectiveValue, *, factor: float
    ) -> None:
        """Count one micro-batch; `factor` is that of its total in the loss, 0 to skip it."""
        counted = float(factor > 0)
        self.loss += factor * value.total.item()
        self._rows += int(counted * len(batch.trajectories))
        for name, total in value.row_sums.items():
            self._row_sums[name] = self._row_sums.get(name, 0.0) + counted * total.item()
        if counted:
            self._compare(batch, inputs)

    def gathered(self, engine: Engine) -> dict[str, float]:
        """Metrics over all ranks."""
        names = sorted(self._row_sums)
        sums = [self.loss, self._rows, self._gap_sum, self._gap_count]
        sums += [self._row_sums[name] for name in names]
        everyones = engine.gather([self._gap_max, *sums])
        gap_max = max(values[0] for values in everyones)
        loss, rows, gap_sum, gap_count, *row_sums = (
            sum(values[place] for values in everyones) for place in range(1, len(sums) + 1)
        )
        metrics = {"loss/value": loss}
        metrics |= {f"loss/{n}": total / rows for n, total in zip(names, row_sums, strict=True)}
        if gap_count:
            metrics["agreement/max_nats"] = gap_max
            metrics["agreement/mean_nats"] = gap_sum / gap_count
        return metrics

    def _compare(self, batch: Batch, inputs: ObjectiveInput) -> None:
        rows = [
            row
            for row, trajectory in enumerate(batch.trajectories)
            if trajectory.policy_version == self._version
            and trajectory.behaviour != "demonstration"
        ]
        if not rows:
            return
        gap_BN, counted_BN = log_q_gaps(batch, inputs.log_pf_BT, inputs.log_stop_BS)
        gap_K = gap_BN[rows][counted_BN[rows]]
        self._gap_sum += gap_K.sum().item()
        self._gap_count += gap_K.numel()
        self._gap_max = max(self._gap_max, gap_K.max().item())


def describe_groups(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Metrics of a drawn batch, known without the model. Rewards and ages are of what actors have
    sampled freshly."""
    fresh = [trajectory for group in groups for trajectory in group.fresh]
    num_replayed = sum(len(group.replayed) for group in groups)
    metrics = {
        "batch/trajectories": float(len(fresh) + num_replayed),
        "batch/replayed": float(num_replayed),
    }
    sampled = [t for t in fresh if t.behaviour != "demonstration"]
    if sampled:
        ages = [version - trajectory.policy_version for trajectory in sampled]
        metrics |= {
            "reward/log_mean_nats": sum(float(t.log_reward[-1]) for t in sampled) / len(sampled),
            "policy/age_mean_versions": sum(ages) / len(ages),
            "policy/age_max_versions": float(max(ages)),
        }
    verdicts = [t.correct for t in fresh if t.behaviour == "on_policy" and t.correct is not None]
    if verdicts:
        metrics["reward/correct_fraction"] = sum(verdicts) / len(verdicts)
    return metrics
