"""Real DeepSpeed ranks on gloo: processes that a test starts, and what they leave in its folder."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from unittest.mock import patch

import torch

from buffer.endpoint import free_port
from lm.process_group import Rendezvous

# DeepSpeed chooses its accelerator at import.
CPU = {"DS_ACCELERATOR": "cpu"}
# What every rank imports takes seconds: once, in the process that ranks are forked from.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["learner.deepspeed_engine", "tests.gate_toy"])


def run_ranks(
    work: Callable[..., None], num_ranks: int, folder: Path, timeout_s: float, *arguments: Any
) -> None:
    """Run `work(place, folder, *arguments)` in each rank; fails with the errors of all.

    Args:
        timeout_s: of the rendezvous `place`.
    """
    ranks = [
        CONTEXT.Process(
            target=_rank_main, args=(work, rank, num_ranks, folder, timeout_s, *arguments)
        )
        for rank in range(num_ranks)
    ]
    with patch.dict(os.environ, CPU):
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(100)
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not errors, "\n".join(errors)


def _rank_main(
    work: Callable[..., None],
    rank: int,
    num_ranks: int,
    folder: Path,
    timeout_s: float,
    *arguments: Any,
) -> None:
    os.environ |= CPU
    torch.set_num_threads(1)
    try:
        # The deadline is for ranks that are up, not for the imports of a busy machine.
        port = _meet(folder, rank, num_ranks)
        place = Rendezvous(
            address="127.0.0.1", port=port, rank=rank, num_ranks=num_ranks, timeout_s=timeout_s
        )
        work(place, folder, *arguments)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    os._exit(0)


def _meet(folder: Path, rank: int, num_ranks: int) -> int:
    """Wait until all ranks are up; a port that was free then, for rank 0 to listen on."""
    (folder / f"up-{rank}").touch()
    wait_for(lambda: len(list(folder.glob("up-*"))) == num_ranks)
    chosen = folder / "port"
    if rank == 0:
        # Chosen now, and not before the imports: another test may take it while nobody listens.
        (folder / "choice").write_text(str(free_port("127.0.0.1")))
        (folder / "choice").rename(chosen)
    wait_for(chosen.exists)
    return int(chosen.read_text())


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that another rank does."""
    deadline_s = monotonic() + 60
    while not condition():
        assert monotonic() < deadline_s, "the other rank did not come"
        sleep(0.02)
