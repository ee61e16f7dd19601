"""Each loss against an independent computation."""

from __future__ import annotations

import math

import pytest
import torch

from dvirl.losses import FastLosses, kl_loss, log_prob_of, masked_ce_loss, reinforce_loss, reward_weight, slow_loss


def random_logits(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reinforce_against_a_plain_loop():
    log_probs, rewards = random_logits(5, 1, 0)[:, 0], torch.tensor([1.0, 0, 0, 1, 1])
    expected = sum(-(float(r) - 0.3) * float(lp) for r, lp in zip(rewards, log_probs, strict=True)) / 5
    assert math.isclose(float(reinforce_loss(log_probs, rewards, 0.3)), expected, rel_tol=1e-6)


def test_reinforce_on_a_bandit_has_the_analytic_gradient():
    """Averaged over actions with their probabilities, the gradient is that of the expected reward, for any baseline.

    d E[r] / d logit_i = p_i (r_i - E[r]).
    """
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reward_of = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    probabilities = logits.softmax(-1).detach()
    analytic = probabilities * (reward_of - (probabilities * reward_of).sum())
    for baseline in (0.0, 0.4, 2.0):
        total = torch.zeros(4, dtype=torch.float64)
        for action in range(4):
            loss = reinforce_loss(
                log_prob_of(logits[None], torch.tensor([action])), reward_of[action : action + 1], baseline
            )
            total += probabilities[action] * torch.autograd.grad(loss, logits)[0]
        torch.testing.assert_close(-total, analytic)


def test_sampled_reinforce_agrees_with_the_analytic_gradient_and_argmax_does_not():
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reward_of = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    probabilities = logits.softmax(-1).detach()
    analytic = probabilities * (reward_of - (probabilities * reward_of).sum())
    actions = torch.multinomial(probabilities, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    baseline = float((probabilities * reward_of).sum())

    def gradient(chosen):
        loss = reinforce_loss(log_prob_of(logits.expand(len(chosen), 4), chosen), reward_of[chosen], baseline)
        return -torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(gradient(actions), analytic, atol=5e-3, rtol=0)
    assert (gradient(torch.full((100,), 2)) - analytic).abs().max() > 0.1


def test_kl_against_a_plain_sum():
    draft, verifier = random_logits(4, 7, 1), random_logits(4, 7, 2)
    p, q = verifier.softmax(-1), draft.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_loss(draft, verifier), expected)
    assert float(kl_loss(draft, draft)) == pytest.approx(0.0, abs=1e-12)


def test_kl_gives_no_gradient_to_the_verifier():
    draft, verifier = random_logits(4, 7, 1).requires_grad_(), random_logits(4, 7, 2).requires_grad_()
    kl_loss(draft, verifier).backward()
    assert draft.grad is not None and verifier.grad is None


def test_masked_ce_counts_accepted_tokens_only():
    log_probs = torch.tensor([-1.0, -2.0, -4.0])
    assert float(masked_ce_loss(log_probs, torch.tensor([1.0, 0.0, 1.0]))) == pytest.approx(2.5)
    assert float(masked_ce_loss(log_probs, torch.zeros(3))) == 0.0


def test_slow_loss_against_plain_sums():
    own, frozen, tokens = random_logits(5, 6, 3), random_logits(5, 6, 4), torch.tensor([0, 5, 2, 2, 1])
    p, q = own.softmax(-1), frozen.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    expected = -p.log()[torch.arange(5), tokens].mean() + 0.3 * divergence
    loss, drift = slow_loss(own, tokens, frozen, 0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(drift, divergence)


def test_log_prob_at_a_temperature():
    logits = random_logits(3, 5, 5)
    expected = (logits / 0.5).softmax(-1).log()[torch.arange(3), torch.tensor([1, 4, 0])]
    torch.testing.assert_close(log_prob_of(logits, torch.tensor([1, 4, 0]), 0.5), expected)


def test_the_ramp():
    assert [reward_weight(x, 0.2, 0.6) for x in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert reward_weight(0.5, 0.5, 0.5) == 0.0 and reward_weight(0.6, 0.5, 0.5) == 1.0


def test_schedules_combine_their_parts():
    parts = FastLosses(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0))
    assert [float(parts.combine(name, 0.5, 0.2)) for name in ("reinforce", "kl", "ce")] == [2.0, 3.0, 5.0]
    assert float(parts.combine("kl_to_rl", 0.0, 0.2)) == 3.0
    assert float(parts.combine("kl_to_rl", 0.5, 0.2)) == pytest.approx(0.6 * 3 + 0.5 * 7)
