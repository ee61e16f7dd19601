"""What does not fit into the memory is done in parts, or refused in one sentence before anything is written."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import random_prompts, tiny_config, tiny_loaded, tiny_model, tiny_split
from test_corpus import ENDS
from test_distill import distiller
from test_trainer import tiny_settings

from dvirl.models import placement
from dvirl.models.placement import fitting
from dvirl.rollout import generate
from dvirl.runs.errors import DvirlError
from dvirl.scale.corpus import write_conversations
from dvirl.trainer import DVITrainer
from kangaroo.decoding.generate import PlainBatch
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM


def leave(monkeypatch, free: float) -> None:
    """Let the device have this many bytes free."""
    monkeypatch.setattr(placement, "free_memory", lambda device: int(free))


def room_for(monkeypatch, texts: int, model, positions: int) -> None:
    """Leave room for the answers of some texts of this length, and not for one more."""
    leave(monkeypatch, 1e9)
    fits = fitting("texts", 10**9, model, model.model.layers, positions, model.config.vocab_size)
    leave(monkeypatch, 1e9 * (texts + 0.5) / fits)


def test_the_estimate_counts_caches_logits_and_what_gradients_need(monkeypatch):
    """Per text: keys and values of 4 layers and half of them again, one layer's states, and logits six times."""
    model = tiny_model()
    positions = 10
    computed = 10 * 32 + 4 * 64 + 4 * positions
    cache = 4 * (2 * 2 * 8) * 1.5
    bytes_each = 4 * positions * (cache + computed) + 6 * 4 * 264
    leave(monkeypatch, 7.5 * bytes_each / placement.SHARE)
    layers = model.model.layers
    assert fitting("texts", 100, model, layers, positions, 264) == 7
    assert fitting("texts", 5, model, layers, positions, 264) == 5
    # Two layers that learn keep all that they compute; their gradients and two moments are float32.
    learning = list(layers[:2].parameters())
    bytes_each = 4 * positions * 3 * computed + 6 * 4 * 264
    state = 12 * sum(parameter.numel() for parameter in learning)
    leave(monkeypatch, (3.5 * bytes_each + state) / placement.SHARE)
    assert fitting("batch", 3, model, layers[:2], positions, 264, learning) == 3
    with pytest.raises(
        DvirlError,
        match=r"^batch puts 4 texts together; expected at most 3, since each takes about .* GB on cpu",
    ):
        fitting("batch", 4, model, layers[:2], positions, 264, learning)


def test_layers_are_spread_and_all_else_lies_on_the_first_card(monkeypatch):
    with torch.device("meta"):
        model = EarlyExitLlamaForCausalLM(tiny_config(tied=False))
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    rest = sum(parameter.numel() for parameter in model.parameters()) * 4 - 4 * layer
    memory = {0: rest + 2 * layer, 1: 4 * layer}
    monkeypatch.setattr(placement, "get_balanced_memory", lambda *_: memory)
    device_of = placement.placement(model, torch.float32, torch.device("cuda:0"))
    cards = {name: device_of(name).index for name, _ in model.named_parameters()}
    assert {cards[name] for name in cards if ".layers." not in name} == {0}
    assert {cards[name] for name in cards if ".layers." in name} == {0, 1}
    assert all(len({cards[name] for name in cards if f".layers.{index}." in name}) == 1 for index in range(4))
    memory = {0: layer, 1: layer}
    with pytest.raises(DvirlError, match="does not fit on 2 cards"):
        placement.placement(model, torch.float32, torch.device("cuda:0"))


def test_cards_keep_a_fifth_of_their_memory_and_belong_to_one_process(monkeypatch):
    with torch.device("meta"):
        model = EarlyExitLlamaForCausalLM(tiny_config(tied=False))
    given = {}

    def balanced(model, memory, *rest):
        given.update(memory)
        return memory

    monkeypatch.setattr(placement, "get_balanced_memory", balanced)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    leave(monkeypatch, 1e6)
    device_of = placement.placement(model, torch.float32, torch.device("cuda", 0))
    assert given == {0: 800_000, 1: 800_000} and device_of("lm_head.weight").index == 0
    leave(monkeypatch, 1e4)
    with pytest.raises(DvirlError, match="^the model does not fit on 2 cards; there is no room for "):
        placement.placement(model, torch.float32, torch.device("cuda", 0))
    monkeypatch.setattr(placement, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(DvirlError, match="takes every card; expected one process$"):
        placement.placement(model, torch.float32, torch.device("cuda", 0))


def test_the_free_memory_of_the_host_is_a_number():
    assert 2**20 < placement.free_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("keep_states", [True, False])
def test_answers_that_do_not_fit_together_are_the_same_in_parts(monkeypatch, keep_states):
    model = tiny_model()
    prompts = random_prompts(11, 3)
    whole = generate(model, prompts, 12, ENDS, keep_states=keep_states)
    sizes = []

    class Counted(PlainBatch):
        def __init__(self, stages, tokens, lengths):
            sizes.append(len(tokens))
            super().__init__(stages, tokens, lengths)

    monkeypatch.setattr("dvirl.rollout.PlainBatch", Counted)
    room_for(monkeypatch, 4, model, max(map(len, prompts)) + 12)
    parts = generate(model, prompts, 12, ENDS, keep_states=keep_states)
    assert sizes == [4, 4, 3]
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), value)


def test_not_even_one_answer_fits(monkeypatch):
    leave(monkeypatch, 1000)
    with pytest.raises(
        DvirlError, match=r"^prompts puts 1 texts together; expected at most 0, since each takes about"
    ):
        generate(tiny_model(), [[3, 4, 5]], 12)


def test_conversations_are_written_in_parts(monkeypatch):
    """Today's 4096 answers at once of a 7B model would be hundreds of gigabytes."""
    loaded = dataclasses.replace(tiny_loaded(), eos_ids=ENDS)
    room_for(monkeypatch, 3, loaded.model, 300)
    written = write_conversations(loaded, 24, 0, 16, 0.5, 4096)
    assert len(written) > 3


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    leave(monkeypatch, 2e6)
    run_dir = tmp_path / "run"
    with pytest.raises(
        DvirlError, match=r"^slow_batch puts 4096 texts together; expected at most \d+, since each takes"
    ):
        DVITrainer(
            tiny_settings(run_dir=str(run_dir), slow_batch=4096, num_prompts=5000),
            tiny_loaded(),
            tiny_split(),
        )
    with pytest.raises(
        DvirlError, match=r"^judge_batch puts 4096 texts together; expected at most \d+, since"
    ):
        DVITrainer(
            tiny_settings(run_dir=str(run_dir), judge_batch=4096, num_prompts=5000),
            tiny_loaded(),
            tiny_split(),
        )
    with pytest.raises(DvirlError, match=r"^batch puts 4096 texts together; expected at most \d+, since"):
        distiller(run_dir, "", batch=4096)
    assert not run_dir.exists()
