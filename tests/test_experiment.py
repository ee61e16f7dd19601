"""Experiments end to end, and a checkpoint judged by itself."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from test_cli import TINY
from test_models import save_tiny
from test_spec_bench import write_questions

from dvirl import cli, run_dvi_experiment
from dvirl.data.sources import chatterbot_prompts
from dvirl.evaluation.runner import EvalConfig, evaluate
from dvirl.experiments.experiment import COMPARED, DVIExperiment, _overall
from dvirl.models.drafters import load_drafter, open_draft
from dvirl.runs.checkpoint import newest

ASKED = ["--answer_tokens", "6", "--methods", "plain,fixed,dvi"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A tiny experiment: its folder."""
    folder = tmp_path_factory.mktemp("experiment")
    model, questions = save_tiny(folder / "model"), write_questions(folder / "q.jsonl")
    flags = ["--model_name", str(model), "--run_dir", str(folder / "runs/e"), "--results", str(folder / "results"),
             "--questions", questions, "--held_out", "4", *TINY, *ASKED]  # fmt: skip
    assert cli.main(["experiment", *flags]) == 0
    return folder


@pytest.mark.no_cover
def test_an_experiment_leaves_results_answers_and_a_report(done):
    found = json.loads((done / "results/e.json").read_text())
    assert {
        f"{name}_{when}" for name in ("accept_rate", "mat", "ppl") for when in ("before", "after")
    } <= set(found["figures"])
    assert (
        found["settings"]["fast_batch"] == 1
        and found["settings"]["answer_tokens"] == 6
        and found["counters"]["step"] > 0
    )
    assert {row["task"] for row in found["after"]} == {"mt_bench", "qa", "overall"}
    page = (done / "results/e.html").read_text()
    for name in ("training.png", "before/speedup.png", "after/speedup.png"):
        assert f'src="e/{name}"' in page and (done / "results/e" / name).stat().st_size > 2000
    assert (done / "results/e/after/answers/dvi-1.jsonl").exists() and (done / "results/e.md").exists()


def test_what_follows_training_is_measured_on_what_was_trained(done, tmp_path):
    """The figures after training are those of the checkpoint, those before it are not."""
    found = json.loads((done / "results/e.json").read_text())
    draft = open_draft(str(done / "runs/e"), "float32", "cpu")
    config = EvalConfig(questions=str(done / "q.jsonl"), methods="plain,fixed,dvi", answer_tokens=6, threads=1,
                        dtype="float32", device="cpu", run_dir=str(tmp_path / "again"))  # fmt: skip
    again = evaluate(draft, config).set_index(["task", "method"]).loc[("overall", "dvi")]
    assert again.ppl == pytest.approx(found["figures"]["ppl_after"], rel=1e-6)
    assert again.drift_kl == pytest.approx(found["figures"]["drift_kl_after"], abs=1e-9)


def test_a_second_experiment_of_the_same_name_is_refused(done, capsys):
    flags = ["--run_dir", str(done / "runs/e"), "--results", str(done / "results"), *TINY]
    assert cli.main(["experiment", *flags]) == 2
    assert "already holds a run; choose another run_dir" in capsys.readouterr().err
    assert cli.main(["experiment", "--methods", "plain", *TINY]) == 2
    assert "expected fixed and dvi among them" in capsys.readouterr().err


