"""What a verifier makes of given responses: their perplexity, and how far it has drifted from the untouched model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dvirl.rollout import verifier_states
from dvirl.sgp import collate
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.sgp_lora import lora_parameters


@torch.no_grad()
def verifier_sums(base: EarlyExitLlamaForCausalLM, examples: Sequence[Tensor], target: str = "base") -> Tensor:
    """Sums over response tokens, `[5]`; those of several batches add up. What they mean says `verifier_figures`.

    Args:
        base: the model, with its adapters.
        examples: `sgp.make_example` of prompts and responses.
        target: what the verifier's deep layers read, base or adapted.
    """
    tokens, targets = (one.to(base.device) for one in collate(examples))
    said = targets >= 0

    def log_probs(off: Sequence[str]) -> Tensor:
        logits: Tensor = base.lm_head(verifier_states(base, tokens, off)[said])
        return logits.float().log_softmax(dim=-1)

    there = [name for name in ("lora_S", "lora_D") if lora_parameters(base, [name])]
    served = [name for name in there if name == "lora_S" and target == "base"]
    own = log_probs(served)
    untouched = own if served == there else log_probs(there)
    losses = [F.nll_loss(one, targets[said], reduction="sum") for one in (own, untouched)]
    divergence = F.kl_div(untouched, own, log_target=True, reduction="sum")
    changed = (own.argmax(dim=-1) != untouched.argmax(dim=-1)).sum()
    return torch.tensor([float(one) for one in (*losses, divergence, changed, said.sum())], dtype=torch.float64)


def verifier_figures(sums: Tensor) -> dict[str, float]:
    """What the sums `[5]` of `verifier_sums` mean.

    Returns:
        `ppl` and `ppl_untouched`, the perplexity under the verifier and under the untouched model; `drift_kl`, the KL
        of the verifier to the untouched model in nats a token; `drift_tokens`, the share of greedy tokens that differ.
    """
    means = sums[:4] / sums[4]
    figures = [*means[:2].exp().tolist(), *means[2:].tolist()]
    return dict(zip(("ppl", "ppl_untouched", "drift_kl", "drift_tokens"), figures, strict=True))
