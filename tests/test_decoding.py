"""Decoding with drafts that are never, always and every second time right, and with bad input."""

from __future__ import annotations

import copy
import sys
import threading
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EOS, random_prompts, tiny_kangaroo, tiny_model
from safetensors.torch import save_file
from torch import Tensor

from kangaroo.decoding.blocks import SOURCES, TARGETS, DecodeConfig
from kangaroo.decoding.drafting import BlockPolicy, LookupIndex
from kangaroo.decoding.sampling import choose_tokens, count_accepted
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import DrafterParts
from kangaroo.kangaroo_model import KangarooModel

VOCAB = 264
PROMPT = [5, 9, 17]


class Oracle(KangarooModel):
    """Drafts what it is told: the right token where `pattern` says so, a wrong one elsewhere.

    It knows which position it drafts from the length of the drafter's cache.
    """

    def tell(self, answer: list[int], pattern) -> None:
        self.told = {
            len(PROMPT) + index: token if pattern(index) else (token + 1) % VOCAB
            for index, token in enumerate(answer)
        }

    def drafter_parts(self) -> DrafterParts:
        parts = super().drafter_parts()
        return replace(parts, weights=replace(parts.weights, head=self.say))

    def say(self, states: Tensor) -> Tensor:
        position = self.base_model.past_key_values.drafter.cache.length
        logits = torch.zeros(states.shape[0], VOCAB)
        logits[:, self.told.get(position, 0)] = 5.0
        return logits


def decode(pattern, draft_len, length=17, target="base", eos=()):
    model = Oracle(tiny_model(2), None, None, 2)
    plain = model.generate(PROMPT, length, DecodeConfig(0), eos).tokens
    model.tell(plain + [0] * 20, pattern)
    decoded = model.generate(PROMPT, length, DecodeConfig(draft_len, target=target), eos)
    assert decoded.tokens == plain
    return [(b.num_drafted, b.num_accepted, b.block_len) for b in decoded.blocks], plain


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_always_right(target):
    blocks, _ = decode(lambda index: True, 3, target=target)
    # 17 tokens: one from the prefill, then four blocks of three drafts and a bonus.
    assert blocks == [(0, 0, 1), (3, 3, 4), (3, 3, 4), (3, 3, 4), (3, 3, 4)]


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_never_right(target):
    blocks, _ = decode(lambda index: False, 3, length=5, target=target)
    # The last block may commit one token only, so nothing is drafted for it.
    assert blocks == [(0, 0, 1), (1, 0, 1), (1, 0, 1), (1, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_every_second_time_right(target):
    blocks, _ = decode(lambda index: index % 2 == 1, 3, length=9, target=target)
    # Positions 1, 3, 5, 7 are right and 2, 4, 6, 8 wrong: each block takes one and is corrected once.
    assert blocks == [(0, 0, 1), (2, 1, 2), (2, 1, 2), (2, 1, 2), (1, 1, 2)]


def test_an_accepted_end_cuts_the_block():
    _, plain = decode(lambda index: True, 3, length=17)
    end = next(token for index, token in enumerate(plain) if index >= 3 and plain.index(token) == index)
    at = plain.index(end)
    blocks, cut = decode(lambda index: True, 6, length=17, eos=(end,))
    assert cut == plain[: at + 1]
    assert sum(block[2] for block in blocks) == at + 1
    assert all(drafted >= accepted and committed <= accepted + 1 for drafted, accepted, committed in blocks)


def test_confidence_stops_a_block_behind_the_doubtful_draft():
    model = tiny_kangaroo(0)
    free = model.generate(PROMPT, 30, DecodeConfig(5)).blocks
    wary = model.generate(PROMPT, 30, DecodeConfig(5, threshold=1.0)).blocks
    assert max(len(block.draft.tokens) for block in free) == 5
    assert {len(block.draft.tokens) for block in wary} <= {0, 1}


def test_plain_decoding_is_draft_len_zero():
    blocks = tiny_kangaroo(0).generate(PROMPT, 8, DecodeConfig(0), (EOS,)).blocks
    assert all(block.block_len == 1 and block.num_drafted == 0 for block in blocks)


@pytest.mark.parametrize("source", SOURCES)
def test_plain_decoding_needs_no_costs_to_choose_by(source):
    model = tiny_kangaroo()
    answer = model.generate(PROMPT, 6, DecodeConfig(0, source=source, adaptive=True))
    assert answer.tokens == model.generate(PROMPT, 6, DecodeConfig(0)).tokens
    assert [block.num_drafted for block in answer.blocks] == [0] * 6


def test_blocks_come_as_they_are_committed():
    model = tiny_kangaroo(0)
    stream = model.decode_blocks(PROMPT, 20, DecodeConfig(3))
    first = next(stream)
    assert first.start == len(PROMPT) and len(first.committed) == 1
    stream.close()
    assert model.base_model.past_key_values is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate([], 5, DecodeConfig(2)), "prompt is empty"),
        (lambda m: m.generate(PROMPT, 0, DecodeConfig(2)), "max_new_tokens is 0"),
        (lambda m: m.generate(PROMPT, 2.5, DecodeConfig(2)), "max_new_tokens is 2.5; expected an integer"),
        (lambda m: m.generate(PROMPT, 5, DecodeConfig(2), seed=1.5), "seed is 1.5; expected an integer"),
        (lambda m: m.generate(PROMPT, 5, DecodeConfig(2), seed=[1, 2]), "one for each of 1 prompts"),
        (lambda m: DecodeConfig(-1), "draft_len is -1"),
        (lambda m: DecodeConfig(2.5), "draft_len is 2.5; expected an integer"),
        (lambda m: DecodeConfig(2, branches=1.5), "branches is 1.5; expected an integer"),
        (lambda m: DecodeConfig(2, threshold=1.5), "threshold is 1.5"),
        (lambda m: DecodeConfig(2, target="other"), "target is 'other'"),
        (lambda m: DecodeConfig(2, draft_temperature=-1.0), "draft_temperature is -1.0"),
        (lambda m: m.generate(PROMPT, 9, DecodeConfig(2, draft_temperature=1.0)), "need noise"),
    ],
)
def test_bad_input_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_kangaroo(0))


