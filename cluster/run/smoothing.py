"""Making a noisy curve readable."""

from collections.abc import Sequence


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean of each value and up to `span` - 1 before it."""
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= span:
            total -= values[index - span]
        means.append(total / min(index + 1, span))
    return means
