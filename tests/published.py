"""Tiny model folders in the layouts in which Llamas are published, with random weights and tokenizers of their own.

It needs numpy, safetensors and tokenizers of any version, so that `record_published.py` can build the same folders in an
environment of the newest transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48}
IDS = [(7 * step) % 200 + 40 for step in range(48)]
"""Token ids whose logits are recorded; three times the context of training of the models with scaled positions."""
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}
CONFIGS: dict[str, dict] = {
    "plain": {},
    "no-groups": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 500000.0},
    "theta-of-5": {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16"},
    "old-scaling-null": {"rope_scaling": None, "rope_theta": 1e6},
    "linear-int": {"rope_scaling": {"type": "linear", "factor": 4}},
    "linear-both": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.5}},
    "linear-of-5": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "dynamic-of-5": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, "max_position_embeddings": 16},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    "llama3-of-5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "factor": 32}},
    "yarn": {"rope_scaling": YARN},
    "yarn-finetuned": {"rope_scaling": {**YARN, "finetuned": True, "beta_fast": 16, "beta_slow": 2}},
    "yarn-attention": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn-mscale": {"rope_scaling": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4, "truncate": False}},
    "head-dim": {"head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "eps": {"rms_norm_eps": 0.01, "pretraining_tp": 2},
    "pad-outside": {"pad_token_id": -1, "is_llama_config": True, "rope_interleaved": False},
}  # fmt: skip
"""What sets a model's `config.json` apart."""

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_MERGES = [
    "h e",
    "Ġ t",
    "Ġt he",
    "l l",
    "o Ġ",
    "1 2",
    "12 3",
    "' t",
    "Ġ f",
    "o x",
    "Ġf ox",
    "Ċ Ċ",
    "a m",
    "N am",
    "Nam e",
]
PIECE_MERGES = ["▁ t", "h e", "▁t he", "l l", "▁ ▁", "▁ f", "o x", "▁f ox", "1 2", "a m", "N am", "Nam e"]
LLAMA3_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
LLAMA3_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
TEXTS = [
    "Name a fox.", " two  spaces ", "the fox  the\n\nfox\tll", "é😀漢字 ﬁ", "don't I'LL 123456", "a▁b ▁", "", "  ",
    "thellfox", " the", "thell fox123", "a [SEP] b[SEP]c  [SEP]", "Name </s> a <s>  Named", "fox<|im_sep|> \n a",
]  # fmt: skip
"""Texts whose ids are recorded."""
TURNS = [" Name a fox. ", "Rex\n", "the fox 漢字?"]
"""The conversation whose ids are recorded."""


def with_tokens(definition: dict, texts: list[str], special: bool = True, **flags) -> dict:
    """The tokenizer with more tokens."""
    first = (
        max(token["id"] for token in definition["added_tokens"] + _added(definition["model"]["vocab"])) + 1
    )
    tokens = _added({text: first + index for index, text in enumerate(texts)}, special)
    definition["added_tokens"] += [{**token, **flags} for token in tokens]
    return definition


def unlike_llama(definition: dict) -> dict:
    """The tokenizer with parts that a Llama's does not have."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = {**definition["model"], "byte_fallback": False, "fuse_unk": False, "ignore_merges": True}
    return {**definition, "model": model, "normalizer": spaces, "decoder": None}


def _added(tokens: dict[str, int], special: bool = True) -> list[dict]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return [{"id": index, "content": text, **flags} for text, index in tokens.items()]


def _begins_with(token: str, index: int) -> dict:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _model(vocab: list[str], merges: list, **flags) -> dict:
    named = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    named |= {"fuse_unk": False, "byte_fallback": False, **flags}
    return {
        "type": "BPE",
        **named,
        "vocab": {token: index for index, token in enumerate(vocab)},
        "merges": merges,
    }


def byte_tokenizer(pairs: bool = False, ignore_merges: bool = False) -> dict:
    """A byte-level BPE like Llama-3's. "fox123" and "llfox" are words of it that no merges make."""
    vocab = [*BYTES, *("".join(merge.split(" ")) for merge in BYTE_MERGES), "thell", "123456"]
    merges = [merge.split(" ") if pairs else merge for merge in BYTE_MERGES]
    added = {token: len(vocab) + index for index, token in enumerate(LLAMA3_TOKENS)}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(added), "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": _begins_with(LLAMA3_TOKENS[0], added[LLAMA3_TOKENS[0]]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(vocab, merges, ignore_merges=ignore_merges),
    }  # fmt: skip


