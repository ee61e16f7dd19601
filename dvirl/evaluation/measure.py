"""One answer by the clock: the measure that every way of decoding is held to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dvirl.runs.errors import DvirlError
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.kangaroo_model import KangarooModel


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        tokens: what was decoded, the end-of-sequence token included.
        wall_s: seconds from the prompt to the last token, the device synchronised at both ends; those that CUDA took to
            capture passes are left out, see `capture_s` of the model.
        prefill_s: those of them before the first token was there; NaN where that is not known.
        blocks: every verification, the prefill's first; none of a decoder that is not ours.
    """

    tokens: list[int]
    wall_s: float
    prefill_s: float = math.nan
    blocks: Sequence[Verification] = ()

    @property
    def accept_lengths(self) -> list[int]:
        """Tokens that each verification committed, the prefill left out: one at a time if there are no blocks."""
        return [block.block_len for block in self.blocks[1:]] if self.blocks else [1] * (len(self.tokens) - 1)

    @property
    def drafts(self) -> list[tuple[int, int]]:
        """Learned and looked-up drafts of each verification, the prefill left out; none without blocks."""
        drafts = [block.draft for block in self.blocks[1:]]
        return [(one.num_learned, len(one.tokens) - one.num_learned) for one in drafts]

    @property
    def nll(self) -> float:
        """Negative log-likelihood of the tokens under the verifier that said them, in nats; NaN without blocks."""
        own = [float(p) for block in self.blocks for p in block.verifier_confidence[: block.block_len]]
        return -sum(map(math.log, own)) if own else math.nan

    @property
    def decoding_s(self) -> float:
        """Seconds behind the prefill."""
        return self.wall_s - self.prefill_s

    @property
    def num_drafted(self) -> int:
        """Scored drafts."""
        return sum(block.num_drafted for block in self.blocks)

    @property
    def num_accepted(self) -> int:
        """Accepted drafts."""
        return sum(block.num_accepted for block in self.blocks)


def timed(
    model: KangarooModel, prompt: Sequence[int], limit: int, settings: DecodeConfig, eos_ids: Sequence[int] = ()
) -> Answer:
    """Decode one prompt by our loop, drafting as `settings` say; arguments as in `KangarooModel.decode_rows`.

    Raises:
        DvirlError: for an empty prompt, or logits that are not finite.
    """
    began, captured = model.now(), model.base_model.capture_s
    stream = model.decode_blocks(prompt, limit, settings, eos_ids)
    try:
        blocks, prefilled = [next(stream)], model.now()
        blocks += stream
    except ValueError as error:
        raise DvirlError(f"a prompt of {len(prompt)} tokens: {error}") from error
    wall_s = model.now() - began - (model.base_model.capture_s - captured)
    return Answer([token for block in blocks for token in block.committed], wall_s, prefilled - began, blocks)


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The names in an order that changes from turn to turn, so that what else a machine does hits all alike."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]
