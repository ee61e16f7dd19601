"""Shallow-gradient fine-tuning: the right gradient, to the right weights, on the right tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_prompts, scramble_lora, tiny_loaded, tiny_pair, tiny_split
from test_models import save_tiny
from test_spec_bench import write_questions
from test_trainer import tiny_settings

from dvirl import cli, run_sgp_experiment
from dvirl.config import SGPConfig
from dvirl.data.examples import collate, make_example
from dvirl.data.sources import Prompt, read_prompts
from dvirl.lora import train_only
from dvirl.runs import checkpoint
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics
from dvirl.sgp import SGPTrainer, gradient_norms, head_sums
from dvirl.train_sgp import make_trainer
from dvirl.trainer import DVITrainer
from kangaroo.sgp_lora import inject_lora, lora_parameters

BETA = 0.7


def sgp_settings(**changes) -> SGPConfig:
    settings = dict(exit_layer=2, lora_rank=4, lora_alpha=8.0, draft_vocab=0, threads=1, dtype="float32", device="cpu",
                    max_tokens=160, batch_size=4, held_out_share=0.25, warmup_steps=2)  # fmt: skip
    return SGPConfig(**{**settings, **changes})


def pairs(count: int = 24) -> list[Prompt]:
    """Questions whose answers have a pattern that carries over."""
    return [Prompt((f"{n}: say {'ab'[n % 2]}",), response="ab"[n % 2] * 6) for n in range(count)]


def trainer(loaded=None, **changes) -> SGPTrainer:
    return SGPTrainer(sgp_settings(**changes), loaded or tiny_loaded(), pairs())


def write_rows(path: Path, rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


# Loss and gradient


@pytest.mark.parametrize("detach_exit", [True, False])
def test_loss_and_gradient_equal_an_independent_computation(detach_exit):
    """Hugging Face's own model with the same LoRA, each record alone and unpadded, prompts masked with -100."""
    theirs, ours = tiny_pair()
    inject_lora(theirs.requires_grad_(False), 2, rank=4, alpha=8.0)
    mine = trainer(dataclasses.replace(tiny_loaded(), model=ours), detach_exit=detach_exit)
    for model in (theirs, mine.model):
        scramble_lora(model, ["lora_S"], 0.15)
    examples = mine.train_set[:4]
    head, norm = (
        p.detach().clone().requires_grad_()
        for p in (mine.model.exit_proj.weight, mine.model.exit_norm.weight)
    )
    main, early = [], []
    for example in examples:
        tokens, start = example[:, 0], int((example[:, 1] >= 0).nonzero()[0]) + 1
        labels = tokens.clone()
        labels[:start] = -100
        out = theirs(tokens[None], output_hidden_states=True)
        normed = F.rms_norm(out.hidden_states[2], (32,), norm, theirs.config.rms_norm_eps)
        for found, logits in ((main, out.logits), (early, normed @ head.T)):
            found.append(F.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"))
    count = sum(int((example[:, 1] >= 0).sum()) for example in examples)
    loss_main, loss_exit = (sum(part) / count for part in (main, early))
    wanted = [*lora_parameters(theirs, ["lora_S"]), norm, head]
    learned = BETA * loss_exit if detach_exit else loss_main + BETA * loss_exit
    expected = torch.autograd.grad(learned, wanted)

    train_only(mine.model, mine.parameters)
    sums = mine._sums(examples)
    torch.testing.assert_close(sums.loss(BETA), loss_main + BETA * loss_exit, atol=1e-4, rtol=1e-5)
    found = torch.autograd.grad(sums.loss(BETA), mine.parameters)
    assert len(found) == len(expected) == 2 * 7 * 2 + 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("detach_exit", [True, False])
def test_only_without_detach_the_main_loss_reaches_shallow_layers(detach_exit):
    mine = trainer(detach_exit=detach_exit)
    scramble_lora(mine.model, ["lora_S"], 0.15)
    mine.model.requires_grad_(True)
    deep = mine.loaded.model.model.layers[2].mlp.up_proj.weight
    shallow = lora_parameters(mine.model, ["lora_S"])
    found = torch.autograd.grad(mine._sums(mine.train_set[:4]).main, [deep, *shallow], allow_unused=True)
    assert found[0].abs().sum() > 0
    assert all(gradient is None for gradient in found[1:]) == detach_exit


@pytest.mark.parametrize("detach_exit", [True, False])
def test_gradient_norms_are_those_of_autograd_layer_by_layer(detach_exit):
    mine = trainer(detach_exit=detach_exit)
    scramble_lora(mine.model, ["lora_S"], 0.15)
    layers = mine.loaded.model.model.layers
    layers.requires_grad_(True)
    sums = mine._sums(mine.train_set[:4])
    for loss, deep_only in ((sums.main, detach_exit), (sums.loss(BETA), False)):
        norms = gradient_norms(mine.model, loss)
        for index, (layer, found) in enumerate(zip(layers, norms, strict=True)):
            for lora, norm in zip((False, True), found, strict=True):
                wanted = [p for name, p in layer.named_parameters() if ("lora_" in name) == lora]
                parts = (
                    torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True) if wanted else ()
                )
                own = [part.square().sum() for part in parts if part is not None]
                assert norm == pytest.approx(float(sum(own)) ** 0.5, rel=1e-4)
                assert (norm == 0) == ((deep_only and index < 2) or (lora and index >= 2))
    assert all(parameter.grad is None for parameter in mine.model.parameters())


