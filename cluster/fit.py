"""Whether a run fits on the CPUs and GPUs there are."""

from collections.abc import Mapping

from cluster.config import RunConfig

_ROUNDING = 1e-9


class DoesNotFit(ValueError):
    """There are not the CPUs or GPUs that the configuration asks for."""


def check_fit(config: RunConfig, have: Mapping[str, float]) -> None:
    """Raise DoesNotFit, naming what is missing, unless the whole run can stand at once.

    Ray would wait for ever for a place that does not exist.

    Args:
        have: units that Ray may give away, by "CPU" and "GPU".
    """
    cluster = config.cluster
    demands = [
        (config.rollout_actors, cluster.actor_placement, "rollout actors"),
        (config.reward_replicas * config.reward.ranks, cluster.reward_placement, "reward ranks"),
        (config.learner.ranks, cluster.learner_placement, "learner ranks"),
        (1, cluster.actor_placement, "evaluator"),
    ]
    for resource, attribute in (("CPU", "cpus"), ("GPU", "gpus")):
        wanted = sum(count * getattr(place, attribute) for count, place, _ in demands)
        offered = have.get(resource, 0.0)
        if wanted > offered + _ROUNDING:
            parts = ", ".join(
                f"{count} {what} x {getattr(place, attribute):g}" for count, place, what in demands
            )
            raise DoesNotFit(
                f"the run needs {wanted:g} {resource} ({parts}), but there are {offered:g}: lower "
                f"cluster.actors, reward.replicas, reward.ranks, learner.ranks or the "
                f"cluster.*_placement.{attribute} shares, or add nodes"
            )
