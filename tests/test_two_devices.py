"""A model whose layers lie on two devices computes what it computes on one, to the last bit on a CPU.

With two CUDA devices, these are they: `pytest tests/test_two_devices.py -n 0`. Elsewhere the second device is played. Its
tensors say that they lie on another device than the CPU, and an operation on tensors of both devices is an error.
"""

from __future__ import annotations

import dataclasses

import pytest
import safetensors.torch
import torch
from conftest import (
    copied,
    random_prompts,
    timeless,
    tiny_kangaroo,
    tiny_loaded,
    tiny_model,
    tiny_split,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map

from dvirl.config import DVIConfig, SGPConfig
from dvirl.data.examples import make_example
from dvirl.data.sources import Prompt
from dvirl.evaluation import inference_baseline
from dvirl.evaluation.inference_kangaroo import measure_acceptance
from dvirl.metrics import verifier_sums
from dvirl.rollout import generate
from dvirl.runs import checkpoint
from dvirl.scale import corpus
from dvirl.scale.corpus import answer, write_shard
from dvirl.scale.distill import DistillConfig, Distiller
from dvirl.sgp import SGPTrainer
from dvirl.trainer import DVITrainer
from kangaroo import kangaroo_model
from kangaroo.decoding import layers
from kangaroo.decoding.blocks import DecodeConfig

ENDS = (2, *range(240, 264))
SHARED = dict(
    exit_layer=2,
    lora_rank=4,
    drafter="layer",
    drafter_layers=1,
    threads=1,
    dtype="float32",
    device="cpu",
    grad_clip=1e6,
)
"""Settings of every training here. Norms of gradients are summed device by device, so the clipping stays out."""


@pytest.fixture(autouse=True)
def without_cpu_kernels(monkeypatch):
    """A played device has none, and other operators round otherwise."""
    monkeypatch.setattr(layers, "_cpu_kernels_work", lambda: False)


PLAYED = torch.device("meta")
"""What tensors of the played device say of themselves: a device on which torch runs nothing."""


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on the second device; its numbers are `here`, on the CPU."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=PLAYED,
        )

    is_meta = False  # there are numbers, so that weights can be loaded into it

    def __init__(self, here):
        self.here = here

    def __getitem__(self, key):  # torch would make the index of a list on a device that holds no numbers
        return super().__getitem__(torch.tensor(key).to(PLAYED) if isinstance(key, list) else key)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return on_one_device(function, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Inside, tensors can be made on the played device and moved there and back."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return on_one_device(function, args, kwargs or {})


def on_one_device(function, args, kwargs):
    """Run one operation on the CPU; its results say that they lie where its arguments do.

    Only copies have arguments on both devices, and numbers without dimensions, which every device takes.
    """
    copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.dim()}
    assert copies or len(devices) < 2, f"{function} has arguments on {devices}"
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif tensors:
        device = tensors[0].device if copies or not devices else devices.pop()
    inside = tree_map(lambda leaf: leaf.here if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    result = function(*inside[0], **inside[1])
    if device == PLAYED:
        result = tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def test_the_played_device_refuses_what_a_second_device_refuses():
    with TwoDevices():
        here = torch.ones(2)
        there = here.to(PLAYED)
        assert (there + 1).device == PLAYED and (there + 1).cpu().tolist() == [2.0, 2.0]
        with pytest.raises(AssertionError, match="arguments on"):
            here + there


# One device and two


CUDA = torch.cuda.device_count() > 1
LAST_BITS = 1e-5 if CUDA else 0.0
"""What answers in float32 may differ by: one card decodes by our own kernels, and two by a library's."""
HOME, SECOND = (torch.device("cuda", 0), torch.device("cuda", 1)) if CUDA else (torch.device("cpu"), PLAYED)


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """The second device is there; files are read outside, since safetensors makes tensors as no operation does."""

    def load_file(*args, **named):
        with _disable_current_modes():
            return safetensors.torch.load_file(*args, **named)

    for module in (checkpoint, corpus, kangaroo_model):
        monkeypatch.setattr(module, "load_file", load_file)
    if CUDA:
        yield
    else:  # torch chooses a kernel of attention by the device; this one is there on both
        with TwoDevices(), sdpa_kernel(SDPBackend.MATH):
            yield


def spread(model, home_layers=1):
    """Put a model's layers from `home_layers` on onto the second device."""
    model.to(HOME)
    for layer in model.model.layers[home_layers:]:
        layer.to(SECOND)
    return model


def same(one, two, atol=0.0):
    """Whether tensors are equal, to the last bit if not said otherwise."""
    torch.testing.assert_close(two.to(HOME), one.to(HOME), rtol=0, atol=atol)


def both(make):
    """The same twice, made by `make(prepare)`, which prepares the model: on one device, and with its layers on two."""
    return make(lambda model: model.to(HOME)), make(spread)


def kangaroo(prepare, **args):
    """A model with a draft that has layers of its own, and both adapters."""
    model = tiny_kangaroo(drafter="layer", deep_scale=0.05, **args)
    prepare(model.to(HOME).base_model)
    return model


@torch.no_grad()
def test_two_cards_compute_a_pass():
    one, two = both(lambda prepare: prepare(tiny_model()))
    assert two.layer_devices() == {HOME, SECOND} and one.layer_devices() == {two.device} == {HOME}
    ids = torch.tensor([random_prompts(1, longest=12)[0] * 2, random_prompts(1, longest=12)[0] * 2]).to(HOME)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padding on the left, for which layers need a mask
    first, second = (model(ids, mask, output_hidden_states=True) for model in (one, two))
    same(first.logits, second.logits)
    for state, other in zip(first.hidden_states, second.hidden_states, strict=True):
        same(state, other)
    assert {state.device for state in second.hidden_states} == {HOME}
    exit_hidden = two.forward_shallow(ids)
    assert exit_hidden.device == two.forward_deep(exit_hidden).device == HOME


@pytest.mark.parametrize(
    "how",
    [
        DecodeConfig(4),
        DecodeConfig(3, target="adapted"),
        DecodeConfig(6, source="hybrid"),
        DecodeConfig(4, deterministic=True),
        DecodeConfig(3, temperature=0.8, draft_temperature=0.9),
    ],
    ids=["greedy", "adapted", "hybrid", "deterministic", "sampled"],
)
def test_two_cards_decode(how):
    prompts = random_prompts(3, 4)
    found = []
    for model in both(kangaroo):
        alone = model.generate(prompts[0], 10, how)
        together = model.generate_batch(prompts, 10, how)
        found.append(
            [(each.tokens, [block.block_len for block in each.blocks]) for each in [alone, *together]]
        )
    assert found[0] == found[1]
    assert max(max(lengths) for _, lengths in found[0]) > 1  # a draft was accepted


@pytest.mark.no_cover
def test_two_cards_in_rollouts_and_evaluation():
    prompts = random_prompts(5, 1)
    one, two = both(kangaroo)
    rollouts = [generate(model.base_model, prompts, 12, ENDS) for model in (one, two)]
    assert rollouts[0].responses() == rollouts[1].responses()
    same(rollouts[0].verifier_hidden, rollouts[1].verifier_hidden, LAST_BITS)
    examples = list(map(make_example, prompts, rollouts[0].responses()))
    same(verifier_sums(one.base_model, examples), verifier_sums(two.base_model, examples))
    rates = [measure_acceptance(model, prompts, 12, DecodeConfig(3), ENDS) for model in (one, two)]
    counts = [(rate.num_accepted, rate.num_drafted, rate.responses) for rate in rates]
    assert counts[0] == counts[1]


def loaded(prepare):
    here = copied(tiny_loaded())
    prepare(here.model)
    return dataclasses.replace(here, eos_ids=ENDS)


def same_weights(one, two, atol=0.0):
    trained = dict(two.named_parameters())
    changed = 0
    for name, parameter in one.named_parameters():
        same(parameter.detach(), trained[name].detach(), atol)
        changed += parameter.requires_grad
    assert changed


def online(run_dir, **changes):
    """Settings of a short run of DVI."""
    sizes = dict(
        num_prompts=12, rollout_batch=8, max_new_tokens=10, fast_batch=3, slow_every=2, draft_vocab=120
    )
    return DVIConfig(run_dir=str(run_dir), tracker="none", warmup_steps=2, **sizes, **SHARED, **changes)


@pytest.mark.no_cover
@pytest.mark.parametrize("target", ["base", "adapted"])
def test_two_cards_train(tmp_path, target):
    """Rollouts, judging, fast and slow updates."""

    def make(prepare):
        config = online(tmp_path / prepare.__name__, target=target)
        return DVITrainer(config, loaded(prepare), tiny_split())

    one, two = both(make)
    assert {p.device for p in two.shallow} == {p.device for p in two.model.parameters()} == {HOME, SECOND}
    logs = ([], [])
    for trainer, log in zip((one, two), logs, strict=True):
        trainer.report = log.append
        while not trainer.finished:
            trainer.advance()
    assert len(logs[0]) == len(logs[1]) > 3
    for line, other in zip(*logs, strict=True):
        assert line.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=1e-5)
        assert line.keys() == other.keys()
        for name, value in timeless(line).items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=LAST_BITS, abs=0.0)
            assert other[name] == value, name
    same_weights(one.model, two.model, LAST_BITS)


