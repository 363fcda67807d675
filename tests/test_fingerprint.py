"""One source for all processes of a run: how it is told, brought to workers, and insisted on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.distributed.source_check import (
    PACKAGES,
    SourceMixture,
    check_source,
    source_fingerprint,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project of the same shape."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "code.py").write_text(f"# {package}\n")
    (tmp_path / "buffer" / "lua").mkdir()
    (tmp_path / "buffer" / "lua" / "store.lua").write_text("return 1\n")
    (tmp_path / "tasks" / "arithmetic.toml").write_text("seed = 0\n")
    return tmp_path


def fingerprint(project: Path) -> str:
    source_fingerprint.cache_clear()
    return source_fingerprint(project)


@pytest.mark.parametrize("name", ["lm/code.py", "buffer/lua/store.lua", "tasks/arithmetic.toml"])
def test_a_change_to_code_script_or_configuration_shows(project: Path, name: str) -> None:
    before = fingerprint(project)
    original = (project / name).read_text()
    (project / name).write_text(original + "\n")
    assert fingerprint(project) != before
    (project / name).write_text(original)
    assert fingerprint(project) == before


def test_a_new_name_and_a_moved_end_of_file_show(project: Path) -> None:
    seen = {fingerprint(project)}
    (project / "lm" / "code.py").rename(project / "lm" / "other.py")
    seen.add(fingerprint(project))
    (project / "lm" / "another.py").write_text("")
    seen.add(fingerprint(project))
    (project / "lm" / "another.py").write_text("# lm\n")
    (project / "lm" / "other.py").write_text("")
    seen.add(fingerprint(project))
    assert len(seen) == 4


def test_what_is_no_source_does_not_show(project: Path) -> None:
    before = fingerprint(project)
    (project / "lm" / "__pycache__").mkdir()
    (project / "lm" / "__pycache__" / "code.cpython-311.pyc").write_bytes(b"\x00")
    (project / "runs").mkdir()
    (project / "runs" / "config.toml").write_text("")
    (project / "tasks" / "notes.md").write_text("")
    assert fingerprint(project) == before


def test_a_mixture_is_refused_with_the_node_and_both_fingerprints(project: Path) -> None:
    found = fingerprint(project)
    check_source(found, node="10.0.0.7", root=project)
    with pytest.raises(SourceMixture) as refusal:
        check_source("0123456789ab", node="10.0.0.7", root=project)
    for part in ("10.0.0.7", found, "0123456789ab", "--working-dir"):
        assert part in str(refusal.value)


EDITED_MEANWHILE = """
import sys
from pathlib import Path
import ray
from cluster.distributed.services import WeightStoreService
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT
from cluster.distributed.source_check import source_fingerprint
from cluster.distributed.worker_group import StartFailed
from cluster.distributed.ray_cluster import connect_ray
from cluster.run.directory import RunDirectory
from cluster.distributed.session import RaySession
from cluster.run.session import BufferAddress

assert PROJECT_ROOT == Path(sys.argv[1]), PROJECT_ROOT
connect_ray(load_config("tasks/arithmetic.toml", ["cluster.cpus=1"]), None, "test")
mine = source_fingerprint()
with (PROJECT_ROOT / "buffer" / "priority.py").open("a") as file:
    file.write("raise RuntimeError('edited while the run goes on')\\n")
source_fingerprint.cache_clear()
assert source_fingerprint() != mine
store = ray.remote(WeightStoreService).options(num_cpus=0).remote()
ray.get(store.check_source.remote(mine), timeout=200)

session = RaySession(  # its source is the edited one
    load_config("tasks/arithmetic.toml", ["cluster.cpus=1"]),
    RunDirectory("mixed"),
    BufferAddress(url="redis://127.0.0.1:1/0", password=None),
    cluster=ray.get_runtime_context().gcs_address,
)
try:
    session.open()
except StartFailed as refusal:
    print(refusal)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_edit_while_a_run_goes_on_reaches_no_worker_and_no_run_mixes_both(
    tmp_path: Path,
) -> None:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    done = subprocess.run(
        [sys.executable, "-c", EDITED_MEANWHILE, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=240,
    )
    edited = fingerprint(tmp_path)
    assert re.search(rf"weight store: SourceMixture: .*{edited}", done.stdout), done.stdout
