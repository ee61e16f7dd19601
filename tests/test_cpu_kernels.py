"""Decoding in float32 on a CPU: the same numbers as torch's operators, and for each row the same bits in any company."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_prompts, tiny_kangaroo, tiny_model
from transformers import LlamaConfig

from kangaroo.adapter import DecoderLayer
from kangaroo.decoding import cpu_kernels, layers
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.cache import plan_cached
from kangaroo.decoding.cpu_kernels import CHUNK, PanelProduct
from kangaroo.decoding.layers import CachedLayer

HOST = cpu_kernels.binding.get_host_cpu_name()
SHAPES = [(1, 1), (16, 8), (40, 23), (33, CHUNK), (48, CHUNK + 1), (7, 3 * CHUNK - 5)]


def test_this_machine_runs_them():
    """Else nothing below says anything."""
    assert cpu_kernels.works()


@pytest.mark.parametrize("outputs,inputs", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_product(outputs, inputs, biased):
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if biased else None
    ours = PanelProduct(weight, bias)
    for rows in (0, 1, 2, 5, 6, 7, 13, 40):
        states = torch.randn(1, rows, inputs)
        exact = F.linear(states.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(ours(states).double(), exact, atol=1e-4, rtol=1e-5)
    across = torch.randn(inputs, 3)  # states that do not lie in a row in memory
    assert torch.equal(ours(across.T), ours(across.T.contiguous()))


FORMS = {
    "whole": lambda weight: PanelProduct(weight),
    "halves": lambda weight: PanelProduct(weight.bfloat16().float()),
    "bfloat16": lambda weight: PanelProduct(weight.bfloat16()),
    "bytes": lambda weight: PanelProduct(weight, int8=True),
    "bytes of bfloat16": lambda weight: PanelProduct(weight.bfloat16(), int8=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs,inputs", SHAPES)
def test_a_row_gives_the_same_bits_alone_and_among_others(form, outputs, inputs):
    ours, states = FORMS[form](torch.randn(outputs, inputs)), torch.randn(19, inputs)
    together = ours(states)
    for count in range(1, 19):
        for start in range(0, 20 - count, 3):
            assert torch.equal(ours(states[start : start + count]), together[start : start + count])


@pytest.mark.parametrize("outputs,inputs", SHAPES)
def test_bfloat16_weights_are_stored_in_half_of_the_memory_with_the_same_bits(outputs, inputs):
    weight = torch.randn(outputs, inputs).bfloat16().float()
    halves, whole = PanelProduct(weight), PanelProduct(weight)
    panels, *others = halves.weights
    bias, form, *rest = others
    assert form == cpu_kernels.UPPER
    as_numbers = (panels.view(np.int16).astype(np.int32) << 16).view(np.uint8)
    whole._parts = (as_numbers, bias, cpu_kernels.WHOLE, rest[0])
    for rows in (1, 2, 3, 4, 5, 6, 7, 20):
        states = torch.randn(rows, inputs)
        assert torch.equal(halves(states), whole(states))
    weight[0, 0] = 1 + 2**-12
    assert PanelProduct(weight).weights[0].nbytes == 2 * panels.nbytes


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("outputs,inputs", SHAPES)
def test_weights_in_bfloat16_stay_so_and_states_are_rounded_where_the_processor_multiplies_pairs(
    outputs, inputs, pairs, monkeypatch
):
    if not pairs:
        monkeypatch.delitem(cpu_kernels.STORED, cpu_kernels.PAIRED, raising=False)
    rounds = cpu_kernels.PAIRED in cpu_kernels.STORED
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    ours = PanelProduct(weight, bias)
    assert ours.weights[2] == (cpu_kernels.PAIRED if rounds else cpu_kernels.UPPER)
    assert ours.weights[0].nbytes <= 2 * (outputs + 15) * (inputs + 1)
    for rows in (0, 1, 5, 12, 13, 40):
        states = torch.randn(rows, inputs)
        read = states.bfloat16() if rounds else states
        exact = F.linear(read.double(), weight.double(), bias.double())
        torch.testing.assert_close(ours(states).double(), exact, atol=2e-4, rtol=1e-5)


def test_inputs_are_rounded_to_bfloat16_as_torch_rounds_them():
    odd = [
        math.nan,
        -math.nan,
        math.inf,
        -math.inf,
        3.4e38,
        -3.4e38,
        1e-40,
        0.0,
        -0.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
    ]
    numbers = torch.cat([torch.tensor(odd), torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))])
    found = torch.from_numpy(cpu_kernels._paired(numbers[None].numpy()).view(np.int16)).view(torch.bfloat16)
    expected = numbers.bfloat16()
    assert torch.equal(found[0, : len(expected)].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert bool(found[0, :2].isnan().all()) and not found[0, 2:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs,inputs", SHAPES)
def test_weights_in_8_bits_have_a_scale_for_each_output(outputs, inputs, dtype):
    weight = torch.randn(outputs, inputs) * torch.logspace(-6, 6, outputs)[:, None]
    weight[0] = 0.0
    weight = weight.to(dtype)
    ours, states = PanelProduct(weight, int8=True), torch.randn(37, inputs)
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    exact = states.double() @ (weight / scales).round().double().T * scales.double().T
    largest = weight.norm(dim=1).double() * states.norm(dim=1, keepdim=True).double() + 1e-30
    assert bool(((ours(states) - exact).abs() <= 1e-4 * largest).all())


def test_the_number_of_threads_changes_nothing():
    ours, states = PanelProduct(torch.randn(200, 300)), torch.randn(7, 300)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ours(states))
            assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def run(model, layer, hidden, starts, own, window=None, capacity=24):
    """A pass of a layer over caches with the same random slots, by our kernels or by torch's operators."""
    torch.manual_seed(4)
    stage = model.new_stages(capacity, batch_size=len(starts)).base
    cache = stage.cache
    cache.window = window
    for stored in cache.keys + cache.values:
        stored.normal_()
    cache.lengths = list(starts)
    cached = CachedLayer(layer, torch.float32)
    assert cached._own is not None
    if not own:
        cached._own = None
    plan = plan_cached(stage.rotary, cache, hidden.shape[1], torch.float32)
    with torch.no_grad():
        states = cached(hidden, plan, cache, 0)
    return states, cache.keys[0].clone(), cache.values[0].clone()


