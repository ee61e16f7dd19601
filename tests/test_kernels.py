"""Our own GPU kernels compute what the layers compute; here in Triton's interpreter, on the CPU.

On a machine with a GPU the same checks run there, and rows have the same bits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from conftest import tiny_config

from kangaroo.adapter import DecoderLayer, rotary_for
from kangaroo.decoding import kernels
from kangaroo.decoding.cache import FixedShape, KVCache
from kangaroo.decoding.kernels import (
    FusedLayer,
    best_tokens,
    head_logits,
    normed,
    plan_fused,
    supports,
    two_maps,
)
from kangaroo.decoding.layers import CachedLayer
from kangaroo.decoding.passes import Passes
from kangaroo.decoding.sampling import Drawn, Sampling, gumbel_noise
from kangaroo.decoding.stages import Stage, StageWeights

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPACITY = 192
TOKENS = 16 if DEVICE.type == "cuda" else 5
"""Tokens of a pass that are compared with passes of one token; the interpreter takes a third of a second for each."""


def random_layer(config, feed_forward: bool, seed: int) -> DecoderLayer:
    torch.manual_seed(seed)
    layer = DecoderLayer(config, feed_forward).to(DEVICE).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.dim() == 1))
    return layer


def stages(layer: DecoderLayer, config, rows: int, window=None, dtype=torch.float32) -> tuple[Stage, Stage]:
    """The layer as a stage by our kernels, and by torch's products, over equal caches."""
    found = []
    for by_own in (True, False):
        like = torch.empty(0, dtype=dtype, device=DEVICE)
        cache = KVCache(config, [DEVICE], rows, CAPACITY, like, window)
        cached = CachedLayer(layer, dtype)
        cached.kernels = FusedLayer(layer, dtype) if by_own else None
        passes = Passes(DEVICE)
        passes.positions = 1
        found.append(Stage(StageWeights([cached]), rotary_for(config), cache, passes))
    torch.manual_seed(7)
    for own, other in zip(
        found[0].cache.keys + found[0].cache.values, found[1].cache.keys + found[1].cache.values, strict=True
    ):
        own.copy_(torch.randn_like(own))
        other.copy_(own)
    return found[0], found[1]