def test_a_seed_may_be_any_integer():
    model, how = tiny_kangaroo(0), DecodeConfig(2, temperature=1.0)
    answers = {
        tuple(model.generate(PROMPT, 20, how, seed=seed).tokens)
        for seed in (1, True, np.int64(1), torch.tensor(1), [1], (np.int32(1),))
    }
    assert len(answers) == 1 != len(answers | {tuple(model.generate(PROMPT, 20, how, seed=2).tokens)})


def test_threads_take_turns():
    """Also the first answers, which make what all later ones decode with, and those of both targets."""
    ways = [DecodeConfig(3, target=target) for target in TARGETS]
    prompts = random_prompts(3, 2)
    expected = {(at, how): tiny_kangaroo(0).generate(prompts[at], 12, how) for at in range(3) for how in ways}
    for _ in range(4):
        model, found, ready = tiny_kangaroo(0), {}, threading.Barrier(6)

        def answer(at, how, model=model, found=found, ready=ready):
            ready.wait()
            found[at, how] = model.generate(prompts[at], 12, how).tokens

        threads = [threading.Thread(target=answer, args=key) for key in expected]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert found == {key: decoded.tokens for key, decoded in expected.items()}


def test_a_copy_of_a_model_waits_for_no_other():
    model = tiny_kangaroo(0)
    stream = model.decode_blocks(PROMPT, 9, DecodeConfig(2))
    next(stream)
    twin = copy.deepcopy(tiny_kangaroo(0))
    assert twin.base_model.turns is not model.base_model.turns
    assert (
        twin.generate(PROMPT, 9, DecodeConfig(2)).tokens == model.generate(PROMPT, 9, DecodeConfig(2)).tokens
    )


def test_a_step_outside_a_decoding_is_refused():
    model = tiny_kangaroo(0)
    with pytest.raises(RuntimeError, match="decoding"):
        model.base_model.spec_decode_step(
            [Text(LookupIndex(PROMPT), 9, BlockPolicy(DecodeConfig(2)))], DecodeConfig(2)
        )


def test_logits_that_are_not_finite_stop_decoding():
    model = tiny_kangaroo(0, lora=False)
    model.base_model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.generate(PROMPT, 5, DecodeConfig(2))


def test_count_accepted():
    assert count_accepted([1, 2, 3], [1, 2, 3, 4]) == 3
    assert count_accepted([1, 9, 3], [1, 2, 3, 4]) == 1
    assert count_accepted([], [1]) == 0


def test_sampled_drafts_follow_the_policy():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(40_000, 1)
    noise = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    tokens, confidence = choose_tokens(logits, 0.7, noise)
    expected = (logits[0] / 0.7).softmax(-1)
    torch.testing.assert_close(torch.bincount(tokens, minlength=4) / 40_000, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(confidence[0], expected.max())
    assert torch.equal(choose_tokens(logits, 0.7, noise)[0], tokens)


@pytest.mark.parametrize("kind", ["adapter", "layer"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_fresh_drafter_starts_from_the_base_layers_behind_the_exit(kind, lora):
    """Once the base carries LoRA its weights have other names; a drafter that missed them started from noise."""
    model = tiny_kangaroo(3, 2, lora=lora, drafter=kind, drafter_layers=3)
    base = model.base_model.model.layers
    for layer, source in zip(model.adapter_model.layers, (base[2], base[3], base[3]), strict=True):
        own = {name: value for name, value in source.state_dict().items() if "lora_" not in name}
        own = {name.replace(".base_layer", ""): value for name, value in own.items()}
        assert all(torch.equal(value, own[name]) for name, value in layer.state_dict().items())


def test_a_lora_head_starts_as_the_base_heads_rows_and_survives_saving(tmp_path):
    args = dict(head="lora", head_rank=3, draft_vocab=range(50))
    model, other = tiny_kangaroo(1, **args), tiny_kangaroo(1, **args)
    states = torch.randn(5, 32)
    torch.testing.assert_close(model.head_logits(states), states @ model.head_model.weight[:50].T)
    model.head_up.data += 1.0
    expected = states @ (model.head_model.weight[:50] + model.head_up @ model.head_down).T
    torch.testing.assert_close(model.head_logits(states), expected, atol=1e-4, rtol=1e-4)
    save_file(model.drafter_state(), tmp_path / "drafter.safetensors")
    other.load_drafter(tmp_path)
    assert torch.equal(other.head_logits(states), model.head_logits(states))


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # the drafter's norms stay float32
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "adapter", "layer"])
def test_a_half_precision_model_drafts_with_any_drafter(kind, dtype):
    model = KangarooModel(tiny_model(0).to(dtype), None, Namespace(drafter=kind), 2)
    assert len(model.generate(PROMPT, 12, DecodeConfig(3)).tokens) == 12
