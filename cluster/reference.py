"""Reference of the configuration: `python -m cluster.reference > docs/configuration.md`."""

from cluster.config_file import keys

_HEAD = """\
# Configuration

A run is configured by one TOML file. Sections are tables, and every key can be changed on the
command line as `section.key=value`, with the value as in TOML (a text needs no quotes). Unknown
keys and wrong types are errors. What a run used, defaults included, is in `runs/NAME/config.toml`.

Written by `python -m cluster.reference`; a test keeps it up to date.
"""


def reference() -> str:
    """All keys with their defaults, a table for each section."""
    lines = [_HEAD]
    section = None
    for key, default, description in keys():
        table, _, name = key.rpartition(".")
        if table != section:
            section = table
            lines += [f"\n## {f'[{table}]' if table else 'top level'}\n"]
            lines += ["| key | default | meaning |", "|---|---|---|"]
        lines.append(f"| `{name}` | {_code(default)} | {_cell(description)} |")
    return "\n".join(lines) + "\n"


def _code(default: str) -> str:
    return {"required": "required", "null": "none"}.get(default, f"`{default}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(reference(), end="")
