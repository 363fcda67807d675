"""`[compare.search]`: every trained method gets the same few trials on the validation split."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import Literal

from cluster.config.experiments import SearchConfig
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.experiments.comparison import Choice, Trial
from cluster.experiments.methods import EM, GFLOWNET, member, method, said_of
from cluster.experiments.suite import Suite
from cluster.run.directory import RunDirectory, read_scores
from tasks.evaluation.evaluation import Evaluation, mean_of


def search(shared: RunConfig, methods: Sequence[str], suite: Suite) -> list[Choice]:
    """Make the trials of every trained method, and choose the best of each; none reads test data.

    Raises:
        UserError: a method has no trial that could be measured.
        whatever `Suite.result` raises.
    """
    settings = shared.compare.search
    if not settings.learning_rates:
        return []
    validating = shared.changed({"evaluation.split": "validation"})
    choices: dict[str, Choice] = {}
    for title in _searched(methods):
        config = tuned(validating, choices.values())
        trials = []
        for number, values in enumerate(tried_values(settings, title), start=1):
            tried = member(
                _with_values(config, title, values),
                title,
                seed=settings.seed,
                run=f"{suite.folder.name}-{title}-trial{number}",
                gflownet=choices[GFLOWNET].chosen.run if title == EM else "",
            )
            suite.result(tried, f"trial {number} of {len(settings.learning_rates)}")
            measured = read_scores(RunDirectory(tried.run)).after
            assert measured is not None, tried.run
            metric, better, figure = headline(measured)
            trials.append(Trial(run=tried.run, values=values, figure=figure))
        known = {trial.figure: trial for trial in reversed(trials) if trial.figure is not None}
        if not known:
            raise UserError(f"{title}: no trial of compare.search has a figure ({metric})")
        choices[title] = Choice(
            method=title,
            metric=metric,
            better=better,
            seed=settings.seed,
            trials=tuple(trials),
            chosen=known[max(known) if better == "higher" else min(known)],
        )
    return list(choices.values())


def _searched(methods: Sequence[str]) -> list[str]:
    """Trained methods; gflownet before gflownet_em, which begins with it. Those at equal LM tokens
    are the same methods as those at equal steps, and have no trials of their own."""
    trained = [title for title in methods if method(title).trained]
    own = [title for title in trained if title != EM and not method(title).equal_tokens]
    return own if EM not in trained else list(dict.fromkeys([*own, GFLOWNET, EM]))


def tried_values(settings: SearchConfig, title: str) -> list[dict[str, float]]:
    """What the trials of a method set, one trial a rate; ppo's have a kl each, in a drawn order."""
    tried = [{"learner.learning_rate": rate} for rate in settings.learning_rates]
    if method(title).name == "ppo" and settings.kl:
        drawn = list(islice(cycle(settings.kl), len(tried)))
        random.Random(settings.seed).shuffle(drawn)
        for values, kl in zip(tried, drawn, strict=True):
            values["learner.ppo_kl"] = kl
    return tried


def headline(measured: Evaluation) -> tuple[str, Literal["higher", "lower"], float | None]:
    """Name, direction and value of what a task is judged by.

    The mean of what a chart shows, a figure for each group of items; where a chart shows none, the
    first figure that says how good a policy is. None: not measured, or not finite.
    """
    judging = {name: metric for name, metric in measured.metrics.items() if metric.better}
    charted = [name for name, metric in judging.items() if metric.shown == "chart"]
    names = charted or list(judging)[:1]
    value = mean_of(judging[name].value for name in names)
    title = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
    return (
        title,
        judging[names[0]].better or "higher",
        value if value is not None and math.isfinite(value) else None,
    )


def tuned(shared: RunConfig, choices: Iterable[Choice]) -> RunConfig:
    """The configuration of a comparison whose methods have what was chosen for them."""
    for choice in choices:
        shared = _with_values(shared, choice.method, choice.chosen.values)
    return shared


def _with_values(shared: RunConfig, title: str, values: Mapping[str, float]) -> RunConfig:
    """`compare.overrides` with these values, which have the last word on their method."""
    told = (*said_of(title, shared), *(f"{key}={value!r}" for key, value in values.items()))
    return shared.changed({"compare.overrides": {**shared.compare.overrides, title: told}})
