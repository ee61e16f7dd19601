"""Nothing is lost: a run that is killed anywhere and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import in_child, scramble_lora, timeless, tiny_loaded, tiny_split
from peft import PeftModel
from safetensors.torch import load_file
from test_models import save_tiny
from test_sgp import flags as sgp_flags
from test_sgp import pairs, sgp_settings, write_rows
from test_trainer import tiny_settings
from transformers import LlamaForCausalLM

from dvirl import cli, trainer
from dvirl.config import SGPConfig
from dvirl.evaluation.questions import spread
from dvirl.models import loading
from dvirl.runs import checkpoint, errors, files, loop
from dvirl.runs import folder as run_folder
from dvirl.runs import log as run_log
from dvirl.runs.checkpoint import newest, prune, verify
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import run_lock
from dvirl.runs.interrupt import stoppable
from dvirl.runs.log import read_metrics
from dvirl.sgp import SGPTrainer
from dvirl.train_dvi import resume
from dvirl.trainer import DVITrainer

POINTS = int(os.environ.get("DVIRL_FAULTS", "12"))
"""Places at which runs are killed; `make faults` takes more."""
EVENTS = [(trainer, "generate"), (loop, "cut_log"), (loop, "log_line"), (DVITrainer, "judge"), (DVITrainer, "step"),
          (checkpoint, "save_adapters"), (checkpoint, "save_file"), (files, "flush"), (checkpoint, "prune"),
          (files, "discard"), (run_folder, "write_text"), (run_log, "write_text"), (os, "replace"),
          (SGPTrainer, "evaluate"), (SGPTrainer, "step")]  # fmt: skip
"""What is going on when a run is killed, before it and after it."""


def settings(folder, **changes):
    return tiny_settings(run_dir=str(folder), keep_checkpoints=1, **changes)


def online(folder: Path) -> DVITrainer:
    """A new run of `dvirl train`, or one that goes on."""
    if (folder / "config.yaml").exists():
        return resume(folder, None, tiny_loaded(), tiny_split())
    return DVITrainer(settings(folder), tiny_loaded(), tiny_split())


def supervised(folder: Path) -> SGPTrainer:
    """A new run of `dvirl sgp`, or one that goes on."""
    make = partial(SGPTrainer, loaded=tiny_loaded(), records=pairs())
    if (folder / "config.yaml").exists():
        return loop.resume(make, SGPConfig, folder)
    return make(sgp_settings(run_dir=str(folder), epochs=2, checkpoint_every=2, keep_checkpoints=1))


def attempt(folder: Path, kill_at: int = 0, begin=online) -> int:
    """Begin a run or go on with it, to be killed at so manieth an event; how many there were."""
    count = 0

    def tick():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(real):
        def call(*args, **how):
            tick()
            found = real(*args, **how)
            tick()
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in EVENTS:
            patch.setattr(owner, name, watched(getattr(owner, name)))
        begin(folder).train(show_progress=False)
    return count


def what_is_there(folder: Path):
    """Everything that a run leaves but the times: log, weights, and the trainer's state."""
    lines = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = newest(folder)
    verify(last)
    tensors = {str(path.relative_to(last)): load_file(path) for path in last.rglob("*.safetensors")}
    numbers = json.loads((last / "trainer.json").read_text())
    numbers |= {name: timeless(numbers[name]) for name in ("counters", "served") if name in numbers}
    return lines, tensors, numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed: its folder, and how many events it had."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, attempt(folder)


@pytest.fixture(scope="module")
def whole_sgp(tmp_path_factory):
    """The same of fine-tuning."""
    folder = tmp_path_factory.mktemp("sgp") / "run"
    return folder, attempt(folder, begin=supervised)


def same(folder: Path, other: Path) -> bool:
    """Whether two runs left the same, times apart, and neither left anything half-written."""
    (lines, tensors, numbers), expected = what_is_there(folder), what_is_there(other)
    names = {file: values.keys() for file, values in tensors.items()}
    return (
        (lines, numbers, names)
        == (expected[0], expected[2], {f: values.keys() for f, values in expected[1].items()})
        and all(
            torch.equal(value, expected[1][f][name])
            for f, values in tensors.items()
            for name, value in values.items()
        )
        and not list((folder / "checkpoints").glob(".*"))
    )


