"""What of a run must outlive its cluster is in the bucket, whole, and another goes on from it."""

import argparse
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
import yaml
from moto.server import ThreadedMotoServer

from cluster.__main__ import main
from cluster.config.file import load_config
from cluster.config.project import PROJECT_ROOT, UserError
from cluster.experiments import suite
from cluster.experiments.compare import planned_member
from cluster.experiments.methods import ENDINGS
from cluster.run import mirror
from cluster.run.directory import BUCKET_VARIABLE, RunDirectory
from cluster.run.mirror import Bucket, Mirror, MirrorFailed, fetch, mirrored, must_fetch


def write(run: RunDirectory, *names: str) -> None:
    for name in names:
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory("first", root=tmp_path / "runs")
    write(directory, "config.toml", "metrics.jsonl", "adapter/adapter_model.safetensors")
    write(directory, "checkpoints/step-00000002/meta.json", "checkpoints/published")
    write(directory, "state.json", "driver.lock", "buffer/appendonly.aof")
    write(directory, "checkpoints/.partial-7/meta.json", "adapter/.cache/half")
    return directory


KEPT = {
    *("config.toml", "metrics.jsonl", "adapter/adapter_model.safetensors"),
    *("checkpoints/step-00000002/meta.json", "checkpoints/published"),
}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a stand-in for S3 on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
        **{"AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"},
        **{"AWS_ALLOW_HTTP": "true", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false"},
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="runs")
    yield "s3://runs/of-mine"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    urls = {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/bucket"}
    return urls.get(request.param) or str(request.getfixturevalue("s3"))


def test_what_is_mirrored_comes_back_and_nothing_else(
    url: str, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUCKET_VARIABLE, url)
    events: list[str] = []
    with mirrored(run, events.append):
        pass
    shutil.rmtree(run.path / "checkpoints/step-00000002")
    write(run, "checkpoints/step-00000004/meta.json")
    (run.path / "metrics.jsonl").write_text("longer than before")
    Mirror(run, Bucket(url, "first"), events.append).close()  # of a driver that came later
    shutil.rmtree(run.path)
    fetch(run)
    gone, new = "checkpoints/step-00000002/meta.json", "checkpoints/step-00000004/meta.json"
    assert files(run.path) == KEPT - {gone} | {new}
    assert (run.path / "metrics.jsonl").read_text() == "longer than before"
    assert (run.path / new).read_text() == f"this is {new}"
    with pytest.raises(FileNotFoundError):
        Bucket(url, "first").get(gone, tmp_path / "gone")
    assert not events


def test_a_run_that_is_here_or_nowhere_is_left_alone(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run.path)
    monkeypatch.setenv(BUCKET_VARIABLE, f"file://{tmp_path}/bucket")
    fetch(run)
    assert files(run.path) == before
    unknown = RunDirectory("unknown", root=tmp_path / "runs")
    fetch(unknown)
    assert not unknown.path.exists()
    monkeypatch.setenv(BUCKET_VARIABLE, "no-such-protocol://x")
    with pytest.raises(UserError, match="AMORTIZE_BUCKET = 'no-such-protocol://x' cannot be open"):
        fetch(unknown)


class Flaky:
    """A bucket that takes the first `good` files, and then fails, or for ever says nothing."""

    url = "s3://far/first"

    def __init__(self, bucket: Bucket, good: int, *, hangs: bool = False) -> None:
        self._bucket = bucket
        self.good = good
        self._hangs = hangs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bucket, name)

    def put(self, source: Path, name: str) -> None:
        self.good -= 1
        if self.good < 0 and self._hangs:
            threading.Event().wait(60.0)
        if self.good < 0:
            raise ConnectionError("no route to host")
        self._bucket.put(source, name)


