"""The newest transformers, economize and flashspec as peers; run in an environment of their own.

`python peers_others.py LIBRARY THREADS MODEL DRAFT EOS...`; `peers.py` starts it and asks.
"""

import sys

import torch
from peer_process import serve
from transformers import AutoModelForCausalLM

library, threads, target_folder, draft_folder, *ends = sys.argv[1:]
ends = [int(token) for token in ends]
LEARNED = 4
"""Drafts of a block by our exported draft, as in `check.py`."""
LOOKED_UP = 10
"""Most drafts of a block by lookup; flashspec has its own default, since it verifies as many without a match."""


def load(folder):
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Counted:
    """A model whose passes are counted: those of its last layer, which no draft runs."""

    def __init__(self):
        self.model = load(target_folder)
        self.passes = 0
        self.model.model.layers[-1].mlp.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.passes += 1

    def way(self, decode):
        """A way of `serve` from a function from a prompt and a limit to new tokens."""

        def answer(prompt, limit):
            before = self.passes
            tokens = decode(prompt, limit)
            return tokens, self.passes - before

        return answer


def transformers_ways():
    """`generate` in its forms; they share the model."""
    target = Counted()

    def way(**options):
        def decode(prompt, limit):
            ids = torch.tensor([prompt])
            output = target.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
                **options,
            )
            return output[0, len(prompt) :].tolist()

        return target.way(decode)

    def assisted():
        draft = load(draft_folder)
        how = draft.generation_config
        how.num_assistant_tokens = LEARNED
        how.num_assistant_tokens_schedule = "constant"
        how.assistant_confidence_threshold = 0.0
        return way(assistant_model=draft)

    return {
        "`generate`": way,
        "`generate`, static cache": lambda: way(cache_implementation="static"),
        "prompt lookup": lambda: way(prompt_lookup_num_tokens=LOOKED_UP),
        "assisted by our draft": assisted,
    }


def economize_ways():
    """What economize drafts without a training: lookups, and our exported draft where no lookup is found."""
    import economize
    from economize.techniques.draft_model import DraftModelConfig
    from economize.techniques.hybrid import HybridConfig
    from economize.techniques.lookup import LookupConfig

    def way(technique):
        target = Counted()
        decoding = economize.DecodeConfig(cycle_length=1 + LOOKED_UP)
        model = economize.apply(target.model, technique, decoding=decoding)

        def decode(prompt, limit):
            return model.decode(torch.tensor(prompt), limit, stop=ends).tokens.tolist()

        return target.way(decode)

    def together():
        return way(HybridConfig(fallback=DraftModelConfig(model=draft_folder), max_drafts=LEARNED))

    return {"lookup": lambda: way(LookupConfig()), "lookup, else our draft": together}


def flashspec_ways():
    """Its lookup of four tokens, and its default: a lookup of up to six, else two drafts, here by our exported draft."""
    import flashspec
    from flashspec.engine import HuggingFaceDrafter, NgramDrafter, TargetModel

    cpu = torch.device("cpu")

    def way(drafter, **options):
        target = Counted()
        config = flashspec.FlashSpecConfig(
            device="cpu",
            dtype="float32",
            sampling=flashspec.SamplingConfig(temperature=0.0),
            **options,
        )
        verifier = TargetModel(target_folder, cpu, torch.float32, model=target.model)
        engine = flashspec.SpeculativeEngine(config, [drafter], verifier)

        def decode(prompt, limit):
            made = engine.generate(torch.tensor([prompt]), max_new_tokens=limit, eos_token_ids=ends)
            return made.output_ids[0, : made.n_tokens_generated].tolist()

        return target.way(decode)

    def lookup():
        alone = flashspec.BanditConfig(n_arms=1)
        return way(NgramDrafter(), drafter_strategy="bandit", bandit=alone)

    def together():
        return way(HuggingFaceDrafter(draft_folder, cpu, torch.float32, model=load(draft_folder)))

    return {"lookup": lookup, "lookup, else our draft": together}


if __name__ == "__main__":
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    serve(globals()[f"{library}_ways"]())
