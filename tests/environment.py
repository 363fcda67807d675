"""The environment of the tests is their own, whatever the caller exports and wherever he stands.

tests/conftest.py takes it on before anything of ours is imported: some variables are read then.
Child processes inherit it.
"""

import os
import shutil
import tempfile
from pathlib import Path

# Set where no test may be skipped for want of a program or a permission, as on CI.
ALL = "AMORTIZE_TEST_ALL"
# A folder of a language model, for a test that takes the seed LM otherwise.
MODEL = "AMORTIZE_TEST_MODEL"
# What the caller says of the machine and of pytest itself; all else he says is dropped.
_KEPT = frozenset({"PATH", "LD_LIBRARY_PATH", "USER", "LOGNAME", "SHELL", "TERM", "CI", ALL, MODEL})
_KEPT_PREFIXES = ("PYTEST_", "COVERAGE_", "COV_")


class OwnEnvironment:
    """A home and a working directory that last as long as the tests of this process."""

    def __init__(self) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _KEPT or name.startswith(_KEPT_PREFIXES)
        }
        os.environ.clear()
        os.environ.update(kept)
        tempfile.tempdir = None  # TMPDIR may have been looked up already
        self._folder = Path(tempfile.mkdtemp(prefix="amortize-tests-"))
        self._home = self._folder / "home"
        self.working_directory = self._folder / "work"
        for folder in (self._home, self.working_directory):
            folder.mkdir()
        os.environ |= {
            "HOME": str(self._home),
            "LANG": "C.UTF-8",
            # Each process computes on one core: a test beside it has another.
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(__file__).parents[1] / ".hypothesis"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray is nice by 15: its workers would starve beside tests that are not.
            "RAY_worker_niceness": "0",
        }

    def remove(self) -> None:
        """Delete both folders."""
        shutil.rmtree(self._folder, ignore_errors=True)
