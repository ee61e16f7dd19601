"""Drafters that ship: written whole, found by name, the same draft again; and what `dvirl agreement` says of them."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from conftest import EOS, random_prompts, scramble_lora, tiny_kangaroo, tiny_loaded, tiny_split
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_corpus import ENDS
from test_distill import question_file
from test_models import save_tiny
from test_trainer import tiny_settings

from dvirl import cli
from dvirl.evaluation.agreement import calibration_error, measure_agreement
from dvirl.evaluation.questions import HELD_OUT, MeasureSettings, question_sets
from dvirl.models import drafters, loading
from dvirl.models.drafters import drafter_folder, export, load_drafter, open_draft
from dvirl.rollout import Responses
from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.scale.corpus import answer
from dvirl.scale.distill import DistillConfig
from dvirl.trainer import DVITrainer
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import inject_lora

ROOT = Path(__file__).parents[1]
KINDS = [dict(), dict(head="full", drafter="adapter", draft_vocab=0), dict(head="frozen", drafter="none")]


def trained(loaded, seed=0, **changes):
    """A model with a scrambled draft, and the settings that it would have been trained by."""
    values = dict(
        lora_rank=4, lora_alpha=8.0, drafter_layers=1, head_rank=8, draft_vocab=100, model_name=loaded.name
    )
    config = DistillConfig(**{**values, **changes})
    peft_model = inject_lora(loaded.model, config.exit_layer, config.lora_rank, config.lora_alpha)
    generator = torch.Generator().manual_seed(seed)
    ids = (
        torch.randperm(loaded.model.config.vocab_size, generator=generator)[: config.draft_vocab]
        .sort()
        .values
    )
    model = KangarooModel(loaded.model, None, config.drafter_args(ids.tolist() or None), config.exit_layer)
    scramble_lora(model, ["lora_S"], 0.15, seed)
    for parameter in (*model.adapter_model.parameters(), *([model.head_up] if config.head == "lora" else [])):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, peft_model, config


def exported(folder, loaded=None, **changes) -> KangarooModel:
    loaded = loaded or tiny_loaded()
    model, peft_model, config = trained(loaded, **changes)
    export(folder, peft_model, model, config, loaded, steps=7)
    return model


# Export and load


@pytest.mark.parametrize("changes", KINDS)
def test_a_drafter_comes_back_rounded_to_bfloat16_and_drafts_without_loss(tmp_path, changes):
    model = exported(tmp_path / "d", **changes)
    found = load_drafter(tmp_path / "d", tiny_loaded())
    assert found.folder == tmp_path / "d" and not any(p.requires_grad for p in found.model.parameters())
    mine, its = model.state_dict(), found.model.state_dict()
    assert mine.keys() == its.keys()
    ships = [
        "lora_S",
        "adapter_model.",
        "head_down",
        "head_up",
        *(["exit_proj"] if model.head == "full" else []),
    ]
    for name, value in mine.items():
        shipped = any(part in name for part in ships)
        assert its[name].dtype == value.dtype
        assert torch.equal(its[name], value.bfloat16().float() if shipped else value), name
    ids = torch.tensor([[*range(30, 60)]])
    one, other = (m(ids).exit_logits.detach() for m in (model, found.model))
    assert one.shape == other.shape and 0 < float((one - other).norm() / one.norm()) < 0.02
    plain = tiny_kangaroo(lora=False)
    for prompt in random_prompts(5):
        drafted = found.model.generate(prompt, 20, DecodeConfig(4, 0.0, "base"), (EOS,))
        assert drafted.tokens == plain.generate(prompt, 20, DecodeConfig(0), (EOS,)).tokens


def test_a_folder_to_ship_is_small_whole_and_says_how_it_was_made(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    loaded = tiny_loaded()
    model, peft_model, config = trained(loaded)
    export(folder, peft_model, model, config, loaded, steps=7, agreement=0.5)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "config.yaml", "drafter.safetensors", "lora_S/adapter_config.json", "lora_S/adapter_model.safetensors"]  # fmt: skip
    for name in ("drafter.safetensors", "lora_S/adapter_model.safetensors"):
        assert {t.dtype for k, t in load_file(folder / name).items() if k != "draft_ids"} == {torch.bfloat16}
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert content["config"] == dataclasses.asdict(config) and content["made"] == {
        "steps": 7,
        "agreement": 0.5,
    }
    assert (
        content["model"]["fingerprint"] == "sha256:tiny" and content["versions"]["torch"] == torch.__version__
    )
    assert (
        json.loads((folder / "lora_S/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    )

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(run_folder, "write_config", full)
    with pytest.raises(
        DvirlError, match="could not be written .no space left.; what was there before is whole"
    ):
        export(tmp_path / "other", peft_model, model, config, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_shipped_names_are_looked_up_and_others_are_listed(tmp_path, monkeypatch):
    roots = tmp_path / "weights", tmp_path / "dvirl_weights"
    monkeypatch.setattr(drafters, "WEIGHTS", roots)
    with pytest.raises(
        DvirlError, match=r"no drafter 'nope'; expected a folder .* shipped ones \(none are\)"
    ):
        load_drafter("nope")
    exported(roots[0] / "tiny-k2", loaded=dataclasses.replace(tiny_loaded(), name="elsewhere"))
    exported(roots[1] / "tiny-k1", exit_layer=1)
    assert drafter_folder("tiny-k1") == roots[1] / "tiny-k1"
    assert load_drafter("tiny-k2", tiny_loaded()).model.base_model.exit_layer == 2
    with pytest.raises(DvirlError, match=r"no drafter 'tiny-k3'.*\(tiny-k1, tiny-k2\)"):
        load_drafter("tiny-k3")


def test_the_model_that_a_drafter_was_made_for_is_loaded(tmp_path):
    source = save_tiny(tmp_path / "model")
    model = exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    found = load_drafter(tmp_path / "d", dtype="bfloat16", device="cpu")
    assert found.loaded.name == str(source) and found.loaded.model.dtype == torch.bfloat16
    assert {p.dtype for p in found.model.adapter_model.parameters()} == {torch.float32}
    logits = found.model(torch.tensor([[5, 6, 7]])).exit_logits
    torch.testing.assert_close(
        logits, model(torch.tensor([[5, 6, 7]])).exit_logits.detach(), atol=0.5, rtol=0.1
    )


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_a_run_opens_as_its_newest_checkpoint_decodes(tmp_path, target):
    run, source = tmp_path / "run", str(save_tiny(tmp_path / "model"))
    config = tiny_settings(model_name=source, run_dir=str(run), target=target)
    trainer = DVITrainer(config, loading.load(source, dtype="float32", device="cpu"), tiny_split())
    run_folder.write_config(run, config, trainer.loaded)
    for step in (1, 2):
        scramble_lora(trainer.model, ["lora_S", "lora_D"], 0.1, step)
        checkpoint.save(run, step, trainer.peft_model, trainer.model, trainer.state_dict())
    found = open_draft(str(run), "float32", "cpu")
    assert found.target == target and not any(one.requires_grad for one in found.model.parameters())
    for prompt in random_prompts(3):
        expected, answer = (one.model.generate(prompt, 12, config.decode) for one in (trainer, found))
        assert (
            answer.tokens == expected.tokens
            and answer.blocks[1].num_accepted == expected.blocks[1].num_accepted
        )
    exported(run / "drafter", loading.load(source, dtype="float32", device="cpu"))
    assert (
        open_draft(str(run), "float32", "cpu").folder == run / "drafter"
    )  # what a distillation ships comes first


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            dict(model=dict(fingerprint="sha256:other")),
            "made for the model sha256:other, but 'tiny' is sha256:tiny",
        ),
        (dict(config=dict(exit_layer=9)), "exit_layer is 9; this model of 4 layers takes 1 to 3"),
        (dict(config=dict(lora_rank=2)), "the adapter does not fit this model"),
        (dict(config=dict(drafter="none")), "the drafter holds"),
        (dict(config=dict(draft_vocab=99)), r"head_up is \[100, 8\], expected \[99, 8\]"),
        (dict(config=dict(head="none")), "head is 'none'; expected one of"),
        (dict(config=None), "expected a drafter's settings under 'config' and 'model'"),
    ],
)
def test_a_drafter_that_does_not_fit_is_one_sentence(tmp_path, spoil, message):
    exported(tmp_path)
    path = tmp_path / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for part, values in spoil.items():
        content[part] = {**content[part], **values} if values else {}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(DvirlError, match=message) as caught:
        load_drafter(tmp_path, tiny_loaded())
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_broken_is_named(tmp_path):
    exported(tmp_path)
    (tmp_path / "lora_S/adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(DvirlError, match="unreadable checkpoint"):
        load_drafter(tmp_path, tiny_loaded())
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(DvirlError, match=r"config\.yaml: No such file"):
        load_drafter(tmp_path, tiny_loaded())
    loaded = tiny_loaded()
    inject_lora(loaded.model, 2)
    with pytest.raises(DvirlError, match="carries adapters already"):
        exported(tmp_path / "d")
        load_drafter(tmp_path / "d", loaded)


def test_the_wheel_holds_every_package_and_the_data_that_they_read():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tree = {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for n in ("dvirl", "kangaroo")
        for p in (ROOT / n).rglob("__init__.py")
    }
    assert set(setup["packages"]) == tree | {"dvirl_weights", "dvirl_configs"}
    assert setup["package-dir"] == {"dvirl_weights": "weights", "dvirl_configs": "configs"}
    assert (ROOT / "weights/README.md").exists()
    packed = set()
    for name, patterns in setup["package-data"].items():
        folder = ROOT / setup["package-dir"].get(name, name.replace(".", "/"))
        packed |= {path for pattern in patterns for path in folder.glob(pattern)}
    for folder in (ROOT / "dvirl", ROOT / "weights", ROOT / "configs"):
        data = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        assert data and data <= packed


# Agreement


def test_agreement_is_what_the_decoder_accepts_at_every_position(tmp_path):
    """After each prefix of each answer the decoder drafts one token: accepted means agreement."""
    loaded = dataclasses.replace(tiny_loaded(), eos_ids=ENDS)
    model, _, _ = trained(loaded)
    prompts = random_prompts(8)
    responses = answer(loaded, prompts, 12, 8)
    found = measure_agreement(model, responses)
    accepted, covered = [], []
    for prompt, length, row in zip(
        prompts, responses.response_lens.tolist(), responses.tokens.tolist(), strict=True
    ):
        text = row[len(prompt) : len(prompt) + length]
        for position in range(1, length):
            blocks = model.generate(prompt + text[: position - 1], 3, DecodeConfig(1)).blocks
            accepted.append(blocks[1].num_accepted)
            covered.append(text[position] in model.draft_ids.tolist())
    assert found.positions == len(accepted) > 30 and 0 < sum(accepted) < len(accepted)
    assert found.rate == pytest.approx(sum(accepted) / len(accepted), abs=1e-6)
    assert found.covered == pytest.approx(sum(covered) / len(covered), abs=1e-6)
    parts = torch.tensor(accepted, dtype=torch.float).split(
        (responses.response_lens - 1).clamp(min=0).tolist()
    )
    by_answer = [float(part.mean()) for part in parts]
    assert found.answers == pytest.approx(by_answer, abs=1e-6, nan_ok=True) and len(found.answers) == len(
        prompts
    )


def test_the_calibration_error_by_hand():
    confidence = torch.tensor([0.1, 0.12, 0.5, 0.52, 0.51, 1.0])  # bins 1 (two), 7 (three), 14 (one)
    right = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    expected = (abs(0.22 - 1.0) + abs(1.53 - 1.0) + 0.0) / 6
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.zeros(3), torch.zeros(3)) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40))
def test_the_calibration_error_is_that_of_a_plain_loop(pairs):
    bins = {}
    for confidence, right in pairs:
        bins.setdefault(min(14, int(torch.tensor(confidence) * 15)), []).append((confidence, right))
    expected = sum(
        len(b) * abs(sum(c for c, _ in b) / len(b) - sum(r for _, r in b) / len(b)) for b in bins.values()
    )
    confidence, right = (torch.tensor([float(p[i]) for p in pairs]) for i in (0, 1))
    assert calibration_error(confidence, right) == pytest.approx(expected / len(pairs), abs=1e-5)


def test_answers_of_one_token_hold_no_position():
    model = tiny_kangaroo(lora=False)
    found = measure_agreement(model, Responses(torch.tensor([[3, 4]]), torch.tensor([1]), torch.tensor([1])))
    assert found.positions == 0 and found.rate != found.rate and found.ece != found.ece


def test_the_command_prints_a_table_and_writes_what_repeats_it(tmp_path, capsys):
    source = save_tiny(tmp_path / "model")
    exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    questions = question_file(tmp_path / "q.jsonl", [["What is it?", "Why?"], ["Count"], ["Sum up"]])
    flags = [
        "agreement",
        str(tmp_path / "d"),
        "--questions",
        questions,
        "--device",
        "cpu",
        "--max_new_tokens",
        "6",
    ]
    found = []
    for name in ("one.json", "two.json"):
        assert cli.main([*flags, "--out", str(tmp_path / "out" / name)]) == 0
        header, row = capsys.readouterr().out.splitlines()
        own = ["agreement", "confidence", "ece", "covered", "positions"]
        assert header.split() == [*own, "by_depth", "tokens_a_block", "expected_tokens"]
        assert row.startswith(questions) and row.split()[5] == "15" and len(row.split()) == 6 + 4 + 2
        found.append(json.loads((tmp_path / "out" / name).read_text()))
    figures = found[0]["figures"][questions]
    assert (
        found[0]["figures"] == found[1]["figures"]
        and 0 <= figures["rate"] <= 1
        and figures["positions"] == 15
    )
    assert found[0]["versions"]["torch"] == torch.__version__ and found[0]["model"]["dtype"] == "float32"
    assert found[0]["arguments"]["seed"] == 0 and set(found[0]["files"]) == {
        questions,
        str(tmp_path / "d/drafter.safetensors"),
    }
    assert all(value.startswith("sha256:") for value in found[0]["files"].values())


def test_questions_that_come_with_a_drafter_are_the_default(tmp_path, capsys):
    exported(tmp_path / "d", loading.load(str(save_tiny(tmp_path / "model")), dtype="float32", device="cpu"))
    question_file(tmp_path / "d" / HELD_OUT, [["What is it?"], ["Count"]])
    assert cli.main(["agreement", str(tmp_path / "d"), "--device", "cpu", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0].endswith(f"d/{HELD_OUT}")


def test_own_prompts_of_every_kind_are_measured_apart(tmp_path, capsys):
    source = save_tiny(tmp_path / "model")
    exported(tmp_path / "d", loading.load(str(source), dtype="float32", device="cpu"))
    assert (
        cli.main(["agreement", str(tmp_path / "d"), "--own", "1", "--device", "cpu", "--max_new_tokens", "4"])
        == 0
    )
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [" ".join(row.split()[:2]) for row in rows] == [
        f"own {k}" for k in ("free", "question", "task", "maths", "code", "long")
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--own", "1"], "no drafter 'nowhere'"),
        (["{d}"], "nothing to measure on; expected --questions FILE, or --own of at least 1"),
        (["{d}", "--own", "-1"], "own is -1; expected a number from 0"),
        (["{d}", "--own", "1", "--max_new_tokens", "1"], "max_new_tokens is 1; expected a number from 2"),
        (["{d}", "--questions", "none.jsonl"], "'none.jsonl': no such file"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, capsys, argv, message):
    exported(tmp_path / "d", loading.load(str(save_tiny(tmp_path / "m")), dtype="float32", device="cpu"))
    assert cli.main(["agreement", *(a.format(d=tmp_path / "d") for a in argv)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and error[-1].startswith("dvirl: ")


# The drafters in the box

SHIPPED = {name: ROOT / "weights" / name for name in ("smollm2-135m-k2", "smollm2-135m-k2-recurrent")}
HASHED = ("drafter.safetensors", HELD_OUT)
RECORDED = {
    name: {
        where: json.loads((ROOT / f"book/results/agreement-{name}-{where}.json").read_text())
        for where in ("cpu", "h200")
    }
    for name in SHIPPED
}


def held_out_record(name):
    return RECORDED[name]["cpu"]["figures"][f"weights/{name}/{HELD_OUT}"]


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_small_whole_and_what_was_measured(name):
    shipped = SHIPPED[name]
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert {path.relative_to(shipped).as_posix() for path in files} == {
        "README.md",
        "config.yaml",
        "drafter.safetensors",
        "held-out.jsonl",
        "lora_S/adapter_config.json",
        "lora_S/adapter_model.safetensors",
    }
    sums = {file: f"sha256:{sha256((shipped / file).read_bytes()).hexdigest()}" for file in HASHED}
    for record in RECORDED[name].values():
        measured = {Path(path).name: value for path, value in record["files"].items()}
        assert all(measured[file] == sums[file] for file in HASHED if file in measured)
        assert "drafter.safetensors" in measured and record["model"]["dtype"] == "float32"
        assert record["arguments"]["max_new_tokens"] == 128


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_says_the_recorded_figures(name):
    card = " ".join((SHIPPED[name] / "README.md").read_text().split())
    for record in RECORDED[name].values():
        for key, figures in record["figures"].items():
            assert f"{Path(key).stem if '/' in key else key} {figures['rate']:.3f}" in card, key
    rates = {Path(key).stem: figures["rate"] for key, figures in RECORDED[name]["h200"]["figures"].items()}
    opened = sum(rates[key] for key in ("alpaca", "gsm8k", "humaneval")) / 3
    assert f"mean of these three **{opened:.3f}**" in card and opened >= 0.75
    assert held_out_record(name)["rate"] >= 0.75
    own = [rate for key, rate in rates.items() if key.startswith("own ")]
    if name == "smollm2-135m-k2":
        assert f"mean of the kinds **{sum(own) / len(own):.3f}**" in card and sum(own) / len(own) >= 0.75
        assert rates["magpie"] >= 0.75


def held_out_prompts(name, loaded):
    """A prompt of each kind, of a shipped drafter's own questions."""
    settings = MeasureSettings(questions=[str(SHIPPED[name] / HELD_OUT)], max_new_tokens=8)
    return question_sets(loaded, settings).popitem()[1][:6]