@pytest.mark.parametrize("size", [4, 8, 20, 64, 100, 128, 144])
@pytest.mark.parametrize("window", [1000, 37])
def test_attention_by_heads_of_any_size(size, window):
    """Against float64, whether or not vectors fill the heads; and a row's bits do not depend on the rows beside it."""
    rng = np.random.default_rng(size)
    rows, heads, groups, capacity = 19, 6, 2, 160
    queries = rng.standard_normal((rows, heads * size)).astype(np.float32)
    keys, values = rng.standard_normal((2, 1, groups, capacity, size)).astype(np.float32)
    slots = np.arange(capacity - rows, capacity)[None]
    for first in (0, 1, 60, capacity - rows):
        own = slots - slots.min() + first
        mixed = cpu_kernels._attend_all(heads, queries, own, keys, values, window, False)
        distance = own[0][:, None] - np.arange(capacity)
        mask = torch.from_numpy((distance >= 0) & (distance < window))
        asked = torch.from_numpy(queries).double().view(1, rows, heads, size).transpose(1, 2)
        stored = [torch.from_numpy(each).double().repeat_interleave(3, dim=1) for each in (keys, values)]
        exact = (
            F.scaled_dot_product_attention(asked, *stored, attn_mask=mask).transpose(1, 2).reshape(rows, -1)
        )
        torch.testing.assert_close(torch.from_numpy(mixed).double(), exact, atol=2e-6, rtol=1e-5)
        for row in (0, 7, 18):
            alone = cpu_kernels._attend_all(
                heads, queries[row : row + 1], own[:, row : row + 1], keys, values, window, True
            )
            assert np.array_equal(alone[0], mixed[row])


def test_exponentials_are_right_to_the_last_place_and_keep_what_is_no_number():
    numbers = np.linspace(-86.9, 87.9, 100_003, dtype=np.float32)
    found = numbers.copy()
    cpu_kernels._exponentials(found, np.float32(0))
    exact = np.exp(numbers.astype(np.float64))
    assert np.abs(found / exact - 1).max() < 1.5e-7
    odd = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, 1.0] * 3, np.float32)
    cpu_kernels._exponentials(odd, np.float32(1))
    assert np.isnan(odd[::7]).all() and (odd[1::7] > 1e37).all() and (odd[2::7] < 1e-37).all()
    assert (odd[3::7] > 1e37).all() and (odd[4::7] < 1e-37).all() and (odd[6::7] == 1).all()


