"""Two adapters on one model: where they sit, how they are left out, merged, and kept from one another."""

from __future__ import annotations

import pytest
import torch
from conftest import scramble_lora, tiny_kangaroo, tiny_model, tiny_pair

from dvirl.lora import deep_parameters, shallow_parameters, train_only
from kangaroo.sgp_lora import get_peft_model_state_dict, inject_dual_lora, inject_lora, lora_parameters

IDS = torch.arange(3, 15)[None]


def layers_of(model, name):
    return {
        int(key.split("layers.")[1].split(".")[0])
        for key, _ in model.named_parameters()
        if f".{name}." in key
    }


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_each_adapter_sits_on_its_own_layers(exit_layer):
    peft_model = inject_dual_lora(tiny_model(), exit_layer, rank=2)
    assert layers_of(peft_model, "lora_S") == set(range(exit_layer))
    assert layers_of(peft_model, "lora_D") == set(range(exit_layer, 4))
    assert set(get_peft_model_state_dict(peft_model, adapter_name="lora_S"))


def test_inject_lora_freezes_everything_else():
    peft_model = inject_lora(tiny_model(), 2, rank=2)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_S" in name for name in trainable)


def test_fresh_adapters_compute_nothing_and_off_is_the_base():
    theirs, base = tiny_pair()
    expected = theirs(IDS).logits
    inject_dual_lora(base, 2, rank=4)
    torch.testing.assert_close(base(IDS).logits, expected, atol=1e-4, rtol=0)
    scramble_lora(base, ["lora_S", "lora_D"])
    assert (base(IDS).logits - expected).abs().max() > 0.1
    with base.without_adapters("lora_S", "lora_D"):
        torch.testing.assert_close(base(IDS).logits, expected, atol=1e-4, rtol=0)
        with base.merged():
            torch.testing.assert_close(base(IDS).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_folding_computes_the_same_and_leaves_the_weights_alone():
    model = tiny_kangaroo().base_model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(IDS).logits
    with model.without_adapters("lora_S"):
        without = model(IDS).logits
    with model.merged():
        torch.testing.assert_close(model(IDS).logits, plain, atol=1e-4, rtol=0)
        with model.without_adapters("lora_S"):
            torch.testing.assert_close(model(IDS).logits, without, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(IDS).logits, plain, atol=1e-4, rtol=0)
        with model.merged():
            pass
        torch.testing.assert_close(model(IDS).logits, plain, atol=1e-4, rtol=0)
    assert torch.equal(model(IDS).logits, plain)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_leaving_out_survives_an_error():
    model = tiny_kangaroo().base_model
    plain = model(IDS).logits
    with pytest.raises(RuntimeError, match="inside"), model.merged(), model.without_adapters("lora_S"):
        raise RuntimeError("inside")
    assert torch.equal(model(IDS).logits, plain)


def test_the_guard_undoes_what_peft_makes_trainable():
    base = tiny_model()
    peft_model = inject_dual_lora(base, 2, rank=2)
    deep = lora_parameters(base, ["lora_D"])
    train_only(base, deep)
    with peft_model.disable_adapter():
        pass
    leaked = [p for p in lora_parameters(base, ["lora_S"]) if p.requires_grad]
    assert leaked, "PEFT no longer re-enables adapters; the guard could go"
    train_only(base, deep)
    assert [p for p in base.parameters() if p.requires_grad] == deep


def test_our_switch_does_not_touch_requires_grad():
    model = tiny_kangaroo()
    train_only(model, shallow_parameters(model))
    before = [p.requires_grad for p in model.parameters()]
    with model.base_model.without_adapters("lora_S"), model.base_model.merged():
        pass
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(p.requires_grad for p in deep_parameters(model))


def test_bad_layer_or_rank_is_said():
    with pytest.raises(ValueError, match="takes 1 to 3"):
        inject_dual_lora(tiny_model(), 4)
    with pytest.raises(ValueError, match="rank is 0"):
        inject_lora(tiny_model(), 2, rank=0)


def test_a_second_injection_is_refused():
    model = tiny_model()
    inject_lora(model, 2, rank=2)
    with pytest.raises(ValueError, match="carries adapters already"):
        inject_dual_lora(model, 2, rank=2)
