"""Pages that stand alone: one file that shows a run, with nothing fetched from anywhere.

A language model wrote part of the text, so every text passes `escaped`, and the page's own policy
forbids scripts and loading, in case an escape was forgotten.
"""

import base64
import html
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cluster.reports.score_table import after_title, note, pairs, rows
from cluster.run.directory import write_whole
from tasks.evaluation.evaluation import Scores


def write_report(path: Path, scores: Scores, *, title: str, **shown: Any) -> None:
    """Write the page of a run; `shown` are its `facts`, `config`, and `plots`, PNG files to embed
    under their names."""
    both = scores.before, scores.after
    shown |= {"rows": rows(*both), "note": note(*both), "pairs": pairs(*both)}
    after = after_title(scores.after)
    write_html(path, "report.html", title=title, after_title=after, **shown)


def write_html(path: Path, template: str, **context: Any) -> None:
    """Write a template of this room, filled; every page has a `title`."""
    environment = page_environment("cluster.reports")
    environment.filters["base64"] = lambda file: base64.b64encode(file.read_bytes()).decode()
    environment.filters["caption"] = lambda file: file.stem.replace("_", " ")
    write_whole(path, environment.get_template(template).render(**context))


def page_environment(package: str) -> Environment:
    """Templates of a package; no text reaches a page but through `escaped`."""
    return templates(
        package,
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(str(value))),
    )


def templates(package: str, **settings: Any) -> Environment:
    """Of a package; one that names what it is not given is an error."""
    settings |= {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=PackageLoader(package), **settings)


def escaped(text: str) -> str:
    """`text` for any place in HTML."""
    return html.escape(visible(text))


def visible(text: str) -> str:
    """`text` with the characters that hide or turn text written out, such as \\u{202e}."""
    # Control, format (such as right-to-left override), surrogate and unassigned characters.
    return "".join(
        f"\\u{{{ord(character):x}}}"
        if unicodedata.category(character)[0] == "C" and character not in "\n\t"
        else character
        for character in text
    )
