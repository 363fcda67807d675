"""Keeps the weight board told which reward replicas answer."""

import time

from cluster.distributed.clients import RemoteBoard

_REMIND_S = 2.0


class Roster:
    """What the board was told last, and when."""

    def __init__(self, board: RemoteBoard) -> None:
        self._board = board
        self._told: tuple[str, ...] = ()
        self._told_s = time.monotonic()

    def tell(self, names: tuple[str, ...], *, wait: bool = True) -> None:
        """Announce these names where they are news, or were told a while ago.

        A board that was restarted has forgotten them, and nobody hears of its restart.

        Args:
            wait: for the board to have heard news, before anybody goes.

        Raises:
            PeerTimeout, PeerDied: the board did not answer.
        """
        news = names != self._told
        if news and wait:
            self._board.announce_replicas(names)
        elif news or time.monotonic() - self._told_s >= _REMIND_S:
            self._board.remind_of_replicas(names)
        else:
            return
        self._told, self._told_s = names, time.monotonic()
