"""The command line: results are named, bad input is one sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

import pytest
from test_models import save_tiny

from dvirl import cli, train_dvi

TINY = ["--exit_layer", "2", "--num_prompts", "8", "--rollout_batch", "4", "--max_new_tokens", "8", "--fast_batch", "1",
        "--lora_rank", "2", "--draft_vocab", "0", "--threads", "1", "--device", "cpu", "--dtype", "float32"]  # fmt: skip


@pytest.mark.no_cover
def test_train_runs_and_says_where_things_are(tmp_path, capsys):
    model, run_dir = save_tiny(tmp_path / "model"), tmp_path / "run"
    assert cli.main(["train", "--model_name", str(model), "--run_dir", str(run_dir), *TINY]) == 0
    out = capsys.readouterr().out
    assert f"log: {run_dir}/metrics.jsonl" in out and "acceptance rate:" in out
    checkpoint = next(line.split(": ")[1] for line in out.splitlines() if line.startswith("checkpoint"))
    assert checkpoint.startswith(f"{run_dir}/checkpoints/step-")
    assert cli.main(["train", "--model_name", str(model), "--run_dir", str(run_dir), *TINY]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_main_takes_a_namespace(tmp_path):
    args = Namespace(model_name=str(save_tiny(tmp_path / "m")), run_dir=str(tmp_path / "r"), exit_layer=1, num_prompts=4,
                     max_new_tokens=6, fast_batch=1, slow_every=2, beta_kl=0.2, baseline_momentum=0.8, threads=1,
                     draft_vocab=100, device="cpu", dtype="float32")  # fmt: skip
    trainer = train_dvi.main(args)
    assert trainer.counters.prompts == 4 and (tmp_path / "r/config.yaml").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--exit_layer", "0"], "exit_layer is 0"),
        (["train", "--config", "none.yaml"], "none.yaml: No such file"),
        (["train", "--model_name", "./nowhere"], "./nowhere is not there; expected the folder of a model"),
        (["fetch", "gpt5"], "fetch knows smollm2-135m"),
        (["dance"], "unknown command 'dance'"),
    ],
)
def test_bad_input_exits_with_two(argv, message, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_unknown_flags_and_help(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--exit_layr", "3"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0 and "layers[:k] draft" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0 and cli.main([]) == 2


@pytest.mark.parametrize("code", ["import dvirl", "from dvirl import cli; cli.main(['--help'])"])
def test_the_package_and_its_help_load_no_torch(code):
    check = f"import sys; {code}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, capture_output=True)


def test_public_names_are_imported_when_they_are_used():
    code = "from dvirl import DVIConfig, DVITrainer, ReplayBuffer; assert ReplayBuffer(DVIConfig().buffer_size).capacity"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
    with pytest.raises(ImportError, match="cannot import name 'Trainer'"):
        from dvirl import Trainer  # noqa: F401


@pytest.mark.real
def test_fetch_prints_the_folder(capsys):
    assert cli.main(["fetch"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
