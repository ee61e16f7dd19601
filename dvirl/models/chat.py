"""Chat formats: conversations become token ids, and a user's text never becomes a control token.

A format is a Jinja template, the model's own or one of `FORMATS`. It is rendered to text and cut at the control tokens.
Where a turn itself spells a control token, a guard character breaks the spelling until the text has been cut, so that
only the template's control tokens count.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dvirl.models.tokenizers import TextEncoder, TokenIds
from dvirl.runs.errors import DvirlError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FORMATS = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content.strip() }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llama-2": (
        "{% set system = namespace(text='') %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% set system.text = '<<SYS>>\n' ~ m.content ~ "
        "'\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ system.text }}"
        "{{ m.content.strip() }} [/INST]{% set system.text = '' %}{% else %} {{ m.content.strip() }} "
        "{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% if messages[0].role != 'system' %}" + VICUNA_SYSTEM + " {% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
        "USER: {{ m.content }} ASSISTANT:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
"""Formats of families whose models come without a template; none of them but Vicuna's has a default system text."""
TEMPLATE = "template"
"""The model's own template."""
FAMILIES = {
    "vicuna": "vicuna",
    "zephyr": "zephyr",
    "tinyllama": "zephyr",
    "llama-2": "llama-2",
    "codellama": "llama-2",
}
"""The format of families that a model's name tells."""
NONE = "none"
"""No format: the turns as plain text, begun as the tokenizer begins a text."""
MARKS = re.compile(r"\[/?[A-Z_]+\]|<</?[A-Z_]+>>|<\|\w+\|>")
"""Plain text by which a template may tell turns apart. A user's turn with such a mark is refused."""
MARK = "\0"
"""Stands for a turn where only the text around it matters."""


def detect_format(tokenizer: Any, name: str, vocab_size: int | None = None) -> tuple[str, str]:
    """The chat format that a model was trained with, and what tells so.

    Args:
        tokenizer: its tokenizer.
        name: its name or folder.
        vocab_size: number of its embeddings; a control token beyond them tells nothing.
    """
    if tokenizer.init_kwargs.get("chat_template"):
        return TEMPLATE, "the model's own chat_template"
    vocabulary = tokenizer.get_vocab()
    lowered = Path(name).name.lower()
    instructed = "chat" in lowered or "instruct" in lowered

    def has(token: str) -> bool:
        return vocabulary.get(token, -1) in range(vocab_size or len(vocabulary))

    if has("<|im_start|>") and has("<|im_end|>"):
        return "chatml", "no chat_template, but the token <|im_start|>"
    if has("<|eot_id|>") and instructed:
        return "llama-3", "no chat_template, but the token <|eot_id|> and the model's name"
    for family, chat_format in FAMILIES.items():
        # Every Vicuna and Zephyr is for chat; of the others there are base models, too.
        if family in lowered and (instructed or family in ("vicuna", "zephyr")):
            return chat_format, "no chat_template, but the model's name"
    return NONE, "no chat_template, and no family that is known by its name or tokens"


