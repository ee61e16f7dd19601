"""Sampling with drafts follows the verifier's own distribution: against every sequence that a tiny model can say."""

from __future__ import annotations

import random
from argparse import Namespace
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import random_prompts, tiny_config, tiny_kangaroo

from kangaroo.decoding import speculate
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.drafting import Memory
from kangaroo.decoding.sampling import (
    distribution,
    inverse_cdf,
    speculative_sampling,
    speculative_sampling_of_chains,
)
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

VOCAB, LENGTH, DRAWS, ROWS = 5, 3, 20_000, 2_000
PROMPT = [0, 4, 4, 3, 4, 2, 4, 1, 4, 0, 3, 3, 2, 3, 1, 3, 0, 2, 2, 1, 2, 0, 1, 1, 0, 0]
"""Every pair of tokens once, so that there is always something to look up."""


def by_hand(logits: np.ndarray, how: DecodeConfig) -> np.ndarray:
    """Probabilities at a temperature, cut to top_k and top_p, without the package's own code."""
    weights = np.exp((logits - logits.max()) / how.temperature)
    order = np.argsort(-weights)
    kept = order[: how.top_k or len(order)]
    shares = weights[kept] / weights[kept].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(shares), how.top_p - 1e-12)) + 1]
    chances = np.zeros_like(weights)
    chances[kept] = weights[kept] / weights[kept].sum()
    return chances


@torch.no_grad()
def exact(model: KangarooModel, how: DecodeConfig) -> dict[tuple[int, ...], float]:
    """The probability of every response, from the whole model without a cache."""
    answers = {(): 1.0}
    for _ in range(LENGTH):
        ids = torch.tensor([[*PROMPT, *answer] for answer in answers])
        logits = model.base_model(ids).logits[:, -1].double().numpy()
        answers = {
            (*answer, token): chance * step
            for (answer, chance), row in zip(answers.items(), logits, strict=True)
            for token, step in enumerate(by_hand(row, how))
        }
    return answers


class Adversary(KangarooModel):
    """Drafts what the verifier finds least likely, and is sure of it."""

    def drafter_parts(self):
        parts = super().drafter_parts()
        return replace(
            parts, weights=replace(parts.weights, head=lambda states: -5.0 * parts.weights.head(states))
        )


class Remembering(KangarooModel):
    """Looks drafts up in an earlier text that knows every pair of tokens and no model."""

    def decode_rows(self, *arguments):
        memory = Memory(100)
        memory.add([random.Random(0).randrange(VOCAB) for _ in range(100)])
        return super().decode_rows(*arguments, memory=memory)


def five_tokens(kind=KangarooModel, **args):
    torch.manual_seed(0)
    base = EarlyExitLlamaForCausalLM(tiny_config(vocab_size=VOCAB, num_hidden_layers=2)).eval()
    for parameter in base.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    return kind(base, None, Namespace(**args), 1)


def p_value(model: KangarooModel, how: DecodeConfig, draws: int = DRAWS) -> tuple[float, float]:
    """Of the responses drawn against the exact distribution, and the share of drafts that was accepted."""
    counts = dict.fromkeys(product(range(VOCAB), repeat=LENGTH), 0)
    drafted = accepted = 0
    for start in range(0, draws, ROWS):
        for one in model.generate_batch([PROMPT] * ROWS, LENGTH, how, seed=range(start, start + ROWS)):
            counts[tuple(one.tokens)] += 1
            drafted += sum(block.num_drafted for block in one.blocks)
            accepted += sum(block.num_accepted for block in one.blocks)
    chances = exact(model, how)
    assert abs(sum(chances.values()) - 1.0) < 1e-9
    assert not [answer for answer, chance in chances.items() if chance == 0.0 and counts[answer]]
    large = [answer for answer, chance in chances.items() if draws * chance >= 5.0]
    seen, due = [counts[a] for a in large], [draws * chances[a] for a in large]
    if draws - sum(due) > 1e-6 * draws:
        seen, due = [*seen, draws - sum(seen)], [*due, draws - sum(due)]
    assert len(large) > 8 and drafted > draws / 2
    squares = sum((a - b) ** 2 / b for a, b in zip(seen, due, strict=True))
    half = torch.tensor([(len(seen) - 1) / 2, squares / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])), accepted / drafted


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("how", "args", "kind"),
    [
        (DecodeConfig(3, temperature=0.9, draft_temperature=1.4), dict(draft_vocab=[0, 3]), KangarooModel),
        (
            DecodeConfig(3, temperature=3.0, top_k=4, top_p=0.95, source="hybrid", draft_temperature=0.7),
            {},
            Adversary,
        ),
        (DecodeConfig(3, temperature=1.5, source="hybrid", branches=2), {}, KangarooModel),
        (DecodeConfig(3, temperature=1.5, source="lookup"), {}, Remembering),
    ],
    ids=["draft vocabulary", "adversary and lookup, cut", "branches and lookup", "earlier texts"],
)
def test_speculative_samples_follow_the_exact_distribution(how, args, kind):
    chance, rate = p_value(five_tokens(kind, **args), how)
    assert chance > 1e-3 and 0.02 < rate < 0.98


