"""The picture of a comparison with the posterior."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cluster.reports.plots import new_figure
from tasks.posterior.records import Picture

_WIDTH_INCHES, _PANEL_INCHES, _SCATTER_INCHES = 8.0, 2.6, 5.0
_POSTERIOR, _POLICY, _BASE = "#c2410c", "#1f5a96", "#b8bcc2"
# A panel has bars for the completions that reach this probability under posterior or policy, as
# long as they are so few and hold most of the posterior.
_BAR = 0.005
_MOST_BARS = 120
_MOST = 0.75
_FEWEST_PLACES = 10  # fewer bars would be as wide as the page
_MOST_PANELS = 4
_MOST_LABELS = 64
_LONGEST_LABEL = 24
# Below it a scatter shows nothing but the tail of the enumeration.
_SMALLEST = 1e-9


def draw_posterior(
    pictures: Sequence[tuple[str, Picture]], path: Path, *, policy: str, beside_base: bool
) -> None:
    """Write the PNG: bars for the completions that matter if they are few, else q against p.

    Args:
        pictures: a title and what to draw, for each prompt that was enumerated; at least one.
        policy: what the policy is called.
        beside_base: the pictures hold the base LM's q after the policy's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [policy, "base"] if beside_base else [policy]
    colours = [_POLICY, _BASE] if beside_base else [_BASE]
    chosen = [_of_interest(picture) for _, picture in pictures]
    if all(len(one) for one in chosen):
        figure = _bars(pictures[:_MOST_PANELS], chosen, names, colours)
    else:
        figure = _scatter(pictures, names, colours)
    figure.savefig(path)


def _of_interest(picture: Picture) -> NDArray[np.intp]:
    """Valid completions that reach _BAR, in order; none where they are too many or say too little.

    Integers stand in the order of the number line, anything else in that of the posterior.
    """
    p_N = np.exp(picture.posterior.log_p_N)
    highest_N = np.maximum(p_N, np.exp(picture.posterior.support.log_q_KN).max(axis=0))
    chosen = np.flatnonzero(picture.valid_N & (highest_N >= _BAR))
    if len(chosen) > _MOST_BARS or p_N[chosen].sum() < _MOST:
        return np.empty(0, dtype=np.intp)
    texts = [picture.texts[at].strip() for at in chosen.tolist()]
    if all(_is_integer(text) for text in texts):
        return chosen[np.argsort([int(text) for text in texts])]
    return chosen[np.argsort(-p_N[chosen], kind="stable")]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()


def _bars(
    pictures: Sequence[tuple[str, Picture]],
    chosen: Sequence[NDArray[np.intp]],
    names: Sequence[str],
    colours: Sequence[str],
) -> Figure:
    """A panel for each prompt: bars for q of each policy, lines for p."""
    height = _PANEL_INCHES * len(pictures)
    figure, panels = new_figure(_WIDTH_INCHES, height, panels=len(pictures))
    for axes, (title, picture), at in zip(panels, pictures, chosen, strict=False):
        places = np.arange(len(at))
        width = 0.84 / len(names)
        for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
            q_N = np.exp(picture.posterior.support.log_q_KN[number][at])
            shift = (number - (len(names) - 1) / 2) * width
            axes.bar(places + shift, q_N, width, color=colour, label=f"q, {name}")
        p_N = np.exp(picture.posterior.log_p_N[at])
        axes.hlines(
            p_N, places - 0.5, places + 0.5, color=_POSTERIOR, linewidth=1.6, label="p, exact"
        )
        _title(axes, title)
        axes.set_ylabel("probability")
        axes.set_xlim(-0.8, max(len(at), _FEWEST_PLACES) - 0.2)
        _label(axes, [picture.texts[n] for n in at])
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _label(axes: Axes, texts: Sequence[str]) -> None:
    every = -(-len(texts) // _MOST_LABELS)
    if every > 1 and not all(_is_integer(text.strip()) for text in texts):
        axes.set_xlabel("completions, by probability")
        return
    every = 10 if every > 1 else 1
    shown = range(0, len(texts), every)
    labels = [_plain(texts[at]) for at in shown]
    upright = max(len(label) for label in labels) > 3
    axes.set_xticks(list(shown), labels, rotation=90 if upright else 0, fontsize=6)


def _plain(text: str) -> str:
    """A short text without the space that tokens begin with."""
    shown = text.strip() or "(empty)"
    short = shown if len(shown) <= _LONGEST_LABEL else f"{shown[: _LONGEST_LABEL - 1]}…"
    return _unformatted(short)


def _scatter(
    pictures: Sequence[tuple[str, Picture]], names: Sequence[str], colours: Sequence[str]
) -> Figure:
    """q against p of every completion of all prompts, in powers of ten."""
    figure, [axes] = new_figure(_SCATTER_INCHES, _SCATTER_INCHES)
    p_N = np.concatenate([np.exp(picture.posterior.log_p_N) for _, picture in pictures])
    for number in reversed(range(len(names))):
        q_N = np.concatenate(
            [np.exp(picture.posterior.support.log_q_KN[number]) for _, picture in pictures]
        )
        seen_N = np.maximum(p_N, q_N) > _SMALLEST
        axes.scatter(
            np.maximum(p_N[seen_N], _SMALLEST),
            np.maximum(q_N[seen_N], _SMALLEST),
            s=6,
            color=colours[number],
            alpha=0.6,
            linewidths=0,
            label=f"q, {names[number]}",
        )
    axes.plot([_SMALLEST, 1], [_SMALLEST, 1], color=_POSTERIOR, linewidth=1.2, label="q = p")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("p, exact posterior")
    axes.set_ylabel("q")
    _title(axes, f"{len(pictures)} prompts, {len(p_N)} completions")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _title(axes: Axes, title: str) -> None:
    axes.set_title(_unformatted(title), fontsize=9, loc="left")


def _unformatted(text: str) -> str:
    """As it reads: two dollar signs would make a formula of it."""
    return text.replace("$", r"\$")
