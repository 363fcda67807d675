"""The command line of a benchmark that measures cases one by one, on one thread."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Case = TypeVar("Case")


def run_cases(
    description: str, measure: Callable[[Case, int], dict[str, object]], cases: Sequence[Case]
) -> None:
    """Measure every case in `--repeats` rounds; print a line for each, or one object (`--json`)."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of each side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in cases:
        rows.append(measure(case, arguments.repeats))
        if not arguments.json:
            print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))
