"""Picking tokens from logits, and which drafts a verifier accepts: by argmax, or by speculative sampling."""

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Float64 probabilities `[N, V]` of logits `[N, V]` at a temperature above 0, cut to top_k (0: all) and top_p.

    Temperature, then top-k, then top-p, by Hugging Face's own warpers, so that they mean the same here as there.
    """
    scores = TemperatureLogitsWarper(float(temperature))(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    probabilities: Tensor = scores.softmax(dim=-1)
    return probabilities


def inverse_cdf(weights: Tensor, noise: Tensor) -> Tensor:
    """Tokens `[N]` drawn from weights `[N, V]`, which need not sum to 1, by uniform numbers `[N]` in [0, 1)."""
    cumulative = weights.double().cumsum(dim=-1)
    cut = noise.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, cut, right=True).squeeze(1).clamp(max=weights.shape[-1] - 1)


def choose_tokens(logits: Tensor, temperature: float = 0.0, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick a token from each row of draft logits, by argmax or by inverse-CDF sampling.

    Args:
        logits: `[N, V]`, float32.
        temperature: 0 for argmax.
        noise: `[N]`, uniform in [0, 1): the same noise and logits give the same tokens. Needed above temperature 0.

    Returns:
        Tokens `[N]` and the policy's largest probability `[N]`, at temperature 1 for argmax.
    """
    if temperature == 0.0:
        confidence, tokens = logits.softmax(dim=-1).max(dim=-1)
        return tokens, confidence
    if noise is None:
        raise ValueError("sampled drafts need noise")
    probabilities = distribution(logits, temperature)
    return inverse_cdf(probabilities, noise), probabilities.amax(dim=-1).float()


def count_accepted(draft_tokens: list[int], verifier_tokens: list[int]) -> int:
    """Length of the prefix on which draft and verifier agree (greedy verification)."""
    for count, (drafted, own) in enumerate(zip(draft_tokens, verifier_tokens, strict=False)):
        if drafted != own:
            return count
    return min(len(draft_tokens), len(verifier_tokens))


def speculative_sampling(target: Tensor, proposed: Tensor, drafted: Tensor, uniform: Tensor) -> tuple[int, int]:
    """Accept drafts so that what is committed follows the target, whatever proposed them.

    Draft x is accepted with probability min(1, p(x) / q(x)); the first reject is replaced by a draw from max(p - q, 0),
    and behind n accepted drafts stands a draw from p (Leviathan et al. 2023, Chen et al. 2023).

    Args:
        target: `[n + 1, V]`, p at each position.
        proposed: `[n, V]`, q that each draft was drawn from; one-hot for a draft that was not drawn.
        drafted: `[n]`, the drafts.
        uniform: `[n + 1]`, uniform in [0, 1), the last one for the verifier's own token.

    Returns:
        How many drafts are accepted, and the verifier's own token behind them.
    """
    count, rows = len(drafted), torch.arange(len(drafted), device=target.device)
    passes = uniform[:count] * proposed[rows, drafted] < target[rows, drafted]
    accepted = int(passes.long().cumprod(dim=0).sum())
    rest = target[accepted]
    if accepted < count:
        left = (rest - proposed[accepted]).clamp(min=0.0)
        rest = left if float(left.sum()) > 0.0 else rest  # p = q but for rounding: nothing is left over
    return accepted, int(inverse_cdf(rest[None], uniform[count:]))
