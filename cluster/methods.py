"""The methods of a comparison: what each changes in a run's configuration, and nothing else."""

from collections.abc import Sequence

from cluster.config import RunConfig
from cluster.config_file import load_config

BASE = "base"
METHODS = (BASE, "sft", "ppo", "gflownet")
_NOT_GFLOWNET = ("ppo", "sft")


def method_config(path: str, overrides: Sequence[str], *, method: str, seed: int) -> RunConfig:
    """The run of one method and seed; raises ConfigError.

    Equal for all: LM, adapter, prompts, legal tokens, tool, optimizer steps, and trajectories of
    each step but where a prompt has too few to replay. LM tokens are counted, not made equal. The
    time limit is off, because steps that it cut would not be equal.

        base      the LM as it is, behind `compare.shots` worked questions; no step is taken
        sft       maximum likelihood of the task's demonstrations
        ppo       reward maximisation with a KL penalty; the policy's own samples, none replayed
        gflownet  the file's objective, subtb where that is one of the two above
    """
    shared = load_config(path, overrides)
    steps = shared.compare.steps or shared.learner.steps
    rows = shared.actors.group_size + shared.learner.replayed_per_group
    balance = [] if shared.learner.objective not in _NOT_GFLOWNET else ["learner.objective=subtb"]
    own = {
        BASE: [f"evaluation.shots={shared.compare.shots}"],
        "sft": ["learner.objective=sft"],
        "ppo": [
            "learner.objective=ppo",
            "learner.replayed_per_group=0",
            f"actors.group_size={rows}",
            "actors.on_policy_share=1.0",
        ],
        "gflownet": balance,
    }
    equal = [f"seed={seed}", f"learner.steps={steps}"]
    tuned = shared.compare.overrides.get(method, ())
    config = load_config(path, [*overrides, *equal, *own[method], *tuned])
    return config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"time_limit_s": None})}
    )