def unreadable(folder: Path) -> list[str]:
    """What is wrong with a run's checkpoints."""
    found = []
    for one in folder.glob("checkpoints/step-*"):
        try:
            verify(one)
        except DvirlError as error:
            found.append(str(error))
    return found


def killed_and_resumed(folder: Path, expected: Path, kill_at: int, begin) -> dict[str, float]:
    """Kill a run at an event and go on with it: how many of its checkpoints were unreadable, and whether it ends equal."""
    status = in_child(lambda: attempt(folder, kill_at, begin))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    wrong = unreadable(folder)
    equal = in_child(lambda: attempt(folder, begin=begin)) == 0 and same(folder, expected)
    return {"unreadable_checkpoints": len(wrong), "equal": equal}


@pytest.mark.no_cover
@pytest.mark.parametrize("part", range(POINTS))
def test_a_killed_run_resumed_is_the_run_that_was_not_killed(whole, tmp_path, part, record_property):
    folder, events = whole
    assert events > 100
    kill_at = spread(range(1, events + 1), POINTS)[part]
    found = killed_and_resumed(tmp_path / "run", folder, kill_at, online)
    record_property("kills of dvirl train", found)
    assert found == {"unreadable_checkpoints": 0, "equal": True}


@pytest.mark.no_cover
@pytest.mark.parametrize("part", range(POINTS // 4))
def test_so_is_shallow_gradient_fine_tuning(whole_sgp, tmp_path, part, record_property):
    folder, events = whole_sgp
    assert events > 100
    kill_at = spread(range(1, events + 1), POINTS // 4)[part]
    found = killed_and_resumed(tmp_path / "run", folder, kill_at, supervised)
    record_property("kills of dvirl sgp", found)
    assert found == {"unreadable_checkpoints": 0, "equal": True}


def test_fine_tuning_that_is_asked_to_stop_goes_on_later(whole_sgp, tmp_path, monkeypatch):
    real = SGPTrainer.step

    def step(self, number, examples):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number, examples)

    def work():
        monkeypatch.setattr(SGPTrainer, "step", step)
        os._exit(errors.guarded(lambda _: supervised(tmp_path / "run").train(show_progress=False), []))

    status = in_child(work)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 143
    assert newest(tmp_path / "run").name == "step-000003"
    run = supervised(tmp_path / "run")
    result = run.train(show_progress=False)
    assert same(tmp_path / "run", whole_sgp[0]) and run.counters.step == run.num_steps == result.steps
    assert (
        result.before
        and result.before == json.loads((newest(whole_sgp[0]) / "trainer.json").read_text())["before"]
    )
    assert supervised(tmp_path / "run").train(show_progress=False) == result
    assert same(tmp_path / "run", whole_sgp[0])


def test_a_torn_last_line_is_written_anew(whole, tmp_path):
    folder, events = whole
    assert os.WIFSIGNALED(in_child(lambda: attempt(tmp_path / "run", events // 2)))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    assert in_child(lambda: attempt(tmp_path / "run")) == 0
    assert what_is_there(tmp_path / "run")[0] == what_is_there(folder)[0]


def test_a_finished_run_resumed_does_nothing(whole):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")}
    lines = (folder / "metrics.jsonl").read_text()
    run = resume(folder, None, tiny_loaded(), tiny_split())
    assert run.finished
    run.train(show_progress=False)
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*")} == before
    assert (folder / "metrics.jsonl").read_text() == lines


def test_every_random_generator_goes_on(tmp_path):
    run = DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split())
    folder = run.save_checkpoint()
    expected = (torch.rand(3), np.random.rand(3), torch.rand(3, generator=run.generator))
    resume_from = DVITrainer(settings(tmp_path / "other"), tiny_loaded(), tiny_split())
    resume_from.load_checkpoint(folder)
    found = (torch.rand(3), np.random.rand(3), torch.rand(3, generator=resume_from.generator))
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


# What a checkpoint holds


def test_a_run_that_is_done_keeps_no_moments_and_begins_them_anew_with_more_prompts(whole, tmp_path, capsys):
    """They are two thirds of a checkpoint; one of a run under way has them, since it goes on bit for bit."""
    trainers = ("fast.", "slow.")
    under_way = DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split())
    under_way.advance()
    held = load_file(under_way.save_checkpoint() / "trainer.safetensors")
    assert under_way.counters.step and any(name.startswith(trainers) for name in held)
    done = newest(whole[0])
    assert not any(name.startswith(trainers) for name in load_file(done / "trainer.safetensors"))
    run = DVITrainer(settings(tmp_path / "more", num_prompts=48), tiny_loaded(), tiny_split())
    run.load_checkpoint(done)
    assert (
        f"{done}: the run was finished; it goes on, and its optimizers start again" in capsys.readouterr().err
    )
    step = run.counters.step
    run.train(show_progress=False)
    assert run.counters.prompts == 48 and run.counters.step > step


@pytest.mark.parametrize("exit_states", ["recomputed", "stored"])
def test_exit_states_of_records_are_kept_only_where_updates_read_them(tmp_path, exit_states):
    run = DVITrainer(settings(tmp_path / "run", exit_states=exit_states), tiny_loaded(), tiny_split())
    run.advance()
    folder = run.save_checkpoint()
    held = load_file(folder / "trainer.safetensors")
    assert ("buffer.field.hidden" in held) == (exit_states == "stored")
    other = DVITrainer(settings(tmp_path / "other", exit_states=exit_states), tiny_loaded(), tiny_split())
    other.load_checkpoint(folder)
    mine, its = (one.buffer.field("hidden") for one in (run, other))
    assert mine.shape == its.shape and mine.dtype == its.dtype
    assert torch.equal(mine, its) if exit_states == "stored" else its.isnan().all()


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    """It has the exit states of its records, whatever reads them, and the adapters' whole configurations."""
    run = DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split())
    run.advance()
    state = run.state_dict()
    state["tensors"]["buffer.field.hidden"] = run.buffer.field("hidden")
    folder = checkpoint.save(tmp_path / "old", run.counters.step, run.peft_model, run.model, state)
    (folder / "manifest.json").unlink()
    run.peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "manifest.json").write_text(json.dumps(checkpoint._checksums(folder)))
    other = DVITrainer(settings(tmp_path / "other"), tiny_loaded(), tiny_split())
    other.load_checkpoint(folder)
    assert torch.equal(other.buffer.field("hidden"), run.buffer.field("hidden"))
    for each in (run, other):
        each.advance()
    mine, its = (one.state_dict()["tensors"] for one in (run, other))
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def test_adapters_of_a_checkpoint_load_with_plain_peft_and_name_the_model_as_it_was_given(tmp_path):
    """Old and new releases of PEFT refuse entries that they do not know, and a class of ours they cannot import."""
    source = tmp_path / "somebody/models/tiny"
    loaded = loading.load(str(save_tiny(source)), dtype="float32", device="cpu")
    named = settings(tmp_path / "run", model_name="smollm2-135m")
    run = DVITrainer(named, loaded, tiny_split())
    scramble_lora(run.model, ["lora_S", "lora_D"], 0.1)
    folder = run.save_checkpoint()
    known = {"base_model_name_or_path", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
             "peft_type", "r", "target_modules", "task_type"}  # fmt: skip
    for name in ("lora_S", "lora_D"):
        values = json.loads((folder / name / "adapter_config.json").read_text())
        assert set(values) == known and values["task_type"] == "CAUSAL_LM"
        assert values["base_model_name_or_path"] == "smollm2-135m"
        assert values["target_modules"] == sorted(values["target_modules"])
    for path in folder.rglob("*.json"):
        assert "somebody" not in path.read_text() and str(Path.home()) not in path.read_text()
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(source), folder / "lora_S", "lora_S")
    plain.load_adapter(folder / "lora_D", "lora_D")
    plain.base_model.set_adapter(["lora_S", "lora_D"])
    ids = torch.arange(5, 25)[None]
    expected = run.loaded.model(ids).logits
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)


