"""The verb `mstep`: one M-step of a run's policy, as a run of its own."""

import argparse

from cluster.commands.train import train
from cluster.config.file import load_config
from cluster.experiments.em import m_step
from cluster.reports.run_report import show_conclusion
from cluster.run.directory import RunDirectory, find_run, new_name


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune the LM of a run on rationales of its policy; exit status as of `train`."""
    policy = find_run(arguments.of)
    config = m_step(
        load_config(str(policy.config_file), arguments.overrides), policy=policy.adapter
    )
    directory = RunDirectory(arguments.run or new_name(f"{policy.name}-m"))
    scores = train(
        config,
        directory,
        resume=arguments.resume,
        address=arguments.address,
        local=arguments.local,
    )
    show_conclusion(directory, scores)
    return 0