@pytest.mark.parametrize("detach_exit", [True, False])
@pytest.mark.parametrize("changes", [{}, dict(drafter="layer", head="lora"), dict(lora_shallow=False)])
def test_a_step_moves_lora_and_exit_head_and_nothing_else(detach_exit, changes):
    mine = trainer(detach_exit=detach_exit, warmup_steps=0, **changes)
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    for step in (1, 2):
        mine.step(step, mine.train_set[:4])
    moved = {name for name, value in mine.model.state_dict().items() if not torch.equal(value, before[name])}
    lora = {name for name in moved if "lora_S" in name}
    own = {name.split(".")[0] for name in moved - lora}
    assert own == (
        {"adapter_model", "head_up", "head_down"} if changes.get("head") else {"adapter_model", "exit_proj"}
    )
    assert {int(name.split("layers.")[1].split(".")[0]) for name in lora} == (
        set() if "lora_shallow" in changes else {0, 1}
    )


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_said(tmp_path, capsys):
    mine = trainer(run_dir=str(tmp_path), max_steps=1)
    mine.model.head_model.weight.data[:, 0] = math.nan
    before = [parameter.clone() for parameter in mine.parameters]
    mine.config = dataclasses.replace(mine.config, detach_exit=False)
    mine.train(show_progress=False)
    assert (
        all(torch.equal(a, b) for a, b in zip(before, mine.parameters, strict=True))
        and not mine.optimizer.state
    )
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["grad_norm"] is None and line["skipped"] == 1
    assert "step 1: loss or gradient is not finite; the update is left out" in capsys.readouterr().err


# Targets


def test_prompts_are_no_targets():
    first, second = make_example([5, 6, 7], [8, 9]), make_example([50, 60, 70], [8, 9])
    assert first.tolist() == [[5, -1], [6, -1], [7, 8], [8, 9], [9, -1]]
    mine = trainer()
    tokens, targets = collate([first])
    one, other = head_sums(mine.model, tokens, targets), head_sums(mine.model, tokens, collate([second])[1])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and int(one.tokens) == 2


def test_padding_on_the_right_changes_nothing():
    mine = trainer()
    examples = [make_example(ids, [8, 9, 10][: n % 3 + 1]) for n, ids in enumerate(random_prompts(6))]
    alone = [torch.stack(mine._sums([example])) for example in examples]
    torch.testing.assert_close(
        torch.stack(mine._sums(examples)), torch.stack(alone).sum(0), atol=1e-3, rtol=1e-5
    )


def test_targets_outside_the_draft_vocabulary_do_not_count_for_the_exit_head():
    mine = trainer(draft_vocab=100)
    inside, outside = (
        next(t for t in range(264) if (t in mine.model.draft_ids) == there) for there in (True, False)
    )
    both, one = make_example([5, 6], [inside, outside]), make_example([5, 6], [inside])
    sums, alone = mine._sums([both]), mine._sums([one])
    assert (int(sums.tokens), int(sums.covered)) == (2, 1)
    torch.testing.assert_close(sums.exit, alone.exit)
    none = mine._sums([make_example([5, 6], [outside])])
    assert none.exit == 0 and none.loss(BETA).isfinite() and math.isnan(none.figures()["loss_exit"])


def test_figures_are_means_by_hand():
    mine = trainer(draft_vocab=100)
    example = mine.train_set[0]
    logits, chosen = mine.model(example[None, :, 0]), example[:, 1] >= 0
    targets = example[chosen, 1]
    ids = mine.model.draft_ids[logits.exit_logits[0, chosen].argmax(-1)]
    figures = mine._sums([example]).figures()
    assert figures["agreement"] == float((ids == logits.final_logits[0, chosen].argmax(-1)).double().mean())
    assert figures["loss_main"] == pytest.approx(
        float(F.cross_entropy(logits.final_logits[0, chosen], targets)), rel=1e-5
    )
    assert (
        figures["ppl_main"] == pytest.approx(math.exp(figures["loss_main"])) and 0 < figures["coverage"] <= 1
    )