def test_a_planted_error_is_found(monkeypatch):
    """The control: a reject replaced by a draw from p, rather than from what p has left over q, changes the odds."""

    def wrong(target, proposed, drafted, uniform):
        accepted, token = speculative_sampling(target, proposed, drafted, uniform)
        return accepted, int(inverse_cdf(target[accepted][None], uniform[len(drafted) :])) if len(
            drafted
        ) else token

    monkeypatch.setattr(speculate, "speculative_sampling", wrong)
    how = DecodeConfig(3, temperature=0.9, draft_temperature=1.4)
    assert p_value(five_tokens(draft_vocab=[0, 3]), how, 10_000)[0] < 1e-6


def test_a_planted_error_among_two_chains_is_found(monkeypatch):
    """The control: a second chain that is held against p again, rather than against what the first has left over."""

    def wrong(targets, proposed, drafted, uniform):
        counts, token = speculative_sampling_of_chains(targets, proposed, drafted, uniform)
        first, second = (int(one[0]) for one in drafted)
        if not any(counts) and second != first and uniform[-1] < float(targets[1][0][second]):
            return [0, 0], second
        return counts, token

    monkeypatch.setattr(speculate, "speculative_sampling_of_chains", wrong)
    how = DecodeConfig(3, temperature=3.0, source="hybrid", draft_temperature=0.7)
    assert p_value(five_tokens(), how, 10_000)[0] < 1e-6


def test_samples_are_seeded_and_cold_ones_are_greedy():
    model, prompt = tiny_kangaroo(1), random_prompts(1)[0]
    how = DecodeConfig(3, temperature=1.0, draft_temperature=1.0)
    one, two, three = (model.generate(prompt, 30, how, seed=seed).tokens for seed in (1, 1, 2))
    assert one == two != three
    greedy = model.generate(prompt, 30, DecodeConfig(0)).tokens
    for cold in (DecodeConfig(3, temperature=1e-4), DecodeConfig(3, temperature=1.0, top_k=1)):
        assert model.generate(prompt, 30, cold).tokens == greedy


def test_the_distribution_is_cut_as_asked():
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.9]])
    for how in (DecodeConfig(temperature=0.7), DecodeConfig(temperature=1.3, top_k=2), DecodeConfig(temperature=1.0, top_p=0.6),
                DecodeConfig(temperature=2.0, top_k=4, top_p=0.8)):  # fmt: skip
        found = distribution(logits, how.temperature, how.top_k, how.top_p)[0].numpy()
        np.testing.assert_allclose(found, by_hand(logits[0].double().numpy(), how), atol=1e-12)


def test_drafts_of_the_verifiers_own_distribution_are_all_accepted():
    target = torch.rand(4, 9, dtype=torch.float64)
    target /= target.sum(dim=1, keepdim=True)
    for _ in range(200):
        drafted = inverse_cdf(target[:3], torch.rand(3))
        assert speculative_sampling(target, target[:3], drafted, torch.rand(4, dtype=torch.float64))[0] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-0.5), "temperature is -0.5; expected 0 or more"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1.0, top_k=-1), "top_k is -1"),
        (dict(temperature=1.0, top_p=0.0), "top_p is 0.0; expected above 0, to 1"),
        (dict(top_k=5), "expected a temperature above 0"),
    ],
)
def test_bad_sampling_settings_are_said(settings, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**settings)
