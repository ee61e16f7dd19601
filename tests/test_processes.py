"""Several processes are one: together they do what one process does with all their prompts at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from conftest import in_child, timeless, tiny_loaded, tiny_split
from safetensors.torch import load_file
from test_models import save_tiny
from test_trainer import tiny_settings
from torch import nn

from dvirl.config import SGPConfig
from dvirl.runs import checkpoint, errors
from dvirl.runs import folder as run_folder
from dvirl.runs.checkpoint import newest, verify
from dvirl.runs.log import read_metrics
from dvirl.runs.processes import Processes
from dvirl.sgp import SGPTrainer
from dvirl.train_dvi import resume
from dvirl.trainer import DVITrainer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(count: int, work) -> list[int]:
    """Run in so many processes of one run, by gloo; their exit codes, negative for a signal."""
    port = str(free_port())

    def enter(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
        PartialState._reset_state()
        work(rank)

    children = [fork(lambda rank=rank: enter(rank)) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(work) -> int:
    number = os.fork()
    if number == 0:
        os._exit(os.waitstatus_to_exitcode(in_child(work)) % 256)
    return number


def settings(folder, processes=1, **changes):
    """A run of eight prompts a batch, shared by so many processes."""
    sizes = dict(rollout_batch=8, judge_batch=4, slow_batch=4)
    return tiny_settings(
        run_dir=str(folder), **{name: size // processes for name, size in sizes.items()}, **changes
    )


def train(folder, processes=1, **changes):
    DVITrainer(settings(folder, processes, **changes), tiny_loaded(), tiny_split()).train(show_progress=False)


def same(one: Path, two: Path) -> None:
    """Two runs have the same log, weights and state, but for rounding and the clock."""
    logs = [
        [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert len(logs[0]) == len(logs[1]) > 5
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value == second[key] or value == pytest.approx(second[key], rel=1e-3, abs=1e-5), (
                first["step"],
                key,
            )
    folders = newest(one), newest(two)
    assert folders[0].name == folders[1].name
    files = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")) for folder in folders
    ]
    assert files[0] == files[1]
    for file in files[0]:
        first, second = (load_file(folder / file) for folder in folders)
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.allclose(value.float(), second[name].float(), rtol=1e-3, atol=2e-5), (file, name)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(schedule="reinforce", kl_weight=0.2, entropy_weight=0.01, baseline="mean"),
        dict(schedule="ce", actions="argmax", draft_vocab=40),
        dict(schedule="masked_ce", num_prompts=21, replay=0),
        dict(schedule="tv", target="adapted"),
        # Updates on first drafts alone give one parameter no gradient: `fuse_later`, which later drafts read.
        dict(
            schedule="kl",
            drafter="layer",
            feedback=True,
            recurrent=True,
            draft_len=2,
            fast_batch=2,
            replay=2,
            buffer_size=9,
        ),
    ],
    ids=lambda changes: changes.get("schedule", "default"),
)
def test_two_processes_are_one_with_the_doubled_batch(tmp_path, changes):
    assert in_processes(2, lambda rank: train(tmp_path / "two", 2, **changes)) == [0, 0]
    train(tmp_path / "one", **changes)
    same(tmp_path / "one", tmp_path / "two")


def test_a_parameter_without_a_gradient_anywhere_is_not_stepped():
    """As by one process: a gradient of zero would count as a step, and the moments would go on."""

    def work(rank):
        weights = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        weights[rank].grad = torch.full((2,), 3.0)  # of two processes each has the gradient of one
        Processes("cpu").add_gradients(weights)
        assert [weight.grad is None for weight in weights] == [False, False, True]
        assert all(weight.grad.tolist() == [3.0, 3.0] for weight in weights[:2])

    assert in_processes(2, work) == [0, 0]


def test_what_trains_alone_refuses_several_processes(tmp_path, capfd):
    def work(rank):
        config = SGPConfig(
            run_dir=str(tmp_path / "run"), exit_layer=2, lora_rank=4, dtype="float32", device="cpu"
        )
        sys.exit(errors.guarded(lambda _: SGPTrainer(config, tiny_loaded(), []), []))

    codes = in_processes(2, work)
    assert 2 in codes and 0 not in codes  # the other one may see first that it is alone
    assert "2 processes were started; expected one, which trains alone" in capfd.readouterr().err


@pytest.mark.no_cover
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Each time the last process alone is asked to stop, and all stop after the same prompts."""
    train(tmp_path / "whole")
    for processes, asked in ((2, True), (1, True), (4, False)):

        def work(rank, processes=processes, asked=asked):
            args = settings(tmp_path / "run", processes), tiny_loaded(), tiny_split()
            begun = (tmp_path / "run/config.yaml").exists()
            run = resume(tmp_path / "run", *args, accept_changes=True) if begun else DVITrainer(*args)
            if asked and rank == processes - 1:
                run.answer = lambda prompts: os.kill(os.getpid(), signal.SIGTERM) or run._generate(prompts)
            run.train(show_progress=False)

        assert in_processes(processes, work) == [143 if asked else 0] * processes
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.no_cover
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_sentence_and_a_whole_checkpoint(tmp_path, capfd, rank):
    def work(own):
        run = DVITrainer(settings(tmp_path / "run", 2), tiny_loaded(), tiny_split())
        real = run._generate
        if own == rank:
            run.answer = lambda prompts: (
                real(prompts) if run.counters.prompts < 16 else os.kill(os.getpid(), 9)
            )
        sys.exit(errors.guarded(lambda _: run.train(show_progress=False), []))

    codes = in_processes(2, work)
    assert codes[rank] == 256 - signal.SIGKILL and codes[1 - rank] == 2
    said = capfd.readouterr().err
    assert f"dvirl: process {1 - rank} of 2 has lost another" in said and "Traceback" not in said
    verify(newest(tmp_path / "run"))
    assert in_processes(
        2, lambda _: resume(tmp_path / "run", None, tiny_loaded(), tiny_split()).train(False)
    ) == [0, 0]
    train(tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "run")


