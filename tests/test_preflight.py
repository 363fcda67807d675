"""Bad input is refused before anything starts, and each refusal says what to do."""

import importlib.util
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from buffer.config import BufferConfig
from buffer.server import RedisServer
from cluster.__main__ import main
from cluster.config.file import load_config, resolved_toml
from cluster.run.directory import RunDirectory
from lm.adapter import save_adapter
from lm.config import LMConfig, LoRAConfig
from lm.model import attach_adapter, load_base

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "seed_lm" / "model"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder = tmp_path_factory.mktemp("redis")
    running = RedisServer.start(folder, run="preflight", config=BufferConfig())
    yield running
    running.stop(timeout_s=30)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `amortize train` says as it refuses; it must have left nothing behind."""
    assert main(["train", "tasks/arithmetic.toml", "--run", "mine", *arguments]) == 1
    assert not Path("runs/mine/state.json").exists()
    said = capsys.readouterr().err
    assert said.startswith("amortize train: ") and "Traceback" not in said
    return said


def test_a_data_file_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "task.questions=nowhere.json")
    assert 'task.questions = "nowhere.json": no such file' in said


def test_a_data_file_with_a_malformed_item(capsys: pytest.CaptureFixture[str]) -> None:
    good = {"str_query": "Question: 6 - 0 = ? Answer:", "num_sol": 6}
    for key in ("questions", "demonstrations"):
        Path("bad.json").write_text(json.dumps([good, good | {"num_sol": "six"}]))
        said = refusal(capsys, f"task.{key}=bad.json")
        assert "bad.json: item 2" in said and "num_sol" in said


def test_a_test_file_with_a_malformed_item(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text('[{"str_query": "How much is 2 + 2?", "num_sol": 4}]')
    assert "bad.json: item 1" in refusal(capsys, 'task.tests=["bad.json"]')


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refusal(capsys, "lm.model=./nowhere")


def test_a_folder_that_holds_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert "is no model folder" in refusal(capsys, "lm.model=./empty")


def test_more_ranks_than_the_machine_has_room_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "cluster.cpus=2", "learner.ranks=9", "reward.ranks=1")
    assert "9 learner ranks" in said and "but there are 2" in said and "lower" in said


def test_one_process_that_should_be_several(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "--local", "reward.ranks=2", "learner.ranks=1")
    assert "reward.ranks = 2" in said and "leave --local out" in said


def test_an_engine_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None)
    vllm = 'actors.engine="vllm"'
    said = refusal(capsys, "--local", vllm)
    assert "vLLM is not installed here" in said and "pip install -e '.[vllm]'" in said
    said = refusal(capsys, "--local", vllm, 'buffer.kind="memory"')
    assert 'set actors.engine to "native"' in said


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refusal(capsys, f"buffer.port={port}")


def test_a_wrong_redis_password(
    capsys: pytest.CaptureFixture[str], server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMORTIZE_REDIS_PASSWORD", "guess")
    said = refusal(capsys, f"buffer.url={server.url}")
    assert "password" in said and server.password not in said and "guess" not in said


def test_a_redis_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    assert url in refusal(capsys, f"buffer.url={url}", "buffer.timeout_s=1.0")


def test_a_run_that_exists_and_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert "it has: none" in refusal(capsys, "--resume")
    RunDirectory("mine").path.mkdir(parents=True)
    assert "add --resume" in refusal(capsys)


def test_a_run_that_another_process_drives(capsys: pytest.CaptureFixture[str]) -> None:
    driven = RunDirectory("mine")
    driven.begin(resume=False)
    driven.config_file.write_text(resolved_toml(load_config("tasks/arithmetic.toml")))
    assert "amortize stop --run mine" in refusal(capsys, "--resume")
    driven.end()


def test_an_adapter_of_another_base(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(MODEL, "other")
    base = load_base(LMConfig(model="other"))
    with torch.no_grad():
        next(base.model.parameters()).add_(1.0)
    base.model.save_pretrained("other")
    other = load_base(LMConfig(model="other"))
    adapted = attach_adapter(other, LoRAConfig(rank=2), seed=0)
    save_adapter(adapted, Path("adapter"), other.fingerprint)
    assert main(["evaluate", "tasks/arithmetic.toml", "--adapter", "adapter"]) == 1
    assert "was trained on base" in capsys.readouterr().err


def test_a_run_cannot_start_from_an_adapter_that_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "nowhere holds no adapter" in refusal(capsys, "learner.start_from=nowhere")
    base = load_base(LMConfig(model=str(MODEL)))
    save_adapter(attach_adapter(base, LoRAConfig(rank=2), seed=0), Path("mine"), base.fingerprint)
    said = refusal(capsys, "learner.start_from=mine", "lora.rank=4")
    assert "rank 2" in said and "rank 4" in said and "learner.start_from" in said


def test_a_folder_that_holds_no_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    Path("adapter").mkdir()
    assert main(["evaluate", "tasks/arithmetic.toml", "--adapter", "adapter"]) == 1
    assert "adapter holds no adapter" in capsys.readouterr().err
