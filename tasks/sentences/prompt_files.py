"""Prompts to continue in text files: UTF-8, one prompt of one to three sentences in each line.

With their next sentences, to be imitated, they come in JSON Lines:

    {"prompt": "It rained at noon.", "next": "The captain was tired."}
"""

import json

from tasks.data_error import read_text, refuse

LONGEST = 2000  # characters of a prompt
PROMPT, NEXT = "prompt", "next"  # keys of JSON Lines


def load_prompts(path: str) -> tuple[str, ...]:
    """All prompts of a file, blanks at their ends taken off; raises DataError with the bad lines.

    A line is bad when it is empty, longer than LONGEST characters, or holds a control character.
    """
    prompts, wrong = [], []
    for number, line in enumerate(_lines(path), start=1):
        prompt = line.strip()
        if fault := _fault(prompt):
            wrong.append(f"{path}:{number}: {fault}")
        prompts.append(prompt)
    refuse(wrong)
    return tuple(prompts)


def load_continued(path: str) -> tuple[tuple[str, str], ...]:
    """All prompts of a file with their next sentences; raises DataError with the bad lines.

    A line is bad when it is no object with the keys "prompt" and "next", or when either is what
    `load_prompts` would refuse. Other keys are ignored.
    """
    pairs, wrong = [], []
    for number, line in enumerate(_lines(path), start=1):
        read = _pair(line)
        if isinstance(read, str):
            wrong.append(f"{path}:{number}: {read}")
        else:
            pairs.append(read)
    refuse(wrong)
    return tuple(pairs)


def _pair(line: str) -> tuple[str, str] | str:
    """Prompt and next sentence, or what is wrong with the line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON: {error}"
    texts = []
    for key in (PROMPT, NEXT):
        text = row.get(key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            return f'no text under "{key}"; write {{"{PROMPT}": "...", "{NEXT}": "..."}}'
        if fault := _fault(text.strip()):
            return f'under "{key}": {fault}'
        texts.append(text.strip())
    return texts[0], texts[1]


def _lines(path: str) -> list[str]:
    return read_text(path).removesuffix("\n").split("\n")


def _fault(prompt: str) -> str:
    if not prompt:
        return "empty; write a prompt of one to three sentences in every line"
    if len(prompt) > LONGEST:
        return f"{len(prompt)} characters; a prompt has {LONGEST} at most"
    bad = [character for character in prompt if ord(character) < 32]
    return f"holds the control character {bad[0]!r}; take it out" if bad else ""
