"""What decodes computes what the layers compute, and is made anew when a weight has changed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import EOS, capture_passes, random_prompts, scramble_lora, tiny_kangaroo, tiny_model
from torch import nn
from torch.nn.utils import prune

from kangaroo import sgp_lora
from kangaroo.decoding import layers
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.layers import CachedLayer, MadeFromWeights, product
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import AdapterSwitch, inject_dual_lora


@pytest.mark.parametrize("own", [True, False])
def test_a_product_is_the_product(own, monkeypatch):
    if not own:
        monkeypatch.setattr(layers, "on_own_cpu_kernels", lambda *_: False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (1, 2, 3, 5, 40):
            x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((1, rows, 24), (56, 24), (56,)))
            expected = torch.nn.functional.linear(x, weight, bias)
            states = x.float() if own and dtype == torch.bfloat16 else x
            torch.testing.assert_close(product(weight, bias)(states).to(dtype), expected)
            torch.testing.assert_close(
                product(weight)(states).to(dtype), torch.nn.functional.linear(x, weight)
            )


def test_a_head_in_8_bits_is_nearly_the_product():
    weight = torch.randn(56, 24) * torch.logspace(-3, 3, 56)[:, None]  # rows of very different sizes
    weight[7] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 3, 9):
            states = torch.randn(1, rows, 24).to(dtype)
            expected = states.float() @ weight.to(dtype).float().T
            found = product(weight.to(dtype), int8=True)(states.float())
            sizes = weight.norm(dim=1) * states.float().norm(dim=-1).amax()
            assert found.dtype == torch.float32 and not torch.equal(found, expected)
            assert bool(((found - expected).abs() <= 0.02 * sizes).all())


def test_without_own_kernels_nothing_is_rounded(monkeypatch):
    model = tiny_kangaroo(1, drafter="layer", head="full")
    model.int8_draft = True
    monkeypatch.setattr(layers, "on_own_cpu_kernels", lambda *_: False)
    found = model.drafter_parts().weights
    assert found.head is not None and found.head_weight is not None
    states = torch.randn(1, 2, 32)
    torch.testing.assert_close(found.head(states), states @ found.head_weight.T)


def test_a_rounded_head_chooses_drafts_and_no_token():
    """Which is made when it is asked for; what is drafted may differ, what is answered does not."""
    model = tiny_kangaroo(3, drafter="layer", head="full", deep_scale=0.3)
    prompt = random_prompts(3, 1)[0]
    ways = [DecodeConfig(4), DecodeConfig(4, source="hybrid", adaptive=True)]
    plain = model.generate(prompt, 40, DecodeConfig(0)).tokens
    exact = model.drafter_parts().weights.head
    states = torch.randn(1, 1, 32)
    costs = model.step_costs()
    with model.with_int8_draft(True):
        assert model.step_costs() is not costs
        rounded = model.drafter_parts().weights.head
        assert not torch.equal(exact(states), rounded(states))
        assert [model.generate(prompt, 40, how).tokens for how in ways] == [plain, plain]
        together = model.generate_batch([prompt, *random_prompts(4, 2)], 40, ways[0])[0]
        alone = model.generate(prompt, 40, ways[0])  # each text drafts as if alone
        assert [one.draft.tokens.tolist() for one in together.blocks] == [
            one.draft.tokens.tolist() for one in alone.blocks
        ]
        with torch.no_grad():
            model.exit_proj.weight.neg_()  # an update is seen here, too
        assert model.drafter_parts().weights.head(states).allclose(-rounded(states), atol=0.05)
    assert torch.equal(model.drafter_parts().weights.head(states), -exact(states))
    assert model.step_costs() is costs


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_a_stage_computes_what_the_layers_compute(length, biased):
    model, states = tiny_model(1), torch.randn(1, length, 32)
    if biased:
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).bias = torch.nn.Parameter(torch.randn(
                    getattr(layer.self_attn, name).out_features))  # fmt: skip
    with torch.no_grad():
        slow = model.new_stages(16, few_rows=False).deep
        with model.decoding(16, None) as stages:
            fast = stages.deep
            for turn in range(1, 4):
                one, two = slow(states), fast(states)
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(slow.logits(one), fast.logits(two), atol=1e-5, rtol=0)
                whole = model.forward_deep(states.repeat(1, turn, 1))[:, -length:]
                torch.testing.assert_close(two, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("args", [dict(), dict(drafter="layer", drafter_layers=2, head="lora", head_rank=3),
                                  dict(drafter="adapter", head="full", draft_vocab=range(90))])  # fmt: skip
def test_decoding_with_fused_layers_and_with_the_modules_is_the_same(args, monkeypatch):
    model, prompts = tiny_kangaroo(2, 3, deep_scale=0.2, **args), random_prompts(4)
    settings = DecodeConfig(4)
    fast = [model.generate(prompt, 20, settings, (EOS,)) for prompt in prompts]
    build = layers.CachedLayer.__init__
    monkeypatch.setattr(
        layers.CachedLayer,
        "__init__",
        lambda self, layer, dtype, *_: build(self, layer, dtype, False),
    )
    model._weights, model.base_model._weights = MadeFromWeights(), MadeFromWeights()
    slow = [model.generate(prompt, 20, settings, (EOS,)) for prompt in prompts]
    assert [d.tokens for d in fast] == [d.tokens for d in slow]
    assert [b.block_len for d in fast for b in d.blocks] == [b.block_len for d in slow for b in d.blocks]
    for one, two in zip(fast, slow, strict=True):
        for a, b in zip(one.blocks, two.blocks, strict=True):
            torch.testing.assert_close(a.draft.confidence, b.draft.confidence, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(a.draft.exit_hidden, b.draft.exit_hidden, atol=1e-4, rtol=1e-4)


def test_fused_layers_are_made_once_and_anew_when_a_weight_has_changed(monkeypatch):
    model, prompt = tiny_kangaroo(1, 3, lora=False, drafter="layer", head="full"), random_prompts(1)[0]
    made = []
    build = layers.CachedLayer.__init__
    monkeypatch.setattr(
        layers.CachedLayer, "__init__", lambda self, *args: (made.append(1), build(self, *args))[1]
    )

    def decode():
        made.clear()
        return model.generate(prompt, 8, DecodeConfig(2)).tokens, len(made)

    before, count = decode()
    assert count == 3 + 3 + 1 + 1 and decode() == (before, 0)
    optimizer = torch.optim.SGD([model.exit_proj.weight], lr=1.0)
    model.exit_proj.weight.grad = torch.randn_like(model.exit_proj.weight)
    optimizer.step()
    # The head alone is made anew.
    assert decode() == (before, 0)
    assert torch.equal(model.drafter_parts().weights.head_weight, model.exit_proj.weight)
    with torch.no_grad():
        model.adapter_model.layers[0].mlp.down_proj.weight.mul_(2.0)
    assert decode() == (before, 1)
    with torch.no_grad():
        model.base_model.model.layers[3].mlp.down_proj.weight.mul_(-3.0)
    after, count = decode()
    assert count == 1 and after != before
    model.double().float()
    assert decode() == (after, 8)


def test_adapters_are_in_the_draft_and_not_in_the_verifier():
    model, prompt = tiny_kangaroo(1, 3), random_prompts(1)[0]
    base = model.base_model
    with torch.no_grad(), model.decoding(32) as stages:
        tokens = torch.tensor([prompt])
        states = []
        for stage, off in ((stages.shallow, ()), (stages.base, ("lora_S",))):
            with base.without_adapters(*off):
                expected = base.forward_shallow(tokens)
            states.append(stage(tokens))
            torch.testing.assert_close(states[-1], expected, atol=1e-4, rtol=1e-5)
        assert not torch.allclose(*states)


def test_weights_are_held_for_as_long_as_what_was_made_from_them():
    made, calls = MadeFromWeights(), []
    for _ in range(20):
        weight = torch.randn(64)
        made.get("x", [weight], lambda: calls.append(1))
        del weight
    assert len(calls) == 20


def test_weights_are_found_again_where_adapters_are_attached_or_merged_anew():
    """What a stage computes with is kept while the weights last, and no longer: other adapters give other answers."""
    model = tiny_kangaroo(2, drafter="layer", deep_scale=0.1)
    prompt = random_prompts(1, 3)[0]

    def drafts():
        with model.decoding(40) as stages:
            return stages.shallow(torch.tensor([prompt]))

    before = drafts()
    assert torch.equal(drafts(), before)
    with torch.no_grad():
        for name, weight in model.base_model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
    changed = drafts()
    assert not torch.allclose(changed, before)
    model.base_model.adapter_switch = AdapterSwitch(model.base_model.model)
    with torch.no_grad():
        model.base_model.model.layers[0].mlp.down_proj.base_layer.weight.mul_(1.5)
    again = drafts()
    assert not torch.allclose(again, changed)
    with model.base_model.merged():
        assert torch.equal(drafts(), again)
        with model.base_model.without_adapters("lora_S"):
            assert not torch.allclose(drafts(), again)
    state = {name: 2 * weight for name, weight in model.base_model.state_dict().items()}
    model.base_model.load_state_dict(state, assign=True)  # other tensors in the same modules
    assert not torch.allclose(drafts(), again)


def test_answers_one_after_another_merge_and_pack_once(monkeypatch):
    """A user calls `generate` in a loop: nothing is made anew while the weights are the same."""
    model = tiny_kangaroo(2, drafter="layer", deep_scale=0.1)
    made = []
    kept = CachedLayer.__init__
    monkeypatch.setattr(CachedLayer, "__init__", lambda self, *args: (made.append(1), kept(self, *args))[1])
    first = model.generate(random_prompts(1, 3)[0], 4, DecodeConfig(2)).tokens
    count = len(made)
    assert count and model.generate(random_prompts(1, 3)[0], 4, DecodeConfig(2)).tokens == first
    assert len(made) == count
    with torch.no_grad():
        for name, weight in model.base_model.named_parameters():
            if "lora_D" in name and "lora_B" in name:
                weight.add_(1.0)
    assert model.generate(random_prompts(1, 3)[0], 4, DecodeConfig(2)).tokens != first
    assert len(made) > count


def test_large_weights_are_not_kept_merged(monkeypatch):
    """They would take the memory of a second model while the first is trained."""
    monkeypatch.setattr(sgp_lora, "LARGE", 0)
    model = tiny_kangaroo().base_model
    with model.merged():
        before = model.adapter_switch.modules
    with model.merged():
        assert not any(one is other for one, other in zip(before, model.adapter_switch.modules, strict=True))


def test_adapters_of_another_strength_are_merged_anew():
    """PEFT scales an adapter without touching its weights."""
    model = tiny_kangaroo(2, deep_scale=0.1)
    prompt = random_prompts(1, 3)[0]
    how = DecodeConfig(0, target="adapted")
    first = model.generate(prompt, 8, how).tokens
    scaled = [site.layer for site in model.base_model.adapter_switch._sites]
    for layer in scaled:
        layer.scaling = {name: 20 * scale for name, scale in layer.scaling.items()}
    with torch.no_grad():
        expected = int(model.base_model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert model.generate(prompt, 8, how).tokens[0] == expected != first[0]


def test_adapters_that_peft_has_disabled_are_not_merged():
    base = tiny_model(2, deep_scale=0.1)
    peft_model = inject_dual_lora(base, 2, rank=4, alpha=8.0)
    scramble_lora(base, ["lora_D"])
    model = KangarooModel(base, EARLY_STOP_LAYER=2)
    prompt = random_prompts(1, 3)[0]
    with_adapters = model.generate(prompt, 4, DecodeConfig(2)).tokens
    with peft_model.disable_adapter(), torch.no_grad():
        expected = int(base(torch.tensor([prompt])).logits[0, -1].argmax())
        assert model.generate(prompt, 4, DecodeConfig(2)).tokens[0] == expected != with_adapters[0]
    assert model.generate(prompt, 4, DecodeConfig(2)).tokens == with_adapters


@pytest.mark.parametrize("how", [DecodeConfig(3), DecodeConfig(4, source="hybrid", adaptive=True)])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_a_callers_inference_mode_changes_nothing(captured, merged, how, monkeypatch):
    """Not even later: what is kept in it, weights and caches, is written to afterwards."""
    model = tiny_kangaroo(2, deep_scale=0.1)
    held = capture_passes(model, monkeypatch) if captured else []
    merge = model.base_model.merged if merged else nullcontext
    expected = tiny_kangaroo(2, deep_scale=0.1).generate([5, 6, 7], 12, DecodeConfig(0)).tokens
    for mode in (torch.inference_mode, nullcontext, torch.inference_mode):
        with mode(), merge():
            assert model.generate([5, 6, 7], 12, how).tokens == expected
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
            streamed = [
                token for block in model.decode_blocks([5, 6, 7], 12, how) for token in block.committed
            ]
            assert streamed == expected
    kept = [keys for stages in held for cache in stages.caches() for keys in cache.keys]
    assert bool(kept) == captured and not any(keys.is_inference() for keys in kept)


def test_a_model_that_was_loaded_in_inference_mode_decodes():
    expected = tiny_kangaroo(2, deep_scale=0.1).generate([5, 6, 7], 12, DecodeConfig(0)).tokens
    with torch.inference_mode():
        model = tiny_kangaroo(2, deep_scale=0.1)
    assert model.generate([5, 6, 7], 12, DecodeConfig(3)).tokens == expected


def _step(optimizer_class):
    """A change of all weights by an optimizer's fused step."""

    def change(model):
        model.requires_grad_(True)
        optimizer = optimizer_class(model.parameters(), lr=0.1, fused=True)
        model(torch.randint(3, 200, (1, 20))).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        model.requires_grad_(False)

    return change


