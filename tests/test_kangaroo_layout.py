"""An adapter in the published Kangaroo layout is read as it is, and decodes with the published accept lengths."""

from __future__ import annotations

import json
import os
import pickle
from argparse import Namespace
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import random_prompts, tiny_model, write_published
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from dvirl.evaluation.inference_kangaroo import kangaroo_forward
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.published import read_published

LIMIT, EXIT_LAYER = 24, 2
NORMS = ("layers.0.input_layernorm.weight", "norm.weight")


class Published:
    """The published algorithm, written from its description: Hugging Face's modules, no cache of keys or values."""

    def __init__(self, ours: EarlyExitLlamaForCausalLM, folder: Path) -> None:
        self.base = LlamaForCausalLM(ours.config).eval()
        self.base.load_state_dict({**self.base.state_dict(), **ours.state_dict()})
        config, state = LlamaConfig.from_pretrained(folder), torch.load(folder / "pytorch_model.bin")
        self.attention = LlamaAttention(config)
        prefix = "layers.0.self_attn."
        weights = {
            name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
        }
        self.attention.load_state_dict({**self.attention.state_dict(), **weights})
        self.norms = [LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in NORMS]
        for norm, name in zip(self.norms, NORMS, strict=True):
            norm.weight.data = state[name]
        self.look = cache(self._look)

    @torch.no_grad()
    def _look(self, tokens: tuple[int, ...]) -> tuple[int, int, float]:
        """After `tokens`: the verifier's token, the draft's, and the draft's confidence."""
        seen = self.base(torch.tensor([tokens]), output_hidden_states=True)
        hidden, positions = seen.hidden_states[EXIT_LAYER], torch.arange(len(tokens))
        mask = torch.zeros(len(tokens), len(tokens)).masked_fill(positions[None] > positions[:, None], -1e30)
        mixed = self.attention(self.norms[0](hidden), mask[None, None], positions[None])[0]
        drafted = self.base.lm_head(self.norms[1](hidden + mixed))[0, -1].softmax(dim=-1)
        return int(seen.logits[0, -1].argmax()), int(drafted.argmax()), float(drafted.max())

    def decode(
        self, prompt: list[int], limit: int, steps: int, threshold: float, eos: int = -1
    ) -> tuple[list[int], list[int]]:
        """The response and its accept lengths, the prefill's 1 first.

        Up to `steps` tokens are drafted, one below the threshold being the last; all of them are verified. A block is
        begun only if `steps + 1` tokens have room, and the prefill's token is not compared with `eos`.
        """
        tokens, lengths = (*prompt, self.look(tuple(prompt))[0]), [1]
        while len(tokens) - len(prompt) < limit - steps:
            drafts: list[int] = []
            confidence = 1.0
            while len(drafts) < steps and (not drafts or confidence >= threshold):
                _, drafted, confidence = self.look((*tokens, *drafts))
                drafts.append(drafted)
            start = len(tokens)
            for drafted in (*drafts, None):  # after the last draft comes the bonus token
                own = self.look(tokens)[0]
                tokens = (*tokens, own)
                if own == eos or own != drafted:
                    break
            lengths.append(len(tokens) - start)
            if tokens[-1] == eos:
                break
        return list(tokens[len(prompt) :]), lengths


def alter(folder: Path, **changes) -> None:
    """Rewrite the weights with tensors added, replaced, or left out where they are None; dots are written as __."""
    state = torch.load(folder / "pytorch_model.bin")
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    torch.save(
        {name: value for name, value in state.items() if value is not None}, folder / "pytorch_model.bin"
    )


def configure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value != "gone"})
    )


def pair(folder: Path, seed: int = 0, **changes) -> tuple[KangarooModel, Published]:
    """Our model and the reference on one base and one published adapter."""
    write_published(folder, seed, **changes)
    base = tiny_model(seed, deep_scale=0.1)
    return KangarooModel(base, folder, None, EXIT_LAYER), Published(base, folder)


def ours(model: KangarooModel, prompt, steps, threshold, eos=(), limit=LIMIT, target="adapted"):
    decoded = kangaroo_forward(model, prompt, limit, DecodeConfig(steps, threshold, target), eos)
    return decoded.tokens, [block.block_len for block in decoded.blocks]


def prompts_of(seed: int) -> list[list[int]]:
    """Two, one of them longer than the window of our own adapter."""
    short, *others = random_prompts(30, seed)
    return [short, list(chain(*others))[:80]]


@pytest.fixture(scope="module", params=range(3))
def seeded(request, tmp_path_factory):
    """A seed and its pair, for all thresholds: the reference need not look at the same texts again."""
    theta = (100.0, 10000.0, 1e6)[request.param]
    return request.param, *pair(tmp_path_factory.mktemp("published"), request.param, rope_theta=theta)