@pytest.mark.no_cover
def test_two_cards_distil(tmp_path):
    shard = answer(loaded(lambda model: model), random_prompts(12), 10, 8)
    write_shard(tmp_path / "shard-00000.safetensors", shard)

    def make(prepare):
        where = str(tmp_path / prepare.__name__)
        sizes = dict(batch=4, head_rank=8, draft_vocab=100, answer_tokens=10, warmup_steps=2)
        config = DistillConfig(run_dir=where, responses_from=str(tmp_path), **sizes, **SHARED)
        mine = Distiller(config, loaded(prepare))
        assert mine._use_cuda_graphs == (CUDA and len(mine.loaded.model.layer_devices()) == 1)
        mine._use_cuda_graphs = False  # padding for a captured update moves the last bit
        mine.start()
        mine.losses = [mine.update(*batch)[0] for batch in mine.batches()]
        return mine

    one, two = both(make)
    same(torch.stack(one.losses), torch.stack(two.losses))
    same_weights(one.model, two.model)


def test_two_cards_fine_tune(tmp_path):
    def make(prepare):
        where = str(tmp_path / prepare.__name__)
        config = SGPConfig(run_dir=where, draft_vocab=0, max_tokens=160, detach_exit=False, **SHARED)
        records = [
            Prompt((f"say {word}",), response=word * 3) for word in ("one", "two", "three", "four", "five")
        ]
        trainer = SGPTrainer(config, loaded(prepare), records)
        trainer.found = trainer.step(1, trainer.train_set[:4])
        return trainer

    one, two = both(make)
    assert one.found["loss"] == two.found["loss"]
    # The gradients of both heads meet in the shallow layers, on two cards in no fixed order.
    same_weights(one.model, two.model, atol=1e-6)


