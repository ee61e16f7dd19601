"""One answer by the clock, and the acceptance statistics of several: what every method of decoding is measured by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dvirl.data.examples import make_example
from dvirl.data.sources import Prompt
from dvirl.metrics import Tally, verifier_figures, verifier_sums
from dvirl.models.loading import LoadedModel
from dvirl.runs.errors import bad_input
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.decoding.inputs import Ends, Ids, check_prompt
from kangaroo.kangaroo_model import KangarooModel


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        tokens: the decoded token ids, the end-of-sequence token included.
        wall_s: seconds from the prompt to the last token. The device is synchronised at both ends, and the time in
            which CUDA graphs were captured is left out (`capture_s` of the model).
        prefill_s: the part of `wall_s` before the first token; NaN where it is not known.
        blocks: every verification, the prefill's first; none if another decoder gave the answer.
        sampled: the tokens were drawn.
    """

    tokens: list[int]
    wall_s: float
    prefill_s: float = math.nan
    blocks: Sequence[Verification] = ()
    sampled: bool = False

    @property
    def accept_lengths(self) -> list[int]:
        """Tokens that each verification committed, without the prefill; one each if there are no blocks."""
        if self.blocks:  # the first one is the prefill
            return [block.block_len for block in self.blocks[1:]]
        return [1] * (len(self.tokens) - 1)

    @property
    def drafts(self) -> list[tuple[int, int, int]]:
        """Learned and looked-up drafts of each main chain, and the number of chains beside it; without the prefill."""
        found = []
        for block in self.blocks[1:]:
            main = block.main_chain.draft
            looked_up = len(main.tokens) - main.num_learned
            found.append((main.num_learned, looked_up, len(block.beside)))
        return found

    @property
    def nll(self) -> float:
        """Negative log-likelihood of the tokens under the verifier, in nats; NaN if sampled, or without blocks."""
        if self.sampled or not self.blocks:
            return math.nan
        # A verifier's confidence covers the whole block; what was rejected is not part of the answer.
        committed = [block.verifier_confidence[: block.block_len].tolist() for block in self.blocks]
        return -sum(math.log(chance) for chances in committed for chance in chances)

    @property
    def decoding_s(self) -> float:
        """Seconds after the prefill."""
        return self.wall_s - self.prefill_s

    @property
    def tok_per_s(self) -> float:
        """Tokens a second, the prefill included."""
        return len(self.tokens) / self.wall_s


def tally(answers: Sequence[Answer]) -> Tally:
    """Count the drafts and verifications of some answers; the first block of each is the prefill's."""
    counts = Tally()
    for answer in answers:
        counts.count(answer.blocks[1:])
    return counts


def judge_replies(
    loaded: LoadedModel, replies: Sequence[Prompt], target: str, batch: int = 1
) -> dict[str, float]:
    """Perplexity of replies under the verifier, and its drift from the untouched model on them.

    Args:
        loaded: the model, with its adapters.
        replies: prompts with their responses.
        target: what the verifier's deep layers read, base or adapted.
        batch: replies in one pass.

    Returns:
        See `metrics.verifier_figures`.
    """
    chat = loaded.chat
    examples = [
        make_example(chat.encode(reply.turns), chat.encode_response(reply.response)) for reply in replies
    ]
    # Sums add up over batches, and means are taken once, at the end.
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(examples), batch):
        sums += verifier_sums(loaded.model, examples[start : start + batch], target)
    return verifier_figures(sums)


def timed(
    model: KangarooModel,
    prompt: Ids,
    limit: int,
    settings: DecodeConfig,
    eos_ids: Ends = (),
    seed: int = 0,
) -> Answer:
    """Decode one prompt by our loop; the arguments are those of `KangarooModel.decode_blocks`.

    Raises:
        DvirlError: for a prompt that cannot be read or leaves no room for the answer, or logits that are not finite.
    """
    captured_s = model.base_model.capture_s
    with bad_input():
        ids = check_prompt(prompt, model.base_model, limit)
        start = model.now()
        stream = model.decode_blocks(ids, limit, settings, eos_ids, seed=seed)
        blocks = [next(stream)]
        prefill_s = model.now() - start
        blocks += stream
    # Capturing CUDA graphs is paid once a process, not once an answer.
    wall_s = model.now() - start - (model.base_model.capture_s - captured_s)
    tokens = [token for block in blocks for token in block.committed]
    return Answer(tokens, wall_s, prefill_s, blocks, settings.temperature > 0)


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The names in an order that changes with every turn, so that other load on the machine hits all of them alike."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]