def test_a_copy_that_is_cut_off_is_as_if_it_had_not_begun(
    run: RunDirectory, tmp_path: Path
) -> None:
    bucket = Bucket(f"file://{tmp_path}/bucket", "first")
    Mirror(run, bucket, print).close()
    write(run, "checkpoints/step-00000004/meta.json", "checkpoints/step-00000004/state.safetensors")
    with pytest.raises(MirrorFailed, match=r"s3://far/first \(AMORTIZE_BUCKET\) .*no route to hos"):
        Mirror(run, Flaky(bucket, 5), print).close()
    assert set(bucket.index()) == KEPT


def test_a_bucket_that_fails_is_told_once_and_tried_again(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_LOOK_S", 0.01)
    events: list[str] = []
    told = threading.Event()

    def report(event: str) -> None:
        events.append(event)
        told.set()

    bucket = Bucket(f"file://{tmp_path}/bucket", "first")
    flaky = Flaky(bucket, 0)
    copier = Mirror(run, flaky, report)
    assert told.wait(10.0)
    flaky.good = 100
    while not bucket.index():
        assert copier._thread.is_alive()
    copier.close()
    assert len(events) == 1 and "ConnectionError: no route to host; it goes on" in events[0]


def test_a_bucket_that_says_nothing_holds_nobody_up_for_longer_than_its_deadline(
    run: RunDirectory, tmp_path: Path
) -> None:
    bucket = Bucket(f"file://{tmp_path}/bucket", "first")
    with pytest.raises(MirrorFailed, match=r"not done after 0 s\): it is whole in .*runs/first"):
        Mirror(run, Flaky(bucket, 0, hangs=True), print).close(timeout_s=0.2)


def test_only_the_newest_checkpoint_is_copied_and_may_be_removed_meanwhile(
    run: RunDirectory, tmp_path: Path
) -> None:
    class Slow(Flaky):
        def put(self, source: Path, name: str) -> None:
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # the run is faster
            super().put(source, name)

    new = "checkpoints/step-00000004"
    write(run, f"{new}/meta.json", f"{new}/state.safetensors")
    bucket = Bucket(f"file://{tmp_path}/bucket", "first")
    Mirror(run, Slow(bucket, 100), print).close()
    steps = {name for name in bucket.index() if "step-" in name}
    assert steps == {f"{new}/meta.json", f"{new}/state.safetensors"}
    assert files(tmp_path / "bucket/first") == {*bucket.index(), "index.json"}
    assert not (run.path / ".mirror").exists()


def test_a_bucket_that_fails_in_many_ways_is_told_once(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_LOOK_S", 0.01)
    often = threading.Event()

    class Moody(Flaky):
        def put(self, source: Path, name: str) -> None:
            self.good += 1
            if self.good > 3:
                often.set()
            raise ConnectionError(f"failure {self.good}")

    events: list[str] = []
    copier = Mirror(run, Moody(Bucket(f"file://{tmp_path}/bucket", "first"), 0), events.append)
    assert often.wait(10.0)
    with pytest.raises(MirrorFailed):
        copier.close()
    assert len(events) == 1 and "failure 1; it goes on" in events[0]


@pytest.fixture
def elsewhere(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that only the bucket has; commands look for it where it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(BUCKET_VARIABLE, f"file://{tmp_path}/bucket")
    with mirrored(run, print):
        pass
    shutil.rmtree(run.path)
    return run


TRAIN = ["train", "tasks/toy.toml", "--local", "--run", "first"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_new_run_leaves_one_of_its_name_in_the_bucket(
    elsewhere: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    before = files(tmp_path / "bucket")
    assert main([*TRAIN, "learner.steps=1", *more]) == 1
    assert "bucket/first (AMORTIZE_BUCKET) has a run 'first': add" in capsys.readouterr().err
    assert files(tmp_path / "bucket") == before and not elsewhere.path.exists()


def test_a_folder_that_is_older_than_its_copy_does_not_go_on(elsewhere: RunDirectory) -> None:
    assert must_fetch(elsewhere, resume=True)
    fetch(elsewhere)
    assert not must_fetch(elsewhere, resume=True)
    with mirrored(elsewhere, print):
        write(elsewhere, "checkpoints/step-00000004/meta.json")
    shutil.rmtree(elsewhere.checkpoints / "step-00000004")
    write(elsewhere, "checkpoints/step-00000002/meta.json")
    with pytest.raises(UserError, match=r"has step-00000004, and .* has step-00000002: move the"):
        must_fetch(elsewhere, resume=True)


def test_a_bucket_that_does_not_answer_is_no_empty_one(
    elsewhere: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Bucket) -> list[str]:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Bucket, "index", fail)
    with pytest.raises(UserError, match=r"'first' could not be looked up .*: no route to host"):
        must_fetch(elsewhere, resume=False)


def test_a_dry_run_fetches_nothing_and_says_what_would_be(
    elsewhere: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--resume", "--dry-run"]) == 0
    assert "run 'first' is fetched first" in capsys.readouterr().out
    assert not elsewhere.path.exists()


def test_an_experiment_goes_on_with_runs_that_only_the_bucket_has(
    elsewhere: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(_: Any, directory: RunDirectory, *, resume: bool, **__: Any) -> None:
        assert resume and files(directory.path) == KEPT
        raise UserError("it goes on")

    monkeypatch.setattr(suite, "train", train)
    words = argparse.Namespace(run="several", resume=False, json=False, address=None, local=True)
    step = suite.Step("the first", "first", load_config("tasks/toy.toml", []))
    with pytest.raises(UserError, match="it goes on"):
        suite.Suite(words, stem="", endings="").take([step])


def test_an_experiment_goes_on_where_only_the_bucket_knows_its_runs(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compare` and `em` on a new cluster: their own folder is made anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(BUCKET_VARIABLE, url)
    made = RunDirectory("c-b-gflownet-0", root=tmp_path / "older")
    write(made, "config.toml", "scores.json")
    Mirror(made, Bucket(url, made.name), print).close()
    words = argparse.Namespace(run="c-b", resume=True, json=False, address=None, local=True)
    with suite.Suite(words, stem="compare", endings=ENDINGS).begun():
        assert RunDirectory("c-b").path.is_dir()
    for other in ("d", "c", "c-b-gf"):  # mistyped, or of a name that begins as this one
        words = argparse.Namespace(run=other, resume=True, json=False)
        with pytest.raises(UserError, match=f"no run '{other}'"):
            suite.Suite(words, stem="compare", endings=ENDINGS)


def test_the_runs_of_a_comparison_are_told_by_how_their_names_end() -> None:
    shared = load_config("tasks/toy.toml", [])
    titles = ["base", "tempered_T0.9", "ppo_tokens", "gflownet", "gflownet_em"]
    steps = [step for title in titles for step in planned_member(shared, title, 12, "c").steps]
    for run in ("c-sft-trial2", *(step.run for step in steps)):
        assert re.fullmatch(f"c-({ENDINGS})", run), run


def test_the_head_on_aws_asks_for_buckets_in_the_region_of_its_machines() -> None:
    cluster = yaml.safe_load((PROJECT_ROOT / "cluster/gpu.yaml").read_text())
    region = re.search(r"\bAWS_REGION=(\S+)", " ".join(cluster["head_start_ray_commands"]))
    assert region and region[1] == cluster["provider"]["region"]


@pytest.mark.slow
def test_a_run_goes_on_where_only_the_bucket_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(BUCKET_VARIABLE, f"file://{tmp_path}/bucket")
    train = ["train", "tasks/toy.toml", "--local", "--run", "first", "learner.warmup_steps=0"]
    assert main([*train, "learner.steps=2"]) == 0
    assert {"report.html", "scores.json"} < files(tmp_path / "bucket/first")
    shutil.rmtree("runs")
    assert main([*train, "learner.steps=4", "--resume"]) == 0
    rows = [json.loads(line) for line in Path("runs/first/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    files_there = fsspec.filesystem("file").glob(f"{tmp_path}/bucket/first/checkpoints/step-*")
    assert any(name.endswith("step-00000004") for name in files_there)
