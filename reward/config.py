"""Configuration of the reward replicas; imports no torch."""

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class RewardConfig(BaseModel):
    """How the frozen LM that scores rationales is run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: PositiveInt = Field(
        default=1, description="Independent copies of the frozen LM; callers spread over them."
    )
    ranks: PositiveInt = Field(
        default=1, description="Processes over which one replica shards its weights (ZeRO-3)."
    )
    token_budget: PositiveInt = Field(
        default=2048, description="Tokens of one padded micro-batch on one rank."
    )
    deadline_s: PositiveFloat = Field(
        default=60.0,
        description="Seconds within which a request is answered, from its arrival on; also how "
        "long a rank waits for the other ranks of its replica.",
    )
    cache_items: NonNegativeInt = Field(
        default=20_000, description="Scores remembered by content, oldest use forgotten; 0: none."
    )
