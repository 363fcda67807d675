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

Colours = Sequence[tuple[str, str]]  # a name and a colour for each of the pictures' K policies


def draw_posterior(
    pictures: Sequence[tuple[str, Picture]], path: Path, *, policy: str, beside_base: bool
) -> None:
    """Write the PNG: bars for the completions that matter if they are few, else q against p.

    Args:
        pictures: of each prompt that was enumerated, with its title; at least one.
        beside_base: the pictures hold the base LM's q after the policy's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = [(policy, _POLICY), ("base", _BASE)] if beside_base else [(policy, _BASE)]
    chosen = [_of_interest(picture) for _, picture in pictures]
    if all(map(len, chosen)):
        figure = _bars(pictures[:_MOST_PANELS], chosen, colours)
    else:
        figure = _scatter([picture for _, picture in pictures], colours)
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
    texts = [picture.texts[at] for at in chosen.tolist()]
    order = [int(text) for text in texts] if _are_integers(texts) else -p_N[chosen]
    return chosen[np.argsort(order, kind="stable")]


def _are_integers(texts: Sequence[str]) -> bool:
    plain = [text.strip().removeprefix("-") for text in texts]
    return all(text.isdecimal() and text.isascii() for text in plain)


def _bars(
    pictures: Sequence[tuple[str, Picture]], chosen: Sequence[NDArray[np.intp]], colours: Colours
) -> Figure:
    """A panel for each prompt: bars for q of each policy, lines for p."""
    height = _PANEL_INCHES * len(pictures)
    figure, panels = new_figure(_WIDTH_INCHES, height, panels=len(pictures))
    width = 0.84 / len(colours)
    for axes, (title, picture), at in zip(panels, pictures, chosen, strict=False):
        places = np.arange(len(at))
        for number, (name, colour) in enumerate(colours):
            q_N = np.exp(picture.posterior.support.log_q_KN[number][at])
            shift = (number - (len(colours) - 1) / 2) * width
            axes.bar(places + shift, q_N, width, color=colour, label=f"q, {name}")
        p_N = np.exp(picture.posterior.log_p_N[at])
        ends = (places - 0.5, places + 0.5)
        axes.hlines(p_N, *ends, color=_POSTERIOR, linewidth=1.6, label="p, exact")
        _title(axes, title)
        axes.set_ylabel("probability")
        axes.set_xlim(-0.8, max(len(at), _FEWEST_PLACES) - 0.2)
        _label(axes, [picture.texts[n] for n in at])
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _label(axes: Axes, texts: Sequence[str]) -> None:
    crowded = len(texts) > _MOST_LABELS
    if crowded and not _are_integers(texts):
        axes.set_xlabel("completions, by probability")
        return
    shown = range(0, len(texts), 10 if crowded else 1)
    labels = [_short(texts[at]) for at in shown]
    upright = max(len(label) for label in labels) > 3
    axes.set_xticks(shown, labels, rotation=90 if upright else 0, fontsize=6)


def _short(text: str) -> str:
    """Without the space that tokens begin with."""
    shown = text.strip() or "(empty)"
    return _plain(shown if len(shown) <= _LONGEST_LABEL else f"{shown[: _LONGEST_LABEL - 1]}…")


def _scatter(pictures: Sequence[Picture], colours: Colours) -> Figure:
    """q against p of every completion of all prompts, in powers of ten."""
    figure, [axes] = new_figure(_SCATTER_INCHES, _SCATTER_INCHES)
    posteriors = [picture.posterior for picture in pictures]
    p_N = np.exp(np.concatenate([posterior.log_p_N for posterior in posteriors]))
    q_KN = np.exp(np.concatenate([posterior.support.log_q_KN for posterior in posteriors], axis=1))
    for q_N, (name, colour) in reversed(list(zip(q_KN, colours, strict=True))):
        seen_N = np.maximum(p_N, q_N) > _SMALLEST
        x, y = (np.maximum(values_N[seen_N], _SMALLEST) for values_N in (p_N, q_N))
        axes.scatter(x, y, s=6, color=colour, alpha=0.6, linewidths=0, label=f"q, {name}")
    axes.plot([_SMALLEST, 1], [_SMALLEST, 1], color=_POSTERIOR, linewidth=1.2, label="q = p")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("p, exact posterior")
    axes.set_ylabel("q")
    _title(axes, f"{len(pictures)} prompts, {len(p_N)} completions")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _title(axes: Axes, title: str) -> None:
    axes.set_title(_plain(title), fontsize=9, loc="left")


def _plain(text: str) -> str:
    """As it reads: two dollar signs would make a formula of it."""
    return text.replace("$", r"\$")