def test_a_score_that_is_no_number_is_not_hidden():
    """A logit that is not finite has to reach the verifier's check."""
    queries = np.ones((1, 64), np.float32)
    keys, values = np.ones((2, 1, 1, 80, 64), np.float32)
    for place in (0, 5, 63, 70, 79):
        broken = keys.copy()
        broken[0, 0, place, 3] = np.nan
        mixed = cpu_kernels._attend_all(1, queries, np.array([[79]]), broken, values, 80, True)
        assert np.isnan(mixed).all()


CASES = [
    ([0], 1, None),
    ([0], 9, None),
    ([13], 1, None),
    ([13], 5, None),
    ([13, 13], 2, None),
    ([3, 17, 11], 1, None),
    ([3, 17, 11], 4, None),
    ([22, 5], 4, None),  # padding of the first row reaches beyond the last slot
    ([13], 5, 4),
    ([3, 17], 3, 6),
    ([62], 1, None),
    ([63], 3, None),
    ([130, 20], 9, None),
    ([150], 70, None),  # a pass of many rows that is no prompt
    ([200, 61], 4, 90),
]


@pytest.mark.parametrize("starts,length,window", CASES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_is_the_layer_of_torch_s_operators(starts, length, window, biased):
    model = tiny_model(1)
    layer = model.model.layers[0]
    if biased:
        for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            part.bias = torch.nn.Parameter(torch.randn(part.out_features))
        # A joined product has a bias if all of its parts have one, or none has.
        for part in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj):
            part.bias = torch.nn.Parameter(torch.zeros(part.out_features))
    hidden = torch.randn(len(starts), length, 32)
    capacity = 24 if max(starts) < 24 else 256
    ours = run(model, layer, hidden, starts, True, window, capacity)
    theirs = run(model, layer, hidden, starts, False, window, capacity)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for one, two in zip(ours, run(model, layer, hidden, starts, True, window, capacity), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(before)
    fitting = [slice(0, min(length, capacity - start)) for start in starts]
    for row, kept in enumerate(fitting):
        torch.testing.assert_close(ours[0][row, kept], theirs[0][row, kept], atol=5e-5, rtol=1e-5)
        for one, two in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(
                one[row, :, : capacity - 1], two[row, :, : capacity - 1], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_do_not_change_a_bit_of_what_the_verifier_computes(dtype):
    """Its states after each token, from single steps and from blocks of every length, alone and in a batch."""
    model = tiny_model(3).to(dtype)
    tokens = torch.randint(3, 200, (1, 200))
    first = 4

    def states(widths, texts=1):
        found = []
        stages = model.new_stages(256, batch_size=texts)
        with torch.no_grad():
            stages.deep(stages.base(tokens[:, :first].expand(texts, -1)))
            start = first
            for width in widths:
                piece = tokens[:, start : start + width].expand(texts, -1)
                found.append(stages.deep(stages.base(piece)))
                start += width
        return torch.cat(found, dim=1)

    alone = states([1] * 180)
    assert len(alone.unique(dim=1)[0]) > 10
    for widths in ([2] * 90, [6] * 30, [7, 11] * 10, [1, 16, 1] * 10, [90, 90], [180]):
        assert torch.equal(states(widths), alone)
    assert torch.equal(states([1, 80, 9, 60, 30], texts=3), alone.expand(3, -1, -1))


def test_layers_that_they_do_not_compute_are_left_to_torch():
    layer = tiny_model(1).model.layers[0]
    assert CachedLayer(layer, torch.float32)._own is not None
    assert CachedLayer(layer, torch.bfloat16)._own is not None
    assert CachedLayer(layer, torch.float16)._own is None
    assert CachedLayer(layer, torch.bfloat16, few_rows=False)._own is None
    layer.mlp.hidden_act = "gelu"
    assert CachedLayer(layer, torch.float32)._own is None
    narrow = LlamaConfig(hidden_size=24, num_attention_heads=2, num_key_value_heads=1, intermediate_size=40)
    assert CachedLayer(DecoderLayer(narrow), torch.float32)._own is None


def answers(model):
    ways = [DecodeConfig(0), DecodeConfig(3), DecodeConfig(4, source="hybrid", adaptive=True)]
    return [model.generate(prompt, 24, how).tokens for prompt in random_prompts(3, 2) for how in ways]


def test_answers_are_those_without_them(monkeypatch):
    expected = answers(tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer"))
    monkeypatch.setattr(layers, "_cpu_kernels_work", lambda: False)
    model = tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer")
    assert answers(model) == expected
    assert not isinstance(model.drafter_parts().weights.head, PanelProduct)


def test_a_model_in_bfloat16_decodes_in_float32_and_gives_its_states_in_bfloat16():
    model = tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer", feedback=True)
    model.base_model.to(torch.bfloat16)
    with torch.no_grad():
        model.base_model.lm_head.weight.copy_(
            model.base_model.lm_head.weight.sign() / 16
        )  # full of near-ties
    settings = [
        DecodeConfig(0),
        DecodeConfig(4, keep_states=True),
        DecodeConfig(4, source="hybrid", adaptive=True),
    ]
    for prompt in [*random_prompts(3, 2), *random_prompts(80, 2)]:
        plain, learned, both = [model.generate(prompt, 40, how) for how in settings]
        assert plain.tokens == learned.tokens == both.tokens
        for block in learned.blocks[1:]:
            kept = (block.verifier_hidden, block.draft.exit_hidden, block.draft.drafter_hidden)
            assert all(states.dtype == torch.bfloat16 for states in kept if len(states))
    with model.decoding(8) as stages:
        assert {cache.dtype for cache in stages.caches()} == {torch.float32}
        states = model.base_model.forward_draft_or_large_model(in_tokens_small=torch.tensor([[3, 4]]))
        assert states.dtype == torch.bfloat16
        assert model.base_model.forward_draft_or_large_model(in_features_large=states).dtype == torch.bfloat16


def _send_answers(model, states, product, queue):
    queue.put((cpu_kernels._forked, answers(model), product(states).tolist()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_goes_on_without_threads():
    """Where GNU's OpenMP would end it."""
    model = tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer")
    states, product = torch.randn(5, 40), PanelProduct(torch.randn(20, 40))
    expected = (True, answers(model), product(states).tolist())
    assert not cpu_kernels._forked
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own threads do not survive it, either
    try:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_send_answers, args=(model, states, product, queue))
        child.start()
        found = queue.get(timeout=60)
        child.join()
    finally:
        torch.set_num_threads(before)
    assert found == expected and child.exitcode == 0


@pytest.mark.parametrize("how", ["sys.modules['numba'] = None", "os.environ['NUMBA_DISABLE_JIT'] = '1'"])
def test_without_numba_torch_s_operators_decode(how):
    code = f"""import os, sys
{how}
import torch
from kangaroo.decoding.layers import on_own_cpu_kernels, product
weight = torch.randn(8, 4)
assert not on_own_cpu_kernels(weight.device, weight.dtype)
print(torch.allclose(product(weight)(weight), weight @ weight.T, atol=1e-5))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def test_threads_that_they_are_not_made_for(monkeypatch):
    monkeypatch.setattr(cpu_kernels.numba, "threading_layer", lambda: "workqueue")
    assert not cpu_kernels.works()


def test_processors_that_they_are_not_made_for(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "FEATURES", {"sse2": True})
    assert not cpu_kernels.works()


def test_torch_s_default_dtype_changes_nothing():
    weight, states = torch.randn(20, 300), torch.randn(3, 300)
    expected = PanelProduct(weight)(states)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert cpu_kernels.works() and torch.equal(PanelProduct(weight)(states), expected)
    finally:
        torch.set_default_dtype(before)
    with pytest.raises(TypeError, match="float64"):
        PanelProduct(weight)(states.double())


def test_where_numba_may_keep_nothing_torch_s_operators_decode(monkeypatch):
    def fails():
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(cpu_kernels, "works", fails)
    with pytest.warns(UserWarning, match="slower than it could be: cannot cache"):
        assert not layers._cpu_kernels_work.__wrapped__()


def test_the_number_of_threads_stays_what_was_asked_for():
    """Numba starts its threads with the first product, and would set torch's number, too."""
    code = """import os, torch
torch.set_num_threads(1)
from kangaroo.decoding.cpu_kernels import PanelProduct
PanelProduct(torch.randn(40, 8))(torch.randn(2, 8))
print(torch.get_num_threads())
if os.fork():
    print(os.waitstatus_to_exitcode(os.wait()[1]))
else:
    torch.randn(200, 200) @ torch.randn(200, 200)  # with threads it would wait for ever
    torch.randn(200, 5000).softmax(dim=-1)
    os._exit(0)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "1\n0\n", result.stderr


@pytest.mark.parametrize("lengths", [(40, 40, 40), (20, 60, 33), (70, 90, 101), (12, 80, 5)])
def test_a_prompt_gives_the_same_bits_alone_and_in_a_batch(lengths):
    model = tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer")
    prompts = [torch.randint(3, 200, (length,)).tolist() for length in lengths]
    together = model.generate_batch(prompts, 12, DecodeConfig(2))
    for prompt, one in zip(prompts, together, strict=True):
        alone = model.generate(prompt, 12, DecodeConfig(2))
        assert one.tokens == alone.tokens
        for block, other in zip(one.blocks, alone.blocks, strict=True):
            assert torch.equal(block.verifier_confidence, other.verifier_confidence)


@pytest.mark.parametrize("length", [20, 100])
def test_a_callers_autocast_changes_nothing(length):
    model = tiny_kangaroo(2, 3, deep_scale=0.2, drafter="layer")
    prompt = torch.randint(3, 200, (length,)).tolist()
    expected = model.generate(prompt, 12, DecodeConfig(3)).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(prompt, 12, DecodeConfig(3)).tokens == expected


def test_biases_of_some_of_the_joined_projections():
    model = tiny_model(1)
    layer = model.model.layers[0]
    layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.randn(layer.self_attn.k_proj.out_features))
    tokens = torch.randint(3, 200, (1, 9))
    with torch.no_grad():
        stages = model.new_stages(16)
        found = stages.deep.logits(stages.deep(stages.base(tokens)))
        torch.testing.assert_close(found, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_states_that_do_not_fit_are_refused_before_memory_is_read():
    product = PanelProduct(torch.randn(32, 16))
    for width in (8, 64, 2_000_000):
        with pytest.raises(ValueError, match=f"expected states of 16 numbers, got {width}"):
            product(torch.zeros(1, width))
    model = tiny_model(1)
    layer = CachedLayer(model.model.layers[0], torch.float32)
    stage = model.new_stages(24, batch_size=3).base
    for lengths, texts in (([0, 0, 0], 16), ([3, 2, 1], 2), ([3, 2, 1], 6)):
        stage.cache.lengths = lengths
        plan = plan_cached(stage.rotary, stage.cache, 2, torch.float32)
        with pytest.raises(ValueError, match=f"of the 3 texts that the cache has, got {texts}"):
            layer(torch.zeros(texts, 2, 32), plan, stage.cache, 0)
    with pytest.raises(ValueError, match="expected states of 32 numbers, got 48"):
        layer(torch.zeros(3, 2, 48), plan, stage.cache, 0)


@pytest.mark.parametrize("part", ["_attention", "_feed_forward"])
def test_a_wrong_half_of_a_layer_is_noticed(part, monkeypatch):
    right = getattr(cpu_kernels, part)
    monkeypatch.setattr(cpu_kernels, part, lambda *inputs: right(*inputs) + np.float32(0.1))
    assert not cpu_kernels.works()


def test_a_wrong_product_is_noticed(monkeypatch):
    right = cpu_kernels._product
    monkeypatch.setattr(cpu_kernels, "_product", lambda *inputs: 1.01 * right(*inputs))
    assert not cpu_kernels.works()


def test_under_a_callers_autocast_the_kernels_are_believed_and_stages_run_by_themselves():
    """Neither whether the kernels are believed, nor what a stage computes that is called by itself."""
    model, tokens = tiny_kangaroo(1, drafter="layer").bfloat16(), torch.ones(1, 70).long()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad(), model.decoding(80):
            assert cpu_kernels.works()
            found.append(model.base_model.forward_draft_or_large_model(in_tokens_small=tokens))
    assert torch.equal(*found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_knows_where_the_kernel_of_its_process_is(copied, monkeypatch):
    ours, states = PanelProduct(torch.randn(20, 30)), torch.randn(3, 30)
    expected, address = ours(states), cpu_kernels._multiply().address
    monkeypatch.setattr(cpu_kernels, "_multiply", lambda: SimpleNamespace(address=0))
    other = copied(ours)
    monkeypatch.setattr(cpu_kernels, "_multiply", lambda: SimpleNamespace(address=address))
    assert torch.equal(other(states), expected)


@pytest.mark.parametrize(
    "setting", ["NUMBA_ENABLE_AVX=0", "NUMBA_CPU_NAME=generic", f"NUMBA_CPU_NAME={HOST}"]
)
def test_settings_of_numba_end_no_process(setting, tmp_path):
    code = """import torch
from kangaroo.decoding.cpu_kernels import PanelProduct
weight, states = torch.randn(20, 31).bfloat16(), torch.randn(3, 31).bfloat16().float()
print(torch.allclose(PanelProduct(weight)(states), states @ weight.float().T, atol=1e-4))"""
    name, _, value = setting.partition("=")
    environment = {**os.environ, name: value, "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "True\n", result.stderr