def test_the_draft_vocabulary_is_the_most_frequent_of_the_training_responses():
    mine = trainer(draft_vocab=100)
    seen = {int(token) for example in mine.train_set for token in example[example[:, 1] >= 0, 1]}
    assert seen <= set(mine.model.draft_ids.tolist()) and len(mine.model.draft_ids) == 100


# Runs


@pytest.mark.parametrize("detach_exit", [True, False])
def test_training_lowers_the_held_out_losses(tmp_path, detach_exit):
    mine = trainer(run_dir=str(tmp_path), epochs=12, lr=1e-2, detach_exit=detach_exit)
    base = {n: v.clone() for n, v in mine.loaded.model.state_dict().items() if "lora_" not in n}
    result = mine.train(show_progress=False)
    assert result.after["loss_exit"] < 0.7 * result.before["loss_exit"]
    assert detach_exit or result.after["loss_main"] < 0.9 * result.before["loss_main"]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.step.tolist() == list(range(1, result.steps + 1)) and result.steps == math.ceil(
        12 * 18 / 4
    )
    assert metrics.loss_exit.tail(5).mean() < metrics.loss_exit.head(5).mean()
    after = mine.loaded.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in base.items())


def test_the_same_seed_gives_the_same_run_and_its_checkpoint_loads_again(tmp_path):
    first, second = (trainer(run_dir=str(tmp_path / name), draft_vocab=100, lr=1e-2) for name in "ab")
    result = first.train(show_progress=False)
    assert dataclasses.replace(second.train(show_progress=False), checkpoint="") == dataclasses.replace(
        result, checkpoint=""
    )
    folder = tmp_path / "a" / "checkpoints" / "step-000005"
    assert result.checkpoint == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "drafter.safetensors",
        "lora_S",
        "manifest.json",
        "trainer.json",
        "trainer.safetensors",
    ]
    fresh = SGPTrainer(sgp_settings(draft_vocab=100, seed=5), tiny_loaded(), pairs()[::-1])
    checkpoint.load_weights(folder, fresh.peft_model, fresh.model, ["lora_S"])
    mine, its = first.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    with pytest.raises(DvirlError, match="already holds a run"):
        trainer(run_dir=str(tmp_path / "a")).train(show_progress=False)


def test_dvi_can_start_from_a_fine_tuned_draft(tmp_path):
    mine = trainer(run_dir=str(tmp_path), draft_vocab=120)
    folder = Path(mine.train(show_progress=False).checkpoint)
    other = DVITrainer(tiny_settings(), tiny_loaded(), tiny_split())
    checkpoint.load_weights(folder, other.peft_model, other.model, ["lora_S"])
    ids = torch.tensor(random_prompts(1))
    torch.testing.assert_close(other.model(ids).exit_logits, mine.model(ids).exit_logits)
    with pytest.raises(DvirlError, match="lora_D missing"):
        other.load_checkpoint(folder)


def test_nothing_held_out_evaluates_nothing(tmp_path):
    result = trainer(run_dir=str(tmp_path), held_out_share=0.0, max_steps=2).train(show_progress=False)
    assert result.before == result.after == {} and result.steps == 2


# Records


