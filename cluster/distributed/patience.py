"""How long parts of a run over Ray wait for one another: each may have to come up first."""

from cluster.config.schema import RunConfig


def with_patience(config: RunConfig) -> RunConfig:
    """The same run of parts that wait for one another to be placed and started, once.

    Each of the two may take `start_timeout_s`. A part that comes at a later try only is waited for
    by the supervisor; who needs it meanwhile ends in an error that says so, and is replaced.
    """
    away_s = 2 * config.cluster.start_timeout_s
    actors, learner = config.actors, config.learner
    actors_wait = {
        "score_timeout_s": actors.score_timeout_s + away_s,
        "pace_timeout_s": actors.pace_timeout_s + away_s,
    }
    learner_waits = {
        "starvation_timeout_s": learner.starvation_timeout_s + away_s,
        "collective_timeout_s": learner.collective_timeout_s + away_s,
    }
    return config.model_copy(
        update={
            "actors": actors.model_copy(update=actors_wait),
            "learner": learner.model_copy(update=learner_waits),
        }
    )
