"""A published Kangaroo adapter by every command: model and exit layer are flags, and decoding is the published one's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_prompts, tiny_config, write_published
from safetensors.torch import load_file
from test_distill import question_file
from test_kangaroo_layout import EXIT_LAYER, LIMIT, Published, ours
from test_models import save_tiny

from dvirl import cli
from dvirl.models import loading
from dvirl.models.drafters import load_drafter, open_draft
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError

BASE = ["--model_name", "model", "--exit_layer", "2"]
CPU = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
TRAIN = ["--num_prompts", "8", "--held_out", "2", "--rollout_batch", "4", "--max_new_tokens", "8", "--fast_batch", "1",
         "--lora_rank", "2", "--draft_vocab", "0", "--tracker", "none"]  # fmt: skip
ASK = [
    "--questions",
    "q.jsonl",
    "--answer_tokens",
    "6",
    "--methods",
    "plain,kangaroo,fixed,dvi",
    "--any_category",
]
COMMANDS = {
    "evaluate": ["--draft", "adapter", "--run_dir", "out", *ASK, *CPU],
    "check": ["adapter", "--questions", "q.jsonl", "--max_new_tokens", "8", *CPU[:4]],
    "bench": ["adapter", "--questions", "q.jsonl", "--max_new_tokens", "8", *CPU],
    "agreement": ["adapter", "--questions", "q.jsonl", "--max_new_tokens", "8", *CPU[:2], "--out", "out.json"],
    "cost": ["--check", "adapter", "--questions", "q.jsonl", "--exit_layers", "2", "--contexts", "8", "--draft_len", "2",
             "--max_new_tokens", "8", *CPU],
    "sgp-eval": ["--ckpt_dir", "adapter", "--n_samples", "2", "--max_new_tokens", "8", *CPU],
}  # fmt: skip
"""Flags of every command that takes a drafter, besides those that name the model and the exit layer."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model, a published adapter of the model's own shape, and questions."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    like_base(tmp_path / "adapter")
    question_file(tmp_path / "q.jsonl", [["What is it?"], ["Count"]])
    return tmp_path


