"""A draft that learns while it serves, and the same draft without learning: the same prompts, in turn."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
from tqdm import tqdm

from dvirl.evaluation.measure import in_turn
from dvirl.live import LiveConfig, LiveSession
from dvirl.metrics import Tally
from dvirl.models.loading import load

FROZEN = "frozen"
LIVE = "live"


def serve_both(
    model_name: str, drafter: str, dtype: str, prompts: Sequence[str], config: LiveConfig
) -> pd.DataFrame:
    """Answer a stream of prompts with the draft as it is and with one that learns, in a changing order.

    Args:
        model_name: name or folder of the model.
        drafter: name or folder of the draft.
        dtype: of the weights.
        prompts: the users' texts, each a conversation of its own.
        config: of the session that learns; the other one's budget is 0.

    Returns:
        A row for each prompt and session: `prompt` from 1, `session`, `tokens` and `blocks` of its answer without the
        prefill's, `answer_s` and `learn_s`, seconds spent on the answer and on learning after it, and `done`, what was
        learned.
    """
    configs = {FROZEN: replace(config, budget=0.0, run_dir=""), LIVE: config}
    rows = []
    sessions = {name: LiveSession(load(model_name, dtype), drafter, one) for name, one in configs.items()}
    with sessions[FROZEN], sessions[LIVE]:
        answer = {name: partial(_row, name, session) for name, session in sessions.items()}
        for turn, text in enumerate(tqdm(prompts, desc="serving", unit="prompt", leave=False)):
            tokens = sessions[LIVE].loaded.chat.encode((text,))
            for name in in_turn(list(answer), turn):
                rows.append({"prompt": turn + 1, **answer[name](tokens)})
    return pd.DataFrame(rows)


def _row(name: str, session: LiveSession, prompt: Sequence[int]) -> dict[str, object]:
    """One answer of a session."""
    counters = session.counters
    before = (counters.answer_s, counters.learn_s)
    tally = Tally()
    tally.count(list(session.stream(prompt))[1:])
    done = session.learn()
    spent = {"answer_s": counters.answer_s - before[0], "learn_s": counters.learn_s - before[1]}
    return {"session": name, "tokens": tally.committed, "blocks": tally.blocks, **spent, "done": done}


def windows(served: pd.DataFrame, size: int) -> pd.DataFrame:
    """Tokens a block and seconds in windows of `size` prompts.

    Args:
        served: what `serve_both` gives.
        size: prompts of a window.

    Returns:
        A row for each window, named by its last prompt: tokens a block of either session, the live one's over the
        frozen one's, and the seconds of all so far, learning counted in.
    """
    window = ((served.prompt - 1) // size + 1) * size
    sums = served.groupby([window, "session"])[["tokens", "blocks", "answer_s", "learn_s"]].sum().unstack()
    mat = sums.tokens / sums.blocks
    seconds = (sums.answer_s + sums.learn_s).cumsum()
    table = pd.DataFrame({f"tokens a block, {name}": mat[name] for name in (FROZEN, LIVE)})
    table["live over frozen"] = mat[LIVE] / mat[FROZEN]
    for name in (FROZEN, LIVE):
        table[f"seconds so far, {name}"] = seconds[name]
    return table.rename_axis("prompts")
