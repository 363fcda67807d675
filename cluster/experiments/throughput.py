"""The verb `throughput`: how a run's rate grows with its rollout actors, and what holds it back."""

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.config.file import load_config
from cluster.experiments.throughput_experiment import Experiment
from cluster.experiments.throughput_records import as_object
from cluster.experiments.throughput_report import draw_throughput, show
from cluster.run.directory import RUNS


def run(arguments: argparse.Namespace) -> int:
    """Measure, draw, print; what happens meanwhile goes to standard error."""
    config = load_config(arguments.config, arguments.overrides)
    progress = Console(stderr=True)
    rows, comparison = Experiment(
        config,
        actors=arguments.actors,
        replicas=arguments.reward_replicas,
        simulated=arguments.simulate,
        address=config.cluster.ray_address(),
        report=lambda text: progress.print(Text(text), soft_wrap=True),
    ).run()
    plot = Path(arguments.output or RUNS / f"throughput-{config.task_name}.png").absolute()
    plot.parent.mkdir(parents=True, exist_ok=True)
    draw_throughput(rows, plot)
    if not arguments.json:
        console = Console()
        show(config, rows, comparison, simulated=arguments.simulate, console=console)
        console.print(f"plot: {plot}", soft_wrap=True, markup=False)
        return 0
    found = {
        "task": config.task_name,
        "simulated": config.throughput.simulation.model_dump() if arguments.simulate else None,
        "rows": [as_object(row) for row in rows],
        "async_over_sync": comparison.async_over_sync,
        "comparison": {
            "steps": comparison.steps,
            "trajectories": comparison.trajectories,
            "synchronous_s": comparison.synchronous_s,
            "asynchronous_s": comparison.asynchronous_s,
        },
        "load_average": os.getloadavg(),
        "plot": str(plot),
    }
    print(json.dumps(found))
    return 0
