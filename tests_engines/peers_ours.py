"""Our own ways of decoding, and `generate` of the transformers that we pin, as peers.

`python peers_ours.py dvirl|pinned THREADS`; `peers.py` starts it and asks.
"""

import sys
from contextlib import ExitStack
from functools import cache

import torch
from peer_process import serve

from dvirl.evaluation.inference_baseline import generate_forward, hugging_face
from dvirl.evaluation.measure import timed
from dvirl.evaluation.methods import decode_configs
from dvirl.models.drafters import load_drafter
from dvirl.models.loading import DEFAULT_MODEL, load

LONGEST = 8
"""Most drafts of a block, as in `dvirl bench`."""
FIRST, SECOND = "smollm2-135m-k2", "smollm2-135m-k2-recurrent"
stack = ExitStack()


@cache
def drafter(name):
    """A drafter whose steps were timed: the length of blocks follows from their costs."""
    loaded = load_drafter(name, None, "float32", "cpu")
    stack.enter_context(loaded.model.base_model.merged())
    loaded.model.measure_costs(LONGEST)
    return loaded


def way(name, method):
    """A method of `dvirl evaluate` with a drafter."""
    draft = drafter(name)
    config = decode_configs(LONGEST)[method]

    def answer(prompt, limit):
        given = timed(draft.model, prompt, limit, config, draft.loaded.eos_ids)
        return given.tokens, len(given.blocks)

    return answer


def pinned():
    """Plain decoding by Hugging Face's loop."""
    loaded = load(DEFAULT_MODEL, "float32", "cpu")
    model = hugging_face(loaded)

    def answer(prompt, limit):
        tokens = generate_forward(model, prompt, limit, loaded.eos_ids).tokens
        return tokens, len(tokens)

    return answer


WAYS = {
    "dvirl": {
        "plain": lambda: way(FIRST, "plain"),
        "lookup": lambda: way(FIRST, "pld"),
        "learned": lambda: way(FIRST, "dvi"),
        "together": lambda: way(FIRST, "hybrid"),
        "together, second drafter": lambda: way(SECOND, "hybrid"),
    },
    "pinned": {"`generate`": pinned},
}

if __name__ == "__main__":
    which, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with stack, torch.no_grad():
        serve(WAYS[which])
