"""Configuration of the language model and of its adapter; imports no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

# Parameters above which memory is saved at the price of time, unless something else is asked for.
LARGE = 50_000_000


class Frozen(BaseModel):
    """What nobody changes: unknown keys are errors, and what a key means stands in its field or in
    the text under it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LMConfig(Frozen):
    """Which base language model to load, and how."""

    model: str = Field(min_length=1, description="Folder in Hugging Face format, or hub id.")
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a hub id; null: its main branch. A folder has none."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model, on every machine of the run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base weights; log-softmax is float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Kernel; auto: sdpa where the architecture has it. flash_attention_2 needs its package, and
    lm.probe refuses it where it does not take the masks of packed texts."""
    bos: Literal["auto"] | bool = "auto"
    """Whether a start token stands in front of every text that the model reads; auto: as its
    tokenizer puts one."""
    probe: bool = True
    """Refuse a base whose packed and cached passes differ from plain ones."""

    @model_validator(mode="after")
    def _check_attention(self) -> "LMConfig":
        if self.attention == "flash_attention_2" and not self.probe:
            raise ValueError(
                'attention "flash_attention_2" with probe = false: only the probe tells whether it '
                "takes the masks of packed texts on this base; leave probe on"
            )
        return self


class LoRAConfig(Frozen):
    """Low-rank adapter: W + (alpha / rank) B A on every targeted linear layer."""

    rank: PositiveInt = Field(16, description="Inner dimension of BA.")
    alpha: PositiveFloat = Field(16.0, description="BA is scaled by alpha / rank.")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["auto", "attention"] = "auto"
    """Names of linear layers; auto: all of attention and MLP, not the output head; attention: those
    of attention, whatever the architecture calls them."""
