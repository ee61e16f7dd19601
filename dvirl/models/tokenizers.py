"""Tokenizers by their files: newer ones are rewritten for the pinned library, sentencepiece models converted.

What a text's ids should be is what the newest transformers says. Where the pinned library cannot keep the meaning, the
model is refused by the name of what it cannot do.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from dvirl.models.hf_config import read_json
from dvirl.models.weights import FindFile
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import JsonObject

TokenIds = list[int]
"""The ids of a text's tokens."""
SPACE = "\u2581"
"""Stands for a space in sentencepiece's pieces."""
DOUBLED = {"type": "Replace", "pattern": {"Regex": f"^{SPACE}(?=[ {SPACE}])"}, "content": ""}
"""Takes a prepended space away where the text begins with one, as newer Metaspace does not put it there."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of chat templates by their names, as the newest transformers writes them."""
LLAMA_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""What the newest Llama tokenizers are given if their files do not say it."""
MOST_HOLES = 1000
"""Ids without a token that a small vocabulary may have; a large one may have as many as it has tokens."""
KNOWN = {
    "BPE": {
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "vocab",
        "merges",
    },
    "Metaspace": {"replacement", "add_prefix_space", "str_rep"},
    "ByteLevel": {"add_prefix_space", "trim_offsets", "use_regex"},
    "Split": {"pattern", "behavior", "invert"},
    "Digits": {"individual_digits"},
    "Unigram": {"unk_id", "vocab"},
}
"""Fields that the pinned library computes with; other components have not changed since."""


class TextEncoder:
    """Encodes plain text by a tokenizer's model, and finds the tokens that were added to it.

    Args:
        tokenizer: a fast Hugging Face tokenizer; `prepend_scheme` and `ignore_merges` in its `init_kwargs` mean what
            newer tokenizers mean by them.

    Attributes:
        added: ids of the added tokens by their text.
        special: texts of those of them that are control tokens.
        special_ids: their ids, without that of the unknown token.
        frame: ids that the tokenizer puts before and after a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        self._tokens = {token["content"]: token for token in definition["added_tokens"]}
        self.added = {text: token["id"] for text, token in self._tokens.items()}
        self.special = {text for text, token in self._tokens.items() if token["special"]}
        self.special_ids = {self.added[text] for text in self.special} - {tokenizer.unk_token_id}
        self._first_only = tokenizer.init_kwargs.get("prepend_scheme") == "first"
        # Words that are one token each, whatever the merges would make of them.
        whole_words = tokenizer.init_kwargs.get("ignore_merges")
        self._words: Mapping[str, int] = definition["model"]["vocab"] if whole_words else {}
        bare: JsonObject = {
            **definition,
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._begin = Tokenizer.from_str(json.dumps(bare))
        self._continue = Tokenizer.from_str(json.dumps({**bare, **_without_prefix(definition)}))
        framed = tokenizer.backend_tokenizer.encode("a")
        mask = framed.special_tokens_mask  # 0 where the text's own tokens stand
        before = [*mask, 0].index(0)
        self.frame: tuple[TokenIds, TokenIds] = (framed.ids[:before], framed.ids[before + mask.count(0) :])

    def encode(self, text: str, tokens: Collection[str], begins: bool | None = None) -> TokenIds:
        """Ids of a text without what the tokenizer puts before and after it.

        Args:
            text: the text.
            tokens: added tokens that count as such where the text spells them.
            begins: True if nothing stands before it, False if other text does, None if an added token does.
        """
        ids: TokenIds = []
        for piece in self.split(text, tokens):
            if piece in tokens:
                ids.append(self.added[piece])
            else:
                prefixed = not self._first_only if begins is None else begins
                ids += self._encode_bare(self._begin if prefixed else self._continue, piece)
            begins = None  # a piece after the first follows a token
        return ids

    def split(self, text: str, tokens: Collection[str]) -> list[str]:
        """A text cut before and after the tokens, white space around them going to those that take it."""
        parts = []
        for token in sorted(tokens, key=len, reverse=True):
            flags = self._tokens[token]
            before = r"\s*" if flags["lstrip"] else ""
            after = r"\s*" if flags["rstrip"] else ""
            spelled = re.escape(token)
            if flags["single_word"]:
                spelled = rf"(?<!\w){spelled}(?!\w)"
            parts.append(f"{before}({spelled}){after}")
        pieces = re.split("|".join(parts), text) if parts else [text]
        return [piece for piece in pieces if piece]

    def _encode_bare(self, tokenizer: Tokenizer, text: str) -> TokenIds:
        if not self._words:
            return list(tokenizer.encode(text).ids)
        if tokenizer.normalizer is not None:  # a sequence of them counts as false
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        ids: TokenIds = []
        for word in words:
            if word in self._words:
                ids.append(self._words[word])
            else:
                ids += [token.id for token in tokenizer.model.tokenize(word)]
        return ids


def _without_prefix(definition: JsonObject) -> JsonObject:
    """The normalizer and pre-tokenizer of a tokenizer without the space that they put before a text."""
    kept = [step for step in _steps(definition) if step.get("type") != "Prepend" and step != DOUBLED]
    changed: JsonObject = {"normalizer": {"type": "Sequence", "normalizers": kept}}
    pre_tokenizer = definition["pre_tokenizer"] or {}
    if pre_tokenizer.get("type") == "Metaspace":
        changed["pre_tokenizer"] = {**pre_tokenizer, "add_prefix_space": False}
    return changed


def _steps(definition: JsonObject) -> list[JsonObject]:
    """The steps of a tokenizer's normalizer."""
    normalizer = definition.get("normalizer") or {"normalizers": []}
    return list(normalizer.get("normalizers", [normalizer]))


class SegmentedTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]  # transformers is untyped here
    """A tokenizer whose encoding the pinned library cannot do alone; ids come from `TextEncoder`."""

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self)

    def _batch_encode_plus(
        self, batch_text_or_text_pairs: list[str], add_special_tokens: bool = True, **how: Any
    ) -> BatchEncoding:
        encoder = self._encoder
        before, after = encoder.frame if add_special_tokens else ([], [])
        rows = []
        for text in batch_text_or_text_pairs:
            row = [*before, *encoder.encode(text, encoder.added, begins=True), *after]
            if how["truncation_strategy"].value != "do_not_truncate":
                row = row[: how["max_length"]]
            rows.append(row)
        return self.pad(
            {"input_ids": rows},
            padding=how["padding_strategy"].value,
            max_length=how["max_length"],
            pad_to_multiple_of=how["pad_to_multiple_of"],
            return_attention_mask=how["return_attention_mask"],
            return_tensors=how["return_tensors"],
        )


