"""The verb `mstep`: one M-step of a run's policy, as a run of its own."""

import argparse

from cluster.commands.train import train_and_show
from cluster.config.file import load_config
from cluster.experiments.em import m_step
from cluster.run.directory import find_run


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune the LM of a run on rationales of its policy; exit status as of `train`."""
    policy = find_run(arguments.of)
    shared = load_config(str(policy.config_file), arguments.overrides)
    config = m_step(shared, policy=policy.adapter)
    return train_and_show(config, arguments, stem=f"{policy.name}-m")