@pytest.mark.no_cover
def test_two_cards_go_on_from_a_checkpoint(tmp_path):
    config = online(tmp_path / "run")
    trainer = DVITrainer(config, loaded(spread), tiny_split())
    trainer.advance()
    assert trainer.counters.step
    folder = trainer.save_checkpoint()
    again = DVITrainer(config, loaded(spread), tiny_split())
    again.load_checkpoint(folder)
    same_weights(trainer.model, again.model)
    before = trainer.fast_optimizer.state_dict()["state"]
    after = again.fast_optimizer.state_dict()["state"]
    for number, state in before.items():
        for name, value in state.items():
            assert after[number][name].device == value.device
            same(value, after[number][name])
    for each in (trainer, again):
        each.fast_update(each.buffer.recent(4))
    same_weights(trainer.model, again.model)


def test_the_baseline_answers_with_layers_on_two_devices(monkeypatch):
    """Hugging Face's loop over a model that lies on several: the tokens are those on one."""
    loaded = tiny_loaded()
    prompt = random_prompts(1, 3)[0]
    monkeypatch.setattr(inference_baseline, "load", lambda *_: loaded)
    how = dict(limit=8, settings=DecodeConfig(0), eos_ids=(2,), seed=0)
    expected = inference_baseline.generate_forward(inference_baseline.hugging_face(loaded), prompt, **how)
    spread(loaded.model)
    theirs = inference_baseline.hugging_face(loaded)
    assert theirs.hf_device_map["model.layers.3"] == SECOND and theirs.hf_device_map["lm_head"] == HOME
    assert inference_baseline.generate_forward(theirs, prompt, **how).tokens == expected.tokens
