"""The GPU benchmark, as far as it goes without a GPU."""

import json
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bench import real
from bench.gpu import Load, Weights, main, matrix_rate, measure, random_model
from lm.model import LanguageModel
from tests.tiny_lm import tiny_config

CPU = torch.device("cpu")


def test_every_work_is_measured_with_finite_rates() -> None:
    load = Load(prompts=2, group=2, prompt=6, completion=4, update_rows=4, rank=2)
    rate = matrix_rate(CPU, 64, repeats=1)
    rows = list(measure("tiny", tiny_config("gptj"), load, CPU, rate, repeats=1))
    assert [row["work"] for row in rows] == ["sampling", "packed scoring", "SubTB update"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and 0 <= row["share"] < math.inf


def test_operations_count_layers_and_output_head() -> None:
    config = tiny_config("gpt2")
    weights = Weights.of(random_model(config, CPU))
    assert weights.body == config.n_layer * 12 * config.n_embd**2
    assert weights.head == config.vocab_size * config.n_embd
    assert weights.flops(tokens=3, predictions=2) == 2 * (3 * weights.body + 2 * weights.head)


def test_without_a_gpu_it_says_so_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench/gpu.py", "--json"])
    main()
    assert json.loads(capsys.readouterr().out) == {
        "rows": [],
        "note": "no GPU here: nothing measured",
    }


def test_on_a_cpu_each_phase_of_a_run_is_held_against_the_matrix_rate_of_the_same_run() -> None:
    model = random_model(tiny_config("llama"), CPU).float()
    base = LanguageModel(model=model, tokenizer=PreTrainedTokenizerFast, fingerprint="random")
    load = Load(prompts=2, group=2, prompt=6, completion=4, update_rows=4, rank=2)
    rows = list(real.measure(base, load, size=64, repeats=1))
    assert [row["phase"] for row in rows] == ["rollouts", "scoring", "learning"]
    for row in rows:
        assert 0 <= row["share_of_gemm"] < math.inf and row["gemm_gflops"] > 0
        assert row["tokens_per_s"] > 0
