"""Text that a language model wrote, made fit for a page."""

import html
import unicodedata


def escaped(text: str) -> str:
    """`text` for any place in HTML; characters that hide or turn text are written out."""
    return html.escape("".join(_visible(character) for character in text), quote=True)


def _visible(character: str) -> str:
    # Control, format (such as right-to-left override), surrogate and unassigned characters.
    if unicodedata.category(character)[0] == "C" and character not in "\n\t":
        return f"\\u{{{ord(character):x}}}"
    return character
