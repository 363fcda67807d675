"""The ranks that share one model, as torch's process group: how they meet, and how one is missed.

The group is the process's default one, so a process is one rank of one model.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from time import monotonic, sleep

import psutil
import torch
import torch.distributed as dist

_LOOK_S = 0.1
_SIGN_EVERY_S = 1.0
_SIGN_BYTES = 2**20  # more than watching over itself moves between two signs


class RankLost(ConnectionError):
    """Another rank did not take its part in time, or is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one model meet. Rank 0 listens on the address."""

    address: str
    port: int
    rank: int
    num_ranks: int
    timeout_s: float  # of the meeting, and of every later wait for another rank


def bytes_moved() -> int:
    """Bytes that this process holds, has read and has written: they rise while it loads."""
    process = psutil.Process()
    read = process.io_counters() if hasattr(process, "io_counters") else None  # not on macOS
    moved = read.read_chars + read.write_chars if read else 0
    return int(process.memory_info().rss + moved)


class Gathering:
    """The ranks of one model while they load: each sees how far the others have come.

    Each tells in a store, which rank 0 keeps, in which phase it is and what it has moved by then.
    Who waits for others does so for `timeout_s` from the last rise of any of theirs: one may wait
    until another has fetched what both need.
    """

    def __init__(self, rendezvous: Rendezvous, *, part: str) -> None:
        """Raises RankLost where rank 0 does not listen."""
        self._place, self._part = rendezvous, part
        self._phase = "rendezvous"
        with waiting_for_ranks(rendezvous, part=part, phase=self._phase):
            self.store = dist.TCPStore(
                rendezvous.address,
                rendezvous.port,
                rendezvous.num_ranks,
                is_master=rendezvous.rank == 0,
                timeout=timedelta(seconds=rendezvous.timeout_s),
                wait_for_workers=False,
            )

    @contextmanager
    def phase(self, name: str, moved: Callable[[], int] = bytes_moved) -> Iterator[None]:
        """Do what is inside; then wait until all have, else RankLost, which names who has not."""
        self._phase, ended = name, Event()
        Thread(target=self._tell, args=(name, moved, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
        try:
            self._wait_for_all(name)
        except dist.DistError as error:
            raise self._lost(f"rank 0, which keeps their store, is gone: {error}") from error

    def _tell(self, phase: str, moved: Callable[[], int], ended: Event) -> None:
        every_s = min(_SIGN_EVERY_S, self._place.timeout_s / 10)
        while not ended.wait(every_s):
            try:
                self.store.set(f"sign/{self._place.rank}", f"{phase}, {moved() // _SIGN_BYTES} MB")
            except dist.DistError:
                return  # the wait that follows finds it out

    def _wait_for_all(self, phase: str) -> None:
        self.store.set(f"{phase}/{self._place.rank}", "done")
        signs: dict[int, str] = {}  # the last of each
        moved_s = monotonic()  # when the last of them came
        while absent := [n for n in range(self._place.num_ranks) if not self._has(f"{phase}/{n}")]:
            for rank in absent:
                key = f"sign/{rank}"
                sign = self.store.get(key).decode() if self._has(key) else "no sign yet"
                if signs.get(rank) != sign:
                    signs[rank], moved_s = sign, monotonic()
            if monotonic() - moved_s > self._place.timeout_s:
                stuck = (f"rank {rank} has come no further than: {signs[rank]}" for rank in absent)
                raise self._lost("; ".join(stuck))
            sleep(_LOOK_S)

    def _has(self, key: str) -> bool:
        found: bool = self.store.check([key])
        return found

    def _lost(self, cause: str) -> RankLost:
        where = self._place
        return RankLost(
            f"{self._part} rank {where.rank} of {where.num_ranks} at {where.address}:{where.port} "
            f"waited in vain in {self._phase} (deadline {where.timeout_s} s): {cause}"
        )


def join_ranks(
    rendezvous: Rendezvous, device: torch.device, store: dist.Store | None = None
) -> None:
    """Meet the other ranks, over NCCL on CUDA and gloo on CPU, in a process that DeepSpeed joins.

    Call it, and everything that waits for other ranks, inside `waiting_for_ranks`.

    Args:
        store: of a `Gathering`, if there was one.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed insists on this variable. A rank sees its own GPU only, which is its number 0.
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=None if store is None else dist.PrefixStore("group", store),
        init_method=f"tcp://{rendezvous.address}:{rendezvous.port}" if store is None else None,
        rank=rendezvous.rank,
        world_size=rendezvous.num_ranks,
        timeout=timedelta(seconds=rendezvous.timeout_s),
    )


@contextmanager
def waiting_for_ranks(rendezvous: Rendezvous, *, part: str, phase: str) -> Iterator[None]:
    """Turn an error of communication inside into RankLost, which names part, phase and seconds."""
    start_s = monotonic()
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        # Gloo raises plain RuntimeErrors, which only their text tells from the model's own.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        where = rendezvous
        raise RankLost(
            f"{part} rank {where.rank} of {where.num_ranks} at {where.address}:{where.port} lost "
            f"its peers in {phase} after {monotonic() - start_s:.1f} s "
            f"(deadline {where.timeout_s} s): {error}"
        ) from error