# Settings


def test_other_settings_are_refused_unless_accepted(whole):
    folder, _ = whole
    other = settings(folder, lr_shallow=1e-3, fast_batch=5)
    with pytest.raises(DvirlError) as error:
        resume(folder, other, tiny_loaded(), tiny_split())
    assert "fast_batch (3, now 5), lr_shallow (0.004, now 0.001); give --accept_changes" in str(error.value)
    assert resume(folder, other, tiny_loaded(), tiny_split(), accept_changes=True).config.fast_batch == 5
    with pytest.raises(DvirlError, match="the run is of the model sha256:tiny, and this one is sha256:other"):
        loaded = tiny_loaded()
        resume(folder, None, type(loaded)(**{**vars(loaded), "fingerprint": "sha256:other"}), tiny_split())


def test_other_prompts_under_the_same_name_are_refused_unless_accepted(whole):
    """A run with other prompts is not the one that was never stopped, and held-out prompts may be trained on."""
    folder, _ = whole
    other = tiny_split(seed=1)
    with pytest.raises(
        DvirlError, match=r"config.yaml: the content of prompts has changed .*--accept_changes"
    ):
        resume(folder, None, tiny_loaded(), other)
    assert resume(folder, None, tiny_loaded(), other, accept_changes=True).split is other


