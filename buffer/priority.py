"""Prioritised sampling from the replay of one prompt."""

import numpy as np
from numpy.typing import NDArray


def sample_by_priority(
    log_reward_N: NDArray[np.float64],
    *,
    num_draws: int,
    inverse_temperature: float,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """Positions of `num_draws` different items, fewer if there are fewer.

    Successive draws without replacement, each with probability proportional to
    exp(inverse_temperature * log_reward) among those left. Adding Gumbel noise and taking the
    largest gives exactly this law (Yellott 1977), in one pass and without a normaliser.
    """
    noisy_N = inverse_temperature * log_reward_N + rng.gumbel(size=log_reward_N.shape)
    return np.argsort(-noisy_N)[:num_draws]