def test_the_first_process_alone_writes(tmp_path, monkeypatch):
    """Nothing that writes is called in the second."""

    def work(rank):
        if rank:
            for owner, name in (
                (checkpoint, "save_file"),
                (checkpoint, "atomic_directory"),
                (run_folder, "run_lock"),
                (run_folder, "write_text"),
            ):
                monkeypatch.setattr(owner, name, None)
        train(tmp_path / "run", 2)

    assert in_processes(2, work) == [0, 0]


def test_what_processes_do_together():
    def work(rank):
        group = Processes("cpu")
        assert (group.rank, group.count, group.first) == (rank, 3, rank == 0)
        assert group.once(lambda: {"made by": rank}) == {"made by": 0}
        assert group.largest([3, 1, 2][rank]) == 3 and group.gathered([rank, rank]) == [0, 0, 1, 1, 2, 2]
        assert list(group.share(range(7))) == list(range(rank, 7, 3))
        weights = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))]
        if rank:
            (weights[rank - 1].sum() * rank).backward()
        group.add_gradients(weights)
        assert weights[0].grad.eq(1).all() and weights[1].grad.eq(2).all()

    assert in_processes(3, work) == [0, 0, 0]


# As a user starts them


@pytest.mark.no_cover
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_launchers_train(tmp_path, launcher):
    how = {
        "accelerate": [
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes=2",
            f"--main_process_port={free_port()}",
        ],
        "torchrun": ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"],
    }[launcher]
    flags = ["--exit_layer", "2", "--num_prompts", "8", "--rollout_batch", "2", "--max_new_tokens", "8", "--fast_batch", "1",
             "--lora_rank", "2", "--draft_vocab", "0", "--threads", "1", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    where = ["--model_name", save_tiny(tmp_path / "model"), "--run_dir", tmp_path / "run"]
    start = [sys.executable, "-m", *how, "-m", "dvirl.train_dvi", *where, *flags]
    done = subprocess.run(start, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("acceptance rate: ") == 1
    # On a CPU Accelerate's launcher starts one process, and the command says what starts several.
    said = {"accelerate": "processes: 1; on a CPU, torchrun", "torchrun": "processes: 2\n"}[launcher]
    assert done.stdout.startswith(said) and done.stdout.count("processes: ") == 1
    assert read_metrics(tmp_path / "run/metrics.jsonl").step.is_unique
    assert json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["counters"]["prompts"] == 8