def under_way(run):
    """The same run with a checkpoint after its first prompts, as if it had been stopped there."""
    run.advance()
    run.save_checkpoint()
    run_folder.write_config(run.run_dir, run.config, run.loaded, inputs=run.inputs)
    return run


def test_the_average_of_another_baseline_is_not_gone_on_with(tmp_path):
    run = under_way(DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split()))
    assert run.baseline.value
    for kind, value in (("ema", run.baseline.value), ("none", 0.0), ("mean", 0.0)):
        other = settings(tmp_path / "run", baseline=kind)
        again = resume(tmp_path / "run", other, tiny_loaded(), tiny_split(), accept_changes=True)
        assert again.baseline.value == value


def test_moments_of_other_parameters_are_refused(tmp_path):
    under_way(DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split()))
    other = settings(tmp_path / "run", lora_shallow=False)
    with pytest.raises(DvirlError, match="optimizer is of other parameters; expected the same lora_shallow"):
        resume(tmp_path / "run", other, tiny_loaded(), tiny_split(), accept_changes=True)


def test_a_run_goes_on_when_what_it_started_from_is_gone(whole, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(newest(whole[0]), start)
    config = settings(tmp_path / "run", start_from=str(start))
    run = DVITrainer(config, tiny_loaded(), tiny_split())
    shutil.rmtree(start)
    with pytest.raises(DvirlError, match="not a complete checkpoint"):  # nothing says what to begin with
        DVITrainer(config, tiny_loaded(), tiny_split())
    under_way(run)
    again = resume(tmp_path / "run", None, tiny_loaded(), tiny_split())
    assert again.config.start_from == str(start) and again.counters.step == run.counters.step
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_a_run_that_is_stopped_before_its_first_update_goes_on(tmp_path):
    """The same trainer, as in a notebook's cell that is run again."""
    run = DVITrainer(settings(tmp_path / "run", fast_batch=50), tiny_loaded(), tiny_split())
    real, run.answer = run.answer, lambda prompts: signal.raise_signal(signal.SIGINT) or real(prompts)
    with pytest.raises(KeyboardInterrupt):
        run.train(show_progress=False)
    assert run.counters.prompts and not run.counters.step
    run.answer = real
    run.train(show_progress=False)
    assert run.finished


def test_a_setting_that_came_after_the_run_had_its_default(whole, tmp_path):
    """Of a run that goes on, and of an evaluation."""
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["config"].pop("kl_kind")
    content["config"]["run_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert resume(folder, None, tiny_loaded(), tiny_split()).config.kl_kind == "forward"
    run_folder.claim(folder, settings(folder), tiny_loaded())
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    other = settings(folder, kl_kind="reverse")
    said = r"other settings: kl_kind \('forward', now 'reverse'\)"
    with pytest.raises(DvirlError, match=said):
        resume(folder, other, tiny_loaded(), tiny_split())
    with pytest.raises(DvirlError, match=said):
        run_folder.claim(folder, other, tiny_loaded())


@pytest.mark.no_cover
def test_the_command_line_resumes_by_the_runs_own_settings(tmp_path, capsys):
    flags = ["--exit_layer", "2", "--num_prompts", "8", "--rollout_batch", "4", "--max_new_tokens", "8", "--fast_batch", "1",
             "--lora_rank", "2", "--draft_vocab", "0", "--threads", "1", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    run_dir = tmp_path / "run"
    assert (
        cli.main(["train", "--model_name", str(save_tiny(tmp_path / "m")), "--run_dir", str(run_dir), *flags])
        == 0
    )
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run_dir)]) == 0
    assert f"{run_dir}: 8 of 8 prompts are done" in capsys.readouterr().out
    assert cli.main(["train", "--resume", str(run_dir), "--num_prompts", "12"]) == 2
    assert "num_prompts (8, now 12); give --accept_changes true" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(run_dir), "--num_prompts", "12", "--accept_changes"]) == 0
    assert "8 of 12 prompts are done" in capsys.readouterr().out
    moved = run_dir.rename(tmp_path / "moved")
    assert cli.main(["train", "--resume", str(moved)]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "none")]) == 2
    assert "none/config.yaml: No such file" in capsys.readouterr().err


