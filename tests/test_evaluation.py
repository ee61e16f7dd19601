"""Measures by hand, a run judged from its folder, and figures that can be drawn."""

from __future__ import annotations

import dataclasses
import json
import math

import matplotlib as mpl
import pandas as pd
import pytest
from conftest import EOS, random_prompts, tiny_kangaroo
from test_cli import TINY
from test_models import save_tiny

from dvirl import cli, plots
from dvirl.evaluation.inference_kangaroo import measure_acceptance
from dvirl.metrics import STEP_COLUMNS, StepMetrics
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics
from kangaroo.decoding.blocks import DecodeConfig

mpl.use("Agg")


def test_measures_are_pooled_and_leave_the_prefill_out():
    model, prompts = tiny_kangaroo(0, 3, deep_scale=0.2), random_prompts(5)
    found = measure_acceptance(model, prompts, 20, DecodeConfig(3), (EOS,))
    blocks = [b for p in prompts for b in model.generate(p, 20, DecodeConfig(3), (EOS,)).blocks[1:]]
    assert found.num_blocks == len(blocks)
    assert found.accept_rate == sum(b.num_accepted for b in blocks) / sum(b.num_drafted for b in blocks)
    assert found.mat == sum(b.block_len for b in blocks) / len(blocks) > 1
    assert found.num_tokens == sum(map(len, found.responses)) and found.tok_per_s > 0


def test_plain_decoding_commits_one_token_a_verification():
    found = measure_acceptance(tiny_kangaroo(0), random_prompts(3), 8, DecodeConfig(0))
    assert found.mat == 1.0 and math.isnan(found.accept_rate)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = ["--held_out", "5", "--seed", "3", *TINY]
    assert (
        cli.main(
            [
                "train",
                "--model_name",
                str(save_tiny(folder / "model")),
                "--run_dir",
                str(folder / "run"),
                *settings,
            ]
        )
        == 0
    )
    return folder / "run"


@pytest.mark.no_cover
def test_a_run_is_judged_from_its_folder(run_dir, capsys, tmp_path):
    assert (
        cli.main(["sgp-eval", "--ckpt_dir", str(run_dir), "--held_out", "--out", str(tmp_path / "x.json")])
        == 0
    )
    out = capsys.readouterr().out
    assert "5 of 5 responses equal those of the same verifier without drafts" in out
    figures = json.loads((tmp_path / "x.json").read_text())["figures"]
    assert figures["plain"]["mat"] == 1.0
    assert figures["trained"]["num_drafted"] > 0 and figures["untrained"]["num_drafted"] > 0


def test_a_folder_without_a_run_is_said(tmp_path, capsys):
    assert cli.main(["sgp-eval", "--ckpt_dir", str(tmp_path), "--held_out"]) == 2
    assert "no checkpoint there" in capsys.readouterr().err


def test_figures_are_drawn(run_dir, tmp_path):
    metrics = read_metrics(run_dir / "metrics.jsonl")
    plots.learning_curve(metrics, (0.1, 0.2), save=tmp_path / "a.png")
    plots.compare_runs({"one": metrics, "other": metrics}, "Two runs", save=tmp_path / "b.svg")
    plots.time_shares({"generation": 3.0, "updates": 1.0}, save=tmp_path / "c.png")
    assert all((tmp_path / name).stat().st_size > 2000 for name in ("a.png", "b.svg", "c.png"))


def test_a_run_without_steps_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    empty = read_metrics(tmp_path / "metrics.jsonl", STEP_COLUMNS)
    assert isinstance(empty, pd.DataFrame) and "accept_rate" in empty
    assert list(empty) == [spec.name for spec in dataclasses.fields(StepMetrics)]
    with pytest.raises(DvirlError, match="made no fast update"):
        plots.learning_curve(empty)
