"""`report.html`: one file that shows a run, with nothing fetched from anywhere.

A language model wrote part of the text, so everything is escaped, and the page's own policy
forbids scripts and loading, in case an escape was forgotten.
"""

import base64
import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.reports.score_table import rows
from cluster.run.directory import write_whole
from tasks.evaluation.evaluation import Evaluation, Example

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --dim: #667483; --line: #dde3e9;
        --card: #fff; --page: #f5f7f9; --good: #17713d; --bad: #a4342a; --accent: #1f5a96; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --dim: #93a0ad; --line: #33404c; --card: #1b242d; --page: #12181e;
          --good: #63c78c; --bad: #ef8b7f; --accent: #7db4ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; }
header p { color: var(--dim); margin: .3rem 0 0; }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.4rem 0 0; padding: 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
             padding: .6rem .9rem; }
dt { color: var(--dim); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
table { border-collapse: collapse; width: 100%; background: var(--card);
        border: 1px solid var(--line); border-radius: 8px; }
th, td { padding: .45rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--dim); font-weight: 500; font-size: .85rem; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.gained { color: var(--good); font-weight: 600; }
.right { color: var(--good); } .wrong { color: var(--bad); }
code, pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere;
            white-space: pre-wrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
      padding: .9rem 1rem; margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px;
         padding: .6rem; color: #1c2733; }
figure img { width: 100%; display: block; } figcaption { font-size: .85rem; }
.scroll { overflow-x: auto; }
summary { cursor: pointer; color: var(--accent); }
"""


def write_report(
    path: Path,
    *,
    run: str,
    facts: Mapping[str, str],
    config: str,
    before: Evaluation | None,
    after: Evaluation | None,
    plots: Sequence[Path],
) -> None:
    """Write the page.

    Args:
        facts: a few figures for the top, such as steps, duration, trajectories/s.
        config: the resolved configuration, as text.
        plots: PNG files; each is embedded, and its file's name captions it.
    """
    parts = [
        head(run, "GFlowNet fine-tuning of a language model"),
        _facts(facts),
        _table(before, after),
        _examples(before, after),
        figures("Curves", plots),
        f"<h2>Configuration</h2><details><summary>resolved, defaults included</summary>"
        f"<pre>{escaped(config)}</pre></details></main></body></html>\n",
    ]
    write_whole(path, "\n".join(part for part in parts if part))


def head(title: str, subtitle: str) -> str:
    """The page up to and with its heading; `</main></body></html>` ends it."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p></header>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    cells = (
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _table(before: Evaluation | None, after: Evaluation | None) -> str:
    lines = [
        f"<tr><td>{escaped(row.label)}</td>"
        f'<td class="number">{escaped(row.items)}</td>'
        f'<td class="number">{escaped(row.before)}</td>'
        f'<td class="number{" gained" if row.gained else ""}">{escaped(row.after)}</td></tr>'
        for row in rows(before, after)
    ]
    if not lines:
        return ""
    return (
        '<h2>Before and after</h2><div class="scroll"><table><tr><th></th>'
        '<th class="number">items</th><th class="number">before</th><th class="number">after</th>'
        f"</tr>{''.join(lines)}</table></div>"
    )


def _examples(before: Evaluation | None, after: Evaluation | None) -> str:
    old = {example.question: example for example in before.examples} if before else {}
    new = {example.question: example for example in after.examples} if after else {}
    lines = list(_example_lines(old, new))
    if not lines:
        return ""
    return (
        '<h2>Rationales</h2><div class="scroll"><table><tr><th>question</th><th>before</th>'
        f"<th>after</th></tr>{''.join(lines)}</table></div>"
    )


def _example_lines(old: Mapping[str, Example], new: Mapping[str, Example]) -> Iterator[str]:
    for question in dict.fromkeys([*new, *old]):
        cells = "".join(f"<td>{_example(board.get(question))}</td>" for board in (old, new))
        truth = (new.get(question) or old[question]).truth
        yield (f"<tr><td><code>{escaped(question)}</code><br>{escaped(truth)}</td>{cells}</tr>")


def _example(example: Example | None) -> str:
    if example is None:
        return ""
    mark = "right" if example.right else "wrong"
    answer = escaped(example.answer) if example.answer else "no answer that can be read"
    return f'<code>{escaped(example.rationale)}</code><br><span class="{mark}">{answer}</span>'


def figures(heading: str, plots: Sequence[Path]) -> str:
    """PNG files below a heading, embedded; nothing where there are none."""
    if not plots:
        return ""
    shown = []
    for plot in plots:
        caption = escaped(plot.stem.replace("_", " "))
        data = base64.b64encode(plot.read_bytes()).decode("ascii")
        shown.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<h2>{escaped(heading)}</h2><div class="plots">{"".join(shown)}</div>'


def escaped(text: str) -> str:
    """`text` for any place in HTML."""
    return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
    """`text` with the characters that hide or turn text written out, such as \\u{202e}."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    # Control, format (such as right-to-left override), surrogate and unassigned characters.
    if unicodedata.category(character)[0] == "C" and character not in "\n\t":
        return f"\\u{{{ord(character):x}}}"
    return character
