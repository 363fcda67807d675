"""Verifiers of somebody's own, good and bad ones, for the tests of reward terms."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any


def share_of_c(text: str, record: dict[str, Any]) -> float:
    print("said by a verifier")  # which must not pass for an answer
    return text.count("c") / max(len(text), 1)


def misbehaves(text: str, record: dict[str, Any]) -> Any:
    """As the text says: on "once", only while the file that the record names is not there."""
    marker = Path(record["marker"])
    with marker.open("a") as seen:
        seen.write(f"{text}\n")
    times = marker.read_text().splitlines().count(text)
    behaviour, _, once = text.partition(" ")
    if once and times > 1:
        return 1.0
    match behaviour:
        case "raises":
            raise ValueError("no verdict")
        case "hangs":
            time.sleep(60)
        case "forks":
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            child.join()
        case "dies":
            os._exit(3)
        case "leaves":
            raise SystemExit(0)
        case "says":
            return {"nan": float("nan"), "much": 1.5, "text": "1", "list": [1]}[record["word"]]
    return 0.5


def hangs(text: str, record: dict[str, Any]) -> float:
    time.sleep(60)
    return 1.0


def shouts(text: str) -> str:
    return " " + text.split()[-2].upper() if "?" not in text else ""


def answers(text: str) -> str:
    """In capitals what the newest tag holds; nothing where that is "no"."""
    asked = text.rpartition("<b>")[2].partition("</b>")[0]
    return "" if asked == "no" else f" {asked.upper()}"


def ponders(text: str) -> str:
    """For a while, or for ever where there is an x."""
    time.sleep(60 if "x" in text else 0.2)
    return text


def is_silent(text: str) -> int:
    return 7
