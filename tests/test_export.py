"""An exported policy: other programs load it and compute what the policy does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cluster.__main__ import main
from cluster.config.file import load_config, resolved_toml
from cluster.run.directory import RunDirectory, first_state
from lm.adapter import FINGERPRINT_FILE, save_adapter
from lm.export import ExportRefused, push, whole_folder
from lm.model import attach_adapter, load_base
from lm.scoring import completion_log_probs
from tasks.evaluation.evaluation import Evaluation, Example, Metric, Scores
from tasks.registry import build_task

IDS = torch.arange(5, 25)[None]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("lm.export.get_token", lambda: None)


def finished_run(file: str, *overrides: str) -> Any:
    """A run called `mine` that has learned something; its policy, in memory."""
    config = load_config(file, overrides)
    run = RunDirectory("mine")
    run.path.mkdir(parents=True)
    run.config_file.write_text(resolved_toml(config))
    run.write_state(first_state("mine", steps=300).model_copy(update={"step": 200}))
    right = Metric(label="right", value=0.875, better="higher", items=40)
    found = Evaluation(
        task=config.task_name,
        temperature=1.0,
        step=200,
        metrics={"right": right},
        examples=(Example(question="1 + 2 =?", rationale="", answer="", truth="", right=True),),
    )
    run.scores_file.write_text(Scores(after=found).model_dump_json())
    base = load_base(config.lm)
    policy = attach_adapter(base, config.lora, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    save_adapter(policy, run.adapter, base.fingerprint)
    return policy


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_an_exported_adapter_gives_the_policy_in_plain_peft() -> None:
    policy = finished_run("tasks/arithmetic.toml")
    assert main(["export", "--run", "mine", "--to", "out/adapter"]) == 0
    base = AutoModelForCausalLM.from_pretrained(load_config("tasks/arithmetic.toml").lm.model)
    without = logits(base)
    loaded = PeftModel.from_pretrained(base, "out/adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(policy), rtol=1e-5, atol=1e-5)
    assert (logits(loaded) - without).abs().max() > 0.1
    # The folder says itself where its base is.
    alone = AutoPeftModelForCausalLM.from_pretrained("out/adapter").eval()
    torch.testing.assert_close(logits(alone), logits(policy), rtol=1e-5, atol=1e-5)
    written = Path("runs/mine/adapter") / FINGERPRINT_FILE
    assert (Path("out/adapter") / FINGERPRINT_FILE).read_text() == written.read_text()


def test_a_merged_model_gives_the_policy_in_plain_transformers() -> None:
    policy = finished_run("tasks/arithmetic.toml")
    assert main(["export", "--run", "mine", "--to", "out", "--merge"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained("out").eval()
    torch.testing.assert_close(logits(loaded), logits(policy), rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.decode(tokenizer.encode("1 + 2 =")) == "1 + 2 ="


@pytest.mark.parametrize("merge", [(), ("--merge",)])
def test_weights_are_written_in_the_dtype_that_is_asked_for(merge: tuple[str, ...]) -> None:
    policy = finished_run("tasks/arithmetic.toml")
    main(["export", "--run", "mine", "--to", "out", "--dtype", "bf16", *merge])
    (file,) = Path("out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    if merge:
        loaded = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
        assert loaded.dtype == torch.bfloat16
        assert (logits(loaded) - logits(policy)).abs().max() < 0.3
    assert "bfloat16 |" in Path("out/README.md").read_text()


def test_a_bfloat16_policy_in_float32_keeps_what_the_adapter_adds() -> None:
    policy = finished_run("tasks/toy.toml", "lm.dtype=bfloat16", "lm.device=cpu")
    main(["export", "--run", "mine", "--to", "out", "--merge", "--dtype", "fp32"])
    loaded = AutoModelForCausalLM.from_pretrained("out").eval()
    ids = torch.arange(4)[None]
    with torch.no_grad():
        exact = policy.float()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("min_len", [0, 2])
def test_plain_generate_draws_from_the_policy(min_len: int) -> None:
    policy = finished_run("tasks/toy.toml", f"task.min_len={min_len}")
    main(["export", "--run", "mine", "--to", "out", "--merge"])
    model = AutoModelForCausalLM.from_pretrained("out").eval()
    tokenizer = AutoTokenizer.from_pretrained("out")
    config = load_config("runs/mine/config.toml")
    task = build_task(config.task, tokenizer, seed=config.seed)
    prompt, stop = task.prompts[0].prompt, task.actions.stop_token
    torch.manual_seed(1)
    drawn = model.generate(
        torch.tensor([prompt] * 64),
        generation_config=GenerationConfig.from_pretrained("out"),
        return_dict_in_generate=True,
        output_scores=True,
    )
    new_BT = drawn.sequences[:, len(prompt) :]
    log_p_BTV = torch.log_softmax(torch.stack(drawn.scores, dim=1), dim=-1)
    log_p_BT = log_p_BTV.gather(-1, new_BT[..., None])[..., 0]
    completions, told = [], []
    for row, log_p in zip(new_BT.tolist(), log_p_BT.tolist(), strict=True):
        length = row.index(stop) if stop in row else len(row)
        completions.append(row[:length])
        told.append(sum(log_p[: length + 1]))
    assert len({tuple(one) for one in completions}) > 10
    found = completion_log_probs(
        policy,
        task.actions,
        [prompt] * 64,
        completions,
        [[False] * len(one) for one in completions],
    )
    ends = torch.tensor([len(one) for one in completions])[:, None]
    log_q_B = found.log_pf_BT.sum(dim=1) + found.log_stop_BS.gather(1, ends)[:, 0]
    torch.testing.assert_close(log_q_B.detach(), torch.tensor(told), rtol=0, atol=1e-4)


def test_the_card_says_what_it_is_and_how_it_did() -> None:
    finished_run("tasks/arithmetic.toml", "lm.bos=false")
    main(["export", "--run", "mine", "--to", "out"])
    card = Path("out/README.md").read_text()
    for said in (
        "library_name: peft",
        "| task | arithmetic |",
        "| data | demonstrations.json, questions.json |",
        "| objective | raptb, T = 1 |",
        "| steps | 200 of 300 |",
        "| adapter | LoRA, rank 8, alpha 16 |",
        "| right | 40 |  | 0.875 |",
        'tokenizer("1 + 2 =?", return_tensors="pt", add_special_tokens=False)',
        "--max-lora-rank 8",
        "They call no tool",
    ):
        assert said in card, said
    # A folder of this machine is no base that the hub knows.
    assert "base_model:" not in card and "{" not in card


def test_a_policy_of_whole_texts_has_no_settings_of_a_task() -> None:
    finished_run("tasks/subjectivity.toml", "learner.objective=sft")
    main(["export", "--run", "mine", "--to", "out"])
    assert not Path("out/generation_config.json").exists()
    assert "GenerationConfig" not in Path("out/README.md").read_text()


def test_nothing_is_overwritten_and_nothing_is_half_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished_run("tasks/toy.toml")
    Path("out").mkdir()
    Path("out/mine.txt").write_text("precious")
    assert main(["export", "--run", "mine", "--to", "out"]) == 1
    assert "out exists and holds something: name a new folder" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]
    Path("empty").mkdir()
    assert main(["export", "--run", "mine", "--to", "empty"]) == 0
    with pytest.raises(KeyError), whole_folder(Path("failed").absolute()) as partial:
        (partial / "half").write_text("")
        raise KeyError
    assert {path.name for path in Path().iterdir()} == {"runs", "out", "empty"}


def test_pushing_without_a_token_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    finished_run("tasks/toy.toml")
    assert main(["export", "--run", "mine", "--to", "out", "--push", "me/policy"]) == 1
    said = capsys.readouterr().err
    assert "no token of the Hugging Face hub; set HF_TOKEN" in said and not Path("out").exists()


def test_a_push_makes_a_private_repository_and_tells_what_the_hub_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, **how: Any) -> str:
            asked.append((repository, how))
            return f"https://hub/{repository}"

        def upload_folder(self, **how: Any) -> None:
            asked.append(how)
            if how["repo_id"] == "me/full":
                raise OSError("no room")

    monkeypatch.setattr("lm.export.get_token", lambda: "hf_secret")
    monkeypatch.setattr("lm.export.HfApi", Hub)
    assert push(tmp_path, "me/policy") == "https://hub/me/policy"
    assert asked == [
        ("me/policy", {"private": True, "exist_ok": True}),
        {"repo_id": "me/policy", "folder_path": tmp_path},
    ]
    with pytest.raises(ExportRefused, match=r"cannot push to 'me/full': no room; .*hf upload"):
        push(tmp_path, "me/full")
