"""The buffer's keys in Redis, and the scripts that change them."""

from collections.abc import Callable
from importlib import resources
from typing import Any

import redis
from redis.client import Pipeline

from buffer.connection import naming_errors

FORMAT = b"1"
SCRIPTS = ("read", "commit", "draw", "fetch", "quarantine", "snapshot", "summary")


class ForeignKeys(ValueError):
    """The keys of this run were written by something else, or in another format."""


class Store:
    """One run's keys. Every change is one Lua script, so a crash leaves all of it or nothing.

    The prefix `{amortize:RUN}` is a hash tag. Under it, with ids of 32 hex digits:

        meta            hash: format, the learner's last version, one field per counter
        payload         hash: id -> packed trajectory                                     replay
        priority        zset: id + prompt -> terminal log-reward; its lowest is evicted
        prompt:PROMPT   zset: id -> terminal log-reward
        revision        hash: prompt -> number that moves with every change to its items
        sampled         hash: id -> times drawn from replay
        duplicates      hash: id -> times it came again while it was stored
        near_replaced   hash: id -> near-duplicates that made way for it
        groups          hash: sequence number -> packed group                             fresh
        fresh           zset: sequence number -> policy version; its lowest is dropped
        undrawn         zset: the part of fresh that was never drawn
        draws           hash: sequence number -> times drawn
        accepted        zset: digests of the latest groups, against counting a resend twice
        quarantine      hash: bytes that could not be read
    """

    def __init__(self, client: redis.Redis, *, run: str) -> None:
        self.client = client
        self.place = address(client)
        self._prefix = f"{{amortize:{run}}}"
        self._scripts = {name: client.register_script(source(name)) for name in SCRIPTS}
        self._claim()

    def key(self, name: str) -> str:
        """Full name of a key."""
        return f"{self._prefix}:{name}"

    def call(self, script: str, *arguments: str | int | float | bytes) -> Any:
        """Run one script. Raises BufferUnreachable."""
        with naming_errors(self.place, phase=f"running {script}"):
            return self._scripts[script](keys=[self._prefix], args=list(arguments))

    def read(self, command: str, key: str, *arguments: str | int) -> Any:
        """Answer of one read command."""
        with naming_errors(self.place, phase="reading"):
            return self.client.execute_command(command, self.key(key), *arguments)

    def pipeline(self, fill: Callable[[Pipeline], None]) -> list[Any]:
        """Answers of the read commands that `fill` puts into a pipeline, as of one instant."""
        with naming_errors(self.place, phase="reading"), self.client.pipeline() as pipeline:
            fill(pipeline)
            return pipeline.execute()

    def _claim(self) -> None:
        """Write the format, or refuse keys of another."""
        meta = self.key("meta")
        with naming_errors(self.place, phase="opening the buffer"):
            kind = str(self.read("TYPE", "meta"), "ascii")
            if kind not in ("none", "hash"):
                raise ForeignKeys(
                    f"key {meta} at {self.place} is a {kind}, not the buffer's hash."
                    " Give the run another name, or delete the key"
                )
            self.client.hsetnx(meta, "format", FORMAT)
            found = self.client.hget(meta, "format")
        if found != FORMAT:
            raise ForeignKeys(
                f"the buffer under {meta} at {self.place} has format {found!r}, this program"
                f" writes {FORMAT!r}. Give the run another name"
            )


def source(script: str) -> str:
    """Text of a script, below the functions that all of them share."""
    folder = resources.files("buffer") / "lua"
    return "".join((folder / f"{name}.lua").read_text() for name in ("store", script))


def address(client: redis.Redis) -> str:
    """Where a client connects to, without its password."""
    settings = client.get_connection_kwargs()
    return settings.get("path") or f"{settings.get('host')}:{settings.get('port')}"
