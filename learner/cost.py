"""What a step costs: the tokens of its trajectories that pass through a language model."""

from collections.abc import Sequence
from itertools import chain

from buffer.replay import Group
from learner.batch import content


def describe_cost(groups: Sequence[Group], *, against_base: bool) -> dict[str, float]:
    """Tokens of one step's batch, padding left out:

        tokens/sampled  fresh trajectories: completions, and each group's prompt once
        tokens/scored   ... prompts, completions and an answer at every stop state, as the packed
                        pass has them; only where a language model scores
        tokens/learned  each distinct row once: one forward and one backward pass
        tokens/base     ... once more, forward, where the objective compares with the base LM

    A demonstration is neither sampled nor scored, and what is replayed was so before. What was
    rolled out and never drawn is not here, nor what the agreement gate recomputes.
    """
    sampled = scored = 0
    for group in groups:
        fresh = [t for t in group.fresh if t.behaviour != "demonstration"]
        prompts = {t.prompt.tobytes(): t.prompt.size for t in fresh}
        sampled += sum(prompts.values()) + sum(t.completion.size for t in fresh)
        scored += sum(
            t.prompt.size + t.completion.size + t.stops.size * t.answer.size for t in fresh
        )
    rows = chain.from_iterable((*group.fresh, *group.replayed) for group in groups)
    distinct = {content(t): t.prompt.size + t.completion.size for t in rows}
    learned = float(sum(distinct.values()))
    return {
        "tokens/sampled": float(sampled),
        "tokens/scored": float(scored),
        "tokens/learned": learned,
        "tokens/base": learned if against_base else 0.0,
    }
