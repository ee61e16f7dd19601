"""A draft that is exported is a plain Llama with the draft's own logits, or is refused by name; nothing is half-written."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
import torch.nn.functional as F
from conftest import copied, tiny_kangaroo, write_published
from published import CONFIGS, TOKENIZERS, write_model
from safetensors.torch import load_file
from test_drafters import trained
from transformers import LlamaForCausalLM

from dvirl import cli
from dvirl.models import drafters, gguf_file
from dvirl.models import export as exporting
from dvirl.models.drafters import load_drafter
from dvirl.models.embedded import gguf_config, read_weights, unpermute
from dvirl.models.export import plain_context, plain_llama
from dvirl.models.gguf_file import permute
from dvirl.models.loading import load
from dvirl.models.tokenizers import TextEncoder
from dvirl.runs.errors import DvirlError
from kangaroo.adapter import rotary_for

LENGTH = 16
"""Tokens of a text: the shortest context of the models here."""
MADE = dict(exit_layer=1, adapter_window=64, draft_vocab=100, head_rank=8)


def made(tmp_path, config="plain", tokenizer="llama2", base=None, **changes):
    """A base model's folder with a drafter for it; the drafter's folder."""
    name = str(write_model(tmp_path / "base", config, tokenizer, **(base or {})))
    loaded = load(name, "float32", "cpu")
    model, peft_model, settings = trained(loaded, **{**MADE, **changes})
    drafters.export(tmp_path / "drafter", peft_model, model, settings, loaded)
    return tmp_path / "drafter"


def export(drafter, out, *flags):
    return cli.main(["export", str(drafter), str(out), *flags])


@torch.no_grad()
def drafted(model, ids):
    """The draft's logits over the whole vocabulary: its own rows, and the model's where it has none."""
    states = model.drafter_states(model.base_model.forward_shallow(ids))
    logits = F.linear(states, model.head_model.weight)
    logits[..., model.token_ids(torch.arange(model.head_rows.shape[0]))] = model.head_logits(states)
    return logits


def some_ids(model):
    return torch.randint(3, model.base_model.config.vocab_size, (2, LENGTH))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# As a Hugging Face folder


@pytest.mark.no_cover
@pytest.mark.parametrize("drafter", ["none", "adapter", "layer"])
@pytest.mark.parametrize("head", ["frozen", "full", "lora"])
@pytest.mark.parametrize("draft_vocab", [0, 100])
def test_a_plain_llama_has_the_drafts_logits(tmp_path, drafter, head, draft_vocab):
    folder = made(
        tmp_path, exit_layer=2, drafter=drafter, drafter_layers=2, head=head, draft_vocab=draft_vocab
    )
    assert export(folder, tmp_path / "out", "--dtype", "float32") == 0
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    model = load_drafter(folder, None, "float32", "cpu").model
    ids = some_ids(model)
    with torch.no_grad():
        close(theirs(ids).logits, drafted(model, ids))
    assert theirs.config.num_hidden_layers == 2 + len(model.adapter_model.layers)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_kind_of_configuration_is_kept(tmp_path, config):
    folder = made(tmp_path, config)
    assert export(folder, tmp_path / "out", "--dtype", "float32") == 0
    model = load_drafter(folder, None, "float32", "cpu").model
    ids = some_ids(model)
    with torch.no_grad():
        close(load(str(tmp_path / "out"), "float32", "cpu").model(ids).logits, drafted(model, ids))


@pytest.mark.parametrize("config", ["plain", "linear-int", "llama3"])
def test_a_shorter_context_changes_no_positions(tmp_path, config):
    folder = made(tmp_path, config, adapter_window=LENGTH)
    assert export(folder, tmp_path / "out", "--dtype", "float32", "--context", str(LENGTH)) == 0
    model = load_drafter(folder, None, "float32", "cpu").model
    ids = some_ids(model)
    with torch.no_grad():
        close(load(str(tmp_path / "out"), "float32", "cpu").model(ids).logits, drafted(model, ids))


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
def test_lora_is_merged_and_the_model_is_left_as_it_was(exit_layer):
    model = tiny_kangaroo(exit_layer=exit_layer, drafter="layer", adapter_window=None, head="lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, tensors = plain_llama(model)
    assert len(before) == len(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    ids = some_ids(model)
    with torch.no_grad():
        close(theirs(ids).logits, drafted(model, ids))


def test_the_head_is_tied_only_where_it_is_the_embedding():
    config, tensors = plain_llama(tiny_kangaroo(head="frozen", lora=False))
    assert config.tie_word_embeddings and "lm_head.weight" not in tensors
    model = tiny_kangaroo(head="full", lora=False)
    model.exit_proj.weight.data[5] += 1
    config, tensors = plain_llama(model)
    assert not config.tie_word_embeddings and "lm_head.weight" in tensors


def test_an_export_has_the_models_tokenizer_and_no_trace_of_us(tmp_path):
    folder = made(tmp_path, "tied", base={"auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "dvirl/base"})
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert export(folder, tmp_path / "out") == 0
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    base, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out"))
    changed = {name for name in {*base, *ours} if base.get(name) != ours.get(name)}
    assert changed == {"num_hidden_layers", "tie_word_embeddings", "torch_dtype", "auto_map", "_name_or_path"}
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {
        torch.bfloat16
    }
    content = (tmp_path / "out/model.safetensors").read_bytes()[:4000].decode(errors="ignore").lower()
    content += json.dumps(ours).lower()
    assert not any(word in content for word in ("dvirl", "kangaroo", "lora", "exit", "adapter"))


# As GGUF


@pytest.mark.parametrize("heads", [1, 3])
def test_the_order_of_rows_is_undone_by_reading(heads):
    weight = torch.randn(heads * 8, 5).numpy()
    assert (unpermute(permute(weight, heads), heads) == weight).all()
    assert (unpermute(permute(weight[:, 0], heads)[:, None], heads)[:, 0] == weight[:, 0]).all()


def test_a_gguf_file_holds_the_tensors_of_the_folder(tmp_path):
    folder = made(tmp_path, tokenizer="added-token")
    assert export(folder, tmp_path / "out", "--dtype", "float32") == 0
    assert export(folder, tmp_path / "out.gguf", "--to", "gguf", "--dtype", "float32") == 0
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = gguf_config(fields, tied=False)
    expected = load_file(tmp_path / "out/model.safetensors")
    found = read_weights(reader, config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    theirs = json.loads((tmp_path / "out/config.json").read_text())
    for name in (
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "num_key_value_heads",
        "bos_token_id",
    ):
        assert getattr(config, name) == pytest.approx(theirs[name], rel=1e-6)


@pytest.mark.parametrize("config", ["biases", "head-dim", "tied", "llama3", "linear-int", "dynamic", "theta"])
def test_what_a_gguf_llama_may_have_is_written(tmp_path, config):
    base = load(str(write_model(tmp_path / "base", config)), "float32", "cpu")
    shape = base.model.config
    tied = shape.tie_word_embeddings
    state = {
        name: value for name, value in base.model.state_dict().items() if not (tied and "lm_head" in name)
    }
    gguf_file.write_gguf(tmp_path / "x.gguf", shape, state, base.tokenizer, "float32")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.num_hidden_layers)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for name, value in state.items():
        stored = found.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        count = heads.get(name.split(".")[-2])
        if count:
            rows = unpermute(stored.numpy().reshape(len(stored), -1), count)
            stored = torch.from_numpy(rows.copy()).reshape(value.shape)
        assert torch.equal(stored, value), name
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (
        fields["llama.rope.dimension_count"] == fields["llama.attention.key_length"] == base.model.rotary.dim
    )
    # The angles that an engine computes are those of our table.
    angles = rotary_for(shape).frequencies(fields["llama.rope.freq_base"])
    angles = angles / found.pop("rope_freqs.weight", torch.ones(()))
    if fields.get("llama.rope.scaling.type") == "linear":
        angles = angles / fields["llama.rope.scaling.factor"]
    cos, _ = base.model.rotary.table(LENGTH, torch.device("cpu"))
    close(torch.cos(3 * angles), cos[3, : len(angles)])
    assert not found


@pytest.mark.no_cover
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_gguf_file_has_the_models_tokens_and_ends(tmp_path, tokenizer):
    base = load(str(write_model(tmp_path / "base", "plain", tokenizer)), "float32", "cpu")
    config = base.model.config
    gguf_file.write_gguf(tmp_path / "x.gguf", config, base.model.state_dict(), base.tokenizer, "bfloat16")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items()}
    known = {index: text for text, index in base.tokenizer.get_vocab().items()}
    expected = [known.get(index, f"[PAD{index}]") for index in range(config.vocab_size)]
    assert fields["tokenizer.ggml.tokens"] == expected
    for role in ("bos", "eos"):
        token = getattr(base.tokenizer, f"{role}_token_id")
        if token is None:
            assert f"tokenizer.ggml.{role}_token_id" not in fields
            continue
        assert fields[f"tokenizer.ggml.{role}_token_id"] == token
        assert fields["tokenizer.ggml.token_type"][token] == gguf.TokenType.CONTROL
    before, after = TextEncoder(base.tokenizer).frame
    assert fields["tokenizer.ggml.add_bos_token"] == bool(before)
    assert fields["tokenizer.ggml.add_eos_token"] == bool(after)
    pieces = "▁" in known.values()
    assert fields["tokenizer.ggml.model"] == ("llama" if pieces else "gpt2")
    assert fields.get("tokenizer.ggml.pre") == (None if pieces else "llama-bpe")
    template = base.tokenizer.init_kwargs.get("chat_template")
    assert fields.get("tokenizer.chat_template") == template


def test_a_gguf_file_names_no_token_that_the_model_does_not_embed(tmp_path):
    known = len(TOKENIZERS["llama3-pairs"][0]["model"]["vocab"]) + 1
    base = load(
        str(write_model(tmp_path / "m", tokenizer="llama3-pairs", vocab_size=known)), "float32", "cpu"
    )
    assert base.tokenizer.eos_token_id >= known
    config = base.model.config
    gguf_file.write_gguf(tmp_path / "x.gguf", config, base.model.state_dict(), base.tokenizer, "float32")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert "tokenizer.ggml.bos_token_id" in fields and "tokenizer.ggml.eos_token_id" not in fields


@pytest.mark.parametrize(
    ("tokenizer", "prefixed"), [("llama2", True), ("metaspace-never", False), ("llama3", False)]
)
def test_a_gguf_file_says_whether_a_space_is_put_before_a_text(tmp_path, tokenizer, prefixed):
    base = load(str(write_model(tmp_path / "m", tokenizer=tokenizer)), "float32", "cpu")
    config = base.model.config
    gguf_file.write_gguf(tmp_path / "x.gguf", config, base.model.state_dict(), base.tokenizer, "float32")
    field = gguf.GGUFReader(tmp_path / "x.gguf").fields["tokenizer.ggml.add_space_prefix"]
    assert field.contents() == prefixed


@pytest.mark.parametrize("dtype", gguf_file.TYPES)
def test_matrices_have_the_type_asked_for_and_vectors_are_float32(tmp_path, dtype):
    folder = made(tmp_path, base={"intermediate_size": 64})
    assert export(folder, tmp_path / "x.gguf", "--to", "gguf", "--dtype", dtype) == 0
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        assert tensor.tensor_type.name == (gguf_file.TYPES[dtype] if len(tensor.shape) > 1 else "F32")


# What is refused


def refused(capsys, tmp_path, drafter, *flags):
    """The one sentence of a refusal, which leaves no file."""
    there = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert export(drafter, tmp_path / "deep/out", *flags) == 2
    assert sorted(tmp_path.rglob("*")) == there
    lines = [line for line in capsys.readouterr().err.splitlines() if "chat format" not in line]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


def test_drafters_that_no_engine_takes_are_refused_by_name(tmp_path, capsys):
    narrow = made(tmp_path, adapter_window=10)
    line = refused(capsys, tmp_path, narrow)
    assert "sees 10 positions" in line and "--context 10," in line and "--adapter_window 64" in line
    assert export(narrow, tmp_path / "out", "--context", "10") == 0
    assert "a model of 10 positions" in capsys.readouterr().err
    feedback = made(tmp_path / "f", feedback=True)
    assert "without --feedback" in refused(capsys, tmp_path, feedback)
    write_published(tmp_path / "p")
    flags = ("--model_name", str(tmp_path / "base"), "--exit_layer", "1")
    assert "num_attention_heads is 8" in refused(capsys, tmp_path, tmp_path / "p", *flags)


def test_a_published_adapter_of_the_models_shape_is_taken(tmp_path):
    name = str(write_model(tmp_path / "base"))
    write_published(tmp_path / "p", heads=4, groups=2, rms_norm_eps=1e-5, rope_theta=10000.0)
    flags = ("--model_name", name, "--exit_layer", "1")
    assert export(tmp_path / "p", tmp_path / "out", *flags, "--dtype", "float32") == 0
    model = load_drafter(tmp_path / "p", None, "float32", "cpu", name, 1).model
    ids = some_ids(model)
    with torch.no_grad():
        close(load(str(tmp_path / "out"), "float32", "cpu").model(ids).logits, drafted(model, ids))


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        ("yarn", ("--to", "gguf"), "scaled by yarn"),
        ("gelu", ("--to", "gguf"), "hidden_act is 'gelu'"),
        ("plain", ("--dtype", "q8_0"), "dtype is 'q8_0'"),
        ("plain", ("--context", "65"), "context is 65"),
        ("dynamic", ("--context", "8"), "dynamic positions"),
        ("yarn", ("--context", "20"), "yarn positions"),
        ("plain", ("--to", "onnx"), "to is 'onnx'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, capsys, config, flags, says):
    assert says in refused(capsys, tmp_path, made(tmp_path, config), *flags)


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path, capsys):
    folder = made(tmp_path, "head-dim")
    assert "no whole blocks" in refused(capsys, tmp_path, folder, "--to", "gguf", "--dtype", "q8_0")


def test_what_is_there_is_never_overwritten(tmp_path, capsys):
    folder = made(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/out").write_text("mine")
    assert "exists already" in refused(capsys, tmp_path, folder)
    assert (tmp_path / "deep/out").read_text() == "mine"


def test_a_drafter_that_is_not_there_is_named(tmp_path, capsys):
    assert "no drafter" in refused(capsys, tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, monkeypatch, to):
    folder = made(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    (tmp_path / "deep").mkdir()
    assert "No space left" in refused(capsys, tmp_path, folder, "--to", to)


@pytest.mark.parametrize(("window", "context"), [(None, 8192), (4096, 4096), (8192, 8192)])
def test_a_wide_window_is_the_context_of_an_export(window, context):
    model = tiny_kangaroo(drafter="layer", adapter_window=window)
    model.base_model.config.max_position_embeddings = 8192
    assert plain_context(model) == context
    model.adapter_model.window = 1023
    with pytest.raises(DvirlError, match="--context 1023"):
        plain_context(model)
    assert plain_context(tiny_kangaroo(drafter="none", adapter_window=3)) == 256


@pytest.mark.real
def test_the_shipped_drafter_is_a_small_llama(real):
    model = load_drafter("smollm2-135m-k2", copied(real)).model
    config, tensors = plain_llama(model)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (4, 4096)
    changed = (tensors["lm_head.weight"] != model.head_model.weight).any(dim=1)
    assert set(changed.nonzero()[:, 0].tolist()) <= set(model.draft_ids.tolist())
    assert 16000 < changed.sum() <= 16384