@pytest.mark.no_cover
def test_main_takes_a_namespace_of_the_names_of_old(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Namespace(model_name=str(save_tiny(tmp_path / "m")), exit_layer=1, fast_batch=1, slow_every=2, beta_kl=0.2,
                     baseline_momentum=0.8, num_prompts=4, max_new_tokens=6, draft_vocab=0, run_dir="runs/lr=0.1", threads=1,
                     device="cpu", dtype="float32", questions=write_questions(tmp_path / "q.jsonl"), answer_tokens=4,
                     methods="plain,fixed,dvi", lora_rank=2, held_out=2)  # fmt: skip
    assert (
        run_dvi_experiment.main(args) == Path("results/lr=0.1.json") and Path("results/lr=0.1.html").exists()
    )


def test_the_settings_are_those_of_both_parts():
    both = DVIExperiment(exit_layer=3, answer_tokens=7)
    assert (both.draft_len, both.longest, both.methods) == (2, 15, "plain,pld,fixed,dvi")


@pytest.mark.no_cover
def test_a_sweep_takes_the_figures_of_experiments(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [flag.removeprefix("--") for flag in (*TINY, *ASKED)]
    base = dict(zip(names[::2], map(yaml.safe_load, names[1::2]), strict=True), held_out=4)
    base |= {"model_name": str(done / "model"), "questions": str(done / "q.jsonl")}
    grid = {"exit_layer": [base.pop("exit_layer")]}
    base.pop("threads")
    Path("s.yaml").write_text(yaml.safe_dump({"run": "experiment", "base": base, "grid": grid}))
    assert cli.main(["sweep", "s.yaml", "--cores", "1"]) == 0
    (row,) = json.loads(Path("runs/s/table.json").read_text())["rows"]
    found = json.loads((done / "results/e.json").read_text())["figures"]
    assert row["exit_layer"] == 2 and row["ppl_after"] == pytest.approx(
        found["ppl_after"]
    )  # the same run again
    assert row["accept_rate_after"] == found["accept_rate_after"]


# A checkpoint by itself


def test_a_checkpoint_is_judged_by_three_figures(done, capsys, tmp_path):
    flags = ["--ckpt_dir", str(newest(done / "runs/e")), "--n_samples", "3", "--max_new_tokens", "6", "--threads", "1",
             "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    assert cli.main(["sgp-eval", *flags, "--exit_layer", "2", "--model_name", str(done / "model"),
                     "--out", str(tmp_path / "o.json")]) == 0  # fmt: skip
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "o.json").read_text())["figures"]
    assert "accept_rate" in printed and 0 <= found["accept_rate"] <= 1 and found["tok_per_s"] > 0
    loaded = load_drafter(newest(done / "runs/e"), dtype="float32", device="cpu").loaded
    nll, count = 0.0, 0
    for one in chatterbot_prompts()[:3]:
        prompt, reply = loaded.chat.encode(one.turns), loaded.chat.encode_response(one.response)
        with torch.no_grad():
            states = loaded.model.forward_deep(loaded.model.forward_shallow(torch.tensor([prompt + reply])))
            logs = loaded.model.lm_head(states)[0].log_softmax(-1)
        nll -= sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(reply))
        count += len(reply)
    assert found["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert cli.main(["sgp-eval", *flags, "--exit_layer", "1"]) == 2
    assert "exit_layer is 1;" in capsys.readouterr().err
    assert cli.main(["sgp-eval", *flags, "--n_samples", "0"]) == 2
    assert "n_samples is 0; expected a number from 1" in capsys.readouterr().err


def test_a_folder_without_a_draft_is_said(tmp_path, capsys):
    assert cli.main(["sgp-eval", "--ckpt_dir", str(tmp_path)]) == 2
    assert "no drafter" in capsys.readouterr().err


def test_a_set_of_one_task_is_compared_by_that_task():
    """It has no row for all tasks together."""
    rows = [{"task": "qa", "method": name, "accept_rate": 0.5, "mat": 1.5, "speedup": 1.2, "tok_per_s": 9.0, "ppl": 2.0,
             "drift_kl": 0.0} for name in ("plain", "fixed", "dvi")]  # fmt: skip
    assert _overall(pd.DataFrame(rows)).to_dict() == {name: rows[0][name] for name in COMPARED}
    several = pd.DataFrame([*rows, *({**row, "task": "overall", "mat": 3.0} for row in rows)])
    assert _overall(several)["mat"] == 3.0