def like_base(folder: Path, **changes) -> dict[str, torch.Tensor]:
    base = tiny_config()
    return write_published(
        folder, **{**dict(heads=4, groups=2, rope_theta=base.rope_theta, rms_norm_eps=base.rms_norm_eps), **changes}
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_it_with_model_and_exit_layer(here, command, capsys):
    assert cli.main([command, *COMMANDS[command], *BASE]) == 0
    said = capsys.readouterr().out
    assert said
    if command == "agreement":
        files = json.loads((here / "out.json").read_text())["files"]
        assert files["adapter/pytorch_model.bin"].startswith("sha256:") and set(files) == {
            "adapter/pytorch_model.bin",
            "q.jsonl",
        }


def test_an_evaluation_goes_on_with_the_same_adapter_and_with_no_other(here, capsys):
    asked = ["evaluate", *COMMANDS["evaluate"], *BASE]
    assert cli.main(asked) == 0 and cli.main(asked) == 0
    write_published(here / "adapter", seed=1)
    capsys.readouterr()
    assert cli.main(asked) == 2
    assert "the content of draft has changed since then" in capsys.readouterr().err


LEFT_OUT = [(command, flag) for command in COMMANDS for flag in ("--model_name", "--exit_layer")]
LEFT_OUT.remove(("cost", "--model_name"))  # its model has a default, which is also that of the costs


@pytest.mark.parametrize(("command", "left_out"), LEFT_OUT)
def test_without_model_or_exit_layer_one_sentence_names_the_flags(here, command, left_out, capsys):
    place = BASE.index(left_out)
    flags = [*BASE[:place], *BASE[place + 2 :]]
    assert cli.main([command, *COMMANDS[command], *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        "dvirl: adapter: a published Kangaroo adapter names neither its model nor its exit layer; "
        "expected --model_name and --exit_layer"
    )


@pytest.mark.parametrize("name", ["adapter", "other"])
def test_it_decodes_with_the_published_accept_lengths(here, name):
    write_published(here / "other", 3)  # heads, epsilon and rope of its own
    drafter = open_draft(name, "float32", "cpu", "model", EXIT_LAYER)
    model = drafter.model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.head == "frozen" and model.draft_ids is None and model.base_model.exit_layer == EXIT_LAYER
    published = Published(loading.load("model", "float32", "cpu").model, here / name)
    for prompt in random_prompts(4):
        tokens, lengths = published.decode(prompt, LIMIT, 4, 0.2)
        found, its = ours(model, prompt, 4, 0.2)
        assert found[: len(tokens)] == tokens and its[: len(lengths)] == lengths
    assert (
        load_drafter(here / name, loading.load("model", "float32", "cpu"), exit_layer=2).folder == here / name
    )


@pytest.mark.parametrize(
    ("folder", "flags", "message"),
    [
        ("adapter", ["--model_name", "model", "--exit_layer", "4"], "exit_layer is 4; this model of 4 layers takes 1 to 3"),
        ("wide", BASE, "its hidden_size is 64, the base model's 32"),
        ("mixed", BASE, "model.safetensors: tensor layers.0.input_layernorm.weight is missing"),
        ("nowhere", BASE, "no drafter 'nowhere'; expected a folder .*a published Kangaroo adapter, a Llama with its tokenizer, or one of the shipped"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(here, folder, flags, message, capsys):
    like_base(here / "wide", hidden_size=64)
    (here / "mixed").mkdir()
    for name in ("config.json", "model.safetensors"):  # a model without its tokenizer
        (here / "mixed" / name).write_bytes((here / "model" / name).read_bytes())
    assert cli.main(["agreement", folder, "--own", "1", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("dvirl: ") and len(error) == 1
    assert re.search(message, error[-1])


# Training from it


@pytest.mark.no_cover
def test_a_run_starts_from_it_and_its_drafter_settings_follow(here, capsys):
    flags = ["--start_from", "adapter", "--head", "frozen", "--run_dir", "run", *TRAIN, *BASE, *CPU]
    assert cli.main(["train", *flags, "--lr_shallow", "0"]) == 0
    config = yaml.safe_load((here / "run/config.yaml").read_text())["config"]
    context = tiny_config().max_position_embeddings
    assert (config["drafter"], config["drafter_layers"], config["adapter_window"]) == ("adapter", 1, context)
    # Nothing was learned, at a rate of 0: the run drafts as the adapter does.
    state = load_file(newest("run") / "drafter.safetensors")
    for name, value in (
        load_drafter("adapter", None, "float32", "cpu", "model", 2).model.drafter_state().items()
    ):
        assert torch.equal(state[name], value), name
    drafts = [open_draft(name, "float32", "cpu", "model", 2).model for name in ("run", "adapter")]
    for prompt in [*random_prompts(3), list(range(3, 110))]:
        run, adapter = (ours(model, prompt, 4, 0.2, target="base") for model in drafts)
        assert run == adapter
    # It goes on, and learns.
    assert (
        cli.main(
            ["train", "--resume", "run", "--num_prompts", "16", "--lr_shallow", "0.01", "--accept_changes"]
        )
        == 0
    )
    assert not torch.equal(state["adapter_model.norm.weight"],
                           load_file(newest("run") / "drafter.safetensors")["adapter_model.norm.weight"])  # fmt: skip


def test_an_experiment_starts_from_it_too(here, capsys):
    flags = ["--start_from", "adapter", "--run_dir", "e", "--results", "results", *TRAIN, *BASE, *ASK, *CPU]
    assert cli.main(["experiment", *flags]) == 0
    assert (here / "results/e.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rms_norm_eps=1e-3), "other: rms_norm_eps is 0.001; expected the model's 1e-06 to train it"),
        (dict(rope_theta=100.0), "other: rope_theta is 100.0; expected the model's 5000.0 to train it"),
        (dict(heads=8, groups=4), "other: num_attention_heads is 8; expected the model's 4 to train it"),
        (dict(hidden_size=64), "its hidden_size is 64, the base model's 32"),
    ],
)
def test_a_run_does_not_start_from_another_shape_than_the_models(here, changes, message, capsys):
    like_base(here / "other", **changes)
    assert cli.main(["train", "--start_from", "other", "--run_dir", "run", *TRAIN, *BASE, *CPU]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not (here / "run/metrics.jsonl").exists()
    # Judged, it is taken as it is.
    if "hidden_size" not in changes:
        assert open_draft("other", "float32", "cpu", "model", 2).folder == Path("other")


def test_a_drafter_of_ours_may_be_put_on_its_model_by_name_and_refuses_another_exit_layer(here):
    flags = ["train", "--run_dir", "run", *TRAIN, *BASE, *CPU]
    assert cli.main(flags) == 0
    (here / "model").rename(here / "moved")
    assert open_draft("run", "float32", "cpu", "moved", 2).loaded.name == "moved"
    with pytest.raises(DvirlError, match="exit_layer is 3; .* was made for 2"):
        open_draft("run", "float32", "cpu", "moved", 3)
