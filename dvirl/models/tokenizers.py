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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor

from dvirl.models.hf_config import read_json
from dvirl.models.weights import FindFile
from dvirl.runs.errors import DvirlError

SPACE = "\u2581"
"""Stands for a space in sentencepiece's pieces."""
DOUBLED = {"type": "Replace", "pattern": {"Regex": f"^{SPACE}(?=[ {SPACE}])"}, "content": ""}
"""Takes a prepended space away where the text begins with one, as newer Metaspace does not put it there."""
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
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
        bare: dict[str, Any] = {
            **definition,
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._begin = Tokenizer.from_str(json.dumps(bare))
        self._continue = Tokenizer.from_str(json.dumps({**bare, **_without_prefix(definition)}))
        framed = tokenizer.backend_tokenizer.encode("a").ids
        inner = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
        places = range(len(framed) + 1)
        before = next(place for place in places if framed[place : place + len(inner)] == inner)
        self.frame: tuple[list[int], list[int]] = (framed[:before], framed[before + len(inner) :])

    def encode(
        self, text: str, tokens: Collection[str], first: bool = False, continues: bool = False
    ) -> list[int]:
        """Ids of a text without what the tokenizer puts before and after it.

        Args:
            text: the text.
            tokens: added tokens that count as such where the text spells them.
            first: nothing stands before it.
            continues: it follows other text, and no added token.
        """
        ids: list[int] = []
        for index, piece in enumerate(self._split(text, tokens)):
            if piece in tokens:
                ids.append(self.added[piece])
                continue
            at_start = index == 0 and first
            prefixed = at_start or not (self._first_only or (continues and index == 0))
            ids += self._encode_bare(self._begin if prefixed else self._continue, piece)
        return ids

    def _split(self, text: str, tokens: Collection[str]) -> list[str]:
        """A text cut before and after the tokens, white space around them going to those that take it."""
        parts = []
        for token in sorted(tokens, key=len, reverse=True):
            before = r"\s*" if self._tokens[token]["lstrip"] else ""
            after = r"\s*" if self._tokens[token]["rstrip"] else ""
            parts.append(f"{before}({re.escape(token)}){after}")
        pieces = re.split("|".join(parts), text) if parts else [text]
        return [piece for piece in pieces if piece]

    def _encode_bare(self, tokenizer: Tokenizer, text: str) -> list[int]:
        if not self._words:
            return list(tokenizer.encode(text).ids)
        if tokenizer.normalizer:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        ids: list[int] = []
        for word in words:
            if word in self._words:
                ids.append(self._words[word])
            else:
                ids += [token.id for token in tokenizer.model.tokenize(word)]
        return ids


def _without_prefix(definition: dict[str, Any]) -> dict[str, Any]:
    """The normalizer and pre-tokenizer of a tokenizer without the space that they put before a text."""
    kept = [step for step in _steps(definition) if not _prepends(step)]
    changed: dict[str, Any] = {"normalizer": {"type": "Sequence", "normalizers": kept}}
    pre_tokenizer = definition["pre_tokenizer"] or {}
    if pre_tokenizer.get("type") == "Metaspace":
        changed["pre_tokenizer"] = {**pre_tokenizer, "add_prefix_space": False}
    return changed


def _steps(definition: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a tokenizer's normalizer."""
    normalizer = definition.get("normalizer") or {"normalizers": []}
    return list(normalizer.get("normalizers", [normalizer]))


def _prepends(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Prepend" or step == DOUBLED


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
            row = [*before, *encoder.encode(text, encoder.added, first=True), *after]
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


def load_tokenizer(find: FindFile) -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer.json`, else of `tokenizer.model`; no class that the files name is run.

    Args:
        find: the path of one of the model's files by its name, None if the model does not have it.

    Raises:
        DvirlError: if there is none, or one that the pinned library cannot compute.
    """
    entries = read_json(find("tokenizer_config.json"))
    texts = {}
    for name in ROLES:
        entry = entries.get(name) or read_json(find("special_tokens_map.json")).get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            texts[name] = text
    template = chat_template(find, entries)
    if template:
        texts["chat_template"] = template
    file = find("tokenizer.json") or find("tokenizer.model")
    if not file:
        raise DvirlError("no tokenizer.json and no tokenizer.model; expected one of them")
    if file.endswith(".json"):
        definition = read_json(file)
        how = rewrite(definition, entries)
        try:
            backend = Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises bare exceptions
            raise DvirlError(f"{file}: not a tokenizer that can be read here ({error!s:.200})") from error
    else:
        backend = from_sentencepiece(file, texts.get("bos_token", "<s>"))
        how = {"prepend_scheme": "always" if entries.get("legacy") else "first"}
    _add_tokens(backend, entries, read_json(find("added_tokens.json")))
    for role in ROLES:  # a role whose token is not there would be added beyond the model's embeddings
        if backend.token_to_id(texts.get(role, "")) is None:
            texts.pop(role, None)
    plain = how.get("prepend_scheme") != "first" and not how.get("ignore_merges")
    kind = PreTrainedTokenizerFast if plain else SegmentedTokenizer
    return kind(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **how,
        **texts,
    )


def chat_template(find: FindFile, entries: Mapping[str, Any]) -> str | None:
    """The chat template: `chat_template.jinja`, else that of `tokenizer_config.json`, of several the default."""
    file = find("chat_template.jinja")
    if file:
        return Path(file).read_text(encoding="utf-8-sig")
    found = entries.get("chat_template")
    if isinstance(found, list):
        by_name = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = by_name.get("default") or next(iter(by_name.values()), None)
    return found if isinstance(found, str) else None


def rewrite(definition: dict[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
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
    model = definition["model"]
    how: dict[str, Any] = {}
    if model.pop("ignore_merges", False):
        how["ignore_merges"] = True
    if model.get("type") == "BPE":
        model["merges"] = [_merge(merge) for merge in model["merges"]]
    scheme = _spaces(definition, entries)
    if scheme:
        how["prepend_scheme"] = scheme
    _refuse_newer(definition)
    return how


def _merge(merge: Any) -> str:
    """A merge as one text, "left right"."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or " " in "".join(parts):
        raise DvirlError(f"tokenizer.json: the merge {merge!r:.60} has spaces in it, which is not supported")
    return " ".join(parts)


def _spaces(definition: dict[str, Any], entries: Mapping[str, Any]) -> str | None:
    """Rewrite how spaces become part of tokens.

    Returns:
        When a space is put before a text (first, always, never); None if the pinned library does what is meant.
    """
    kept = _steps(definition)
    pre_tokenizer = definition.get("pre_tokenizer") or {}
    metaspace = pre_tokenizer if pre_tokenizer.get("type") == "Metaspace" else {}
    split = metaspace.get("split", True)
    scheme: str = metaspace.get("prepend_scheme", "")
    of_llama = str(entries.get("tokenizer_class", "")).startswith(("LlamaTokenizer", "CodeLlamaTokenizer"))
    if of_llama and (metaspace or any(map(_prepends, kept))):
        # The newest transformers builds a Llama tokenizer's spaces from its settings.
        kept = []
        split = False
        scheme = "always" if entries.get("legacy") else "first"
        scheme = "never" if entries.get("add_prefix_space") is False else scheme
    elif not scheme:
        return None
    older: dict[str, Any] = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": scheme != "never"}
    if (definition.get("decoder") or {}).get("type") == "Metaspace":
        definition["decoder"] = older
    if split:
        definition["pre_tokenizer"] = older
        return scheme
    prefix = [] if scheme == "never" else [{"type": "Prepend", "prepend": SPACE}, DOUBLED]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    definition["normalizer"] = {"type": "Sequence", "normalizers": [*kept, *prefix, spaces]}
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


def _add_tokens(backend: Tokenizer, entries: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Add the tokens that only `tokenizer_config.json` or `added_tokens.json` list.

    Raises:
        DvirlError: if one does not get the id that is written there.
    """
    listed = {int(token): dict(entry) for token, entry in (entries.get("added_tokens_decoder") or {}).items()}
    for text, token in more.items():
        listed.setdefault(int(token), {"content": text})
    for token, entry in sorted(listed.items()):
        text = entry["content"]
        if backend.token_to_id(text) is None:
            flags = {
                name: entry.get(name, False) for name in ("lstrip", "rstrip", "single_word", "normalized")
            }
            add = backend.add_special_tokens if entry.get("special") else backend.add_tokens
            add([AddedToken(text, **flags)])
        if backend.token_to_id(text) != token:
            raise DvirlError(
                f"the added token {text!r} is listed as {token}, but is {backend.token_to_id(text)}"
            )


def from_sentencepiece(file: str, bos_token: str) -> Tokenizer:
    """A sentencepiece BPE model as a fast tokenizer with the same ids, which begins a text with `bos_token`.

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
    kinds = ModelProto.SentencePiece
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
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    for piece in proto.pieces:
        token = AddedToken(piece.piece, normalized=False)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            tokenizer.add_special_tokens([token])
        elif piece.type == kinds.USER_DEFINED:
            tokenizer.add_tokens([token])
    if bos_token in pieces:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, pieces[bos_token])]
        )
    return tokenizer


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
