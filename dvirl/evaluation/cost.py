"""What drafting costs here, from which acceptance on it pays, and what to set: `dvirl cost`.

A block of n drafts, each accepted with chance a, commits 1 + a + … + a^n tokens and costs a verification of n + 1 rows
and n drafts (Leviathan et al. 2023, Theorem 3.8). Both costs are measured, medians of interleaved repeats.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig

from dvirl import plots
from dvirl.evaluation.bench import PLAIN, spread
from dvirl.evaluation.measure import timed
from dvirl.evaluation.questions import asked_for, parse_measured, question_sets
from dvirl.models.drafters import load_drafter
from dvirl.models.loading import DEFAULT_MODEL, load, resolve_device, resolve_dtype
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from kangaroo.adapter import KVCache
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.costs import StepCosts
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

SHAPES = {
    "llama-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=32, vocab_size=32000),
}  # fmt: skip
"""Models of random weights, whose steps take the time of real ones (Touvron et al. 2023, Table 2)."""
LENGTHS = (1, 2, 4, 8)
"""Draft lengths whose break-even is printed."""


@dataclass(frozen=True)
class Cost:
    """One exit layer behind one context.

    Attributes:
        exit_layer: k.
        context: tokens in the caches.
        steps: what steps cost.
        break_even: by draft length, the acceptance from which on blocks of it pay; infinite if they never do.
        draft_len: the best draft length at the acceptance asked about; 0 if none pays.
        speedup: over plain decoding then.
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
    """The draft length that is fastest if every draft is accepted with this chance, and its speed over plain steps."""
    speeds = [costs.speedup(acceptance, count) for count in range(len(costs.verify))]
    return speeds.index(max(speeds)), max(speeds)


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> EarlyExitLlamaForCausalLM:
    """A model of the named shape with random weights, made in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = EarlyExitLlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    return model


@torch.no_grad()
def costs_of(model: KangarooModel, longest: int, context: int, rows: int, acceptance: float) -> Cost:
    """Measure one exit layer."""
    steps = model.measure_costs(longest, context=context, rows=rows)
    best, speed = recommend(steps, acceptance)
    even = {count: steps.break_even(count) for count in LENGTHS if count <= longest}
    return Cost(model.base_model.exit_layer, context, steps, even, best, speed)


@torch.no_grad()
def step_parts(model: KangarooModel, draft_len: int, context: int = 128, repeats: int = 9) -> dict[str, float]:
    """Milliseconds of a block of `draft_len` drafts by part, medians; parts are run one after the other, uncaptured.

    Args:
        model: drafts and verifies.
        draft_len: drafts of the block; 0 is a plain step.
        context: tokens in the caches.
        repeats: blocks timed; two more go before them uncounted.
    """
    base, turns = model.base_model, []
    ids = (torch.arange(context + draft_len + 1, device=model.head_model.weight.device) % 7)[None]

    def block(drafting: Sequence[Tensor], verifying: Tensor) -> dict[str, float]:
        spent = {"drafting: shallow layers": 0.0, "drafting: drafter and exit head": 0.0}

        def clock(part: str, run: Callable[..., Tensor], given: Tensor, cache: KVCache) -> Tensor:
            began = model.now()
            out = run(given, cache=cache)
            spent[part] = spent.get(part, 0.0) + 1e3 * (model.now() - began)
            return out

        for one in drafting:
            states = clock("drafting: shallow layers", base.forward_shallow, one, caches.draft)
            states = clock("drafting: drafter and exit head", model.drafter_states, states, caches.drafter)
            clock("drafting: drafter and exit head", model.head_logits, states, caches.drafter)
        with base.without_adapters("lora_S"):
            states = clock("verifying: shallow layers", base.forward_shallow, verifying, caches.verify)
        states = clock("verifying: deep layers", base.forward_deep, states, caches.deep)
        clock("verifying: head", base.head_logits, states, caches.deep)
        return spent

    with base.decoding(context + draft_len + 1, model, "base") as caches:
        block([ids[:, :context]], ids[:, :context])
        drafts = [ids[:, at : at + 1] for at in range(context, context + draft_len)]
        for _ in range(repeats + 2):
            caches.roll_back(context)
            turns.append(block(drafts, ids[:, context:]))
    return dict(pd.DataFrame(turns[2:]).median())


@torch.no_grad()
def check(name: str, args: Namespace, lengths: Sequence[int] = (2, 4, 6)) -> list[Checked]:
    """Compare the cost model with the clock on a drafter's own questions, ways in turn on every question."""
    drafter = load_drafter(name, dtype=args.dtype, device=args.device)
    model, loaded = drafter.model, drafter.loaded
    sets = question_sets(loaded, asked_for(args, drafter), args.own, args.seed)
    prompts = spread([prompt for prompts in sets.values() for prompt in prompts], args.num_questions)
    ways = {PLAIN: DecodeConfig(0), **{str(count): DecodeConfig(count) for count in lengths}}
    seconds, tokens, accepted, drafted = ({way: 0.0 for way in ways} for _ in range(4))
    with model.base_model.folded():
        costs = model.step_costs(max(lengths))
        for prompt in [prompts[0], *tqdm(prompts, desc="checking", unit="question", leave=False)]:
            for way, how in ways.items():
                answer = timed(model, prompt, args.max_new_tokens, how, loaded.eos_ids)
                if prompt is not prompts[0]:  # which warms up
                    seconds[way] += answer.decoding_s
                    tokens[way] += len(answer.tokens) - 1
                    drafted[way] += answer.num_drafted
                    accepted[way] += answer.num_accepted
    found = []
    for count in lengths:
        way = str(count)
        rate, speed = accepted[way] / drafted[way], tokens[way] / seconds[way] * seconds[PLAIN] / tokens[PLAIN]
        found.append(Checked(count, rate, costs.speedup(rate, count), speed))
    return found


