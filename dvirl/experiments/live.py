"""A draft that learns and remembers while it serves, and the same draft as it is: the same prompts, in turn."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import pandas as pd
from tqdm import tqdm

from dvirl.data.domains import docstring_prompts
from dvirl.data.sources import chatterbot_prompts
from dvirl.evaluation.measure import in_turn
from dvirl.live import LiveConfig, LiveSession
from dvirl.metrics import Tally
from dvirl.models.loading import load
from dvirl.runs.errors import DvirlError

FROZEN = "frozen"
REMEMBERS = "remembers"
LIVE = "live"
FLIPS_EVERY = 5
"""Prompts after which a flipping stream changes its domain."""


def question_prompts(count: int, seed: int = 0) -> list[str]:
    """Questions of many topics, shuffled: the openings of chatterbot's conversations."""
    texts = [prompt.turns[0] for prompt in chatterbot_prompts()]
    random.Random(seed).shuffle(texts)
    return texts[:count]


def one_domain(count: int, seed: int = 0) -> list[str]:
    """Requests for docstrings, and after these a sixth as many questions of many topics."""
    return docstring_prompts(count, seed) + question_prompts(count // 6, seed)


def mixed(count: int, seed: int = 0) -> list[str]:
    """Requests for docstrings and questions of many topics, in random order."""
    rng = random.Random(seed)
    pairs = zip(docstring_prompts(count, seed), question_prompts(count, seed), strict=True)
    return [rng.choice(pair) for pair in pairs]


def flipping(count: int, seed: int = 0) -> list[str]:
    """The same in turn, a few of each."""
    domains = (docstring_prompts(count, seed), question_prompts(count, seed))
    return [domains[place // FLIPS_EVERY % 2][place] for place in range(count)]


def poisoned(count: int, seed: int = 0) -> list[str]:
    """Requests for docstrings; in place of every second one its letters in random order, every third of these again."""
    rng = random.Random(seed)
    prompts = docstring_prompts(count, seed)
    for place in range(1, count, 2):
        letters = list(prompts[place])
        rng.shuffle(letters)
        prompts[place] = prompts[place - 2] if place % 6 == 5 else "".join(letters)
    return prompts


def serve_both(
    model_name: str,
    drafter: str,
    dtype: str,
    prompts: Sequence[str],
    config: LiveConfig,
    names: Sequence[str] = (FROZEN, LIVE),
) -> pd.DataFrame:
    """Answer a stream of prompts with the draft as it is and with one that learns, in a changing order.

    Args:
        model_name: name or folder of the model.
        drafter: name or folder of the draft.
        dtype: of the weights.
        prompts: the users' texts, each a conversation of its own.
        config: of the live session; the frozen one has no budget and remembers nothing, and the one that `REMEMBERS`
            has no budget.
        names: of the sessions.

    Returns:
        A row for each prompt and session: `prompt` from 1, `session`, `tokens` and `blocks` of its answer without the
        prefill's, `answer_s` and `learn_s`, seconds spent on the answer and on learning after it, and `done`, what was
        learned. Its `attrs` have the `costs` of steps by which blocks were chosen.
    """
    unlearning = replace(config, budget=0.0, run_dir="")
    configs = {FROZEN: replace(unlearning, remember=0), REMEMBERS: unlearning, LIVE: config}
    rows = []
    sessions = {name: LiveSession(load(model_name, dtype), drafter, configs[name]) for name in names}
    first = sessions[names[0]]
    with ExitStack() as opened:
        for session in sessions.values():
            # What steps cost is measured once, so that all choose their blocks by the same figures.
            session.model.share_costs(first.model)
            opened.enter_context(session)
        for turn, text in enumerate(tqdm(prompts, desc="serving", unit="prompt", leave=False)):
            tokens = first.loaded.chat.encode((text,))
            for name in in_turn(names, turn):
                rows.append({"prompt": turn + 1, "session": name, **_answer(sessions[name], tokens)})
    served = pd.DataFrame(rows)
    if config.adaptive:
        served.attrs["costs"] = asdict(first.model.step_costs(config.draft_len))
    return served


def _answer(session: LiveSession, prompt: Sequence[int]) -> dict[str, object]:
    """What an answer of a session took, and what was learned after it."""
    counters = session.counters
    before = replace(counters)
    tally = Tally()
    tally.count(list(session.stream(prompt))[1:])
    done = session.learn()
    return {
        "tokens": tally.committed,
        "blocks": tally.blocks,
        "answer_s": counters.answer_s - before.answer_s,
        "learn_s": counters.learn_s - before.learn_s,
        "done": done,
    }


def windows(served: pd.DataFrame, size: int) -> pd.DataFrame:
    """Tokens a block and seconds in windows of `size` prompts.

    Args:
        served: what `serve_both` gives.
        size: prompts of a window.

    Returns:
        A row for each window, named by its last prompt: tokens a block of every session and the live one's over the
        frozen one's; the live one's speed over the frozen one's, learning counted in; and the seconds so far. The speed
        is by the median of all prompts' ratios, since other load on the machine can double the time of an answer.
    """
    if served.empty:
        raise DvirlError("there is no prompt; expected at least one")
    last = ((served.prompt - 1) // size + 1) * size
    served = served.assign(window=last.clip(upper=served.prompt.max()))
    sums = served.groupby(["window", "session"]).sum(numeric_only=True).unstack()
    mat = sums.tokens / sums.blocks
    so_far = (sums.answer_s + sums.learn_s).cumsum()
    answer_s = served.pivot(index=["window", "prompt"], columns="session", values="answer_s")
    ratio = (answer_s[FROZEN] / answer_s[LIVE]).groupby("window").median()
    learning = 1 + sums.learn_s[LIVE] / sums.answer_s[LIVE]
    table = pd.DataFrame({f"tokens a block, {name}": mat[name] for name in (FROZEN, LIVE)})
    table["live over frozen"] = mat[LIVE] / mat[FROZEN]
    table["speed, live over frozen"] = ratio / learning
    for name in (FROZEN, LIVE):
        table[f"seconds so far, {name}"] = so_far[name]
    return table.rename_axis("prompts")


def figures(served: pd.DataFrame, size: int = 50) -> dict[str, float | None]:
    """What a stream shows, in short: `windows` of `size` prompts and of all of it, and `break_even`.

    Args:
        served: what `serve_both` gives.
        size: prompts of a window.

    Returns:
        Tokens a block of both sessions (`frozen_mat`, `live_mat`) and their ratio, `speed` over all and in the
        `slowest_window`, the `break_even`, and the share of the live session's time that `learning` took.
    """
    whole = windows(served, int(served.prompt.max())).iloc[0]
    live = served[served.session == LIVE]
    return {
        "frozen_mat": whole[f"tokens a block, {FROZEN}"],
        "live_mat": whole[f"tokens a block, {LIVE}"],
        "mat_ratio": whole["live over frozen"],
        "speed": whole["speed, live over frozen"],
        "slowest_window": windows(served, size)["speed, live over frozen"].min(),
        "break_even": break_even(served),
        "learning": live.learn_s.sum() / (live.learn_s + live.answer_s).sum(),
    }


def break_even(served: pd.DataFrame) -> int | None:
    """The first prompt from which on the live session is ahead, learning counted in; None if there is none."""
    seconds = served.assign(s=served.answer_s + served.learn_s).pivot(
        index="prompt", columns="session", values="s"
    )
    slower = (seconds[LIVE] - seconds[FROZEN]).cumsum() >= 0
    last = int(slower[slower].index.max()) if slower.any() else 0
    return last + 1 if last < len(slower) else None