def test_both_schemas_are_read(tmp_path):
    rows = [
        {"instruction": "Sum up", "context": "A text", "response": "r", "category": "c"},
        {
            "id": 1,
            "instruction": "Add",
            "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "0"}],
        },
        {"instruction": "sum up!", "context": "a text", "response": "a repeat"},
    ]
    found = read_prompts("supervised", str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert [(p.turns, p.response) for p in found] == [
        (("Sum up\n\nA text",), "r"),
        (("Add\n\n1 1",), "2"),
        (("Add",), "0"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x"}, "'response'"),
        ({"instruction": "x", "response": " "}, "'response'"),
        ({"response": "x"}, "'instruction'"),
        ({"instruction": "x", "instances": []}, "'instances' to be a list of objects"),
        ({"instruction": "x", "instances": ["y"]}, "'instances' to be a list of objects"),
        ({"instruction": "x", "instances": [{"input": "y"}]}, "'output'"),
        ({"instances": [{"input": "y", "output": "z"}]}, "'instruction'"),
        ("{", "not valid JSON"),
        ([], "'response'|'instruction'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b"}, row])
    with pytest.raises(DvirlError, match=message) as caught:
        make_trainer(sgp_settings(records_path=str(path)), tiny_loaded())
    assert str(caught.value).startswith(f"{path}:2: ")
    assert (
        len(read_prompts("supervised", str(path), "skip")) == 1
        and f"skipped {path}:2" in capsys.readouterr().err
    )


def test_long_records_are_cut_or_left_out(capsys):
    loaded = tiny_loaded()
    room = len(loaded.chat.encode(["Hi"])) + 4
    records = [
        Prompt(("Hi",), response="a" * 9),
        Prompt(("Hi you, and you",), response="b"),
        Prompt(("Hi",), response="a"),
    ]
    mine = SGPTrainer(sgp_settings(max_tokens=room, held_out_share=0.0), loaded, records)
    assert sorted(int((one[:, 1] >= 0).sum()) for one in mine.train_set) == [2, 4]
    assert {len(one) for one in mine.train_set} == {room, room - 2}
    assert f"left out 1 records: their prompts fill {room} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "records", "message"),
    [
        ({}, None, "records_path is empty"),
        (dict(records_path="none.jsonl"), None, "'none.jsonl': no such file"),
        (dict(max_tokens=2), 4, "0 records fit max_tokens, 0 are held out"),
        (dict(exit_layer=4), 4, "exit_layer is 4; this model of 4 layers takes 1 to 3"),
        ({}, 1, "1 records fit max_tokens, 1 are held out; none is left for training"),
    ],
)
def test_what_cannot_be_trained_is_said(changes, records, message):
    with pytest.raises(DvirlError, match=message):
        make_trainer(sgp_settings(**changes), tiny_loaded(), records and pairs(records))


@pytest.mark.parametrize(
    "changes", [dict(beta_exit=-1.0), dict(held_out_share=0.95), dict(epochs=0), dict(detach_exit=1)]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(DvirlError, match=next(iter(changes))):
        sgp_settings(**changes)


# The command line


def flags(model, records, run_dir):
    return ["--model_name", str(model), "--records_path", str(records), "--run_dir", str(run_dir), "--exit_layer", "2",
            "--lora_rank", "2", "--draft_vocab", "100", "--threads", "1", "--device", "cpu", "--dtype", "float32"]  # fmt: skip


def test_the_command_trains_and_says_where_things_are(tmp_path, capsys):
    model, run_dir = save_tiny(tmp_path / "model"), tmp_path / "run"
    records = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": f"Say {n}", "response": "x" * n} for n in range(1, 13)]
    )
    assert cli.main(["sgp", *flags(model, records, run_dir), "--detach_exit", "false"]) == 0
    out = capsys.readouterr().out
    assert "held-out loss_exit: " in out and f"log: {run_dir}/metrics.jsonl" in out
    assert (
        run_dir / "checkpoints/step-000002/lora_S/adapter_model.safetensors"
    ).exists() and "step-000002" in out
    assert "detach_exit: false" in (run_dir / "config.yaml").read_text()
    assert cli.main(["sgp", *flags(model, records, run_dir)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    write_rows(records, [{"instruction": "x"}])
    assert cli.main(["sgp", *flags(model, records, tmp_path / "other")]) == 2
    assert f"{records}:1: expected an object with a non-empty string 'response'" in capsys.readouterr().err


def test_an_experiment_leaves_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say {n}", "response": "x" * n} for n in range(1, 13)]
    args = Namespace(model_name=str(save_tiny(tmp_path / "m")), records_path=str(write_rows(tmp_path / "r", rows)),
                     exit_layer=1, max_steps=2, run_dir="runs/sgp-tiny", threads=1, device="cpu", dtype="float32",
                     questions=write_questions(tmp_path / "q.jsonl"), answer_tokens=6, methods="plain,fixed,dvi")  # fmt: skip
    path = run_sgp_experiment.main(args)
    found = json.loads((tmp_path / "results/sgp-tiny.json").read_text())
    assert str(path) == "results/sgp-tiny.json" and f"results: {path}" in capsys.readouterr().out
    assert found["settings"]["beta_exit"] == 0.7 and found["versions"]["torch"] == torch.__version__
    held_out = found["held_out"]
    names = {"loss_main", "loss_exit", "agreement"}
    assert held_out["steps"] == 2 and set(held_out["before"]) == set(held_out["after"]) >= names
    assert found["model"]["fingerprint"].startswith("sha256:") and Path(held_out["checkpoint"]).is_dir()
    assert found["figures"]["accept_rate_before"] is not None and Path("results/sgp-tiny.html").exists()
    assert Path("results/sgp-tiny/training.png").stat().st_size > 2000


def test_the_experiment_as_a_module_says_what_is_wrong():
    command = [sys.executable, "-m", "dvirl.run_sgp_experiment", "--records_path", "none.jsonl"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.strip() == "dvirl: 'none.jsonl': no such file"
