"""Prompts to continue in text files: UTF-8, one prompt of one to three sentences in each line."""

from pathlib import Path

from tasks.arithmetic_data import DataError

LONGEST = 2000  # characters of a prompt
_TOLD = 20  # bad lines that an error lists


def load_prompts(path: str) -> tuple[str, ...]:
    """All prompts of a file, blanks at their ends taken off; raises DataError with the bad lines.

    A line is bad when it is empty, longer than LONGEST characters, or holds a control character.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: not text in UTF-8: {error}; convert it") from error
    prompts, wrong = [], []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        prompt = line.strip()
        if fault := _fault(prompt):
            wrong.append(f"{path}:{number}: {fault}")
        prompts.append(prompt)
    if wrong:
        more = [f"... and {len(wrong) - _TOLD} more"] if len(wrong) > _TOLD else []
        raise DataError("\n".join([*wrong[:_TOLD], *more]))
    return tuple(prompts)


def _fault(prompt: str) -> str:
    if not prompt:
        return "empty; write a prompt of one to three sentences in every line"
    if len(prompt) > LONGEST:
        return f"{len(prompt)} characters; a prompt has {LONGEST} at most"
    bad = [character for character in prompt if ord(character) < 32]
    return f"holds the control character {bad[0]!r}; take it out" if bad else ""