def piece_tokenizer(metaspace: dict | None = None, post: bool = True, **flags) -> dict:
    """A BPE over sentencepiece's pieces like Llama-2's, its spaces by a normalizer or by newer Metaspace."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted(set("etahonidsrlcumfpgwybvk.,'?!TINRa12fx") - set(pieces))
    vocab = [*pieces, *letters, *("".join(merge.split(" ")) for merge in PIECE_MERGES)]
    vocab = list(dict.fromkeys(vocab))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": _added({"<unk>": 0, "<s>": 1, "</s>": 2}),
        "normalizer": None if metaspace else prepend, "pre_tokenizer": metaspace,
        "post_processor": _begins_with("<s>", 1) if post else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": _model(vocab, PIECE_MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **flags),
    }  # fmt: skip


def with_holes(definition: dict) -> dict:
    """The tokenizer with ids that no token has."""
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = {**vocab, "zz": max(vocab.values()) + 9}
    return definition


def without_bytes(definition: dict) -> dict:
    """The tokenizer of pieces that cannot spell every text."""
    vocab = definition["model"]["vocab"]
    words = [text for text in vocab if not text.startswith("<0x")]
    definition["model"]["vocab"] = {text: index for index, text in enumerate(words)}
    return definition


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
FAST = {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"}
META = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
TINYLLAMA_CHAT = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% else %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA3_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM_CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nBe kind.</s>\n' }}{% endif %}{{ '<s>' + message.role + '\n' + message.content + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
NEWER_CHAT = (
    "{%- for message in messages -%}\n    {%- if message.role == 'tool' %}{% continue %}{% endif -%}\n"
    "    {{- '<s>' + message.role + ':' -}}\n    {%- if message.role == 'assistant' -%}\n"
    "    {% generation %}{{ message.content + '</s>' }}{% endgeneration %}\n    {%- else -%}\n"
    "    {{- message.content | tojson -}}\n    {%- endif -%}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<s>assistant:' -}}{%- endif -%}"
)
SEPARATORS = ["<|im_start|>", "<|im_sep|>", "<|im_end|>"]
SEPARATED_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>\n{% endif %}"
)
NAMED_CHAT = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TINYLLAMA_CHAT}]
MAPPED = "a-class-that-only-config-names"
TOKENIZERS: dict[str, tuple[dict, dict]] = {
    "llama3": (byte_tokenizer(), {**META, "chat_template": LLAMA3_CHAT}),
    "llama3-pairs": (byte_tokenizer(pairs=True), META),
    "llama3-whole-words": (byte_tokenizer(pairs=True, ignore_merges=True), {**META, "chat_template": LLAMA3_CHAT}),
    "llama2": (piece_tokenizer(), {**LLAMA, "chat_template": TINYLLAMA_CHAT}),
    "llama2-legacy": (piece_tokenizer(), {**LLAMA, "legacy": True, "chat_template": LLAMA2_CHAT}),
    "llama2-no-prefix": (piece_tokenizer(), {**LLAMA, "add_prefix_space": False}),
    "llama2-no-bos": (piece_tokenizer(post=False), {**LLAMA, "chat_template": DEFAULT_SYSTEM_CHAT}),
    "llama2-fast": (piece_tokenizer(), {**FAST, "chat_template": NAMED_CHAT, "add_bos_token": False}),
    "metaspace-first": (piece_tokenizer(METASPACE), {**FAST, "chat_template": NEWER_CHAT}),
    "metaspace-always": (piece_tokenizer({**METASPACE, "prepend_scheme": "always"}), {**FAST, "chat_template": NEWER_CHAT}),
    "metaspace-never": (piece_tokenizer({**METASPACE, "prepend_scheme": "never"}), FAST),
    "metaspace-split": (piece_tokenizer({**METASPACE, "split": True}), FAST),
    "codellama": (piece_tokenizer(), {**LLAMA, "tokenizer_class": "CodeLlamaTokenizer", "chat_template": LLAMA2_CHAT}),
    "codellama-legacy": (piece_tokenizer(), {**LLAMA, "tokenizer_class": "CodeLlamaTokenizer", "legacy": True}),
    "llama-fast-of-bytes": (byte_tokenizer(), {**META, "tokenizer_class": "LlamaTokenizerFast", "chat_template": LLAMA3_CHAT}),
    "no-class": (byte_tokenizer(), {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"}),
    "backend-class": (piece_tokenizer(), {**LLAMA, "tokenizer_class": "TokenizersBackend", "chat_template": TINYLLAMA_CHAT}),
    "llama3-strips": (with_tokens(byte_tokenizer(), SEPARATORS, lstrip=True, rstrip=True), {**META, "chat_template": SEPARATED_CHAT}),
    "pieces-strip": (with_tokens(piece_tokenizer(), SEPARATORS, rstrip=True), {**FAST, "chat_template": SEPARATED_CHAT}),
    "llama3-single-word": (with_tokens(byte_tokenizer(ignore_merges=True), ["[SEP]"], single_word=True), META),
    "llama2-single-word": (with_tokens(piece_tokenizer(), ["[SEP]", "fox"], single_word=True, special=False), LLAMA),
    "named-in-the-vocabulary": (with_tokens(piece_tokenizer(), SEPARATORS), {**FAST, "eos_token": "12",
        "additional_special_tokens": ["ll", {"__type": "AddedToken", "content": "[SEP]", "lstrip": True, "normalized": False, "special": True}], "cls_token": "<|im_end|>",
        "turn_token": "1", "chat_template": "{{ cls_token }}{{ turn_token }}{{ eos_token }}" + SEPARATED_CHAT}),
    "flags-of-the-configuration": (piece_tokenizer(), {**LLAMA, "added_tokens_decoder": {
        "1": {"content": "<s>", "special": True, "lstrip": True, "rstrip": True, "normalized": False},
        "2": {"content": "</s>", "special": True, "rstrip": True, "normalized": False}}}),
    "listed-in-the-vocabulary": (piece_tokenizer(), {**FAST, "added_tokens_decoder": {
        str(piece_tokenizer()["model"]["vocab"]["Name"]): {"content": "Name", "special": False, "normalized": False}}}),
    "llama-class-builds-its-own": (unlike_llama(piece_tokenizer()), LLAMA),
    "whole-words-of-pieces": (piece_tokenizer(ignore_merges=True), FAST),
    "turn-token-of-its-own": (with_tokens(piece_tokenizer(), ["<turn>"]), {**FAST, "turn_token": "<turn>", "extra_special_tokens": {"image_token": "<img>"},
        "added_tokens_decoder": {}, "chat_template": "{% for m in messages %}{{ turn_token }}{{ m.content }}{{ image_token }}{% endfor %}"}),
    "older-map": (piece_tokenizer(), {**FAST, "chat_template": TINYLLAMA_CHAT}),
    "no-bos-token": (piece_tokenizer(), {**LLAMA, "bos_token": None, "chat_template": "{{ bos_token }}" + TINYLLAMA_CHAT}),
    "default-of-more-templates": (piece_tokenizer(), {**LLAMA, "chat_template": "nor this one"}),
    "one-of-more-templates": (piece_tokenizer(), LLAMA),
    MAPPED: (unlike_llama(piece_tokenizer()), {name: token for name, token in LLAMA.items() if name != "tokenizer_class"}),
    "words-of-the-template-itself": (with_tokens(byte_tokenizer(), ["    ", "for", "x"], special=False),
        {**META, "chat_template": "{%- for m in messages %}\n    {{- '<|eot_id|>' + m.role + '\n' + m.content }}\n{%- endfor %}"}),
    "holes": (with_holes(piece_tokenizer()), {**LLAMA, "chat_template": TINYLLAMA_CHAT}),
    "llama2-lacks-bytes": (without_bytes(piece_tokenizer()), LLAMA),
    "metaspace-decodes-otherwise": ({**piece_tokenizer({**METASPACE, "prepend_scheme": "always"}),
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}}, FAST),
    "added-token": (piece_tokenizer(), {**LLAMA, "pad_token": "[PAD]", "added_tokens_decoder": {
        str(len(piece_tokenizer()["model"]["vocab"])): {"content": "[PAD]", "special": True}}}),
}  # fmt: skip
"""`tokenizer.json` and `tokenizer_config.json` by name."""


FILES: dict[str, dict[str, dict | str]] = {
    "turn-token-of-its-own": {"special_tokens_map.json": {"pad_token": "fox"}},
    "older-map": {"special_tokens_map.json": {"eos_token": "12", "additional_special_tokens": ["ll"]}},
    MAPPED: {"config.json": {"tokenizer_class": "LlamaTokenizer"}},
    "default-of-more-templates": {
        "additional_chat_templates/default.jinja": "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
        "additional_chat_templates/tool_use.jinja": "tools",
        "chat_template.jinja": "not this one",
    },
    "one-of-more-templates": {
        "additional_chat_templates/tool_use.jinja": "tools",
        "chat_template.jinja": "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}",
    },
}
"""Further files of the model with a tokenizer; what stands under `config.json` is changed in it."""


def config_of(changes: dict, vocab_size: int = 320) -> dict:
    """A `config.json` with these changes."""
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3}
    base |= {
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
    }
    base |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "use_cache": True}
    return {**base, **HEADS, "initializer_range": 0.02, "tie_word_embeddings": False, **changes}


def weights_of(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, the same with every library."""
    rng = np.random.RandomState(seed)
    width = config["hidden_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries = head * config["num_attention_heads"]
    keys = head * (config["num_key_value_heads"] or config["num_attention_heads"])
    inner = config["intermediate_size"]
    weights = {"model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], width))}
    for layer in range(config["num_hidden_layers"]):
        shapes = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width)}
        shapes |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries)}
        shapes |= {
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        for name, shape in shapes.items():
            place = f"model.layers.{layer}.{name}"
            weights[f"{place}.weight"] = rng.standard_normal(shape) * 2 / shape[1] ** 0.5
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                weights[f"{place}.bias"] = rng.standard_normal(shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = 1 + 0.2 * rng.standard_normal(width)
    weights["model.norm.weight"] = 1 + 0.2 * rng.standard_normal(width)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = rng.standard_normal((config["vocab_size"], width))
    return {name: value.astype(np.float32) for name, value in weights.items()}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_model(folder: Path, config: str = "plain", tokenizer: str = "llama2", **changes) -> Path:
    """A model folder with a config and a tokenizer by name; `changes` go into its `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    definition, entries = TOKENIZERS[tokenizer]
    values = config_of({**CONFIGS[config], **changes})
    files = FILES.get(tokenizer, {})
    for name, content in files.items():
        if name != "config.json":
            (folder / name).parent.mkdir(exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "config.json", {**values, **files.get("config.json", {})})
    write_json(folder / "tokenizer.json", definition)
    write_json(folder / "tokenizer_config.json", entries)
    save_file(weights_of(values), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