def _scale_data(model):
    model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    model.forget_weights()


CHANGES = {
    "a fused AdamW step": _step(torch.optim.AdamW),
    "a fused SGD step": _step(torch.optim.SGD),
    "another weight": lambda model: setattr(
        model.model.layers[0].mlp.down_proj, "weight", nn.Parameter(torch.randn(32, 64))
    ),
    "another module": lambda model: setattr(
        model.model.layers[2].mlp, "down_proj", nn.Linear(64, 32, bias=False)
    ),
    "half of a weight pruned": lambda model: prune.l1_unstructured(
        model.model.layers[0].mlp.down_proj, "weight", 0.5
    ),
    "another embedding": lambda model: model.set_input_embeddings(nn.Embedding(264, 32)),
    "another epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "eps", 1.0),
    "in place through data, told": _scale_data,
}


@pytest.mark.parametrize("name", CHANGES)
def test_decoding_notices_what_was_put_in_another_s_place(name):
    model = tiny_model(1)
    tokens = torch.randint(3, 200, (1, 20))

    @torch.no_grad()
    def decoded():
        stages = model.new_stages(32)
        return stages.deep.logits(stages.deep(stages.base(tokens)))

    before = decoded()
    CHANGES[name](model)
    with torch.no_grad():
        expected = model(tokens).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(decoded(), expected, atol=1e-3, rtol=1e-3)
