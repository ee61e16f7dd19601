"""What drafting costs on this machine, which acceptance makes it pay, and what to set: `dvirl cost`.

A block of n drafts, each accepted with chance a, commits 1 + a + … + a^n tokens. It costs a verification of n + 1 rows
and n drafts (Leviathan et al. 2023, Theorem 3.8). Both costs are measured, as medians of interleaved repeats.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from dvirl import plots
from dvirl.evaluation.measure import tally
from dvirl.evaluation.methods import answer_in_turn, decoders
from dvirl.evaluation.questions import MeasureSettings, asked_for, question_sets, spread
from dvirl.evaluation.report import write_out
from dvirl.models.drafters import load_drafter
from dvirl.models.loading import DEFAULT_MODEL, load, resolve_device, resolve_dtype
from dvirl.runs.errors import bad_input
from dvirl.runs.folder import provenance
from dvirl.runs.settings import MANY, command_line, number, several
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.costs import StepCosts
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

SHAPES: dict[str, dict[str, int]] = {"llama-7b": {}}
"""Models with random weights, whose steps take as long as real ones (Touvron et al. 2023, Table 2): what they have
otherwise than a `LlamaConfig` without arguments, which is Llama 7B's."""
LENGTHS = (1, 2, 4, 8)
"""Draft lengths whose break-even is printed."""
CHECKED = (2, 4, 6)
"""Draft lengths at which a drafter is timed."""


@dataclass(frozen=True)
class Cost:
    """One exit layer after one context.

    Attributes:
        exit_layer: k.
        context: tokens in the caches.
        steps: what steps cost.
        break_even: by draft length, the least acceptance at which its blocks pay; infinite if they never do.
        draft_len: the best draft length at the acceptance in question; 0 if none pays.
        speedup: over plain decoding, with this draft length.
    """

    exit_layer: int
    context: int
    steps: StepCosts
    break_even: dict[int, float]
    draft_len: int
    speedup: float


@dataclass(frozen=True)
class Checked:
    """A drafter's speed-up over plain decoding at one draft length, by the cost model and by the clock."""

    draft_len: int
    accept_rate: float
    predicted: float
    measured: float


def recommend(costs: StepCosts, acceptance: float) -> tuple[int, float]:
    """The fastest draft length if every draft is accepted with this chance, and its speed over plain steps."""
    speeds = [costs.speedup(acceptance, count) for count in range(len(costs.verify))]
    best = max(speeds)
    return speeds.index(best), best


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> EarlyExitLlamaForCausalLM:
    """A model of the named shape with random weights, made in place."""
    # Weights are made in their dtype on the device: float32 ones on the CPU first would take twice the memory.
    with device:
        model: EarlyExitLlamaForCausalLM = EarlyExitLlamaForCausalLM._from_config(
            LlamaConfig(**SHAPES[shape]), torch_dtype=dtype
        )
    model.requires_grad_(False).eval()
    return model


