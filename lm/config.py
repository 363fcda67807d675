"""Configuration of the language model and of its adapter; imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

# Parameters above which memory is saved at the price of time, unless something else is asked for.
LARGE = 50_000_000


class LMConfig(BaseModel):
    """Which base language model to load, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="Folder in Hugging Face format, or hub id.")
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Branch, tag or commit of a hub id; null: its main branch. A folder has none.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run the Python files that come with the model, on every machine of the run.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the base weights; log-softmax is float32 always."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where there is one, else cpu."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        default="auto",
        description="Kernel; auto: sdpa where the architecture has it. flash_attention_2 needs its "
        "package, and lm.probe refuses it where it does not take the masks of packed texts.",
    )
    bos: Literal["auto"] | bool = Field(
        default="auto",
        description="Whether a start token stands in front of every text that the model reads; "
        "auto: as its tokenizer puts one.",
    )
    probe: bool = Field(
        default=True,
        description="Refuse a base whose packed and cached passes differ from plain ones.",
    )

    @model_validator(mode="after")
    def _check_attention(self) -> "LMConfig":
        if self.attention == "flash_attention_2" and not self.probe:
            raise ValueError(
                'attention "flash_attention_2" with probe = false: only the probe tells whether it '
                "takes the masks of packed texts on this base; leave probe on"
            )
        return self


class LoRAConfig(BaseModel):
    """Low-rank adapter: W + (alpha / rank) B A on every targeted linear layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: PositiveInt = Field(default=16, description="Inner dimension of BA.")
    alpha: PositiveFloat = Field(default=16.0, description="BA is scaled by alpha / rank.")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["auto", "attention"] = Field(
        default="auto",
        description="Names of linear layers; auto: all of attention and MLP, not the output head; "
        "attention: those of attention, whatever the architecture calls them.",
    )
