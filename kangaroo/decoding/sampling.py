"""Picking tokens from logits, and which drafts a verifier accepts: by argmax, or by speculative sampling."""

from collections.abc import Sequence

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
    total = cumulative[:, -1:]
    threshold = noise.double()[:, None] * total
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return tokens.clamp(max=weights.shape[-1] - 1)


def choose_tokens(
    logits: Tensor, temperature: float = 0.0, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pick a token from each row of draft logits, by argmax or by inverse-CDF sampling.

    Args:
        logits: `[N, V]`, float32.
        temperature: 0 for argmax.
        noise: `[N]`, uniform in [0, 1): the same noise and logits give the same tokens. Needed above temperature 0.

    Returns:
        Tokens `[N]` and the policy's largest probability `[N]`, at temperature 1 for argmax.

    Raises:
        ValueError: for sampling without noise.
    """
    if temperature == 0.0:
        confidence, tokens = logits.softmax(dim=-1).max(dim=-1)
        return tokens, confidence
    if noise is None:
        raise ValueError("sampled drafts need noise")
    probabilities = distribution(logits, temperature)
    return inverse_cdf(probabilities, noise), probabilities.amax(dim=-1).float()


def count_accepted(draft_tokens: Sequence[int], verifier_tokens: Sequence[int]) -> int:
    """Length of the prefix on which draft and verifier agree (greedy verification)."""
    for count, (drafted, own) in enumerate(zip(draft_tokens, verifier_tokens, strict=False)):
        if drafted != own:
            return count
    return min(len(draft_tokens), len(verifier_tokens))


def speculative_sampling(
    target: Tensor, proposed: Tensor, drafted: Tensor, uniform: Tensor
) -> tuple[int, int]:
    """Accept drafts so that what is committed follows the target, whatever proposed them.

    Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318).

    Args:
        target: `[n + 1, V]`, p at each position.
        proposed: `[n, V]`, q that each draft was drawn from; one-hot for a draft that was not drawn.
        drafted: `[n]`, the drafts.
        uniform: `[n + 1]`, uniform in [0, 1), the last one for the verifier's own token.

    Returns:
        The number of accepted drafts, and the verifier's own token that follows them.
    """
    count = len(drafted)
    positions = torch.arange(count, device=target.device)
    # Accept draft x with probability min(1, p(x) / q(x)): u < p / q, multiplied out.
    p = target[positions, drafted]
    q = proposed[positions, drafted]
    passes = uniform[:count] * q < p
    accepted = int(passes.long().cumprod(dim=0).sum())
    weights = target[accepted]  # all accepted: the bonus token is drawn from p
    if accepted < count:
        # The first reject is replaced by a draw from what p has left over q, max(p - q, 0).
        residual = (weights - proposed[accepted]).clamp(min=0.0)
        if float(residual.sum()) > 0.0:  # p equals q but for rounding: nothing is left over, so draw from p
            weights = residual
    return accepted, int(inverse_cdf(weights[None], uniform[count:]))


def speculative_sampling_of_chains(
    targets: Sequence[Tensor], proposed: Sequence[Tensor], drafted: Sequence[Tensor], uniform: Sequence[float]
) -> tuple[list[int], int]:
    """The same for several chains of drafts after one text, by recursive rejection over siblings.

    SpecInfer (Miao et al. 2024, arXiv 2305.09781). At each position the chains that were right so far propose in turn;
    after a reject the next one is held against what the target has left over.

    Args:
        targets, proposed, drafted: as in `speculative_sampling`, of each chain.
        uniform: numbers in [0, 1), one for each draft and one more.

    Returns:
        The number of accepted drafts of each chain, and the verifier's own token that follows the longest.
    """
    noise = iter(uniform)
    counts = [0] * len(drafted)
    alive = list(range(len(drafted)))  # chains that were right so far
    for depth in range(max(map(len, drafted)) + 1):
        weights = targets[alive[0]][depth]
        accepted: int | None = None
        for chain in alive:
            if depth == len(drafted[chain]):
                continue
            token = int(drafted[chain][depth])
            q = proposed[chain][depth]
            total = weights.sum()
            # The same rule, of weights that do not sum to 1: u < p / q with p = weights / total.
            if next(noise) * float(q[token] * total) < float(weights[token]):
                accepted = token
                break
            residual = (weights / total - q).clamp(min=0.0)
            if float(residual.sum()) > 0.0:  # else p equals q but for rounding
                weights = residual
        if accepted is None:
            break
        right = []
        for chain in alive:
            if depth < len(drafted[chain]) and int(drafted[chain][depth]) == accepted:
                counts[chain] = depth + 1
                right.append(chain)
        alive = right
    return counts, int(inverse_cdf(weights[None], weights.new_tensor([next(noise)])))
