"""A conversation in the terminal, from which the draft learns: `dvirl chat`."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path

from dvirl.data.sources import Prompt, parse_jsonl, placed
from dvirl.live import LiveConfig, LiveSession
from dvirl.metrics import Tally
from dvirl.models.drafters import DEFAULT_DRAFTER
from dvirl.models.embedded import cache_root
from dvirl.models.loading import DEFAULT_MODEL, load_for
from dvirl.models.streaming import stream_text
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError, bad_input
from dvirl.runs.interrupt import handled
from dvirl.runs.log import numbered, parse_line, read_text, write_json
from dvirl.runs.settings import ModelSettings, choice, narrowed
from kangaroo.decoding.blocks import Verification
from kangaroo.decoding.inputs import check_prompt

LEARNED = "\033[32m"
"""Colour of accepted drafts of the shallow layers."""
LOOKED_UP = "\033[36m"
"""Colour of accepted drafts that were looked up; the verifier's own tokens have none."""
REJECTED = "\033[9;31m"
"""Colour of the draft that was rejected, struck out."""
END = "\033[0m"
DONE = {
    "": "not learned",
    "update": "learned",
    "replay": "learned",
    "guard": "draft checked",
    "back": "went back to an earlier draft",
    "checkpoint": "saved",
}
"""What `LiveSession.learn` did, in words."""
HELP = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer."
ON_A_GPU = """On a GPU answers are neither learned from nor remembered: learning takes twice the time there.
--learn true does both."""
"""What a user reads there in place of the question."""
QUESTION = """May the draft learn from your conversations? It then gets faster at what you ask; answers stay the same.
What you write is not stored, but the weights of the draft that are learned from it are, in {folder}.
Learn (yes or no; Enter is yes)? """
YES = ("", "yes", "y", "true", "t", "1")
"""Answers to it that mean yes."""


@dataclass(frozen=True)
class ChatConfig(LiveConfig, ModelSettings):
    """A conversation: who answers, who drafts, and what is shown."""

    run_dir: str = ""
    """Folder of what the draft learned, from which the next conversation goes on; by default one in the cache."""
    learn: str = choice("ask", ("ask", "true", "false"))
    """Whether the draft learns from the conversation; ask: as answered the first time, and false without a terminal.
    On a GPU a session is faster without, and unless this is true it neither learns nor remembers."""
    show_blocks: bool = False
    """Colour drafts: accepted ones green (learned) or cyan (looked up), the rejected one struck out, others plain."""
    replay: str = ""
    """File of prompts to answer in place of a conversation: one a line, or JSON lines with "prompt" or "turns"."""
    draft: str = DEFAULT_DRAFTER
    """Name or folder of the drafter."""
    model_name: str = DEFAULT_MODEL
    """Embedded name, local folder or hub id of the model that answers; the drafter must be made for it."""
    system: str = ""
    """System text before the conversation; by default the model's own."""


parse_args = settings.command_line(ChatConfig, "dvirl chat", f"Talk to a model. {HELP}")
"""Settings from flags; see `settings.parse_args`."""


