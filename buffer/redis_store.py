"""The store that processes share: keys of one run in a Redis, changed by atomic Lua scripts."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import redis

from buffer.admission import COUNTED, Plan
from buffer.config import BufferConfig
from buffer.connection import naming_errors
from buffer.stats import ReplayStats, summarise
from buffer.store import KEPT_EVIDENCE, REMEMBERED_GROUPS, Arrival, Commit, Drawn, Stored

FORMAT = b"2"


class ForeignKeys(RuntimeError):
    """The prefix of this run holds keys of something else, or of another format."""


class RedisStore:
    """A `Store` on the keys of one run.

    The prefix `{amortize:RUN}` is a hash tag. Under it, with ids of 32 hex digits:

        meta            hash: format, the learner's last version, one field per counter
        payload         hash: id -> packed trajectory                                     replay
        priority        zset: id + prompt -> log-reward less that of the prompt's best, which has
                        +inf; its lowest is evicted
        prompt:PROMPT   zset: id -> terminal log-reward
        revision        hash: prompt -> number that moves with every change to its items
        sampled         hash: id -> times drawn from replay
        duplicates      hash: id -> times it came again while it was stored
        near_replaced   hash: id -> near-duplicates that made way for it
        groups          hash: arrival number -> packed group                              fresh
        fresh           zset: arrival number -> policy version; its lowest is dropped
        undrawn         zset: the part of fresh that was never drawn
        draws           hash: arrival number -> times drawn
        accepted        zset: digests of the latest groups, against counting a resend twice
        quarantine      hash: bytes that could not be read

    Every method raises BufferUnreachable; a new store ForeignKeys.
    """

    def __init__(self, client: redis.Redis, *, run: str) -> None:
        self.client = client
        self.place = address(client)
        self._prefix = f"{{amortize:{run}}}"
        folder = resources.files("buffer") / "lua"
        shared = (folder / "store.lua").read_text()
        self._scripts = {
            file.name.removesuffix(".lua"): client.register_script(shared + file.read_text())
            for file in folder.iterdir()
        }
        self._claim()

    def commit(self, plan: Plan, arrival: Arrival | None, limits: BufferConfig) -> Commit:
        arguments: list[Any] = [plan.prompt, plan.revision, limits.capacity]
        arguments.append(int(plan.keep_stored))
        arguments += [plan.counts[name] for name in COUNTED]
        arguments += [len(plan.removed), *plan.removed, len(plan.put)]
        for item, duplicates, near_replaced in plan.put:
            arguments += (item.id, item.log_reward, item.payload, duplicates, near_replaced)
        if arrival is not None:
            arguments += (arrival.digest, arrival.version, limits.max_age)
            arguments += (limits.fresh_capacity, REMEMBERED_GROUPS, arrival.payload)
        fate, *evicted = self.call("commit", *arguments)
        return Commit(fate.decode(), *evicted)

    def draw(self, num_groups: int, version: int, limits: BufferConfig) -> Drawn:
        eligible, drawn = self.call("draw", num_groups, version, limits.max_age, limits.max_draws)
        return eligible, [(int(seq), payload) for seq, payload in by_two(drawn)]

    def read_completions(self, prompt: str, shortest: int, longest: int) -> Stored:
        revision, ranked, tokens = self.call("completions", prompt, shortest, longest)
        return int(revision), [
            (id.decode(), float(score), each)
            for (id, score), each in zip(by_two(ranked), tokens, strict=True)
        ]

    def rank(self, prompts: Sequence[str]) -> list[list[tuple[str, float]]]:
        found = self.read(*(("ZRANGE", f"prompt:{p}", 0, -1, "WITHSCORES") for p in prompts))
        return [[(id.decode(), score) for id, score in ranked] for ranked in found]

    def fetch(self, ids: Sequence[str]) -> list[bytes | None]:
        return self.call("fetch", *ids)

    def peek(self, ids: Sequence[str]) -> list[bytes | None]:
        return self.read(("HMGET", "payload", *ids))[0] if ids else []

    def quarantine_item(self, id: str, prompt: str) -> None:
        self.call("quarantine", "item", id, prompt, KEPT_EVIDENCE)

    def quarantine_group(self, number: int, payload: bytes) -> None:
        self.call("quarantine", "group", f"{number:016d}", payload, KEPT_EVIDENCE)

    def newest_group(self) -> bytes | None:
        (numbers,) = self.read(("ZREVRANGE", "fresh", 0, 0))
        return self.read(("HGET", "groups", numbers[0]))[0] if numbers else None

    def depth(self) -> int:
        return int(self.read(("ZCARD", "undrawn"))[0])

    def prompts(self) -> list[str]:
        return sorted(prompt.decode() for prompt in self.read(("HKEYS", "revision"))[0])

    def stats(self) -> ReplayStats:
        # Reads the index of fresh groups and one number per drawn item.
        meta, size, prompts, sampled, fresh, undrawn = self.read(
            *(("HGETALL", "meta"), ("ZCARD", "priority"), ("HLEN", "revision")),
            *(("HVALS", "sampled"), ("ZRANGE", "fresh", 0, -1, "WITHSCORES"), ("ZCARD", "undrawn")),
        )
        times_sampled = [int(count) for count in sampled]
        versions = [int(version) for _, version in fresh]
        return summarise(numbers(meta), size, prompts, times_sampled, versions, undrawn)

    def key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def read(self, *commands: Sequence[Any]) -> list[Any]:
        """Answers of read commands, as of one instant: each its name, its key and its arguments."""
        pipeline = self.client.pipeline(transaction=len(commands) > 1)
        with naming_errors(self.place, phase="reading"), pipeline:
            for command, key, *arguments in commands:
                scored = {"withscores": True} if "WITHSCORES" in arguments else {}  # for redis-py
                pipeline.execute_command(command, self.key(key), *arguments, **scored)
            return pipeline.execute()

    def call(self, script: str, *arguments: str | int | float | bytes) -> Any:
        """Answer of one script."""
        with naming_errors(self.place, phase=f"running {script}"):
            return self._scripts[script](keys=[self._prefix], args=list(arguments))

    def _claim(self) -> None:
        """Write the format, or refuse keys of another."""
        meta = self.key("meta")
        with naming_errors(self.place, phase="opening the buffer"):
            kind = str(self.read(("TYPE", "meta"))[0], "ascii")
            if kind not in ("none", "hash"):
                raise ForeignKeys(
                    f"key {meta} at {self.place} is a {kind}, not the buffer's hash."
                    " Give the run another name, or delete the key"
                )
            self.client.hsetnx(meta, "format", FORMAT)
            self.call("upgrade")
            found = self.client.hget(meta, "format")
        if found != FORMAT:
            raise ForeignKeys(
                f"the buffer under {meta} at {self.place} has format {found!r}, this program"
                f" writes {FORMAT!r}. Give the run another name"
            )


def address(client: redis.Redis) -> str:
    """Where a client connects to, without its password."""
    settings = client.get_connection_kwargs()
    return settings.get("path") or f"{settings.get('host')}:{settings.get('port')}"


def by_two(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of a flat list of keys and values."""
    return zip(flat[::2], flat[1::2], strict=True)


def numbers(fields: Mapping[bytes, bytes]) -> dict[str, int]:
    """Fields of a hash as integers by name."""
    return {name.decode(): int(value) for name, value in fields.items()}