def _parse(argv: Sequence[str]) -> Namespace:
    parser = argparse.ArgumentParser(prog="dvirl cost", description=__doc__)
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help=f"model, or random weights: {', '.join(SHAPES)}")
    parser.add_argument("--exit_layers", type=int, nargs="+", default=[1, 2, 4, 6, 8, 12], help="k, one or several")
    parser.add_argument("--drafter", default="layer", help="none, adapter or layer; layer by default")
    parser.add_argument("--drafter_layers", type=int, default=2, help="layers of the drafter; 2 by default")
    parser.add_argument("--draft_vocab", type=int, default=16384, help="tokens the exit head covers; 0 for all")
    parser.add_argument("--draft_len", type=int, default=8, help="longest block; 8 by default")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128], help="tokens before a block, one or several")
    parser.add_argument("--rows", type=int, default=1, help="texts at once")
    parser.add_argument("--acceptance", type=float, default=0.7, help="for which to recommend a draft length")
    parser.add_argument("--check", default="", help="a drafter whose speed-up is measured as well, and compared")
    parser.add_argument("--num_questions", type=int, default=6, help="that --check decodes")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 by default")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; 2 by default")
    parser.add_argument("--figure", default="", help="also draw the steps over the contexts into this file")
    args = parse_measured(parser, argv)
    for name in ("draft_len", "rows", "threads", "num_questions"):
        if getattr(args, name) < 1:
            raise DvirlError(f"{name} is {getattr(args, name)}; expected at least 1")
    if min(args.contexts) < 1 or not 0.0 <= args.acceptance <= 1.0:
        raise DvirlError(f"expected contexts of at least 1 and an acceptance of 0 to 1, got {args.contexts} and "
                         f"{args.acceptance}")  # fmt: skip
    return args


def main(argv: Sequence[str]) -> list[Cost]:
    """Measure, print a line for every exit layer and context with what to set, and write them if asked to.

    Raises:
        DvirlError: for bad input.
    """
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    if args.model_name in SHAPES:
        base, where = random_model(args.model_name, resolve_dtype(args.dtype, device), device), {}
    else:
        loaded = load(args.model_name, args.dtype, args.device)
        base, where = loaded.model, provenance(loaded)
    covered = range(args.draft_vocab) if 0 < args.draft_vocab < base.config.vocab_size else None
    draft = Namespace(drafter=args.drafter, drafter_layers=args.drafter_layers, draft_vocab=covered)
    found = []
    for k in tqdm(args.exit_layers, desc="measuring", unit="exit layer", leave=False):
        try:
            model = KangarooModel(base, None, draft, k)
        except ValueError as error:
            raise DvirlError(str(error)) from error
        found += [costs_of(model, args.draft_len, context, args.rows, args.acceptance) for context in args.contexts]
    print(table(found, args.acceptance))
    best = max(found, key=lambda one: one.speedup)
    print(f"at an acceptance of {args.acceptance:.2f} the fastest is exit layer {best.exit_layer} with draft_len "
          f"{best.draft_len}: {best.speedup:.2f} times plain decoding")  # fmt: skip
    checked = check(args.check, args) if args.check else []
    for one in checked:
        print(f"{args.check}, draft_len {one.draft_len}: predicted {one.predicted:.2f} from an accept rate of "
              f"{one.accept_rate:.2f}, measured {one.measured:.2f}")  # fmt: skip
    if args.figure:
        plots.steps_by_context([(one.exit_layer, one.context, one.steps) for one in found], Path(args.figure))
    if args.out:
        figures = {"costs": [asdict(one) for one in found], "checked": [asdict(one) for one in checked]}
        write_json(args.out, {"arguments": vars(args), **where, **figures})
    return found


def table(found: Sequence[Cost], acceptance: float) -> str:
    """A line for every cost."""
    rows = [
        {
            "k": one.exit_layer,
            "context": one.context,
            "plain ms": one.steps.verify[0],
            "draft ms": one.steps.draft,
            "draft/plain": one.steps.draft / one.steps.verify[0],
            f"verify {len(one.steps.verify) - 1}/plain": one.steps.verify[-1] / one.steps.verify[0],
            **{f"even n={count}": chance for count, chance in one.break_even.items()},
            f"best n at {acceptance:.2f}": one.draft_len,
            "speed-up": one.speedup,
        }
        for one in found
    ]
    return pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format)
