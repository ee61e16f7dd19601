"""Averages of adapters: by hand, whole or not at all, and never of what does not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import scramble_lora, tiny_loaded, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_sgp import pairs, sgp_settings

from dvirl import cli
from dvirl.data.sources import Prompt
from dvirl.runs import checkpoint
from dvirl.runs.errors import DvirlError
from dvirl.scale.averaging import average_adapters
from dvirl.sgp import SGPTrainer
from kangaroo.sgp_lora import get_peft_model_state_dict, inject_dual_lora, inject_lora

TENSORS = "adapter_model.safetensors"


def adapter(folder: Path, seed: int, exit_layer: int = 2, **changes) -> Path:
    """A plain PEFT folder."""
    model = inject_lora(tiny_model(), exit_layer, **{"rank": 4, "alpha": 8.0, **changes})
    scramble_lora(model, ["lora_S"], seed=seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder / "lora_S"


def client(folder: Path, seed: int, records=None, **changes) -> Path:
    """A checkpoint of a fine-tuning with a draft vocabulary."""
    config = sgp_settings(
        run_dir=str(folder), draft_vocab=100, max_steps=1, seed=seed, held_out_share=0.0, **changes
    )
    trainer = SGPTrainer(config, tiny_loaded(), records or pairs())
    scramble_lora(trainer.model, ["lora_S"], seed=seed)
    return Path(trainer.train(show_progress=False).checkpoint)


@pytest.mark.parametrize(
    ("weights", "shares"), [(None, (1 / 3, 1 / 3, 1 / 3)), ([100, 300, 600], (0.1, 0.3, 0.6))]
)
def test_the_mean_is_weighted_factor_by_factor(tmp_path, weights, shares):
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(3)]
    out = average_adapters(folders, weights, tmp_path / "new" / "mean")
    clients, mean = [load_file(folder / TENSORS) for folder in folders], load_file(out / TENSORS)
    assert mean.keys() == clients[0].keys() and len(mean) == 2 * 7 * 2
    for name, value in mean.items():
        assert value.dtype == torch.float32
        expected = sum(share * one[name].double() for share, one in zip(shares, clients, strict=True))
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["mean"]


def test_the_mean_loads_in_peft(tmp_path):
    out = average_adapters(
        [adapter(tmp_path / str(seed), seed) for seed in range(2)], None, tmp_path / "mean"
    )
    peft_model = PeftModel.from_pretrained(tiny_model(), str(out))
    state, mean = get_peft_model_state_dict(peft_model, "default"), load_file(out / TENSORS)
    assert state.keys() == mean.keys() and all(torch.equal(state[name], mean[name]) for name in mean)


def test_one_adapter_alone_stays_itself(tmp_path):
    folder = adapter(tmp_path / "a", 0)
    one, mean = (
        load_file(folder / TENSORS),
        load_file(average_adapters([folder], [7], tmp_path / "mean") / TENSORS),
    )
    assert all(torch.equal(one[name], mean[name]) for name in one)


def test_checkpoints_are_averaged_with_their_drafters(tmp_path):
    folders = [client(tmp_path / str(seed), seed) for seed in range(2)]
    out = average_adapters(folders, [1, 3], tmp_path / "mean")
    assert sorted(path.name for path in out.iterdir()) == ["drafter.safetensors", "lora_S"]
    first, second, mean = (load_file(folder / "drafter.safetensors") for folder in (*folders, out))
    assert torch.equal(mean["draft_ids"], first["draft_ids"]) and mean["draft_ids"].dtype == torch.long
    torch.testing.assert_close(
        mean["exit_proj.weight"], 0.25 * first["exit_proj.weight"] + 0.75 * second["exit_proj.weight"]
    )
    fresh = SGPTrainer(sgp_settings(draft_vocab=100), tiny_loaded(), pairs())
    checkpoint.load_weights(out, fresh.peft_model, fresh.model, ["lora_S"])
    assert torch.equal(fresh.model.exit_proj.weight, mean["exit_proj.weight"])


def test_both_adapters_of_a_training_checkpoint_are_averaged(tmp_path):
    folders = []
    for seed in range(2):
        model = inject_dual_lora(tiny_model(), 2, rank=2)
        scramble_lora(model, ["lora_S", "lora_D"], seed=seed)
        model.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        save_file({"exit_norm": torch.ones(3) * seed}, tmp_path / str(seed) / "drafter.safetensors")
        folders.append(tmp_path / str(seed))
    out = average_adapters(folders, None, tmp_path / "mean")
    one, other, mean = (load_file(folder / "lora_D" / TENSORS) for folder in (*folders, out))
    assert all(torch.allclose(value, (one[name] + other[name]) / 2) for name, value in mean.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=2), "r is 2; expected 4"),
        (dict(alpha=4.0), "lora_alpha is 4.0; expected 8.0"),
        (
            dict(targets=("q_proj", "v_proj")),
            r"target_modules is \['q_proj', 'v_proj'\]; expected \['down_proj",
        ),
        (dict(exit_layer=3), r"layers_to_transform is \[0, 1, 2\]; expected \[0, 1\]"),
    ],
)
def test_other_configurations_are_refused(tmp_path, changes, message):
    folders = [adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, **changes)]
    with pytest.raises(DvirlError, match=message) as caught:
        average_adapters(folders, None, tmp_path / "out" / "mean")
    assert str(caught.value).startswith(f"{folders[1]}/adapter_config.json: ") and str(folders[0]) in str(
        caught.value
    )
    assert not list((tmp_path / "out").iterdir())


def test_the_order_of_targets_and_the_place_of_the_base_do_not_matter(tmp_path):
    folders = [adapter(tmp_path / name, 0) for name in "ab"]
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    config |= {
        "target_modules": sorted(config["target_modules"])[::-1],
        "base_model_name_or_path": "elsewhere",
    }
    (folders[1] / "adapter_config.json").write_text(json.dumps(config))
    average_adapters(folders, None, tmp_path / "mean")


def spoil(file: Path, **changes) -> None:
    save_file({**load_file(file), **changes}, file)


@pytest.mark.parametrize(
    ("spoil_it", "message"),
    [
        (lambda file, name: spoil(file, **{name: torch.zeros(4, 31)}), r"is torch.float32 \[4, 31\]; expected torch.float32 \[4, 32\]"),
        (lambda file, name: spoil(file, extra=torch.zeros(1)), r"extra is torch.float32 \[1\]; expected missing"),
        (lambda file, name: spoil(file, **{name: torch.full((4, 32), torch.nan)}), "holds numbers that are not finite"),
        (lambda file, name: file.write_bytes(b"garbage"), "unreadable"),
        (lambda file, name: (file.parent / "adapter_config.json").write_text("3"), "unreadable"),
        (lambda file, name: (file.parent / "adapter_config.json").write_text("{"), "unreadable"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(tmp_path, spoil_it, message):
    folders = [adapter(tmp_path / name, 0) for name in "ab"]
    spoil_it(
        folders[1] / TENSORS,
        next(name for name in load_file(folders[1] / TENSORS) if "q_proj.lora_A" in name),
    )
    with pytest.raises(DvirlError, match=message) as caught:
        average_adapters(folders, None, tmp_path / "out" / "mean")
    assert str(caught.value).startswith(f"{folders[1]}/") and not list((tmp_path / "out").iterdir())


def test_another_draft_vocabulary_is_refused(tmp_path):
    other = [Prompt((f"Say {n}",), response="é") for n in range(4)]
    folders = [client(tmp_path / "a", 0), client(tmp_path / "b", 1, other)]
    with pytest.raises(DvirlError, match=r"b/.*drafter.safetensors: draft_ids is \[0, .*; expected \[0, "):
        average_adapters(folders, None, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    ids = load_file(folders[0] / "drafter.safetensors")["draft_ids"].flip(0)
    spoil(folders[1] / "drafter.safetensors", draft_ids=ids.contiguous())
    with pytest.raises(DvirlError, match="draft_ids is"):
        average_adapters(folders, None, tmp_path / "mean")


def test_kinds_and_weights_must_fit(tmp_path):
    one, two = client(tmp_path / "a", 0), adapter(tmp_path / "b", 1)
    bare = adapter(tmp_path / "c", 0).rename(tmp_path / "bare")
    (bare / TENSORS).unlink()
    (tmp_path / "mean").mkdir()
    for folders, weights, out, message in [
        (
            [one, two],
            None,
            "new",
            "b/lora_S: holds adapter_config.json, adapter_model.safetensors; expected lora_S/adapter",
        ),
        (
            [two, one],
            None,
            "new",
            "step-000001: holds lora_S/adapter_config.json, .*; expected adapter_config.json, ",
        ),
        (
            [two, bare],
            None,
            "new",
            "bare: holds adapter_config.json; expected adapter_config.json, adapter_model.safetensors as in",
        ),
        (
            [bare, bare],
            None,
            "new",
            "bare: expected adapter_config.json and adapter_model.safetensors, or a checkpoint",
        ),
        ([two, tmp_path], None, "new", "holds none; expected"),
        ([], None, "new", "expected a number above 0 for each of 0 folders"),
        ([one, one], [1], "new", r"the weights are \[1\]; expected a number above 0 for each of 2 folders"),
        ([one, one], [1, 0], "new", r"the weights are \[1, 0\]"),
        ([one, one], [1.0, float("nan")], "new", "the weights are"),
        ([one, one], None, "mean", "mean exists already"),
    ]:
        with pytest.raises(DvirlError, match=message):
            average_adapters(folders, weights, tmp_path / out)
        assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".writing")]


def test_the_command_averages(tmp_path, capsys):
    folders = [str(adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    out = str(tmp_path / "mean")
    assert cli.main(["average-adapters", out, *folders, "--tokens", "10", "30"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    one, other, mean = (next(iter(load_file(Path(folder) / TENSORS).values())) for folder in (*folders, out))
    torch.testing.assert_close(mean, 0.25 * one + 0.75 * other)
    assert cli.main(["average-adapters", out, *folders]) == 2
    assert "exists already" in capsys.readouterr().err
