"""A request to change the number of a run's parts: the file that carries it to the driver."""

import os
import uuid

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from cluster.run.directory import RunDirectory, write_whole


class ScaleRefused(ValueError):
    """A run cannot be given the numbers that were asked for; nothing was changed."""


class BadRequest(ValueError):
    """A file that should hold a request to scale does not."""


class ScaleRequest(BaseModel):
    """Numbers that a run shall have from now on; None leaves one as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1)
    actors: PositiveInt | None = None
    replicas: PositiveInt | None = None

    @property
    def numbers(self) -> dict[str, int]:
        """What is asked for, under the names that `RunState.desired` uses."""
        asked = {"actors": self.actors, "replicas": self.replicas}
        return {kind: number for kind, number in asked.items() if number is not None}


def post(directory: RunDirectory, request: ScaleRequest) -> None:
    """Lay a request before the run's driver; an earlier one that it has not taken is replaced."""
    write_whole(directory.scale_request, request.model_dump_json())


def take(directory: RunDirectory) -> ScaleRequest | None:
    """Take the request that lies there, if any; nobody else will get it.

    Raises:
        BadRequest: it cannot be read; it is gone all the same.
    """
    taken = directory.scale_request.with_name(".scale-request.taken")
    try:
        os.replace(directory.scale_request, taken)
    except FileNotFoundError:
        return None
    text = taken.read_bytes()
    taken.unlink()
    try:
        return ScaleRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadRequest(
            f"{directory.scale_request} held no request to scale ({where}: {first['msg']}); "
            f"use 'amortize scale'"
        ) from None