@pytest.mark.no_cover
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 1.0])
def test_accept_lengths_are_the_published_ones(seeded, threshold):
    seed, model, published = seeded
    for steps in range(1, 9):
        for index, prompt in enumerate(prompts_of(seed)):
            expected, lengths = published.decode(prompt, LIMIT, steps, threshold)
            target = ("base", "adapted")[(steps + index) % 2]  # the same without lora_S
            tokens, block_lens = ours(model, prompt, steps, threshold, target=target)
            assert block_lens[: len(lengths)] == lengths, (steps, index)
            assert tokens[: len(expected)] == expected
            # Where a whole block has no room, published decoding stops and ours goes on with shorter ones.
            assert LIMIT - steps <= len(expected) and len(tokens) == LIMIT


@pytest.mark.parametrize(
    "other",
    [
        dict(rope_theta=5000.0),
        dict(rms_norm_eps=1.0),
        dict(num_attention_heads=4, num_key_value_heads=2),
        "window",
    ],
)
def test_what_the_folder_decides_moves_accept_lengths(tmp_path, other):
    """Were any of it taken from elsewhere, the test above would fail."""
    model, published = pair(tmp_path)
    if other == "window":
        model.adapter_model.window = 3
    else:
        configure(tmp_path, **other)
        model.load_drafter(tmp_path)
    expected = [published.decode(prompt, 60, 4, 0.2)[1] for prompt in prompts_of(0)]
    found = [ours(model, prompt, 4, 0.2, limit=60)[1] for prompt in prompts_of(0)]
    assert any(own[: len(lengths)] != lengths for own, lengths in zip(found, expected, strict=True))


@pytest.mark.parametrize("at", [1, 4, 9, 12])
def test_an_end_of_sequence_is_counted_as_published(tmp_path, at):
    model, published = pair(tmp_path, 2)
    prompt = prompts_of(2)[1]
    eos = ours(model, prompt, 0, 0.0)[0][at]
    expected, lengths = published.decode(prompt, LIMIT, 3, 0.0, eos)
    assert expected[-1] == eos and len(lengths) > 1
    assert ours(model, prompt, 3, 0.0, (eos,)) == (expected, lengths)


def test_an_end_of_sequence_from_the_prefill_ends_ours_only(tmp_path):
    model, published = pair(tmp_path, 1)
    prompt = prompts_of(1)[0]
    eos = published.look(tuple(prompt))[0]
    assert len(published.decode(prompt, LIMIT, 3, 0.0, eos)[1]) > 1
    assert ours(model, prompt, 3, 0.0, (eos,)) == ([eos], [1])


