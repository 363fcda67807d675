"""cluster/local.yaml and cluster/gpu.yaml as files: Ray's schema, and what they have in common."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.page import commands

ROOT = Path(__file__).resolve().parent.parent
FILES = ("cluster/local.yaml", "cluster/gpu.yaml")


def read(file: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / file).read_text()))


@pytest.mark.parametrize("file", FILES)
def test_the_file_as_shipped_fits_rays_schema(file: str) -> None:
    validate_config(prepare_config(read(file)))


def test_a_key_that_ray_does_not_know_would_be_noticed() -> None:
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(read("cluster/local.yaml") | {"idle_timeout": 5}))


@pytest.mark.parametrize("file", FILES)
def test_nodes_get_the_token_and_the_pins_and_no_code(file: str) -> None:
    mounts = read(file)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    # Where machines are one's own, the token of the hub is there; where they boot, it travels.
    hub = mounts.pop("~/.cache/huggingface/token", None)
    assert (hub is not None) == (file == "cluster/gpu.yaml")
    assert mounts == {
        "~/amortize/pyproject.toml": "pyproject.toml",
        "~/amortize/constraints.txt": "constraints.txt",
    }


@pytest.mark.parametrize("file", FILES)
def test_every_dependency_is_asked_for_on_a_node(file: str, tmp_path: Path) -> None:
    node = tmp_path / "amortize"
    (node / "venv").mkdir(parents=True)
    (node / "venv" / "bin").symlink_to(Path(sys.executable).parent)
    shutil.copy(ROOT / "pyproject.toml", node)
    config = read(file)
    setup = config["setup_commands"] + config.get("head_setup_commands", [])
    (line,) = (one for one in setup if "tomllib" in one)
    line = line.replace("/srv/amortize/", f"{node}/")
    subprocess.run(["bash", "-c", line], env=os.environ | {"HOME": str(tmp_path)}, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (node / "requirements.txt").read_text().splitlines() == project["dependencies"]


@pytest.mark.parametrize("file", FILES)
def test_ray_starts_with_the_token_a_loopback_dashboard_and_time_for_an_orderly_stop(
    file: str,
) -> None:
    config = read(file)
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token" in head and "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in head
    assert "RAY_JOB_STOP_WAIT_TIME_S=120" in head
    assert "AMORTIZE_RUNS=/srv/amortize/runs" in head


def test_the_page_names_both_files_and_nothing_that_is_not_there() -> None:
    named = {
        word for line in commands("docs/cluster.md") for word in line.split() if ".yaml" in word
    }
    assert named == {*FILES, "cluster/kuberay.yaml"}
    for line in commands("docs/cluster.md"):
        for word in line.split():
            assert not word.startswith("tasks/") or (ROOT / word).exists(), line
