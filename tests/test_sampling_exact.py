"""Samples against the enumerated distribution of a model with a handful of completions."""

from collections import Counter

import pytest
import torch

from lm.actions import ActionSpace
from lm.sampling import Request, Sampler
from tests.sampling_toy import enumerable_policy, exact_probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("min_len", [0, 2])
def test_samples_follow_the_exact_distribution(temperature: float, min_len: int) -> None:
    model, actions = enumerable_policy()
    actions = ActionSpace(
        stop_token=0, legal_tokens=actions.legal_tokens, min_len=min_len, max_len=3
    )
    exact = exact_probabilities(model, actions, (5, 2), temperature)
    assert sum(exact.values()) == pytest.approx(1.0, abs=1e-6)

    count = 20_000
    # A second prompt in the same batch, with refills, must not disturb the first.
    requests = [
        Request(prompt=(3, 1, 1) if i % 5 == 0 else (5, 2), temperature=temperature)
        for i in range(count * 5 // 4)
    ]
    sampler = Sampler(model, actions, None, max_rows=4096)
    completions = sampler.sample(requests, torch.Generator().manual_seed(1))
    seen = Counter(tuple(c.tokens.tolist()) for i, c in enumerate(completions) if i % 5)
    assert seen.total() == count
    assert seen.keys() <= exact.keys()
    common = {z: p for z, p in exact.items() if p * count >= 5}
    chi2 = sum((seen[z] - p * count) ** 2 / (p * count) for z, p in common.items())
    rest = 1.0 - sum(common.values())
    if rest * count >= 5:
        others = sum(seen[z] for z in exact.keys() - common.keys())
        chi2 += (others - rest * count) ** 2 / (rest * count)
    freedom = len(common) - 1 + (rest * count >= 5)
    # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal; 4 sigma.
    z_score = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z_score < 4.0, (chi2, freedom)