@torch.no_grad()
def step_parts(
    model: KangarooModel, draft_len: int, context: int = 128, repeats: int = 9
) -> dict[str, float]:
    """Milliseconds of a block of `draft_len` drafts by part, medians; parts are run one after the other, uncaptured.

    Args:
        model: drafts and verifies.
        draft_len: drafts of the block; 0 is a plain step.
        context: tokens in the caches.
        repeats: blocks timed; two more go before them uncounted.
    """
    ids = (torch.arange(context + draft_len + 1, device=model.head_model.weight.device) % 7)[None]
    shallow = "drafting: shallow layers"
    head = "drafting: drafter and exit head"
    blocks: list[dict[str, float]] = []

    def clock(part: str, run: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        began = model.now()
        outputs = run(inputs)
        blocks[-1][part] = blocks[-1].get(part, 0.0) + 1e3 * (model.now() - began)
        return outputs

    def block(drafting: Iterable[Tensor], verifying: Tensor) -> None:
        blocks.append({shallow: 0.0, head: 0.0})
        for token in drafting:
            states = clock(shallow, stages.shallow, token)
            states = clock(head, stages.drafter, states)
            clock(head, stages.drafter.logits, states)
        states = clock("verifying: shallow layers", stages.base, verifying)
        states = clock("verifying: deep layers", stages.deep, states)
        clock("verifying: head", stages.deep.logits, states)

    with model.decoding(context + draft_len + 1) as stages:
        block([ids[:, :context]], ids[:, :context])
        drafts = ids[0, context:-1, None, None]  # [draft_len, 1, 1]
        for _ in range(repeats + 2):
            stages.truncate([context])
            block(drafts, ids[:, context:])
    return dict(pd.DataFrame(blocks[3:]).median())  # without the text before, and two to warm up


@dataclass(frozen=True)
class CostConfig(MeasureSettings):
    """Settings of `dvirl cost`."""

    model_name: str = ""
    """The model, smollm2-135m by default, or llama-7b for random weights of that shape; also of a --check."""
    exit_layers: list[int] = several(1, 2, 4, 6, 8, 12, limits=(1, MANY))
    """k, one or several."""
    drafter: str = "layer"
    """none, adapter or layer."""
    drafter_layers: int = number(2, 1)
    """Layers of the drafter."""
    draft_vocab: int = number(16384, 0)
    """Number of tokens that the exit head covers; 0 for all."""
    draft_len: int = number(8, 1)
    """Most drafts of a block."""
    contexts: list[int] = several(128, limits=(1, MANY))
    """Tokens before a block, one or several."""
    rows: int = number(1, 1)
    """Number of texts at once."""
    acceptance: float = number(0.7, 0, 1)
    """Chance of each draft to be accepted, for which to recommend a draft length."""
    check: str = ""
    """A drafter whose speed-up is measured as well, and compared with the cost model."""
    num_questions: int = number(6, 1)
    """Number of questions for --check."""
    dtype: str = "bfloat16"
    """Of the weights: auto, float32, bfloat16 or float16."""
    threads: int = number(2, 1, 1024)
    """CPU threads of torch."""
    figure: str = ""
    """Also draw the steps over the contexts into this file."""


@torch.no_grad()
def check(config: CostConfig) -> list[Checked]:
    """Compare the cost model with the clock on a drafter's own questions, at some draft lengths."""
    model_name = "" if config.model_name in SHAPES else config.model_name
    drafter = load_drafter(config.check, None, config.dtype, config.device, model_name, config.exit_layer)
    model = drafter.model
    sets = question_sets(drafter.loaded, asked_for(config, drafter))
    prompts = spread([*chain(*sets.values())], config.num_questions)
    configs = {str(count): DecodeConfig(count) for count in (0, *CHECKED)}
    run = decoders([*configs], configs, drafter, config.max_new_tokens)
    with model.base_model.merged():
        costs = model.step_costs(max(CHECKED))
        answers = answer_in_turn(run, [prompts[0], *prompts], "checking")

    def speed(count: int) -> float:
        counted = answers[str(count)][1:]  # the first one warmed up
        tokens = sum(len(answer.tokens) - 1 for answer in counted)  # the prefill gives the first
        return tokens / sum(answer.decoding_s for answer in counted)

    checked = []
    for count in CHECKED:
        rate = tally(answers[str(count)][1:]).accept_rate
        checked.append(Checked(count, rate, costs.speedup(rate, count), speed(count) / speed(0)))
    return checked


parse_args = command_line(
    CostConfig,
    "dvirl cost",
    "Measure what drafting costs, and say which acceptance makes it pay.",
)
"""Settings from flags; see `settings.parse_args`."""


@torch.no_grad()
def _measure(config: CostConfig) -> tuple[list[Cost], dict[str, Any]]:
    """The costs of every exit layer and context, and what they depend on."""
    device = resolve_device(config.device)
    circumstances: dict[str, Any] = {}
    if config.model_name in SHAPES:  # no file, and so no provenance
        base = random_model(config.model_name, resolve_dtype(config.dtype, device), device)
    else:
        loaded = load(config.model_name or DEFAULT_MODEL, config.dtype, config.device)
        base = loaded.model
        circumstances = provenance(loaded)
    covered = range(config.draft_vocab) if 0 < config.draft_vocab < base.config.vocab_size else None
    draft = Namespace(drafter=config.drafter, drafter_layers=config.drafter_layers, draft_vocab=covered)
    costs = []
    for exit_layer in tqdm(config.exit_layers, desc="measuring", unit="exit layer", leave=False):
        with bad_input():
            model = KangarooModel(base, None, draft, exit_layer)
        for context in config.contexts:
            steps = model.measure_costs(config.draft_len, context=context, rows=config.rows)
            even = {count: steps.break_even(count) for count in LENGTHS if count <= config.draft_len}
            costs.append(Cost(exit_layer, context, steps, even, *recommend(steps, config.acceptance)))
    return costs, circumstances


def main(config: CostConfig) -> list[Cost]:
    """Measure, print a line for every exit layer and context with what to set, and write them if asked to.

    Raises:
        DvirlError: for bad input.
    """
    torch.set_num_threads(config.threads)
    costs, circumstances = _measure(config)
    print(table(costs, config.acceptance))
    best = max(costs, key=lambda cost: cost.speedup)
    print(
        f"at an acceptance of {config.acceptance:.2f} the fastest is exit layer {best.exit_layer} with draft_len "
        f"{best.draft_len}: {best.speedup:.2f} times plain decoding"
    )
    checked = check(config) if config.check else []
    for row in checked:
        print(
            f"{config.check}, draft_len {row.draft_len}: predicted {row.predicted:.2f} from an acceptance rate of "
            f"{row.accept_rate:.2f}, measured {row.measured:.2f}"
        )
    if config.figure:
        steps = [(cost.exit_layer, cost.context, cost.steps) for cost in costs]
        plots.steps_by_context(steps, config.figure)
    write_out(config, **circumstances, costs=list(map(asdict, costs)), checked=list(map(asdict, checked)))
    return costs


def table(costs: Sequence[Cost], acceptance: float) -> str:
    """A line for every cost."""
    rows = []
    for cost in costs:
        plain = cost.steps.verify[0]
        row = {
            "k": cost.exit_layer,
            "context": cost.context,
            "plain ms": plain,
            "draft ms": cost.steps.draft,
            "draft/plain": cost.steps.draft / plain,
            f"verify {len(cost.steps.verify) - 1}/plain": cost.steps.verify[-1] / plain,
        }
        row |= {f"even n={count}": chance for count, chance in cost.break_even.items()}
        row |= {f"best n at {acceptance:.2f}": cost.draft_len, "speed-up": cost.speedup}
        rows.append(row)
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format)