def test_the_command_line_resumes_fine_tuning_too(tmp_path, capsys):
    model, run_dir = save_tiny(tmp_path / "m"), tmp_path / "run"
    records = write_rows(
        tmp_path / "r.jsonl", [{"instruction": f"Say {n}", "response": "x" * n} for n in range(1, 13)]
    )
    assert cli.main(["sgp", *sgp_flags(model, records, run_dir)]) == 0
    said = capsys.readouterr().out
    moved = run_dir.rename(tmp_path / "moved")
    assert cli.main(["sgp", "--resume", str(moved)]) == 0
    out = capsys.readouterr().out
    assert out == f"{moved}: 2 of 2 steps are done\n{said.replace(str(run_dir), str(moved))}"
    assert cli.main(["sgp", "--resume", str(moved), "--epochs", "2"]) == 2
    assert "epochs (1, now 2); give --accept_changes true" in capsys.readouterr().err
    assert cli.main(["sgp", "--resume", str(moved), "--epochs", "2", "--accept_changes"]) == 0
    assert "2 of 3 steps are done" in capsys.readouterr().out and newest(moved).name == "step-000003"
    write_rows(Path(records), [{"instruction": f"Sing {n}", "response": "x" * n} for n in range(1, 13)])
    assert cli.main(["sgp", "--resume", str(moved)]) == 2
    assert (
        "the content of records has changed since then; give --accept_changes true" in capsys.readouterr().err
    )


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on_later(
    whole, tmp_path, monkeypatch, number, code
):
    real = DVITrainer.step

    def step(self):
        if self.counters.step == 2:
            os.kill(os.getpid(), number)
        return real(self)

    def work():
        monkeypatch.setattr(DVITrainer, "step", step)
        run = DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split())
        os._exit(errors.guarded(lambda _: run.train(show_progress=False), []))

    status = in_child(work)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == code
    reached = json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["counters"]
    assert reached["step"] > 2 and reached["prompts"] == 8
    assert in_child(lambda: attempt(tmp_path / "run")) == 0
    assert what_is_there(tmp_path / "run")[0] == what_is_there(whole[0])[0]


def test_an_interrupted_cell_can_be_run_again(whole, tmp_path, monkeypatch):
    run = DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split())
    real, asked, before = DVITrainer.step, [], signal.getsignal(signal.SIGINT)

    def step(self):
        if not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))
        return real(self)

    monkeypatch.setattr(DVITrainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        run.train(show_progress=False)
    assert not run.finished and signal.getsignal(signal.SIGINT) is before
    run.train(show_progress=False)
    assert what_is_there(tmp_path / "run")[0] == what_is_there(whole[0])[0]


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), stoppable() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("still there")


def test_threads_that_get_no_signals_train_all_the_same():
    found = []

    def work():
        with stoppable() as stop:
            found.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


# Files


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("drafter.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is not what was written"),
        ("lora_S/adapter_model.safetensors", lambda data: data[: len(data) // 2], "is not what was written"),
        ("trainer.safetensors", None, "trainer.safetensors missing"),
        ("lora_D/adapter_config.json", None, "lora_D/adapter_config.json is missing"),
        ("manifest.json", lambda data: b"{", "no readable manifest.json"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_written_is_named(whole, tmp_path, file, change, message):
    run = DVITrainer(settings(tmp_path / "run"), tiny_loaded(), tiny_split())
    folder = run.save_checkpoint()
    path = folder / file
    data = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(data))
    with pytest.raises(DvirlError, match=message) as error:
        run.load_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_all_of_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    asked, replace = [], os.replace

    def fsync(descriptor):
        asked.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda one, other: asked.append("named") or replace(one, other))
    with files.atomic_directory(tmp_path / "new") as folder:
        (folder / "lora_S").mkdir()
        (folder / "lora_S/weights").write_text("x")
    named = asked.index("named")
    assert {"new", "lora_S", "weights"} <= set(asked[:named]) and asked[named + 1 :] == [tmp_path.name]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, score in enumerate((0.1, 0.5, 0.2, 0.3, 0.4), start=1):
        folder = tmp_path / f"checkpoints/step-{step:06d}"
        run_log.write_text(folder / "trainer.json", json.dumps({"score": score}))
    prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]


