"""The distributed job ends at the exact posterior, also stale and with actors killed.

Ray, Redis, DeepSpeed and asynchronous actors, on the toy whose posterior is enumerated.
"""

from pathlib import Path

import pytest

from bench.posterior import MAX_AGE, run_condition

LARGEST_TV = 0.05
QUICK = ("task.max_len=3", "learner.steps=200")  # 85 completions for each prompt; TV 0.03 or so

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_job_ends_at_the_posterior_with_the_staleness_at_its_bound(tmp_path: Path) -> None:
    row = run_condition("stale", 0, tmp_path, QUICK)
    assert row.base_tv > 0.5, row
    assert row.age_mean > 0.7 * MAX_AGE and row.age_max <= MAX_AGE, row
    assert row.tv <= LARGEST_TV, row


def test_it_does_with_actors_killed_at_random(tmp_path: Path) -> None:
    row = run_condition("kills", 0, tmp_path, QUICK)
    assert row.kills >= 2, row
    assert row.tv <= LARGEST_TV, row