@pytest.mark.no_cover
@pytest.mark.real
@pytest.mark.parametrize("name", SHIPPED)
def test_the_measured_agreement_comes_out_again(real, name):
    """A prompt of each kind, answered and drafted on anew, against the record of these very prompts."""
    drafter = load_drafter(name, dtype="float32", device="cpu")
    prompts = held_out_prompts(name, drafter.loaded)
    found = measure_agreement(drafter.model, answer(drafter.loaded, prompts, 128, 6))
    recorded = held_out_record(name)["answers"][:6]
    assert len(found.answers) == 6 and found.positions > 350
    assert sum(found.answers) / 6 == pytest.approx(sum(recorded) / 6, abs=0.03)


@pytest.mark.no_cover
@pytest.mark.real
def test_both_drafters_draft_losslessly_and_much_of_it_is_right(real):
    """Greedy answers in float32 are plain ones; tokens a verification of four drafts."""
    prompts = held_out_prompts("smollm2-135m-k2", real)
    plain = [KangarooModel(real.model, EARLY_STOP_LAYER=1).generate(prompt, 40, DecodeConfig(0), real.eos_ids)
             for prompt in prompts]  # fmt: skip
    for name in SHIPPED:
        model = load_drafter(name, dtype="float32", device="cpu").model
        tokens = blocks = 0
        for prompt, expected in zip(prompts, plain, strict=True):
            drafted = model.generate(prompt, 40, DecodeConfig(4), real.eos_ids)
            assert drafted.tokens == expected.tokens
            tokens, blocks = tokens + len(drafted.tokens), blocks + len(drafted.blocks)
        assert tokens / blocks > 2.2, name
