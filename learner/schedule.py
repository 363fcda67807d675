"""What changes with the optimizer step: learning rate and reward temperature."""

from learner.config import LearnerConfig, RewardTemperatureConfig


def learning_rate(step: int, config: LearnerConfig) -> float:
    """Learning rate of the update that follows `step` finished ones.

    It rises linearly to the peak over the warm-up and is never 0: the first update uses
    1 / warmup_steps of the peak, the last one of a linear decay 1 / (steps after warm-up).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    steps_left = max(config.steps - step, 1)
    return config.learning_rate * steps_left / max(config.steps - config.warmup_steps, 1)


def reward_temperature(step: int, config: RewardTemperatureConfig) -> float:
    """T of the update that follows `step` finished ones: linear from start to end, then flat."""
    if step >= config.steps:
        return config.end
    return config.start + (config.end - config.start) * step / config.steps
