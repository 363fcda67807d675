"""The verb `export`: what a run has learned, as a folder that transformers, peft and vLLM load."""

import argparse
from pathlib import Path

from cluster.config.file import load_config
from cluster.reports.model_card import model_card
from cluster.run.directory import find_run, read_scores
from cluster.run.imitation import learns_texts
from cluster.run.preflight import check_adapter
from lm.export import DTYPES, check_push, check_target, export_policy, push
from lm.hub import load_tokenizer
from tasks.registry import build_task


def run(arguments: argparse.Namespace) -> int:
    """Write the folder, push it where that is asked for, and say where it is."""
    run, folder = find_run(arguments.run), Path(arguments.to).absolute()
    check_adapter(run.adapter)
    check_target(folder)
    if arguments.push:
        check_push(arguments.push)
    config = load_config(str(run.config_file))
    task = build_task(config.task, load_tokenizer(config.lm), seed=config.seed)
    texts, state = learns_texts(config, task), run.state()
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    card = model_card(
        run.name,
        config,
        read_scores(run),
        task,
        folder=arguments.push or str(folder),
        steps=None if state is None else state.step,
        merged=arguments.merge,
        dtype=dtype or (config.lm.dtype if arguments.merge else "float32"),
        texts=texts,
    )
    export_policy(
        config.lm,
        run.adapter,
        folder,
        actions=None if texts else task.actions,
        merge=arguments.merge,
        dtype=dtype,
        card=card,
    )
    print(f"{'model' if arguments.merge else 'adapter'}: {folder}")
    if arguments.push:
        print(f"pushed: {push(folder, arguments.push)}")
    return 0
