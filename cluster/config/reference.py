"""Reference of the configuration: `python -m cluster.config.reference > docs/configuration.md`."""

from cluster.config.schema import RunConfig
from cluster.config.validation import keys

_HEAD = """\
# Configuration

A run is configured by one TOML file. Sections are tables, and every key can be changed on the
command line as `section.key=value`, with the value as in TOML (a text needs no quotes). Unknown
keys and wrong types are errors. What a run used, defaults included, is in `runs/NAME/config.toml`.

Written by `python -m cluster.config.reference`; a test keeps it up to date.
"""


def reference() -> str:
    """All keys with their defaults, a table for each section."""
    lines = [_HEAD]
    heading = None
    for key in keys(RunConfig):
        table = f"[{key.section}]" if key.section else "top level"
        named = f'{table} with name = "{key.kind}"' if key.kind else table
        if heading != (heading := named):
            lines += [f"\n## {heading}\n", "| key | default | meaning |", "|---|---|---|"]
        default = {"required": "required", "null": "none"}.get(key.default, f"`{key.default}`")
        meaning = key.description.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{key.name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
