"""How often a draft's argmax is the verifier's token on greedy answers, in one pass: `dvirl agreement DRAFTER`."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from dvirl.evaluation.questions import MeasureSettings, asked_for, from_here, question_sets
from dvirl.evaluation.report import write_out
from dvirl.losses import DraftsAtDepth, Teacher, along_blocks, within_text
from dvirl.models.drafters import load_drafter
from dvirl.rollout import Responses, draft_rollout, verifier_states
from dvirl.runs.checkpoint import DRAFTER
from dvirl.runs.folder import provenance
from dvirl.runs.settings import command_line, number, positional
from dvirl.scale.corpus import answer
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.published import WEIGHTS

BINS = 15
"""Bins of equal width for the expected calibration error (Guo et al. 2017)."""
BATCH = 32
"""Number of answers in one pass of the draft."""


@dataclass(frozen=True)
class Agreement:
    """What the draft knows of the verifier's greedy answers.

    Attributes:
        rate: fraction of response positions, without the first of each answer, where the draft's argmax is the
            verifier's token; a token outside the draft vocabulary is a miss.
        confidence: mean of the draft's largest probability there.
        ece: expected calibration error of that probability against agreement, with 15 bins.
        covered: fraction of those tokens that are in the draft vocabulary.
        positions: number of positions.
        answers: the rate of each answer, in the order of the prompts; NaN for an answer of one token.
    """

    rate: float
    confidence: float
    ece: float
    covered: float
    positions: int
    answers: tuple[float, ...]


@dataclass(frozen=True)
class BlockLengths:
    """How long blocks of a fixed number of drafts are, one from each position that `Agreement` counts.

    Decoding begins blocks where others ended, which are not all positions: its mean is near this one, not the same.

    Attributes:
        by_depth: for the first, second, … draft, how often its argmax is the verifier's token if all before were.
        tokens_a_block: 1 + the mean number of accepted drafts: argmax drafts, a greedy verifier.
        expected_tokens: the same in the mean over samples if both sample at temperature 1 (arXiv 2211.17192); each
            draft is judged after the greedy answer, not after a sampled one.
    """

    by_depth: tuple[float, ...]
    tokens_a_block: float
    expected_tokens: float


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: the gaps between mean confidence and accuracy of each bin, weighted by its size.

    Args:
        confidence: `[N]`, 0 to 1.
        right: `[N]`, 1.0 where the prediction was right, else 0.0.
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.bincount(bins, weights=confidence - right)  # summed, so that sizes are the weights
    return float(gaps.abs().sum() / max(1, len(confidence)))


@torch.no_grad()
def _in_batches(
    model: KangarooModel, responses: Responses, judge: Callable[[KangarooModel, Responses], Tensor]
) -> list[Tensor]:
    """What `judge` gives for each batch of answers, moved to the model's device, in the order of their lengths."""
    device = model.head_model.weight.device
    parts = []
    with model.base_model.merged():
        # Answers of similar length share a batch, so that little of it is padding.
        for rows in torch.split(responses.lengths.argsort(), BATCH):
            batch = {name: tensor.long().to(device) for name, tensor in vars(responses.take(rows)).items()}
            parts.append(judge(model, Responses(**batch)))
    return parts


def _judge_drafts(model: KangarooModel, responses: Responses) -> Tensor:
    """Confidence, agreement and coverage at each position, `[3, M]`."""
    # The prefill gives a response's first token; those after it can be drafted.
    rows, before = responses.draft_places()
    verified = responses.tokens[rows, before + 1]
    logits = draft_rollout(model, responses, 1).logits[0]
    confidence, index = logits.softmax(dim=-1).max(dim=-1)
    agrees = model.token_ids(index) == verified
    covered = model.draft_index(verified) >= 0
    return torch.stack([confidence, agrees.float(), covered.float()])


def measure_agreement(model: KangarooModel, responses: Responses) -> Agreement:
    """Compare the draft's argmax with the verifier's token at every position, in one pass.

    Args:
        model: drafts.
        responses: the verifier's greedy answers (`corpus.answer`).
    """
    order = responses.lengths.argsort()
    confidence, agrees, covered = torch.cat(_in_batches(model, responses, _judge_drafts), dim=1)
    counts = (responses.response_lens[order] - 1).clamp(min=0)
    by_answer = torch.split(agrees.cpu(), counts.tolist())
    rates = torch.stack([part.mean() for part in by_answer])
    return Agreement(
        rate=float(agrees.mean()),
        confidence=float(confidence.mean()),
        ece=calibration_error(confidence, agrees) if len(agrees) else math.nan,
        covered=float(covered.mean()),
        positions=len(agrees),
        answers=tuple(rates[order.argsort().cpu()].tolist()),
    )