def load_tokenizer(find: FindFile, templated: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer.json`, else of `tokenizer.model`; no class that the files name is run.

    Args:
        find: the path of one of the model's files by its name, None if the model does not have it.
        templated: whether its own chat template may be needed.

    Raises:
        DvirlError: if there is none, or one that the pinned library cannot compute.
    """
    entries = read_json(find("tokenizer_config.json"))
    if entries.get("split_special_tokens"):
        raise DvirlError("tokenizer_config.json: split_special_tokens is true, which is not supported")
    file = find("tokenizer.json") or find("tokenizer.model")
    if not file:
        raise DvirlError("no tokenizer.json and no tokenizer.model; expected one of them")
    definition: JsonObject = read_json(file) if file.endswith(".json") else {}
    if not entries.get("tokenizer_class"):
        entries["tokenizer_class"] = read_json(find("config.json")).get("tokenizer_class")
    named = _named_tokens(entries, find, LLAMA_ROLES if _is_llama(definition, entries) else {})
    if definition:
        how = rewrite(definition, entries)
    else:
        definition = from_sentencepiece(file, entries, named)
        how = {"prepend_scheme": "always" if entries.get("legacy") else "first"}
    more = {} if "added_tokens_decoder" in entries else read_json(find("added_tokens.json"))
    listed = _add_tokens(definition, entries, more, named)
    backend = _backend(file, definition, listed)
    texts = {role: token["content"] for role, token in named.items()}
    # The pinned library overlooks added tokens that its model has as well, unless they are special.
    plain = [token["content"] for token in definition["added_tokens"] if not token["special"]]
    overlooked = not _vocabulary(definition).keys().isdisjoint(plain)
    segmented = overlooked or how["prepend_scheme"] == "first" or how.get("ignore_merges")
    kind = SegmentedTokenizer if segmented else PreTrainedTokenizerFast
    return kind(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=chat_template(find, entries, templated),
        named_tokens=texts,
        **how,
        **{role: text for role, text in texts.items() if role in ROLES},
    )


def _backend(file: str, definition: JsonObject, listed: Mapping[str, int]) -> Tokenizer:
    """The tokenizer of a definition, whose tokens have the ids that the files list.

    Raises:
        DvirlError: for one that the pinned library cannot read, or another id.
    """
    try:
        backend = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare exceptions
        raise DvirlError(f"{file}: not a tokenizer that can be read here ({error!s:.200})") from error
    for text, token in listed.items():
        found = backend.token_to_id(text)
        if found != token:
            raise DvirlError(f"the added token {text!r} is listed as {token}, but is {found}")
    return backend


def _named_tokens(entries: JsonObject, find: FindFile, defaults: Mapping[str, str]) -> dict[str, JsonObject]:
    """The control tokens that the files name, each with the flags that stand beside it.

    Names of their own end with `_token`, too. The older file counts only where the newer one lists no added tokens, and
    then more than it.

    Returns:
        By role or name; those that are only listed, by their text.
    """
    older = {} if "added_tokens_decoder" in entries else read_json(find("special_tokens_map.json"))
    both = {**defaults, **entries, **older}
    own = [name for name, token in both.items() if name.endswith("_token") and isinstance(token, str)]
    named: JsonObject = {role: both.get(role) for role in (*ROLES, *own)}
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = both.get(field) or {}
        if not isinstance(more, dict):
            more = {str(token.get("content") if isinstance(token, dict) else token): token for token in more}
        named |= more
    tokens = {}
    for role, entry in named.items():
        token = entry if isinstance(entry, dict) else {"content": entry}
        if isinstance(token.get("content"), str) and token["content"]:
            tokens[role] = token
    return tokens


def chat_template(find: FindFile, entries: JsonObject, needed: bool) -> str | None:
    """The chat template: that of a file of its own, else of `tokenizer_config.json`, of several the default.

    Raises:
        DvirlError: for several templates without a default, if one is needed.
    """
    file = find(f"{MORE_TEMPLATES}/default.jinja") or find("chat_template.jinja")
    if file:
        return Path(file).read_text(encoding="utf-8-sig")
    others = [name for name in ("tool_use", "rag") if find(f"{MORE_TEMPLATES}/{name}.jinja")]
    if others and needed:
        raise DvirlError(f"{MORE_TEMPLATES} has {', '.join(others)}; expected one with the name default")
    template = entries.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template and needed:
            raise DvirlError(
                f"tokenizer_config.json: chat_template has {', '.join(template)}; "
                "expected one with the name default"
            )
        template = template.get("default")
    if not isinstance(template, str | None):
        raise DvirlError(f"tokenizer_config.json: chat_template is {template!r:.60}; expected a text")
    return template


def rewrite(definition: JsonObject, entries: JsonObject) -> JsonObject:
    """Change the content of a `tokenizer.json` into what the pinned library reads, its meaning kept.

    Args:
        definition: the content, changed in place.
        entries: of `tokenizer_config.json`.

    Returns:
        What is left for `TextEncoder` to do: `prepend_scheme`, `ignore_merges`.

    Raises:
        DvirlError: for what cannot be kept.
    """
    definition["truncation"] = None
    definition["padding"] = None
    definition.setdefault("added_tokens", [])
    model = definition["model"]
    if "merges" in model:  # old files do not name the kind of model
        model.setdefault("type", "BPE")
    if _is_llama(definition, entries):
        _build_llama(definition, entries)
    ignore_merges = model.pop("ignore_merges", False)
    if model.get("type") == "BPE":
        model["merges"] = [_merge(merge) for merge in model["merges"]]
        _fill_holes(model["vocab"])
    scheme = _spaces(definition)
    _refuse_newer(definition)
    return {"prepend_scheme": scheme, "ignore_merges": ignore_merges}


def _fill_holes(vocabulary: dict[str, int]) -> None:
    """Give every id a text: the pinned library writes a line to the standard output for each that has none.

    Raises:
        DvirlError: for ids far beyond the number of tokens.
    """
    highest = max(vocabulary.values(), default=-1)
    if highest > MOST_HOLES + 2 * len(vocabulary):
        raise DvirlError(f"tokenizer.json: {len(vocabulary)} tokens have ids up to {highest}")
    for index in {*range(highest)} - {*vocabulary.values()}:
        vocabulary[f"<no token {index}>"] = index


def _is_llama(definition: JsonObject, entries: JsonObject) -> bool:
    """Whether the newest transformers builds a Llama tokenizer of its own from the vocabulary and the merges."""
    named = str(entries.get("tokenizer_class")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
    parts = json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")])
    return named and "merges" in definition.get("model", {}) and '"ByteLevel"' not in parts


def _build_llama(definition: JsonObject, entries: JsonObject) -> None:
    """Make a tokenizer what the newest transformers builds, which looks at none of the parts replaced here."""
    absent = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    definition["model"] |= {"byte_fallback": True, "fuse_unk": True} | dict.fromkeys(absent)
    of_code = str(entries["tokenizer_class"]).startswith("Code")
    if not of_code:
        definition["model"]["unk_token"] = None
    prefixed = entries.get("add_prefix_space") is not False
    scheme = "always" if entries.get("legacy") and not of_code else "first"
    definition["normalizer"] = None
    definition["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": scheme if prefixed else "never",
        "split": False,
    }
    definition["decoder"] = _decoder(prefixed or of_code)


def _decoder(prefixed: bool) -> JsonObject:
    """How a Llama tokenizer makes text of its pieces; a space that was put before the text is taken away."""
    spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    steps = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {"type": "Sequence", "decoders": steps}


def _merge(merge: Any) -> str:
    """A merge as one text, "left right"."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or " " in "".join(parts):
        raise DvirlError(f"tokenizer.json: the merge {merge!r:.60} has spaces in it, which is not supported")
    return " ".join(parts)


def _spaces(definition: JsonObject) -> str | None:
    """Rewrite how spaces become part of tokens.

    Returns:
        When a space is put before a text (first, always, never); None if the pinned library does what is meant.
    """
    metaspace = definition.get("pre_tokenizer") or {}
    scheme: str = metaspace.get("prepend_scheme", "")
    if metaspace.get("type") != "Metaspace" or not scheme:
        return None
    older: JsonObject = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": scheme != "never"}
    decoder = definition.get("decoder") or {}
    if decoder.get("type") == "Metaspace":
        prefixed = decoder.get("prepend_scheme", "always") != "never"
        definition["decoder"] = {**older, "add_prefix_space": prefixed}
    if metaspace.get("split", True):
        definition["pre_tokenizer"] = older
        return scheme
    prefix = [] if scheme == "never" else [{"type": "Prepend", "prepend": SPACE}, DOUBLED]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    definition["normalizer"] = {"type": "Sequence", "normalizers": [*_steps(definition), *prefix, spaces]}
    definition["pre_tokenizer"] = None
    return scheme


def _refuse_newer(part: Any) -> None:
    """Refuse fields that the pinned library would leave out in silence.

    Raises:
        DvirlError: with the field's name.
    """
    if isinstance(part, list):
        for member in part:
            _refuse_newer(member)
    elif isinstance(part, dict):
        kind = part.get("type")
        for name, value in part.items():
            unknown = kind in KNOWN and name not in ("type", *KNOWN[kind])
            if unknown and value not in (None, False):
                raise DvirlError(f"tokenizer.json: {kind} has {name} = {value!r:.40}, which is not supported")
            if name not in ("vocab", "merges", "added_tokens"):
                _refuse_newer(value)


def _vocabulary(definition: JsonObject) -> dict[str, int]:
    """Ids of the model's tokens, without added ones, by their texts."""
    vocabulary: dict[str, int] | list[tuple[str, float]] = definition["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return vocabulary


def _add_tokens(
    definition: JsonObject,
    entries: JsonObject,
    more: JsonObject,
    named: dict[str, JsonObject],
) -> dict[str, int]:
    """Add the tokens that other files than `tokenizer.json` list or name, and set the flags that they list.

    Args:
        definition: the content of `tokenizer.json`, changed in place.
        entries: of `tokenizer_config.json`, whose list of tokens counts more than what the definition says.
        more: the content of `added_tokens.json`.
        named: control tokens; what names no known token becomes a new one, as in the newest transformers.

    Returns:
        The ids that the files say, by the tokens' texts.
    """
    vocabulary = _vocabulary(definition)
    added = {token["content"]: token for token in definition["added_tokens"]}
    listed: dict[str, int] = {}

    def add(token_id: int, entry: JsonObject, special: bool) -> None:
        text = entry["content"]
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        flags["normalized"] = bool(entry.get("normalized", not special))
        added[text] = {"id": token_id, "content": text, "special": special, **flags}

    control = {token["content"] for token in named.values()}
    decoder = entries.get("added_tokens_decoder") or {}
    for key, entry in decoder.items():
        text = entry["content"]
        listed[text] = int(key)
        add(int(key), entry, bool(entry.get("special")) or text in control)
    for text, token_id in more.items():
        listed.setdefault(text, int(token_id))
        if text not in added:
            add(int(token_id), {"content": text}, text in control)
    for token in named.values():
        text = token["content"]
        if text not in added:
            highest = max([*vocabulary.values(), *(each["id"] for each in added.values())], default=-1)
            add(vocabulary.get(text, highest + 1), token, special=True)
    definition["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    return listed


def from_sentencepiece(file: str, entries: JsonObject, named: dict[str, JsonObject]) -> JsonObject:
    """The `tokenizer.json` of a sentencepiece BPE model, with the same ids.

    Args:
        file: the model.
        entries: of `tokenizer_config.json`, whose `add_bos_token`, `add_eos_token` and `add_prefix_space` count.
        named: control tokens by role.

    Raises:
        DvirlError: for a damaged file, or another kind of model.
    """
    try:
        extractor = SentencePieceExtractor(file)
        proto = ModelProto.FromString(extractor.sp.serialized_model_proto())
    except Exception as error:  # the library raises bare exceptions
        raise DvirlError(f"{file}: not a sentencepiece model ({error!s:.200})") from error
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise DvirlError(f"{file}: not a BPE model, as Llama's tokenizers are")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise DvirlError(f"{file}: spaces stand at the ends of its words, which is not supported")
    kinds = ModelProto.SentencePiece
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED and SPACE in piece.piece:
            raise DvirlError(f"{file}: the added piece {piece.piece!r} has a space, which is not supported")
    # Merges are taken by the score of the piece that they make.
    scores = [(piece.piece, piece.score) for piece in proto.pieces if piece.type == kinds.NORMAL]
    pieces, merges = extractor.extract(scores)
    bpe = models.BPE(
        pieces,
        merges,
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(bpe)
    prefixed = proto.normalizer_spec.add_dummy_prefix and entries.get("add_prefix_space") is not False
    tokenizer.normalizer = _normalizer(proto.normalizer_spec, prefixed)
    for piece in proto.pieces:
        token = AddedToken(piece.piece, normalized=False)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            tokenizer.add_special_tokens([token])
        elif piece.type == kinds.USER_DEFINED:
            tokenizer.add_tokens([token])
    tokenizer.post_processor = _frame(pieces, entries, named)
    return {**json.loads(tokenizer.to_str()), "decoder": _decoder(prefixed)}


def _frame(
    pieces: Mapping[str, int], entries: JsonObject, named: dict[str, JsonObject]
) -> processors.TemplateProcessing:
    """What is put before and after a text."""
    bos = named.get("bos_token", {}).get("content", "<s>")
    eos = named.get("eos_token", {}).get("content", "</s>")
    before = [bos] if bos in pieces and entries.get("add_bos_token") is not False else []
    after = [eos] if eos in pieces and entries.get("add_eos_token") else []
    return processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]),
        special_tokens=[(token, pieces[token]) for token in {*before, *after}],
    )


def _normalizer(spec: Any, prefixed: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefixed:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
