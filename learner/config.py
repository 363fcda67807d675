"""Settings of the learner. Imports no torch, so that reading a configuration stays fast."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from learner.objectives.traits import TRAITS, ObjectiveName, Traits
from lm.config import LARGE, Frozen


class RewardTemperatureConfig(Frozen):
    """Linear from `start` to `end` over `steps` optimizer steps, then flat (paper, appendix)."""

    start: float = Field(1.0, gt=0, description="T of the first step; R enters as R^(1/T).")
    end: float = Field(1.0, gt=0, description="T once the schedule has run.")
    steps: int = Field(0, ge=0, description="Optimizer steps from start to end.")

    def at(self, step: int) -> float:
        """T of the update after `step` finished ones."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


class LearnerConfig(Frozen):
    """What a batch is, how a step is taken, and what is kept of it."""

    steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
    groups_per_step: int = Field(gt=0, description="Prompts per step, each with its fresh group.")
    replayed_per_group: int = Field(0, ge=0, description="Replayed trajectories per prompt.")
    token_budget: PositiveInt = 4096
    """Columns of one pass, which bounds the memory; a larger group takes several, and one more
    without gradients."""
    checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations instead of keeping them; auto: above 50M parameters."""
    learning_rate: float = Field(gt=0, description="Peak of the schedule.")
    warmup_steps: int = Field(0, ge=0, description="Steps of the linear rise to the peak.")
    decay: Literal["constant", "linear"] = "constant"
    """Learning rate after warm-up: flat, or linear towards 0."""
    clip_norm: float = Field(1.0, gt=0, description="Largest gradient norm.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW, per unit learning rate.")

    start_from: str | None = Field(None, min_length=1)
    """Folder of an adapter whose weights training starts with, such as the `adapter` of a run with
    objective "sft"; None: a new one, with which the policy is the base LM."""
    reward_temperature: RewardTemperatureConfig = RewardTemperatureConfig()
    objective: ObjectiveName = "subtb"
    """subtb: all pairs of stop states; tb: whole trajectories (lambda -> infinity); db:
    neighbouring stop states (lambda -> 0); raptb: every prefix against the root. To compare with:
    ppo: reward maximisation with a KL penalty, on policy; sft: maximum likelihood of the task's
    demonstrations. joint: maximum likelihood of rationales and answers, the M-step of EM."""
    subtb_lambda: float = Field(1.0, gt=0, le=2)
    """Of subtb: pairs n stops apart weigh lambda^(n-1)."""
    normalisation: Literal["batch", "trajectory"] = "batch"
    """Divide residuals by their weight in the whole batch, or in each trajectory."""
    log_z: Literal["group", "learned"] = "group"
    """Log Z(X): mean of the prompt's group, or a linear head on the state behind X."""
    ppo_clip: PositiveFloat = 0.2
    """Of ppo: largest change of an action's probability, as a share, that teaches."""
    ppo_kl: NonNegativeFloat = 0.2
    """Of ppo: nats of log R / T for one of KL(policy || base)."""
    agreement_tolerance_nats: PositiveFloat | None = None
    """Largest root mean square of log q recomputed - recorded, over the tokens and stop states of a
    trajectory that is learned from. None: learned from the first draws, at most 1e-3 in float32 and
    0.25 in bfloat16 or TF32, which round more."""
    agreement_check_share: float = Field(0.02, ge=0, le=1)
    """Share of an actor's versions of which a trajectory is compared with the learner's log q under
    that version, once it has agreed for long; and of the draw that brings it. 1: everything is. In
    the first draws, up to 500 decisions or three draws, everything is, and an actor that is new,
    was wrong or has changed is compared at once, then 1, 2, 4 .. versions later. 0: so on without
    end, so that one who breaks late is found where it differs more than it did, and hardly by its
    turn."""
    agreement_max_share: float = Field(0.25, ge=0, le=1)
    """Share of what was drawn lately that may disagree before the run ends; 1: all."""

    publish_every_steps: int = Field(1, gt=0, description="Steps between two adapters.")
    publish_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the adapters that actors are sent. bfloat16: half the bytes; actors sample from, and are
    held to, the rounded policy."""
    checkpoint_every_steps: int = Field(100, gt=0, description="Steps between checkpoints.")
    checkpoint_every_s: PositiveFloat = 60.0
    """Seconds between them: what a replaced learner repeats."""
    checkpoints_kept: int = Field(2, gt=0, description="Older ones are removed.")

    ranks: int = Field(1, gt=0, description="Processes that share one step.")
    starvation_timeout_s: PositiveFloat = 300.0
    """Longest wait for groups before the step fails."""
    collective_timeout_s: PositiveFloat = 600.0
    """Longest wait of one rank for the others."""

    def recomputes(self, num_parameters: int) -> bool:
        """Whether activations of a model of this size are recomputed."""
        if self.checkpointing == "auto":
            return num_parameters > LARGE
        return self.checkpointing

    @property
    def traits(self) -> Traits:
        return TRAITS[self.objective]

    def trained_temperature(self, step: int | None = None) -> float:
        """T of the last of `step` updates, which such a policy was trained for.

        None or 0: of the last that is configured, for what is compared with that policy.
        """
        return self.reward_temperature.at((step or self.steps) - 1)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished ones.

        It rises linearly to the peak over the warm-up and is never 0: the first update uses
        1 / warmup_steps of the peak, the last one of a linear decay 1 / (steps after warm-up).
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.learning_rate
        steps_left = max(self.steps - step, 1)
        return self.learning_rate * steps_left / max(self.steps - self.warmup_steps, 1)

    @model_validator(mode="after")
    def _check_objective(self) -> "LearnerConfig":
        objective, traits = self.objective, self.traits
        if self.subtb_lambda != 1.0 and not traits.has_pairs:
            raise ValueError(
                f"subtb_lambda ({self.subtb_lambda}) means nothing to objective "
                f'"{objective}", which has no pairs to weigh: leave it out, or use "subtb"'
            )
        if self.normalisation == "trajectory" and not traits.has_terms:
            raise ValueError(
                f'normalisation "trajectory" means nothing to objective "{objective}", which '
                "weighs all trajectories alike: leave it out"
            )
        if self.log_z == "learned" and not traits.uses_log_z:
            raise ValueError(
                f'log_z "learned" means nothing to objective "{objective}", which has no log Z: '
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_waits(self) -> "LearnerConfig":
        if self.ranks > 1 and self.collective_timeout_s <= self.starvation_timeout_s:
            raise ValueError(
                f"collective_timeout_s ({self.collective_timeout_s}) must exceed "
                f"starvation_timeout_s ({self.starvation_timeout_s}): while rank 0 waits for "
                "groups, the other ranks wait for rank 0"
            )
        return self
