"""Picking tokens from logits, by argmax or by sampling, and which drafts a verifier accepts.

A sampled token is the argmax of perturbed scores (Gumbel-max; Maddison et al. 2014, arXiv 1411.0030). The noise belongs
to the place in the text and to the token, and drafts are drawn with the noise of the verifier. So the same seed gives
the same answer whatever drafts: drafter-invariant speculative decoding (Daliri et al. 2024, arXiv 2408.07978).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

GOLDEN = -0x61C8864680B583EB
"""2**64 over the golden ratio, as a signed number: the step of SplitMix64 (Steele et al. 2014)."""
MIXING = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
"""Shifts and factors by which SplitMix64 mixes bits, in Stafford's variant 13."""
LAST_SHIFT = 31
NOISE_BITS = 52


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: at a temperature above 0, cut to top_k (0: all) and top_p."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_cut(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1.0

    def scores(self, logits: Tensor) -> Tensor:
        """Log-probabilities up to a constant, float64, of logits `[N, V]`; minus infinity for what is cut.

        Temperature, then top-k, then top-p, by Hugging Face's own warpers, so that they mean the same here as there.
        """
        scores: Tensor = TemperatureLogitsWarper(float(self.temperature))(None, logits.double())
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(None, scores)
        if self.top_p < 1.0:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return scores

    def perturbed(self, logits: Tensor, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """Scores `[…, V]` whose argmax is a sample, from logits `[…, V]`.

        Args:
            logits: one row a place.
            keys: `[…]`, of the places.
            ids: `[V]`, the tokens; 0, 1, … by default.
        """
        if ids is None:
            ids = torch.arange(logits.shape[-1], device=logits.device)
        scores = self.scores(logits.flatten(0, -2)).view(logits.shape)
        return scores + gumbel_noise(keys, ids)


@dataclass(frozen=True)
class Drawn:
    """How tokens at some places are drawn.

    Attributes:
        how: temperature and cuts.
        keys: of the places, see `gumbel_noise`, in the shape of the tokens.
        is_draft: whether these are drafts.
    """

    how: Sampling
    keys: Tensor
    is_draft: bool = False


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise `[…, V]`, float64, for tokens `[V]` at places with these keys `[…]`, both int64.

    It is a hash (SplitMix64) of place and token, so that whoever draws there finds the same.
    """
    bits = keys[..., None] + ids * GOLDEN
    for shift, factor in MIXING:
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, LAST_SHIFT)
    uniform = (_shifted(bits, 64 - NOISE_BITS).double() + 0.5) / 2**NOISE_BITS  # above 0, below 1
    noise: Tensor = -(-uniform.log()).log()
    return noise


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Bits moved to the right, with zeros from the left."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


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
    probabilities = Sampling(temperature).scores(logits).softmax(dim=-1)
    return inverse_cdf(probabilities, noise), probabilities.amax(dim=-1).float()


def count_accepted(draft_tokens: Sequence[int], verifier_tokens: Sequence[int]) -> int:
    """Length of the prefix on which draft and verifier agree (greedy verification)."""
    for count, (drafted, own) in enumerate(zip(draft_tokens, verifier_tokens, strict=False)):
        if drafted != own:
            return count
    return min(len(draft_tokens), len(verifier_tokens))