def _judge_blocks(model: KangarooModel, responses: Responses, depths: int) -> Tensor:
    """By depth, over all blocks: drafts after accepted ones, accepted ones, and their expected number; `[3, K]`."""
    rows, before = responses.draft_places()
    index = model.draft_index(responses.tokens[rows, before + 1])
    weight = torch.ones_like(rows)
    # 1) One parallel pass of both models.
    states = verifier_states(model.base_model, responses.tokens, ["lora_S"])[rows, before]
    teacher = Teacher.of(model.verifier_logits(states), model.verifier_normalizer(states))
    logits = draft_rollout(model, responses, depths).logits
    # 2) What each draft is worth by itself; without feedback it does not depend on its depth.
    drafts = [DraftsAtDepth(scores, teacher, index, weight) for scores in logits]
    drafts += drafts[-1:] * (depths - len(drafts))
    # 3) Drafts count as long as all drafts before them do.
    inside = within_text(rows * responses.tokens.shape[1] + before, weight, depths)
    accepted = along_blocks([each.logits.argmax(dim=-1) == index for each in drafts], inside).cumprod(dim=0)
    expected = along_blocks([each.acceptance() for each in drafts], inside).cumprod(dim=0)
    drafted = inside * torch.cat([inside[:1], accepted[:-1]])
    return torch.stack([drafted, accepted, expected]).double().sum(dim=-1)


def measure_blocks(model: KangarooModel, responses: Responses, depths: int) -> BlockLengths:
    """How many drafts of a block are accepted, from every position of greedy answers, in one pass.

    Args:
        model: drafts.
        responses: the verifier's greedy answers (`corpus.answer`); blocks that run over the end of one end there.
        depths: drafts of a block.
    """
    parts = _in_batches(model, responses, partial(_judge_blocks, depths=depths))
    drafted, *accepted = torch.stack(parts).sum(dim=0)
    # Each block has one first draft, which is always reached.
    lengths = [1 + float(numbers.sum() / drafted[0]) for numbers in accepted]
    return BlockLengths(tuple((accepted[0] / drafted).tolist()), *lengths)


@torch.no_grad()
def logit_lens(base: EarlyExitLlamaForCausalLM, responses: Responses) -> pd.DataFrame:
    """What the final norm and head predict from the states after each layer (nostalgebraist's logit lens, 2020).

    Args:
        base: the model.
        responses: the tokens to predict, without the first of each answer.

    Returns:
        A row for every layer (0 is the embedding) and position: `layer`, `question_id` (the response's row), `rank` of
        the last layer's token among this layer's, from 1, and `accepted`, 1 where that rank is 1.
    """
    rows, before = responses.draft_places()  # each state predicts the next token
    states = base(responses.tokens.long(), output_hidden_states=True).hidden_states
    *lower, last = [state[rows, before] for state in states]
    normed = [*map(base.model.norm, lower), last]  # Hugging Face's last state has passed the norm
    token = base.lm_head(last).argmax(dim=-1, keepdim=True)
    tables = []
    for layer, state in enumerate(normed):
        logits = base.lm_head(state)
        rank = 1 + (logits > logits.gather(1, token)).sum(dim=1)
        tables.append(pd.DataFrame({"layer": layer, "question_id": rows.cpu(), "rank": rank.cpu()}))
    lens = pd.concat(tables, ignore_index=True)
    lens["accepted"] = (lens["rank"] == 1).astype(int)
    return lens


def _sha256(path: str) -> str | None:
    """The hash of a file; None if there is none, as for a data set of the hub."""
    file = Path(path)
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" if file.exists() else None


@dataclass(frozen=True)
class AgreementConfig(MeasureSettings):
    """Settings of `dvirl agreement`; without questions and own, the drafter's own questions are asked."""

    drafter: str = positional()
    """Name of a shipped drafter, or a folder such as RUN_DIR/drafter or of a whole Llama that drafts."""
    max_new_tokens: int = number(128, 2)
    """Most tokens of an answer."""
    depths: int = number(4, 1, 64)
    """Drafts of a block."""


parse_args = command_line(
    AgreementConfig,
    "dvirl agreement",
    "Measure how often a draft's argmax is the verifier's token.",
)
"""Settings from flags; see `settings.parse_args`."""


def main(config: AgreementConfig) -> dict[str, Agreement]:
    """Measure a drafter in float32, print a table, and write the figures if asked to.

    Raises:
        DvirlError: for a drafter, file or setting that does not fit.
    """
    drafter = load_drafter(
        config.drafter, None, "float32", config.device, config.model_name, config.exit_layer
    )
    loaded = drafter.loaded
    config = asked_for(config, drafter)
    sets = question_sets(loaded, config)
    found: dict[str, Agreement] = {}
    figures = {}
    for name, prompts in tqdm(sets.items(), desc="answering", unit="set", leave=False):
        responses = answer(loaded, prompts, config.max_new_tokens, BATCH)
        found[name] = measure_agreement(drafter.model, responses)
        figures[name] = asdict(found[name]) | asdict(measure_blocks(drafter.model, responses, config.depths))
    table = pd.DataFrame.from_dict(figures, orient="index").drop(columns="answers")
    table["by_depth"] = [" ".join(f"{rate:.3f}" for rate in rates) for rates in table["by_depth"]]
    print(table.rename(columns={"rate": "agreement"}).to_string(float_format="{:.3f}".format))
    weights = [drafter.folder / name for name in (DRAFTER, *WEIGHTS)]
    paths = [from_here(path) for path in weights if path.exists()]
    files = {path: _sha256(path) for path in [*paths, *config.questions]}
    write_out(config, files=files, **provenance(loaded), figures=figures)
    return found