class ChatEncoder:
    """Turns conversations into token ids in one chat format.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        chat_format: a key of `FORMATS`, "template" or "none".
        vocab_size: number of embeddings; tokens beyond them are refused. The tokenizer's own number if not given.

    Raises:
        DvirlError: for an unknown format, one whose control tokens the tokenizer lacks, or a template that fails.
    """

    def __init__(self, tokenizer: Any, chat_format: str, vocab_size: int | None = None) -> None:
        self.chat_format = chat_format
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size or len(tokenizer)
        self._text = TextEncoder(tokenizer)
        templates = {TEMPLATE: tokenizer.init_kwargs.get("chat_template"), **FORMATS, NONE: ""}
        self._source: str = templates.get(chat_format) or ""
        if not self._source and chat_format != NONE:
            known = ", ".join(("auto", *templates))
            raise DvirlError(
                f"chat_format is {chat_format!r}; expected {known}; template if the model has one"
            )
        written = literals(self._source)
        marks = {token for token in self._text.added if token in written and token.strip()}
        self._control = self._text.special | marks
        if chat_format in FORMATS:
            self._check_tokens()
        named = tokenizer.init_kwargs.get("named_tokens", {})
        self._render = compile_template(self._source, tokenizer.special_tokens_map | named)
        self.encode([" "])

    def _check_tokens(self) -> None:
        marks = [] if self.chat_format == "zephyr" else MARKS.findall(self._source)
        needed = [token for token in marks if token.startswith("<|")]
        for role in ("bos_token", "eos_token"):
            if role in self._source:
                needed.append(getattr(self.tokenizer, role) or role)
        for token in needed:
            if token not in self._text.added:
                raise DvirlError(
                    f"chat_format {self.chat_format!r} needs the token {token!r}, which the tokenizer lacks"
                )

    def _prompt_text(self, turns: Sequence[str], system: str = "", ask: bool = True) -> str:
        """The conversation as text, in which the turns stand as they are."""
        texts = [("system", system)] if system else []
        texts += zip(cycle(("user", "assistant")), turns, strict=False)
        return self._render([{"role": role, "content": text} for role, text in texts], ask)

    def encode(self, turns: Sequence[str], system: str = "") -> TokenIds:
        """Token ids of turns of user, assistant, user, …, an odd number, ready for the assistant's next one.

        Args:
            turns: the conversation.
            system: a system text before it.

        Raises:
            DvirlError: for an even number of turns, a user's text that spells a mark of the format, a template that
                fails, or a token that the model has no embedding of.
        """
        if len(turns) % 2 == 0:
            raise DvirlError(f"a prompt has {len(turns)} turns; expected an odd number, the user's last")
        if self.chat_format == NONE:
            before, after = self._text.frame
            text = "\n".join([system, *turns] if system else turns)
            return self._checked([*before, *self.plain(text, begins=True), *after], text)
        for turn in turns[::2]:
            for mark in self._marks:
                if mark in turn:
                    raise DvirlError(
                        f"the prompt {turn!r:.60} spells {mark}, which opens or closes a turn of {self.chat_format}"
                    )
        guard = unused(f"{turns}{system}")
        controls = cycle((self._control, self._opening))
        broken = [guarded(turn, control, guard) for turn, control in zip(turns, controls, strict=False)]
        prompt = self._prompt_text(broken, guarded(system, self._control, guard))
        return self._checked(self._ids(prompt, guard, begins=True), str(turns))

    def _ids(self, text: str, guard: str, begins: bool | None) -> TokenIds:
        """Token ids of a rendered text; `begins` says what stands before it, see `plain`."""
        ids: TokenIds = []
        for piece in self._text.split(text, self._control):
            if piece in self._control:
                ids.append(self._text.added[piece])
            else:
                ids += self.plain(piece.replace(guard, ""), begins)
            begins = None  # a piece after the first follows a token
        return ids

    def _checked(self, ids: TokenIds, text: str) -> TokenIds:
        beyond = [token for token in ids if token >= self._vocab_size]
        if beyond:
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise DvirlError(
                f"the prompt {text!r:.60} has the token {token!r}, {beyond[0]}; the model embeds {self._vocab_size}"
            )
        return ids

    @cached_property
    def _opening(self) -> set[str]:
        """Control tokens that an answer cannot have: special ones, and those that the template writes around turns.

        Others, such as </think>, are what the model itself writes, and the template looks for them.
        """
        return self._text.special | {token for token in self._control if token in self._around}

    @cached_property
    def _around(self) -> str:
        """What the template writes around three turns."""
        return self._prompt_text([MARK] * 3)

    @cached_property
    def _marks(self) -> set[str]:
        return set(MARKS.findall(f"{self._source}\n{self._around}")) - self._control

    @cached_property
    def turn_end(self) -> int | None:
        """The control token that ends the assistant's turn, None if the format has none."""
        if self.chat_format == NONE:
            return None
        answered = self._prompt_text(["", MARK], ask=False)
        after = self._text.split(answered.rpartition(MARK)[2].lstrip(), self._control)
        token = self._text.added.get(after[0]) if after else None
        return token if token is not None and token < self._vocab_size else None

    def encode_response(self, text: str) -> TokenIds:
        """Token ids of the assistant's answer, to follow those of `encode`, without an end-of-sequence token."""
        if self.chat_format == NONE:
            return self.plain("\n" + text)
        guard = unused(text)
        before = self._text.split(self._prompt_text([""]), self._control)[-1:]
        # A control token at the end of the prompt says whether a space is put, or white space taken, after it.
        token = "".join(piece for piece in before if piece in self._control)
        answer = token + self._lead + guarded(text, self._opening, guard)
        ids = self._ids(answer, guard, None if token else False)
        return ids[1:] if token else ids

    @cached_property
    def _lead(self) -> str:
        """What the format puts between the end of a prompt and the answer's own text."""
        prompt = self._prompt_text([""])
        answered = self._prompt_text(["", MARK], ask=False).rpartition(MARK)[0]
        return answered.removeprefix(prompt) if answered.startswith(prompt) else ""

    def frame(self) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Token ids before a user's first turn, between a user's turn and the answer, and between answer and next turn.

        Raises:
            DvirlError: for the format "none", which has no such places.
        """
        if self.chat_format == NONE:
            raise DvirlError("self-written prompts need a chat format; this model has none (set chat_format)")
        ids = self.encode([MARK] * 3)
        mark_id = self.plain(MARK)[-1]
        first, second, third = (index for index, token in enumerate(ids) if token == mark_id)
        return ids[:first], ids[third + 1 :], ids[second + 1 : third]

    def plain(self, text: str, begins: bool | None = False) -> TokenIds:
        """Token ids of a text, in which nothing is a control token.

        Args:
            text: the text.
            begins: True if nothing stands before it, False if other text does, None if a control token does.

        Raises:
            DvirlError: if the tokenizer's own model spells one all the same; byte-level BPE never does.
        """
        ids = self._text.encode(text, self._text.added.keys() - self._control, begins)
        if not self._text.special_ids.isdisjoint(ids):
            raise DvirlError(
                f"the text {text!r:.60} spells a control token, even to this tokenizer's bare model"
            )
        return ids


def guarded(text: str, control: Collection[str], guard: str) -> str:
    """The text, its spellings of control tokens broken by the guard."""
    longest_first = sorted(control, key=len, reverse=True)
    spelled = "|".join(map(re.escape, longest_first)) or "(?!)"
    return re.sub(spelled, lambda found: found[0][0] + guard + found[0][1:], text)


def literals(template: str) -> str:
    """The texts that a template writes as they stand in it, without its own code."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        parts = list(environment.lex(template))
    except TemplateError:  # said when it is compiled
        return template
    return "\0".join(text for _, kind, text in parts if kind in ("data", "string"))


def unused(text: str) -> str:
    """A character that the text does not have."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)


class _Generation(Extension):
    """`{% generation %}` marks what is learned from in newer templates; here its content simply stands there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        """The nodes of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str, tokens: Mapping[str, Any]) -> Callable[[list[dict[str, str]], bool], str]:
    """A chat template as a function from messages, and whether the assistant is asked to answer, to text.

    It runs in Jinja's sandbox. A template that asks whether there is a clock finds none and takes its own date, so that
    prompts are the same every day.

    Args:
        source: the template.
        tokens: texts of the special tokens by role (`bos_token`, …).

    Raises:
        DvirlError: if it cannot be compiled, or when it fails.
    """

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own writes for HTML
    if not re.search(r"strftime_now is (not )?defined", source):
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def render(messages: list[dict[str, str]], ask: bool) -> str:
        try:
            return environment.from_string(source).render(
                messages=messages, add_generation_prompt=ask, tools=None, documents=None, **tokens
            )
        except Exception as error:  # a template can raise anything
            raise DvirlError(f"the chat template fails: {error!s:.200}") from error

    return render
