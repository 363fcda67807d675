"""Reaching a Redis; each way of failing has its own error, with a remedy and no password."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

OLDEST_VERSION = (6, 2)
LONGEST_PAUSE_S = 0.5


class BufferUnreachable(ConnectionError):
    """Redis did not answer in time, or the connection to it broke."""


class WrongPassword(PermissionError):
    """Redis refused the password or asked for one, or the file that should hold it has none."""


class NotOurRedis(RuntimeError):
    """What answers is no Redis, or one that is too old."""


def connect(url: str, *, password: str | None, timeout_s: float) -> redis.Redis:
    """A client that has been answered; raises ValueError for what is no address.

    A later loss of the server is retried for about `timeout_s`, so that a restart on the same
    address goes unnoticed; one reply takes at most `timeout_s`.
    """
    place, pauses = redacted(url), ExponentialBackoff(cap=LONGEST_PAUSE_S, base=0.02)
    try:
        client = redis.Redis.from_url(
            url,
            password=password,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(pauses, 0),
        )
    except ValueError as error:
        raise ValueError(
            f"buffer.url {place!r} is no Redis address; write redis://host:port/0,"
            " rediss://host:port/0 or unix:///path/to/socket"
        ) from error
    check_server(client, place)
    client.set_retry(
        Retry(
            pauses,
            math.ceil(timeout_s / LONGEST_PAUSE_S) + 5,
            # A silent server has used up its time; only a broken connection is worth another try.
            supported_errors=(redis.ConnectionError,),
        )
    )
    return client


def check_server(client: redis.Redis, place: str) -> None:
    """Raise a named error unless a Redis of a usable version answers."""
    try:
        with naming_errors(place, phase="connecting"):
            text = str(client.info("server")["redis_version"])
    except redis.ResponseError as error:
        raise NotOurRedis(f"{place} refuses INFO: {error}. Allow it to this user") from error
    except (redis.RedisError, KeyError, ValueError) as error:
        raise NotOurRedis(
            f"{place} answers, but not as Redis does ({error!r:.200}). Is the port another's?"
        ) from error
    version = tuple(int(part) for part in text.split(".")[:2])
    if version < OLDEST_VERSION:
        raise NotOurRedis(f"{place} is Redis {text}; the buffer needs 6.2 or later. Upgrade it")


@contextmanager
def naming_errors(place: str, *, phase: str) -> Iterator[None]:
    """Turn the client's connection errors into ours, with peer, phase and seconds."""
    started_s = time.monotonic()
    try:
        yield
    except redis.AuthenticationError as error:
        raise WrongPassword(
            f"Redis at {place} refused the password ({error}). Set AMORTIZE_REDIS_PASSWORD or"
            " buffer.password_file to the server's `requirepass`; a server of the run keeps its"
            " own in the run directory"
        ) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        waited_s = time.monotonic() - started_s
        raise BufferUnreachable(
            f"Redis at {place} did not answer while {phase}, after {waited_s:.1f} s: {error}."
            " Is it running, and is the address right and reachable from this host?"
        ) from error


def durability(client: redis.Redis) -> str:
    """What a crash can lose: "always" nothing acknowledged, "everysec" 2 s, "no" and "off" more.

    "unknown" where CONFIG GET is denied.
    """
    try:
        settings = client.config_get("append*")  # Redis 6 takes one pattern
    except redis.ResponseError:
        return "unknown"
    return str(settings["appendfsync"]) if settings["appendonly"] == "yes" else "off"


def redacted(url: str) -> str:
    """The address without its user and password."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))
