"""A model whose layers lie on several devices computes what it computes on one.

On a machine without two cards both devices are the CPU: then the same code runs, and what moves nowhere is the same.
`python tests/test_spread.py FOLDER` compares two cards with one, on a model folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_kangaroo, tiny_split
from published import IDS, write_model
from test_trainer import tiny_settings

from dvirl.evaluation.inference_baseline import generate_forward, hugging_face
from dvirl.models.loading import load
from dvirl.models.placement import placement
from dvirl.runs.errors import DvirlError
from dvirl.trainer import DVITrainer
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

TWO = ("cuda:0", "cuda:1") if torch.cuda.device_count() > 1 else ("cpu", "cpu")


def test_layers_are_spread_and_all_else_lies_on_the_first_card():
    with torch.device("meta"):
        model = EarlyExitLlamaForCausalLM(tiny_config(tied=False))
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    rest = sum(parameter.numel() for parameter in model.parameters()) * 4 - 4 * layer
    device_of = placement(model, torch.float32, torch.device("cuda:0"), {0: rest + 2 * layer, 1: 4 * layer})
    cards = {name: device_of(name).index for name, _ in model.named_parameters()}
    assert {cards[name] for name in cards if ".layers." not in name} == {0}
    assert {cards[name] for name in cards if ".layers." in name} == {0, 1}
    assert all(len({cards[name] for name in cards if f".layers.{index}." in name}) == 1 for index in range(4))
    with pytest.raises(DvirlError, match="does not fit on 2 cards"):
        placement(model, torch.float32, torch.device("cuda:0"), {0: layer, 1: layer})


def spread(base: EarlyExitLlamaForCausalLM, devices: tuple[str, str]) -> None:
    """Put the second half of the layers on the second device, and all else on the first."""
    base.to(devices[0])
    for layer in base.model.layers[len(base.model.layers) // 2 :]:
        layer.to(devices[1])


def test_a_spread_model_decodes_and_answers_as_one_on_one_device():
    model = tiny_kangaroo(3, deep_scale=0.2).to(TWO[0])
    base = model.base_model
    ids = torch.tensor([IDS], device=TWO[0])
    with torch.no_grad():
        logits = base(ids).logits
    ways = [
        DecodeConfig(0),
        DecodeConfig(4),
        DecodeConfig(4, target="adapted"),
        DecodeConfig(6, source="hybrid"),
    ]
    answers = [model.generate_batch([IDS[:9], IDS[3:20]], 16, way) for way in ways]
    spread(base, TWO)
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, logits)
        states = base(ids, output_hidden_states=True).hidden_states
    assert {state.device for state in states} == {ids.device}
    for way, before in zip(ways, answers, strict=True):
        now = model.generate_batch([IDS[:9], IDS[3:20]], 16, way)
        assert [answer.tokens for answer in now] == [answer.tokens for answer in before]


def test_a_spread_model_trains_as_one_on_one_device(tmp_path):
    losses = []
    for name, devices in (("one", (TWO[0], TWO[0])), ("two", TWO)):
        loaded = load(str(write_model(tmp_path / "model", tokenizer="llama3")), "float32", devices[0])
        spread(loaded.model, devices)
        settings = tiny_settings(run_dir=str(tmp_path / name), slow_every=2)
        trainer = DVITrainer(settings, loaded, tiny_split())
        trainer.train(show_progress=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line.split('"tok_per_s"')[0].partition('"loss_rl"')[2][:12] for line in lines])
    assert losses[0] == losses[1] and len(losses[0]) > 3


def compare(folder: str) -> None:
    """Answers of a model folder on one card, and spread over two: our loop's and those of `generate`."""
    one = load(folder, "float32", "cuda:0")
    two = load(folder, "float32", "balanced")
    assert len(two.model.layer_devices()) == 2, two.model.layer_devices()
    limit = 24
    theirs = [generate_forward(hugging_face(loaded), IDS[:12], limit, ()).tokens for loaded in (one, two)]
    assert theirs[0] == theirs[1]
    print("two cards answer as one:", theirs[0])


if __name__ == "__main__":
    compare(str(write_model(Path(sys.argv[1]), tokenizer="llama3")))
