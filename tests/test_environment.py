"""What the caller has set changes neither the tests nor `make run`, and his folders stay empty."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Tests that make run directories, call verbs, and read shipped files by name.
TRIED = ("test_rundir.py", "test_preflight.py", "test_random_number.py")


def hostile(folder: Path) -> dict[str, str]:
    """The variables of somebody with a cluster, a job of his own and a broken home."""
    home = folder / "home"
    home.mkdir(mode=0o555)
    (folder / "runs").mkdir()
    proxy = "http://127.0.0.1:1"
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(folder / "not there"),
        "AMORTIZE_RUNS": str(folder / "runs"),
        "RAY_ADDRESS": "10.255.255.1:6379",
        "RAY_AUTH_MODE": "token",
        "HF_HOME": "/dev/null/hf",
        "TRANSFORMERS_VERBOSITY": "debug",
        "OMP_NUM_THREADS": "7",
        "CUDA_VISIBLE_DEVICES": "9",
        "DS_ACCELERATOR": "cuda",
        **dict.fromkeys(("http_proxy", "HTTPS_PROXY", "all_proxy"), proxy),
        **{"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"},
        **{"COLUMNS": "20", "PYTHONPATH": "/dev/null", "MPLBACKEND": "tkagg"},
    }


@pytest.mark.slow
def test_the_tests_pass_in_any_environment_and_leave_nothing_there(tmp_path: Path) -> None:
    variables = hostile(tmp_path)
    standing = tmp_path / "elsewhere"
    standing.mkdir()
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(ROOT / "tests" / name) for name in TRIED)],
        cwd=standing,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for folder in ("runs", "home", "elsewhere"):
        assert not any((tmp_path / folder).iterdir()), folder


def test_make_run_drops_what_the_caller_has_set(tmp_path: Path) -> None:
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\necho "$@"\nenv\n')
    shown.chmod(0o755)
    # Not set up anew: the stamp counts as made long ago, and as needing nothing.
    make = ["make", "-s", "-o", ".venv/.set-up", "run", f"python={shown}", "ARGS=--run mine"]
    variables = hostile(tmp_path)
    said = subprocess.check_output(make, cwd=ROOT, env=variables, text=True).splitlines()
    assert "-m cluster train tasks/arithmetic.toml --run mine" in said
    seen = {line.partition("=")[0] for line in said if "=" in line}
    assert variables.keys() & seen == {"PATH", "HOME", "TMPDIR", "CUDA_VISIBLE_DEVICES"}