def main(config: ChatConfig) -> None:
    """Converse in the terminal, or answer the prompts of a file.

    Raises:
        DvirlError: for a bad setting, model, drafter or file.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    prompts = read_replay(config.replay) if config.replay else []
    # A terminal that is closed ends the conversation as /exit does, so that what was learned is kept.
    with (
        open_session(config) as session,
        handled(lambda number, _: sys.exit(128 + number), signal.SIGTERM, signal.SIGHUP),
    ):
        chat = Chat(session, config)
        if config.replay:
            for where, prompt in prompts:  # one that cannot be answered is said before any is
                with placed(where):
                    chat.encode(prompt.turns, prompt.system or config.system)
            for _, prompt in prompts:
                print(f"> {prompt.turns[-1]}")
                chat.answer(prompt.turns, prompt.system or config.system)
        else:
            chat.converse()


def open_session(config: ChatConfig) -> LiveSession:
    """The session of a conversation, its model loaded."""
    folder = config.run_dir or str(cache_root() / "live" / Path(os.path.abspath(config.draft)).name)
    live = replace(narrowed(LiveConfig, config), run_dir=folder)
    loaded = load_for(config)
    if loaded.model.can_be_captured and config.learn != "true":
        print(ON_A_GPU)
        live = replace(live, budget=0.0, remember=0)
    elif not wants_to_learn(config.learn, folder):
        live = replace(live, budget=0.0)
    return LiveSession(loaded, config.draft, live)


def wants_to_learn(learn: str, folder: str) -> bool:
    """Whether the user wants the draft to learn: as the flag says, as answered before, or as answered now."""
    if learn != "ask":
        return learn == "true"
    path = cache_root() / "chat.json"
    if path.exists():
        kept = parse_line(str(path), read_text(path), dict).get("learn")
        if not isinstance(kept, bool):
            raise DvirlError(f"{path}: learn is {kept!r:.80}; expected true or false")
        return kept
    if not sys.stdin.isatty():
        return False
    try:
        wanted = input(QUESTION.format(folder=folder)).strip().lower() in YES
    except EOFError:  # Ctrl-D is no reply
        return False
    write_json(path, {"learn": wanted})
    return wanted


def read_replay(path: str) -> list[tuple[str, Prompt]]:
    """The prompts of a file after their places: one a line, or one JSON object a line as `dvirl train` reads them.

    Raises:
        DvirlError: for a line that is neither, or a file without prompts.
    """
    prompts = []
    for where, line in numbered(path, read_text(path)):
        is_json = line.lstrip().startswith("{")
        with placed(where):
            prompt = parse_jsonl(parse_line(where, line)) if is_json else Prompt((line.strip(),))
        prompts.append((where, prompt))
    if not prompts:
        raise DvirlError(f"{path}: no prompts there; expected one a line")
    return prompts


@dataclass
class Chat:
    """Answers turn by turn and prints what comes.

    Args:
        session: answers.
        config: what is shown.
    """

    session: LiveSession
    config: ChatConfig

    def converse(self) -> None:
        """Answer what the user types until the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401  # lets the user edit a line; Python has it where the system has
        print(HELP)
        turns: list[str] = []
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # at the prompt it only drops the line
                print()
                continue
            if text == "/exit":
                return
            if text == "/reset":
                turns = []
            elif text.startswith("/"):
                print(HELP)
            elif text:
                turns = self._turn([*turns, text])

    def _turn(self, turns: list[str]) -> list[str]:
        """Answer the last turn; the conversation after it, or without it if it cannot be answered."""
        try:
            return [*turns, self.answer(turns, self.config.system)]
        except DvirlError as error:
            print(f"dvirl: {error} (/reset starts a new conversation)", file=sys.stderr)
            return turns[:-1]

    def encode(self, turns: Sequence[str], system: str = "") -> list[int]:
        """The token ids of a conversation; arguments and errors as in `answer`."""
        session = self.session
        prompt = session.loaded.chat.encode(turns, system)
        with bad_input():
            return check_prompt(prompt, session.loaded.model, session.config.max_new_tokens)

    def answer(self, turns: Sequence[str], system: str = "") -> str:
        """Print the answer to a conversation as it comes, and a line of figures; Ctrl-C ends the answer.

        Args:
            turns: user, assistant, user, …
            system: a system text before them.

        Returns:
            The answer's text.

        Raises:
            DvirlError: for turns that the chat format cannot spell, or that are too long for the model's context.
        """
        session = self.session
        began = session.counters.answer_s
        stream = session.stream(self.encode(turns, system))
        blocks: list[Verification] = []
        colours: list[str] = []
        text = ""
        # A signal is noted and waits: it must not fall into an update.
        stop = threading.Event()
        with handled(lambda *_: stop.set(), signal.SIGINT), bad_input():
            tokens = self._tokens(stream, blocks, colours, stop)
            for place, piece in enumerate(stream_text(session.loaded.tokenizer, tokens)):
                text += piece
                colour = colours[place] if place < len(colours) else ""
                print(f"{colour}{piece}{END}" if colour else piece, end="", flush=True)
            stream.close()  # type: ignore[attr-defined]  # it is a generator
            print()
            try:
                learned = session.learn()
            except DvirlError as error:  # such as a full disk; the answer stands all the same
                print(f"dvirl: {error}", file=sys.stderr)
                learned = ""
        print(self._figures(blocks, session.counters.answer_s - began, learned))
        return text

    def _tokens(
        self,
        stream: Iterator[Verification],
        blocks: list[Verification],
        colours: list[str],
        stop: threading.Event,
    ) -> Iterator[Verification]:
        """Every token as a block of its own; fills `blocks` with the whole ones, `colours` with one text a token."""
        for block in stream:
            blocks.append(block)
            for place, token in enumerate(block.committed):
                colours.append(self._colour(block, place) if self.config.show_blocks else "")
                yield Verification(block.start + place, (token,), 0, 0)
            if stop.is_set():
                return

    def _colour(self, block: Verification, place: int) -> str:
        """What is printed before a token: its colour and, before a correction, the draft that was rejected."""
        draft = block.draft
        if place < block.num_accepted:
            return LEARNED if place < draft.num_learned else LOOKED_UP
        if block.num_drafted == block.num_accepted:
            return ""
        rejected = self.session.loaded.tokenizer.decode([int(draft.tokens[place])])
        return f"{REJECTED}{rejected}{END}"

    def _figures(self, blocks: Sequence[Verification], seconds: float, learned: str) -> str:
        """The line after an answer."""
        tally = Tally()
        tally.count(blocks[1:])  # the first one is the prefill's
        tokens = sum(block.block_len for block in blocks)
        line = f"[{tokens / max(seconds, 1e-9):.1f} tokens/s, {tally.mat:.2f} tokens a block"
        if self.session.config.budget:
            share = self.session.counters.learning_share
            line += f"; {DONE[learned]}, {100 * share:.0f} % of the time so far"
        return line + "]"