def test_the_config_that_is_published_is_read(tmp_path):
    """The keys of the 7B adapter's config: neither `rope_theta` nor `num_key_value_heads`, and some that say nothing."""
    state = write_published(tmp_path, groups=8)
    config = dict(
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=32,
        initializer_range=0.02, intermediate_size=64, max_position_embeddings=2048, model_type="llama",
        num_attention_heads=8, num_hidden_layers=1, pad_token_id=0, rms_norm_eps=1e-06, tie_word_embeddings=False,
        torch_dtype="float16", transformers_version="4.28.1", use_cache=True, vocab_size=32000,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    half = {name: value.half() for name, value in state.items()}
    torch.save(
        {**half, "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, tmp_path / "pytorch_model.bin"
    )
    adapter = read_published(tmp_path, 32)
    assert adapter.kind == "adapter" and adapter.window is None and len(adapter.layers) == 1
    assert (
        adapter.rotary.base == 10000.0 and adapter.norm.eps == adapter.layers[0].input_layernorm.eps == 1e-06
    )
    assert adapter.layers[0].self_attn.num_groups == 8
    assert {name: value.dtype for name, value in adapter.state_dict().items()} == dict.fromkeys(
        state, torch.float32
    )
    assert all(torch.equal(value, half[name].float()) for name, value in adapter.state_dict().items())


def test_positions_are_read_as_the_newest_transformers_writes_them(tmp_path):
    write_published(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    older = KangarooModel(tiny_model(), tmp_path, None, EXIT_LAYER).adapter_model.rotary
    parameters = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    configure(tmp_path, rope_theta="gone", rope_scaling="gone", rope_parameters=parameters)
    newer = KangarooModel(tiny_model(), tmp_path, None, EXIT_LAYER).adapter_model.rotary
    places = torch.arange(40)[None]
    for one, other in zip(*(rotary(places, 39, torch.float32) for rotary in (older, newer)), strict=True):
        assert torch.equal(one, other)


def test_linear_rope_scaling_is_honoured(tmp_path):
    model, published = pair(tmp_path, 1, rope_scaling={"type": "linear", "factor": 4.0})
    assert model.adapter_model.rotary.scaling_factor == 4.0
    lengths = published.decode(prompts_of(1)[1], LIMIT, 4, 0.2)[1]
    assert ours(model, prompts_of(1)[1], 4, 0.2)[1][: len(lengths)] == lengths


def test_the_folder_decides_the_drafter_and_the_arguments_the_head(tmp_path):
    write_published(tmp_path)
    args = Namespace(drafter="layer", drafter_layers=3, adapter_window=2, head="full", draft_vocab=range(50))
    model = KangarooModel(tiny_model(), tmp_path, args, EXIT_LAYER)
    adapter = model.adapter_model
    assert (adapter.kind, adapter.window, len(adapter.layers)) == ("adapter", None, 1)
    assert model.exit_proj.weight.shape == (50, 32) and model.exit_proj.weight.requires_grad
    frozen = KangarooModel(tiny_model(), tmp_path, None, EXIT_LAYER)
    assert frozen.exit_proj.weight.data_ptr() == frozen.head_model.weight.data_ptr()
    assert frozen.head == "frozen" and frozen.draft_ids is None


def test_safetensors_and_our_own_layout_give_the_same_adapter(tmp_path):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    own.mkdir()
    state = write_published(theirs)
    model = KangarooModel(tiny_model(), theirs, None, EXIT_LAYER)
    save_file(state, theirs / "model.safetensors")
    (theirs / "pytorch_model.bin").unlink()
    again = KangarooModel(tiny_model(), theirs, None, EXIT_LAYER)
    save_file(model.drafter_state(), own / "drafter.safetensors")
    again.adapter_model.norm.weight.data.zero_()
    again.load_drafter(own)
    for name, value in again.adapter_model.state_dict().items():
        assert torch.equal(value, model.adapter_model.state_dict()[name]) and torch.equal(value, state[name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            "neither drafter.safetensors nor a published adapter's config.json",
        ),
        (lambda f: (f / "pytorch_model.bin").unlink(), "expected model.safetensors or pytorch_model.bin"),
        (lambda f: (f / "config.json").write_text("{"), "not the config of a Kangaroo adapter"),
        (lambda f: (f / "config.json").write_text("[]"), "not the config of a Kangaroo adapter"),
        (lambda f: configure(f, hidden_size="gone"), "hidden_size is missing"),
        (lambda f: configure(f, hidden_size=64), "its hidden_size is 64, the base model's 32"),
        (lambda f: configure(f, num_attention_heads=0), "not the config of a Kangaroo adapter"),
        (lambda f: configure(f, num_key_value_heads=3), "8 query and 3 key/value heads do not split"),
        (lambda f: configure(f, num_attention_heads=32), "32 query and 4 key/value heads do not split"),
        (lambda f: configure(f, num_key_value_heads=2), r"k_proj.weight is \[16, 32\], expected \[8, 32\]"),
        (lambda f: configure(f, num_hidden_layers=2), "tensor layers.1.input_layernorm.weight is missing"),
        (
            lambda f: configure(f, rope_scaling={"type": "longrope", "factor": 2.0}),
            "rope_scaling has the type 'longrope'",
        ),
        (lambda f: alter(f, norm__weight=None), "tensor norm.weight is missing"),
        (lambda f: alter(f, layers__0__mlp__up_proj__weight=torch.ones(2)), "mlp.up_proj.weight is foreign"),
        (lambda f: alter(f, norm__weight=torch.ones(31)), r"norm.weight is \[31\], expected \[32\]"),
        (
            lambda f: alter(f, norm__weight=torch.ones(32).long()),
            "more than a plain dict of finite tensors in 16 or 32 bits",
        ),
        (lambda f: alter(f, norm__weight=torch.full((32,), torch.nan)), "a plain dict of finite tensors"),
        (lambda f: alter(f, norm__weight=torch.ones(32).to(torch.float8_e4m3fn)), "tensors in 16 or 32 bits"),
        (lambda f: configure(f, sliding_window=4), "sliding_window is 4, which is not computed here"),
        (lambda f: configure(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (lambda f: configure(f, rope_scaling={"type": "linear"}), "of the type 'linear' has no factor"),
        (
            lambda f: alter(f, norm__weight="ones"),
            "more than a plain dict of finite tensors in 16 or 32 bits",
        ),
        (lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), "more than a plain dict"),
        (lambda f: torch.save({0: torch.ones(2)}, f / "pytorch_model.bin"), "more than a plain dict"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "unreadable"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"PK nothing of the kind"), "unreadable"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "unreadable"),
    ],
)
def test_a_folder_that_does_not_fit_is_said(tmp_path, spoil, message):
    write_published(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        KangarooModel(tiny_model(), tmp_path, None, EXIT_LAYER)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize(
    "write", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data, protocol=2))]
)
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, write):
    proof = tmp_path / "was-run"
    pickle.loads(pickle.dumps(Malicious(proof)))
    proof.rmdir()  # it does what it says, where it is let
    state = write_published(tmp_path / "adapter")
    write({**state, "norm.weight": Malicious(proof)}, tmp_path / "adapter/pytorch_model.bin")
    with pytest.raises(ValueError, match="more than a plain dict of finite tensors in 16 or 32 bits"):
        KangarooModel(tiny_model(), tmp_path / "adapter", None, EXIT_LAYER)
    assert not proof.exists()