def small_disk(folder: Path) -> bool:
    """Give this process, alone and while it lives, a disk of 8 MiB; whether the system lets it."""
    libc, user, mounts = ctypes.CDLL(None, use_errno=True), 0x10000000, 0x00020000
    owners = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    folder.mkdir(exist_ok=True)
    if libc.unshare(user | mounts):
        return False
    try:
        for name, value in owners.items():
            Path("/proc/self", name).write_text(value)
    except OSError:
        return False
    return libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=8m") == 0


def fill(folder: Path, room: int) -> None:
    """Leave so many bytes of a small disk."""
    with (folder / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
        file.truncate(file.tell() - room)


@pytest.mark.parametrize("dies", [True, False])
def test_a_folder_that_is_replaced_is_never_gone(tmp_path, monkeypatch, dies):
    """Between the moment when it makes room and the one when the new one has its name."""
    folder = tmp_path / "checkpoints/step-000003"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("before")
    replace = os.replace

    def fails(one, other):
        if other == folder and one.name == folder.name:
            os._exit(9) if dies else raise_error()
        replace(one, other)

    def raise_error():
        raise OSError("no space")

    def work():
        monkeypatch.setattr(os, "replace", fails)
        with files.atomic_directory(folder) as scratch:
            (scratch / "weights").write_text("after")

    if dies:
        in_child(work)
        assert not folder.exists()
        monkeypatch.undo()
        with run_lock(tmp_path):
            pass
    else:
        with (
            monkeypatch.context(),
            pytest.raises(DvirlError, match="no space.*what was there before is whole"),
        ):
            work()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "weights").read_text() == "before"


@pytest.mark.no_cover
@pytest.mark.parametrize(("where", "real"), [("checkpoint", True), ("checkpoint", False), ("log", False)])
def test_a_full_disk_ends_a_run_and_with_space_it_goes_on(
    whole, tmp_path, capfd, record_property, where, real
):
    """A disk that fills up after the first checkpoint; a limit of the system's to files where none can be mounted."""
    sizes = [path.stat().st_size for path in newest(whole[0]).rglob("*") if path.is_file()]
    disk, kinds, step = tmp_path / "disk", [], DVITrainer.step

    def limit(run_dir, small):
        if small:
            return fill(disk, sum(sizes) // 2)
        most = (
            max(sizes) - 1000 if where == "checkpoint" else (run_dir / "metrics.jsonl").stat().st_size + 100
        )
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def work():
        small = real and in_child(lambda: os._exit(not small_disk(disk))) == 0 and small_disk(disk)
        run_dir = disk / "run"

        def run():
            def full(self):
                if not kinds and list(run_dir.glob("checkpoints/step-*")):
                    kinds.append(limit(run_dir, small))
                return step(self)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(DVITrainer, "step", full)
                run = DVITrainer(settings(run_dir), tiny_loaded(), tiny_split())
                os._exit(errors.guarded(lambda _: run.train(show_progress=False), []))

        status = in_child(run)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
        verify(newest(run_dir))
        reached = json.loads((newest(run_dir) / "trainer.json").read_text())["counters"]["step"]
        assert 0 < reached <= len(read_metrics(run_dir / "metrics.jsonl"))
        (disk / "filler").unlink(missing_ok=True)
        assert in_child(lambda: attempt(run_dir)) == 0
        assert same(run_dir, whole[0])
        print("on a tmpfs" if small else "under a limit", flush=True)

    equal = in_child(work) == 0
    captured = capfd.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("dvirl: ")]
    record_property("full disks", {"equal": equal, "tmpfs": "on a tmpfs" in captured.out})
    assert equal, captured.err
    assert len(said) == 1 and ("metrics.jsonl: could" if where == "log" else "step-") in said[0], said
    assert "could not be written" in said[0]


def test_a_second_process_is_told_who_holds_a_run(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(DvirlError, match=rf"is in use by process {os.getpid()} on \S+; wait for it"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):
        pass


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    for name in (".writing-x", ".gone-step-000001", "step-000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with run_lock(tmp_path):
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
