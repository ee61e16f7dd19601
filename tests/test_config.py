"""Settings: every field is documented, checked, and reachable by flag, YAML and notebook."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest

from dvirl.config import DVIConfig
from dvirl.evaluation.runner import EvalConfig
from dvirl.experiments.notebook import DECLARED, assigned_names, new_run_dir, notebook_config
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import field_docs, from_mapping, from_namespace, narrowed, read_yaml
from dvirl.train_dvi import parse_args

ROOT = Path(__file__).parents[1]
FIELDS = dataclasses.fields(DVIConfig)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_value_of_the_wrong_type_is_refused(field):
    with pytest.raises(DvirlError, match=f"^{field.name} is"):
        DVIConfig(**{field.name: ["no"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layer": 0}, "exit_layer is 0; expected a number from 1"),
        ({"threshold": 1.1}, "threshold is 1.1; expected a number from 0 to 1"),
        (
            {"schedule": "magic"},
            "schedule is 'magic'; expected one of reinforce, exact_pg, ce, masked_ce, kl, tv, kl_to_rl",
        ),
        ({"kl_kind": "backward"}, "kl_kind is 'backward'; expected one of forward, reverse, js"),
        ({"baseline": "max"}, "baseline is 'max'; expected one of ema, mean, none"),
        ({"kl_top_k": -1}, "kl_top_k is -1; expected a number from 0"),
        ({"entropy_weight": -0.1}, "entropy_weight is -0.1; expected a number from 0"),
        ({"num_prompts": True}, "num_prompts is True"),
        ({"seed": 1.5}, "seed is 1.5; expected int"),
        ({"lr_shallow": float("nan")}, "lr_shallow is nan"),
        ({"ramp_start": 0.8, "ramp_end": 0.2}, "ramp_end is 0.2; expected at least ramp_start, 0.8"),
        (
            {"exit_states": "stored", "drafter": "layer"},
            "exit_states is stored; expected drafter none with it, not layer",
        ),
        ({"lora_targets": "q_proj,z_proj"}, "lora_targets has z_proj"),
    ],
)
def test_values_out_of_range_name_field_value_and_range(changes, message):
    with pytest.raises(DvirlError, match=message):
        DVIConfig(**changes)


def test_every_field_has_a_help_text_and_a_flag():
    texts = field_docs(DVIConfig)
    assert set(texts) == {field.name for field in FIELDS} and all(len(text) > 5 for text in texts.values())
    config = parse_args(
        [word for field in FIELDS for word in (f"--{field.name}", str(field.default)) if str(field.default)]
    )
    assert narrowed(DVIConfig, config) == DVIConfig()


def test_flags_override_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("exit_layer: 4\nseed: 3\n")
    config = parse_args(["--config", str(path), "--seed", "5"])
    assert (config.exit_layer, config.seed) == (4, 5)
    assert parse_args([f"--config={path}"]).exit_layer == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [("exit_layr: 4", "unknown setting exit_layr"), ("- 1", "expected a mapping"), ("a: [", "not valid YAML"),
     ("exit_layer: six", "exit_layer is 'six'")],
)  # fmt: skip
def test_a_bad_yaml_is_said(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(DvirlError, match=message):
        parse_args(["--config", str(path)])
    with pytest.raises(DvirlError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_namespaces_are_read():
    assert from_namespace(DVIConfig, Namespace(exit_layer=3)).exit_layer == 3
    with pytest.raises(DvirlError, match="unknown setting exit_lay"):
        from_namespace(DVIConfig, Namespace(exit_lay=3))
    config = DVIConfig(seed=4)
    assert from_namespace(DVIConfig, config) is config


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith(("study-", "sweep-"))),
    ids=lambda path: path.name,
)
def test_every_committed_config_is_valid(path):
    assert from_mapping(DVIConfig, read_yaml(path), str(path))


def test_decode_settings_follow():
    config = DVIConfig(draft_len=5, threshold=0.3, target="adapted", action_temperature=0.7)
    assert (
        config.decode.draft_len == 5
        and config.decode.draft_temperature == 0
        and config.learn.draft_temperature == 0.7
    )
    argmax = dataclasses.replace(config, actions="argmax")
    assert argmax.learn == config.decode
    assert (config.policy_temperature, argmax.policy_temperature) == (0.7, 1.0)


# Notebooks


def namespace(injected="", **values):
    declared = f"{DECLARED} (x)\nexit_layer = 6\neval_prompts = 4\nrun_dir = ''"
    return {"In": ["", declared, injected], "exit_layer": 6, "eval_prompts": 4, "run_dir": "", **values}


def test_notebook_parameters_become_settings():
    config = notebook_config(
        namespace("# Parameters\nexit_layer = 4\nthreads = 1\n", exit_layer=4, threads=1), run_dir="r"
    )
    assert (config.exit_layer, config.threads, config.run_dir) == (4, 1, "r")
    assert notebook_config(namespace(), run_dir="r").exit_layer == 6
    assert notebook_config({"In": [], "exit_layer": 3, "words": 1}).exit_layer == 3  # nbval keeps no history
    judged = notebook_config(namespace("# Parameters\nfixed_len = 2", fixed_len=2), EvalConfig, run_dir="r")
    assert (judged.fixed_len, judged.run_dir) == (2, "r")
    assert assigned_names("a = 1\nb = c = 2\nprint(a)") == ["a", "b", "c"]


def test_an_unknown_notebook_parameter_lists_the_known_ones():
    with pytest.raises(
        DvirlError, match=r"unknown notebook parameter exit_layr; known are .*eval_prompts, exit_layer"
    ):
        notebook_config(namespace("# Parameters\nexit_layr = 4", exit_layr=4))


def test_a_notebook_parameter_of_a_bad_value_is_said():
    with pytest.raises(DvirlError, match="schedule is 'magic'; expected one of"):
        notebook_config(namespace("# Parameters\nschedule = 'magic'", schedule="magic"), run_dir="r")


def test_run_folders_are_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_run_dir("mine", "03") == "mine"
    first = new_run_dir("", "03")
    Path(first).mkdir(parents=True)
    assert new_run_dir("", "03") != first


def test_no_flag_at_all_gives_the_defaults():
    assert narrowed(DVIConfig, parse_args([])) == DVIConfig()


def test_a_file_whose_config_is_no_mapping_is_one_sentence(tmp_path):
    (tmp_path / "x.yaml").write_text("config: 5\n")
    with pytest.raises(DvirlError, match="unknown setting config"):
        parse_args(["--config", str(tmp_path / "x.yaml")])


@pytest.mark.parametrize(
    "name", ["configs/reinforce-argmax.yaml", "reinforce-argmax.yaml", "reinforce-argmax"]
)
@pytest.mark.parametrize("room", ["configs", "dvirl_configs"])
def test_a_settings_file_that_ships_is_found_from_everywhere(tmp_path, monkeypatch, name, room):
    """In a wheel it lies in dvirl_configs, beside the packages."""
    (tmp_path / room).mkdir()
    shipped = tmp_path / room / "reinforce-argmax.yaml"
    shipped.write_text((ROOT / "configs/reinforce-argmax.yaml").read_text())
    monkeypatch.setattr(settings, "CONFIGS", tuple(tmp_path / each for each in ("configs", "dvirl_configs")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = from_mapping(DVIConfig, read_yaml(shipped), "")
    assert narrowed(DVIConfig, parse_args(["--config", name])) == expected != DVIConfig()
    Path("configs").mkdir()
    Path(name).write_text("seed: 7")  # a file that is there comes first
    assert parse_args(["--config", name]).seed == 7
    for missing in ("runs/reinforce-argmax.yaml", "configs/reinforce-argmax.json", "nothing"):
        with pytest.raises(DvirlError, match=f"{missing}: No such file"):
            read_yaml(missing)