def run(
    stage: Stage, states: torch.Tensor, starts: list[int], settled: list[int] | None = None
) -> torch.Tensor:
    stage.cache.lengths = list(starts)
    known = None if settled is None else torch.tensor(settled, device=DEVICE)
    stage.passes.fixed = FixedShape(torch.tensor(starts, device=DEVICE), CAPACITY, known)
    return stage(states)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits on a GPU; the interpreter's products, NumPy's, round rows differently by their place."""
    if DEVICE.type == "cuda":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


SHAPES = [
    dict(hidden_size=64),
    dict(hidden_size=64, heads=4, groups=1),
    dict(hidden_size=48, heads=3, groups=3),
    dict(hidden_size=64, head_dim=24),
    dict(hidden_size=64, attention_bias=True, mlp_bias=True),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("starts", "length"), [([5], 1), ([63], 3), ([30, 100], 2), ([70], 17)])
def test_a_layer_is_that_of_the_library(shape, starts, length):
    config = tiny_config(**shape)
    layer = random_layer(config, feed_forward=True, seed=length)
    ours, theirs = stages(layer, config, len(starts))
    states = torch.randn(len(starts), length, config.hidden_size, device=DEVICE)
    torch.testing.assert_close(run(ours, states, starts), run(theirs, states, starts), atol=2e-4, rtol=1e-4)
    for row, start in enumerate(starts):  # and the cache holds the same
        for own, other in zip(
            ours.cache.keys + ours.cache.values, theirs.cache.keys + theirs.cache.values, strict=True
        ):
            torch.testing.assert_close(
                own[row, :, : start + length], other[row, :, : start + length], atol=1e-4, rtol=1e-4
            )


def test_kangaroos_adapter_layer_with_a_window():
    config = tiny_config(hidden_size=64)
    layer = random_layer(config, feed_forward=False, seed=1)
    ours, theirs = stages(layer, config, 1, window=40)
    states = torch.randn(1, 3, 64, device=DEVICE)
    torch.testing.assert_close(run(ours, states, [90]), run(theirs, states, [90]), atol=2e-4, rtol=1e-4)


@pytest.mark.no_cover
@pytest.mark.parametrize("start", [1, 62, 64, 126])
def test_a_row_has_the_same_bits_alone_and_among_others(start):
    """Plain decoding, drafts and other texts: what a token computes depends on its own text alone.

    A chunk of keys has 64 slots: the passes lie within one, begin with one, and cross the end of the first and second.
    """
    config = tiny_config(hidden_size=64)
    layer = random_layer(config, feed_forward=True, seed=3)
    states = torch.randn(1, TOKENS, 64, device=DEVICE)
    ours, _ = stages(layer, config, 1)
    together = run(ours, states, [start])
    alone, _ = stages(layer, config, 1)
    one_by_one = [run(alone, states[:, [step]], [start + step]) for step in range(TOKENS)]
    assert_same(torch.cat(one_by_one, dim=1), together)
    pair, _ = stages(layer, config, 2)
    fresh, _ = stages(layer, config, 1)
    for own, other in zip(
        pair.cache.keys + pair.cache.values, fresh.cache.keys + fresh.cache.values, strict=True
    ):
        own[0] = other[0]
    batch = torch.cat([states, torch.randn_like(states)])
    assert_same(run(pair, batch, [start, 77])[:1], together)


def test_slots_of_passes_before_and_in_several_spans_give_the_same(monkeypatch):
    """A program reads a span of chunks, what earlier passes wrote before it waits; of several spans one is made."""
    config = tiny_config(hidden_size=64)
    layer = random_layer(config, feed_forward=True, seed=4)
    states = torch.randn(2, 3, 64, device=DEVICE)
    starts = [30, 160]
    whole = run(stages(layer, config, 2)[0], states, starts)
    assert_same(run(stages(layer, config, 2)[0], states, starts, settled=[0, 131]), whole)
    monkeypatch.setattr(kernels, "_span_bytes", lambda device: 1)  # a chunk each
    torch.testing.assert_close(run(stages(layer, config, 2)[0], states, starts), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 20])
def test_norms_and_maps_of_two_states(rows):
    states, feedback, weight = (
        torch.randn(shape, device=DEVICE) for shape in ((rows, 48), (rows, 48), (48, 96))
    )
    scale = torch.randn(48, device=DEVICE)
    torch.testing.assert_close(normed(states, scale, 1e-3), F.rms_norm(states, (48,), scale, 1e-3))
    halves = weight.view(48, 2, 48).transpose(0, 1).contiguous()
    expected = torch.cat([states, feedback], dim=1) @ weight.T
    torch.testing.assert_close(two_maps(states, None, feedback, halves), expected, atol=1e-4, rtol=1e-4)
    table = torch.randn(30, 48, device=DEVICE)
    tokens = torch.arange(rows, device=DEVICE) % 30
    table[tokens] = states
    torch.testing.assert_close(two_maps(table, tokens, feedback, halves), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_likeliest_token_and_its_probability(rows):
    states = torch.randn(rows, 40, device=DEVICE)
    head = torch.randn(300, 40, device=DEVICE)
    tokens, confidence = best_tokens(states, head)
    expected, index = (states @ head.T).softmax(dim=-1).max(dim=-1)
    assert torch.equal(tokens, index[None])
    torch.testing.assert_close(confidence, expected, atol=1e-5, rtol=1e-4)
    again, _ = best_tokens(states[:1].contiguous(), head)
    assert torch.equal(again, tokens[:, :1])
    both, same = best_tokens(states, head, two=True)
    assert torch.equal(both, (states @ head.T).topk(2).indices.T) and torch.equal(same, confidence)
    ids = torch.randperm(1000, device=DEVICE)[:300]
    assert torch.equal(best_tokens(states, head, two=True, ids=ids)[0], ids[both])
    logits = head_logits(states, head)
    torch.testing.assert_close(logits, states @ head.T, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits.argmax(dim=-1), tokens[0])
    assert torch.equal(head_logits(states[:1].contiguous(), head), logits[:1])


def exact_logits(rows: int, vocab: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, a head and its logits, whose sums have no rounding: in any order and precision they are the same."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(-3, 4, (rows, 40), generator=generator).float()
    head = torch.randint(-4, 5, (vocab, 40), generator=generator).float() / 16
    return states.to(DEVICE), head.to(DEVICE), (states @ head.T).to(DEVICE)


def random_keys(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(DEVICE)


@triton.jit
def noise_of(keys, ids, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    noise = kernels._noise(keys, ids, row, column, ROWS, COLUMNS, True)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], noise)


def test_noise_is_that_of_the_library():
    keys = random_keys(16, seed=5)
    ids = torch.randint(0, 200_000, (64,), device=DEVICE)
    out = torch.empty(16, 64, dtype=torch.float64, device=DEVICE)
    noise_of[(1,)](keys, ids, out, ROWS=16, COLUMNS=64)
    torch.testing.assert_close(out, gumbel_noise(keys, ids), atol=1e-13, rtol=1e-13)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("rows", "vocab", "temperature", "named"),
    [(1, 256, 1, True), (18, 300, 0.5, True), (18, 300, 1.7, False)],
)
def test_drawn_tokens_are_those_of_the_library(rows, vocab, temperature, named):
    how = Sampling(temperature)
    ids = torch.randperm(100_000, device=DEVICE)[:vocab] if named else None
    for seed in range(3):
        states, head, logits = exact_logits(rows, vocab, seed)
        keys = random_keys(rows, seed)
        expected = how.perturbed(logits, keys, ids).topk(2).indices.T
        names = expected if ids is None else ids[expected]
        probabilities = logits.softmax(dim=-1)
        tokens, confidence = best_tokens(states, head, two=True, ids=ids, drawn=Drawn(how, keys))
        assert torch.equal(tokens, names)
        chances = probabilities.gather(1, expected[0, :, None])[:, 0]
        torch.testing.assert_close(confidence, chances, atol=1e-7, rtol=1e-5)
        drafts, largest = best_tokens(states, head, ids=ids, drawn=Drawn(how, keys, is_draft=True))
        assert torch.equal(drafts, names[:1])
        torch.testing.assert_close(largest, probabilities.amax(dim=-1), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("is_draft", [False, True])
def test_a_drawn_token_does_not_depend_on_other_rows(is_draft):
    states, head, _ = exact_logits(20, 300, seed=1)
    keys = random_keys(20, seed=2)
    tokens, confidence = best_tokens(
        states, head, two=True, drawn=Drawn(Sampling(0.8), keys, is_draft=is_draft)
    )
    for row in (0, 3, 19):
        alone = Drawn(Sampling(0.8), keys[[row]], is_draft)
        found, chance = best_tokens(states[[row]], head, two=True, drawn=alone)
        assert torch.equal(found[:, 0], tokens[:, row]) and torch.equal(chance[0], confidence[row])


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # NumPy's, in the interpreter
@pytest.mark.parametrize("is_draft", [False, True])
@pytest.mark.parametrize("where", ["states", "head"])
def test_logits_that_are_no_numbers_are_told_where_tokens_are_drawn(where, is_draft):
    states, head, _ = exact_logits(3, 300, seed=1)
    drawn = Drawn(Sampling(1.0), random_keys(3, seed=2), is_draft)
    good, chances = best_tokens(states, head, two=True, drawn=drawn)
    if where == "head":
        head[170, 5] = torch.nan
    else:
        states[1, 5] = torch.nan
    tokens, confidence = best_tokens(states, head, two=True, drawn=drawn)
    assert tokens.min() >= 0 and tokens.max() < 300
    if where == "head":
        assert not confidence.isfinite().any()
    else:
        assert confidence.isfinite().tolist() == [True, False, True]
        assert torch.equal(tokens[:, ::2], good[:, ::2]) and torch.equal(confidence[::2], chances[::2])


@pytest.mark.parametrize("is_draft", [False, True])
def test_a_stage_draws_by_our_kernels_whether_or_not_tokens_are_cut(is_draft):
    config = tiny_config(hidden_size=64)
    stage, _ = stages(random_layer(config, feed_forward=True, seed=1), config, 2)
    states, head, _ = exact_logits(6, 300, seed=4)
    states = F.pad(states, (0, 24)).view(2, 3, 64)
    head = F.pad(head, (0, 24))
    keys = random_keys(12, seed=3).view(2, 6)[:, ::2]  # they need not stand side by side
    calls = []

    def by_library(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return states @ head.T

    stage.weights.head = by_library
    stage.weights.head_weight = head
    for how in (Sampling(0.9), Sampling(0.9, top_k=3), Sampling(0.9, top_p=0.4)):
        drawn = Drawn(how, keys, is_draft)
        stage.passes.fixed = None
        expected, chances = stage.best(states, two=True, drawn=drawn)
        assert calls
        calls.clear()
        stage.passes.fixed = FixedShape(torch.tensor([0, 0], device=DEVICE), CAPACITY)
        tokens, confidence = stage.best(states, two=True, drawn=drawn)
        assert torch.equal(tokens, expected) and not calls
        torch.testing.assert_close(confidence, chances, atol=1e-7, rtol=1e-5)


def test_shapes_that_are_not_computed_are_known():
    layer = random_layer(tiny_config(hidden_size=64), feed_forward=True, seed=0)
    assert supports(layer, torch.float32, 1 << 22) and not supports(layer, torch.float16, 1 << 22)
    assert not supports(layer, torch.float32, 100)
    other = random_layer(tiny_config(hidden_size=64, hidden_act="gelu"), feed_forward=True, seed=0)
    small = random_layer(tiny_config(hidden_size=32), feed_forward=True, seed=0)
    assert not supports(other, torch.float32, 1 << 22) and not supports(small, torch.float32, 1 << 22)


def test_plans_read_whole_chunks():
    config = tiny_config(hidden_size=64)
    cache = KVCache(config, [DEVICE], 1, CAPACITY, torch.empty(0, device=DEVICE))
    states = torch.zeros(1, 3, 64, device=DEVICE)
    plan = plan_fused(
        rotary_for(config).table(CAPACITY, DEVICE),
        cache,
        states,
        FixedShape(torch.tensor([4], device=DEVICE), 100),
        4,
    )
    assert plan.span == 2 and plan.spans == 1 and plan.cos.shape[1] == 16 and not len(plan.partial)
