"""Settings of the replay buffer and of the Redis behind it."""

from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
    model_validator,
)

RAY_PORT = 6379
LOOPBACK = "127.0.0.1"
PASSWORD_VARIABLE = "AMORTIZE_REDIS_PASSWORD"
_WHERE_TO = f"set {PASSWORD_VARIABLE}, or name a file of yours in buffer.password_file"


class BufferConfig(BaseModel):
    """The `[buffer]` section of a run; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    kind: Literal["redis", "memory"] = "redis"
    """Where it is: in a Redis, or in the process of a --local run, which then goes on after a kill
    exactly as if it had not been killed; saved with each checkpoint."""
    url: str | None = None
    """A Redis to use (redis://host:port/db, unix:///path); None: the run's own."""
    password_file: str | None = None
    """File that holds the password of the Redis at url; of a managed one too, whose password is
    made up otherwise. AMORTIZE_REDIS_PASSWORD in the environment comes before it. Passwords are
    refused in TOML, in overrides and in url."""
    transport: Literal["tcp", "unix"] = "tcp"
    """How a managed server listens; unix serves processes of one host only."""
    bind: str = "auto"
    """Address a managed server listens on: one that every host of the run reaches. auto: that under
    which the Ray cluster knows this host, loopback without a cluster."""
    port: int = Field(0, ge=0, le=65535, description="Of a managed server; 0 takes a free one.")
    timeout_s: PositiveFloat = 20.0
    """Longest wait for one reply, and for a lost server to come back."""
    capacity: int = Field(20_000, ge=1, description="Trajectories in replay, all prompts together.")
    quota_per_prompt: int = Field(50, ge=1, description="Trajectories in replay for one prompt.")
    near_duplicate_tolerance: float = Field(0.25, ge=0, lt=1)
    """Of one prompt, two completions of a and b tokens are near-duplicates when their edit distance
    is below this times (a + b); 0 switches the rule off."""
    inverse_temperature: NonNegativeFloat = 1.0
    """Replay draws by softmax of this times log-reward; 0 is uniform."""
    fresh_capacity: int = Field(512, ge=1, description="Groups that wait for the learner.")
    max_draws: int = Field(1, ge=1, description="Times the learner may draw one fresh group.")
    max_age: int = Field(16, ge=0, description="Policy versions after which a group expires.")

    @property
    def address(self) -> str:
        """Numeric address for a managed server; `auto` is loopback until a cluster says more."""
        return LOOPBACK if self.bind == "auto" else self.bind

    @model_validator(mode="before")
    @classmethod
    def refuse_passwords(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "password" in settings:
            raise ValueError(f"password cannot be set in a configuration or a command: {_WHERE_TO}")
        return settings

    @field_validator("url")
    @classmethod
    def refuse_passwords_in_url(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "")
        # Of redis://:a@b@host, the part before the last @ is no host either.
        user = parts.netloc.rpartition("@")[0]
        if ":" in user or "@" in user or "password" in parse_qs(parts.query):
            raise ValueError(f"holds a password, which would be written down with it: {_WHERE_TO}")
        return url

    @field_validator("port")
    @classmethod
    def leave_ray_its_port(cls, port: int) -> int:
        if port == RAY_PORT:
            raise ValueError(f"port {RAY_PORT} is Ray's; set another, or 0 for a free one")
        return port

    @field_validator("bind")
    @classmethod
    def refuse_wildcards(cls, bind: str) -> str:
        if bind in ("", "*", "0.0.0.0", "::"):
            raise ValueError("is no address to connect to; name one of this machine")
        return bind
