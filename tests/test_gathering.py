"""Ranks that load: a slow one is waited for while it comes further, one that does not is named."""

import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import monotonic

import pytest

from buffer.endpoint import free_port
from lm.process_group import Gathering, RankLost, Rendezvous

TIMEOUT_S = 2.0
MB = 2**20


def ended(*work: Callable[[Gathering], object]) -> list[BaseException | None]:
    """How the work of the ranks, which are threads here, ended."""
    port = free_port("127.0.0.1")
    alive: list[Gathering] = []  # until all have ended: rank 0 keeps the store of the others

    def run(rank: int) -> None:
        place = Rendezvous(
            address="127.0.0.1", port=port, rank=rank, num_ranks=len(work), timeout_s=TIMEOUT_S
        )
        gathering = Gathering(place, part="reward")
        alive.append(gathering)
        work[rank](gathering)

    with ThreadPoolExecutor(len(work)) as ranks:
        return [e.exception(60) for e in [ranks.submit(run, rank) for rank in range(len(work))]]


def load(gathering: Gathering) -> None:
    with gathering.phase("loading"):
        """Nothing is to be loaded."""


def test_ranks_are_waited_for_beyond_the_deadline_while_one_comes_further() -> None:
    waited_s: list[float] = []
    fetched = Event()

    def wait(gathering: Gathering) -> None:
        began = monotonic()
        load(gathering)
        waited_s.append(monotonic() - began)

    def load_slowly(gathering: Gathering) -> None:
        moved = itertools.count(step=MB)
        with gathering.phase("loading", moved.__next__):
            Event().wait(2 * TIMEOUT_S)
            fetched.set()

    def wait_for_its_files(gathering: Gathering) -> None:
        with gathering.phase("loading", lambda: 7 * MB):
            fetched.wait(60)

    assert ended(wait, load_slowly, wait_for_its_files) == [None, None, None]
    assert waited_s[0] > 1.5 * TIMEOUT_S


def test_a_rank_that_comes_no_further_is_named_with_its_phase() -> None:
    gave_up = Event()

    def wait(gathering: Gathering) -> None:
        try:
            load(gathering)
        finally:
            gave_up.set()

    def stall(gathering: Gathering) -> None:
        with gathering.phase("fetching", lambda: 7 * MB):
            gave_up.wait(60)

    lost, _ = ended(wait, stall)
    assert isinstance(lost, RankLost)
    assert re.fullmatch(
        r"reward rank 0 of 2 at 127.0.0.1:\d+ waited in vain in loading \(deadline 2.0 s\): "
        "rank 1 has come no further than: fetching, 7 MB",
        str(lost),
    )


def test_rank_zero_is_missed_where_it_does_not_listen() -> None:
    place = Rendezvous(address="127.0.0.1", port=1, rank=1, num_ranks=2, timeout_s=0.5)
    with pytest.raises(RankLost, match=r"reward rank 1 of 2 at 127.0.0.1:1 .* in rendezvous"):
        Gathering(place, part="reward")
