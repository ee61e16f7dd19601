"""Chat formats: conversations become token ids, and a user's text never becomes a control token."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from dvirl.runs.errors import DvirlError

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
"""Plain text to the tokenizer, so a user's turn with one is refused, as Meta's reference code does."""


@dataclass(frozen=True)
class Control:
    """A control token, by its text."""

    token: str


Segment = str | Control


def _chatml(turns: Sequence[str]) -> list[Segment]:
    segments: list[Segment] = [
        Control("<|im_start|>"),
        f"system\n{DEFAULT_SYSTEM}",
        Control("<|im_end|>"),
        "\n",
    ]
    for index, turn in enumerate(turns):
        role = "user" if index % 2 == 0 else "assistant"
        segments += [Control("<|im_start|>"), f"{role}\n{turn}", Control("<|im_end|>"), "\n"]
    return [*segments, Control("<|im_start|>"), "assistant\n"]


def _vicuna(turns: Sequence[str]) -> list[Segment]:
    segments: list[Segment] = [Control("<s>")]
    text = f"{VICUNA_SYSTEM} "
    for index, turn in enumerate(turns):
        if index % 2 == 0:
            text += f"USER: {turn} ASSISTANT:"
        else:
            segments += [f"{text} {turn}", Control("</s>")]
            text = ""
    return [*segments, text]


def _llama2(turns: Sequence[str]) -> list[Segment]:
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        if index % 2 == 0:
            for tag in LLAMA2_TAGS:
                if tag in turn:
                    raise DvirlError(
                        f"the prompt {turn!r:.60} spells {tag}, which opens or closes a turn of llama-2"
                    )
            segments += [Control("<s>"), f"[INST] {turn.strip()} [/INST]"]
        else:
            segments[-1] = f"{segments[-1]} {turn.strip()} "
            segments.append(Control("</s>"))
    return segments


def _plain(turns: Sequence[str]) -> list[Segment]:
    return ["\n".join(turns)]


FORMATS = {"chatml": _chatml, "vicuna": _vicuna, "llama-2": _llama2, "none": _plain}


def detect_format(tokenizer: Any, name: str) -> str:
    """The chat format that a model was trained with, from its control tokens, template or name."""
    vocabulary = tokenizer.get_vocab()
    template = str(tokenizer.init_kwargs.get("chat_template") or "")
    if "<|im_start|>" in vocabulary and ("<|im_start|>" in template or not template):
        return "chatml"
    if "[INST]" in template:
        return "llama-2"
    lowered = name.lower()
    if "vicuna" in lowered:
        return "vicuna"
    if ("llama-2" in lowered and "chat" in lowered) or ("codellama" in lowered and "instruct" in lowered):
        return "llama-2"
    return "none"


class ChatEncoder:
    """Turns conversations into token ids in one chat format.

    The format's control tokens are looked up by id. All other text goes through a copy of the tokenizer that knows no
    control tokens, so `<|im_start|>system` in a user's text stays text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_format: a key of `FORMATS`.

    Raises:
        DvirlError: for an unknown format, or one whose control tokens the tokenizer lacks.
    """

    def __init__(self, tokenizer: Any, chat_format: str) -> None:
        if chat_format not in FORMATS:
            raise DvirlError(f"chat_format is {chat_format!r}; expected one of {', '.join(FORMATS)}")
        self.chat_format = chat_format
        self.tokenizer = tokenizer
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        plain = {**definition, "added_tokens": [], "post_processor": None}
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        special = {token["id"] for token in definition["added_tokens"] if token["special"]}
        self._control = special - {tokenizer.unk_token_id}
        self.encode([" "])

    def encode(self, turns: Sequence[str]) -> list[int]:
        """Token ids of turns of user, assistant, user, …, an odd number, ready for the assistant's next one.

        Raises:
            DvirlError: for an even number of turns, a format that the tokenizer cannot spell, or a user's text that
                spells a mark of llama-2.
        """
        if len(turns) % 2 == 0:
            raise DvirlError(f"a prompt has {len(turns)} turns; expected an odd number, the user's last")
        ids: list[int] = []
        for segment in FORMATS[self.chat_format](turns):
            if isinstance(segment, Control):
                if segment.token not in self._vocabulary:
                    raise DvirlError(
                        f"chat_format {self.chat_format!r} needs the token {segment.token!r}, not there"
                    )
                ids.append(self._vocabulary[segment.token])
            else:
                ids += self.plain(segment)
        return ids

    def encode_response(self, text: str) -> list[int]:
        """Token ids of the assistant's answer, to follow those of `encode`, without an end-of-sequence token."""
        return self.plain(f"\n{text}" if self.chat_format == "none" else text)

    def frame(self) -> tuple[list[int], list[int], list[int]]:
        """Token ids before a user's first turn, between a user's turn and the answer, and between answer and next turn.

        Raises:
            DvirlError: for the format "none", which has no such places.
        """
        if self.chat_format == "none":
            raise DvirlError("self-written prompts need a chat format; this model has none (set chat_format)")
        mark = "\x00"
        ids = self.encode([mark, mark, mark])
        mark_id = self.plain(mark)[-1]
        first, second, third = (index for index, token in enumerate(ids) if token == mark_id)
        return ids[:first], ids[third + 1 :], ids[second + 1 : third]

    def plain(self, text: str) -> list[int]:
        """Token ids of a text, in which nothing is a control token.

        Raises:
            DvirlError: if the tokenizer's own model spells one all the same; byte-level BPE never does.
        """
        ids: list[int] = self._plain.encode(text).ids
        if not self._control.isdisjoint(ids):
            raise DvirlError(
                f"the text {text!r:.60} spells a control token, even to this tokenizer's bare model"
            )
        return ids
