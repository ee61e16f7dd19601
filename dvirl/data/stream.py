"""Encoded prompts in seeded random order, and the held-out ones."""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from dvirl.config import DVIConfig
from dvirl.data.domains import docstring_prompts
from dvirl.data.selfwritten import Openers, write_prompts
from dvirl.data.sources import Prompt, chatterbot_prompts, read_prompts, usable
from dvirl.models.loading import LoadedModel
from dvirl.models.tokenizers import TokenIds
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.inputs import context_length


class PromptStream:
    """An endless stream of encoded prompts. Each pass over the prompts has another random order, which the seed fixes.

    Args:
        prompts: token ids of each.
        seed: of the order; None keeps the order given.

    Attributes:
        position: number of prompts taken so far; setting it moves the stream there.

    Raises:
        DvirlError: if there are no prompts.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], seed: int | None) -> None:
        if not prompts:
            raise DvirlError("the prompt stream is empty; expected at least one prompt")
        self.prompts = [list(prompt) for prompt in prompts]
        self._seed = seed
        self.position = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def _shuffled(self, epoch: int) -> list[TokenIds]:
        prompts = list(self.prompts)
        if self._seed is not None:
            random.Random(f"{self._seed}/{epoch}").shuffle(prompts)
        return prompts

    def take(self, count: int) -> list[TokenIds]:
        """The next `count` prompts."""
        taken: list[TokenIds] = []
        while len(taken) < count:
            epoch, start = divmod(self.position, len(self.prompts))
            prompts = self._shuffled(epoch)[start : start + count - len(taken)]
            taken += prompts
            self.position += len(prompts)
        return taken

    def peek(self, count: int) -> list[TokenIds]:
        """The next `count` prompts, without taking them."""
        before = self.position
        prompts = self.take(count)
        self.position = before
        return prompts


@dataclass(frozen=True)
class PromptSplit:
    """Encoded prompts for training, as a stream, and others that it never yields."""

    stream: PromptStream
    held_out: list[TokenIds]


def load_prompts(config: DVIConfig, loaded: LoadedModel) -> PromptSplit:
    """Read the configured source, encode its prompts, and set `held_out` of them apart.

    Raises:
        DvirlError: for a malformed or empty source, or when nothing is left to train on.
    """
    context = context_length(loaded.model.config)
    most = min(config.max_prompt_tokens, context - config.max_new_tokens)
    if most < 1:
        raise DvirlError(
            f"max_new_tokens is {config.max_new_tokens}, which leaves no room for a prompt; "
            f"expected less than the model's context, {context}"
        )
    encoded = _encoded_prompts(config, loaded)
    short = [ids for ids in encoded if 0 < len(ids) <= most]
    if len(short) < len(encoded):
        tqdm.write(f"left out {len(encoded) - len(short)} prompts over {most} tokens", file=sys.stderr)
    if encoded and not short:
        raise DvirlError(
            f"none of {len(encoded)} prompts has {most} tokens or fewer (max_prompt_tokens is "
            f"{config.max_prompt_tokens}, max_new_tokens {config.max_new_tokens}, the context {context})"
        )
    random.Random(config.seed).shuffle(short)
    held_out = short[: config.held_out]
    training = short[config.held_out :]
    if not training:
        raise DvirlError(
            f"{config.prompts_source} has {len(short)} prompts; "
            f"held_out={config.held_out} leaves none for training"
        )
    return PromptSplit(PromptStream(training, config.seed), held_out)


def _encoded_prompts(config: DVIConfig, loaded: LoadedModel) -> list[TokenIds]:
    if config.prompts_source == "magpie":
        openers = Openers([kind for kind in config.prompts_path.split(",") if kind])
        return write_prompts(loaded, config.num_prompts + config.held_out, config.seed, openers)
    if config.prompts_source == "chatterbot":
        prompts = chatterbot_prompts()
    elif config.prompts_source == "docstrings":
        prompts = [Prompt((text,)) for text in docstring_prompts()]
    elif config.prompts_path:
        prompts = read_prompts(config.prompts_source, config.prompts_path, config.on_bad_row)
    else:
        raise DvirlError(f"prompts_source {config.prompts_source!r} needs prompts_path, a file or a hub id")
    return [ids for _, ids in encode_prompts(prompts, loaded, config.on_bad_row)]


def encode_prompts(
    prompts: Sequence[Prompt], loaded: LoadedModel, on_bad_row: str
) -> Iterator[tuple[Prompt, TokenIds]]:
    """Prompts with their token ids; `on_bad_row` holds for those that the chat format cannot spell.

    Raises:
        DvirlError: for such a prompt, with its first letters.
    """

    def encoded(prompt: Prompt) -> tuple[Prompt, TokenIds]:
        return prompt, loaded.chat.encode(prompt.turns, prompt.system)

    return usable(prompts, encoded, on_bad_row, "prompts")
