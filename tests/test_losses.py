"""Each loss against an independent computation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from dvirl.config import SCHEDULES, DVIConfig
from dvirl.losses import (
    BY_DEPTH,
    OBJECTIVES,
    REPLAYING,
    Decisions,
    DraftsAtDepth,
    Teacher,
    along_blocks,
    count,
    entropy,
    exact_pg_loss,
    expected_accepted,
    fast_loss,
    kl_losses,
    log_prob_of,
    overlap,
    reinforce_block_loss,
    reinforce_loss,
    reward_weight,
    slow_loss,
    within_text,
)


def kl_loss(draft, verifier, kind="forward", top_k=0):
    """The mean divergence."""
    return torch.stack([part.sum(-1).mean() for part in kl_losses(draft, verifier, kind, top_k)]).mean()


def tv_loss(draft, verifier):
    """The mean total variation distance."""
    return 1 - overlap(draft, verifier).mean()


def random_logits(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reinforce_against_a_plain_loop():
    log_probs, rewards = random_logits(5, 1, 0)[:, 0], torch.tensor([1.0, 0, 0, 1, 1])
    expected = sum(-(float(r) - 0.3) * float(lp) for r, lp in zip(rewards, log_probs, strict=True)) / 5
    assert math.isclose(float(reinforce_loss(log_probs, rewards, 0.3).mean()), expected, rel_tol=1e-6)


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
            ).mean()
            total += probabilities[action] * torch.autograd.grad(loss, logits)[0]
        torch.testing.assert_close(-total, analytic)


@pytest.mark.parametrize("baseline", [0.0, 0.4, -3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_exact_gradient_is_reinforces_over_all_actions(baseline, temperature):
    """Three positions, every action in turn weighted by the policy; the last wanted token is not in the vocabulary."""
    logits, wanted = random_logits(3, 5, 6).requires_grad_(), torch.tensor([4, 0, -1])
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for action in range(5):
        actions = torch.full((3,), action)
        for n in range(3):
            reward = torch.tensor([0.0] * 3, dtype=torch.float64)
            reward[n] = float(action == wanted[n])
            log_probs = log_prob_of(logits, actions, temperature)
            gradient = torch.autograd.grad(reinforce_loss(log_probs, reward, baseline).mean(), logits)[0]
            expected[n] += (logits[n].detach() / temperature).softmax(-1)[action] * gradient[n]
    log_probs = log_prob_of(logits, wanted.clamp(min=0), temperature)
    found = torch.autograd.grad(exact_pg_loss(log_probs, (wanted >= 0).double()).mean(), logits)[0]
    torch.testing.assert_close(found, expected)
    assert found[:2].abs().min() > 1e-5 and not found[2].any()


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_sampled_reinforce_agrees_with_the_exact_gradient_and_argmax_does_not(baseline):
    logits, wanted = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True), 1
    probabilities = logits.softmax(-1).detach()
    exact = torch.autograd.grad(
        exact_pg_loss(log_prob_of(logits[None], torch.tensor([wanted])), torch.ones(1)).mean(), logits
    )[0]
    by_hand = -probabilities[wanted] * (torch.eye(4, dtype=torch.float64)[wanted] - probabilities)
    torch.testing.assert_close(exact, by_hand)
    actions = torch.multinomial(
        probabilities, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )

    def gradient(chosen):
        log_probs = log_prob_of(logits.expand(len(chosen), 4), chosen)
        return torch.autograd.grad(
            reinforce_loss(log_probs, (chosen == wanted).double(), baseline).mean(), logits
        )[0]

    torch.testing.assert_close(gradient(actions), exact, atol=5e-3, rtol=0)
    assert (gradient(torch.full((100,), 2)) - exact).abs().max() > 0.05


def test_cross_entropy_leaves_out_what_the_head_has_not():
    logits, wanted = random_logits(4, 6, 7).requires_grad_(), torch.tensor([2, -1, 5, 0])
    on = replace(decisions(schedule="ce", actions="argmax"), logits=logits, verified=wanted)
    found = fast_loss(on)
    expected = F.cross_entropy(logits, wanted, ignore_index=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_exact_pg_against_a_plain_loop():
    logits, wanted = random_logits(4, 6, 7), [2, -1, 5, 0]
    expected = 0.0
    for row, token in zip((logits / 0.7).tolist(), wanted, strict=True):
        expected -= math.exp(row[token]) / sum(math.exp(x) for x in row) / 4 if token >= 0 else 0.0
    index = torch.tensor(wanted)
    found = exact_pg_loss(log_prob_of(logits, index.clamp(min=0), 0.7), (index >= 0).double()).mean()
    assert float(found) == pytest.approx(expected)


def test_kl_against_a_plain_sum():
    draft, verifier = random_logits(4, 7, 1), random_logits(4, 7, 2)
    p, q = verifier.softmax(-1), draft.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_loss(draft, verifier), expected)
    assert float(kl_loss(draft, draft)) == pytest.approx(0.0, abs=1e-12)


def outcomes(draft, verifier, top_k):
    """Plain lists of probabilities a row, the verifier's and the draft's, the tail summed up if there is one."""
    for row, q in enumerate(draft.softmax(-1).tolist()):
        p = verifier.softmax(-1)[row].tolist()
        order = sorted(range(len(p)), key=lambda token: -p[token])
        head, tail = (order[:top_k], order[top_k:]) if top_k else (order, [])
        yield tuple([x[t] for t in head] + ([sum(x[t] for t in tail)] if tail else []) for x in (p, q))


@pytest.mark.parametrize("top_k", [0, 1, 3, 6, 7, 50])
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_every_kl_against_plain_loops(kind, top_k):
    draft, verifier = random_logits(4, 7, 1), 2 * random_logits(4, 7, 2)

    def kl(p, q):
        return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))

    def divergence(p, q):
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        return {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[kind]

    expected = sum(divergence(p, q) for p, q in outcomes(draft, verifier, top_k)) / 4
    found = float(kl_loss(draft, verifier, kind, top_k))
    assert found == pytest.approx(expected) and found > 1e-3
    assert float(kl_loss(draft, draft, kind, top_k)) == pytest.approx(0.0, abs=1e-12)
    whole = float(kl_loss(draft, verifier, kind))
    assert found == pytest.approx(whole) if top_k in (0, 6, 7, 50) else found < whole - 1e-3


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_every_kls_gradient_is_that_of_torchs_distributions(kind):
    draft, verifier = random_logits(4, 7, 1).requires_grad_(), random_logits(4, 7, 2)
    p, q = Categorical(logits=verifier), Categorical(logits=draft)
    m = Categorical(probs=(p.probs + q.probs) / 2)
    both = (kl_divergence(p, m) + kl_divergence(q, m)) / 2
    expected = {"forward": kl_divergence(p, q), "reverse": kl_divergence(q, p), "js": both}[kind].mean()
    found = kl_loss(draft, verifier, kind)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, draft)[0] for loss in (found, expected)))


def test_far_apart_distributions_stay_finite():
    """Logits a float32 softmax takes to exact zeros, with and without a tail."""
    draft = torch.tensor([[0.0, 200.0, -200.0, 0.0]], requires_grad=True)
    verifier = torch.tensor([[300.0, 0.0, 0.0, -300.0]])
    for kind in ("forward", "reverse", "js"):
        for top_k in (0, 1, 2):
            loss = kl_loss(draft, verifier, kind, top_k)
            gradient = torch.autograd.grad(loss, draft)[0]
            assert loss.isfinite() and gradient.isfinite().all()
            assert kind != "js" or float(loss.detach()) == pytest.approx(math.log(2))
    assert float(tv_loss(draft.detach(), verifier)) == 1.0


LOSSES = {
    "kl": kl_loss,
    "reverse top": lambda draft, verifier: kl_loss(draft, verifier, "reverse", 3),
    "js top": lambda draft, verifier: kl_loss(draft, verifier, "js", 3),
    "top": lambda draft, verifier: kl_loss(draft, verifier, top_k=2),
    "tv": tv_loss,
    "entropy": lambda draft, verifier: entropy(draft, 0.7).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences_and_none_to_the_verifier(name):
    draft, verifier = random_logits(4, 7, 1).requires_grad_(), random_logits(4, 7, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: LOSSES[name](logits, verifier.detach()), draft)
    LOSSES[name](draft, verifier).backward()
    assert draft.grad is not None and draft.grad.abs().max() > 1e-3 and verifier.grad is None


def test_total_variation_is_the_rejection_rate_of_speculative_sampling():
    draft, verifier = random_logits(3, 6, 8), random_logits(3, 6, 9)
    p, q = verifier.softmax(-1), draft.softmax(-1)
    torch.testing.assert_close(tv_loss(draft, verifier), ((p - q).abs().sum(-1) / 2).mean())
    by_rule = (
        sum(float(q[n, x]) * (1 - min(1.0, float(p[n, x] / q[n, x]))) for n in range(3) for x in range(6)) / 3
    )
    assert float(tv_loss(draft, verifier)) == pytest.approx(by_rule)
    assert float(tv_loss(draft, draft)) == pytest.approx(0.0, abs=1e-12)


def test_entropy_against_torchs_distributions():
    logits = random_logits(4, 6, 10)
    torch.testing.assert_close(entropy(logits, 0.7), Categorical(logits=logits / 0.7).entropy())
    assert float(entropy(torch.zeros(2, 8)).mean()) == pytest.approx(math.log(8))


def test_masked_ce_counts_accepted_tokens_only():
    log_probs = torch.tensor([-1.0, -2.0, -4.0])

    def masked_ce(rewards):
        on = replace(decisions(), rewards=torch.tensor(rewards), verified=torch.zeros(3))
        return float(on.mean(-log_probs, over="accepted"))

    assert masked_ce([1.0, 0.0, 1.0]) == pytest.approx(2.5)
    assert masked_ce([0.0, 0.0, 0.0]) == 0.0


def test_slow_loss_against_plain_sums():
    own, frozen, tokens = random_logits(5, 6, 3), random_logits(5, 6, 4), torch.tensor([0, 5, 2, 2, 1])
    p, q = own.softmax(-1), frozen.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    expected = -p.log()[torch.arange(5), tokens].mean() + 0.3 * divergence
    cross_entropy, drift = slow_loss(own, tokens, frozen)
    torch.testing.assert_close(cross_entropy.mean() + 0.3 * drift.sum(-1).mean(), expected)
    torch.testing.assert_close(drift.sum(-1).mean(), divergence)


def test_log_prob_at_a_temperature():
    logits = random_logits(3, 5, 5)
    expected = (logits / 0.5).softmax(-1).log()[torch.arange(3), torch.tensor([1, 4, 0])]
    torch.testing.assert_close(log_prob_of(logits, torch.tensor([1, 4, 0]), 0.5), expected)


def test_the_ramp():
    assert [reward_weight(x, 0.2, 0.6) for x in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert reward_weight(0.5, 0.5, 0.5) == 0.0 and reward_weight(0.6, 0.5, 0.5) == 1.0


def decisions(asked=None, **changes) -> Decisions:
    """Four records, one verifier's token outside the exit head; `asked` counts looks at the verifier's logits."""
    config = DVIConfig(
        **{"action_temperature": 0.7, "kl_floor": 0.2, "kl_kind": "reverse", "kl_top_k": 3, **changes}
    )

    def verifier():
        if asked is not None:
            asked.append(1)
        return random_logits(4, 7, 2)

    drafted, verified = torch.tensor([1, 0, 6, 2]), torch.tensor([1, 3, 6, -1])
    return Decisions(
        config, random_logits(4, 7, 1), verifier, drafted, verified, (drafted == verified).double(), 0.3, 0.5
    )


def by_hand() -> dict[str, float]:
    draft, verifier, tempered = random_logits(4, 7, 1), random_logits(4, 7, 2), random_logits(4, 7, 1) / 0.7
    log_pi = tempered.log_softmax(-1)
    parts = {
        "reinforce": -sum(
            (r - 0.3) * float(log_pi[n, x]) for n, x, r in [(0, 1, 1), (1, 0, 0), (2, 6, 1), (3, 2, 0)]
        )
        / 4,
        "exact_pg": -sum(math.exp(log_pi[n, x]) for n, x in [(0, 1), (1, 3), (2, 6)]) / 4,
        "ce": -sum(float(log_pi[n, x]) for n, x in [(0, 1), (1, 3), (2, 6)]) / 3,
        "masked_ce": -sum(float(log_pi[n, x]) for n, x in [(0, 1), (2, 6)]) / 2,
        "kl": sum(
            sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
            for p, q in outcomes(draft, verifier, 3)
        )
        / 4,
        "tv": float((verifier.softmax(-1) - draft.softmax(-1)).abs().sum() / 8),
    }
    return {**parts, "kl_to_rl": 0.6 * parts["kl"] + 0.5 * (parts["masked_ce"] + parts["reinforce"])}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_what_it_says_and_takes_regularisers(schedule):
    parts, on = by_hand(), decisions(schedule=schedule)
    assert float(fast_loss(on)) == pytest.approx(parts[schedule])
    entropy = float(Categorical(logits=on.logits / 0.7).entropy().mean())
    regularised = decisions(schedule=schedule, kl_weight=0.2, entropy_weight=0.05)
    assert float(fast_loss(regularised)) == pytest.approx(
        parts[schedule] + 0.2 * parts["kl"] - 0.05 * entropy
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_losses_of_several_processes_add_up_to_that_of_one(schedule):
    on = decisions(schedule=schedule, kl_weight=0.2, entropy_weight=0.05)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        values = {name: getattr(on, name)[rows] for name in ("logits", "drafted", "verified", "rewards")}
        verifier = partial(lambda rows: on.verifier()[rows], rows)
        parts.append(
            fast_loss(replace(on, **values, verifier=verifier, totals=count(on.rewards, on.verified)))
        )
    assert float(sum(parts)) == pytest.approx(float(fast_loss(on)))


def test_argmax_actions_come_from_the_policy_at_temperature_one():
    found = fast_loss(decisions(schedule="ce", actions="argmax"))
    expected = F.cross_entropy(random_logits(4, 7, 1), torch.tensor([1, 3, 6, -1]), ignore_index=-1)
    torch.testing.assert_close(found, expected)


def test_the_schedules_have_their_objectives_and_kl_to_rl_starts_as_kl():
    assert tuple(OBJECTIVES) == SCHEDULES and set(REPLAYING) < set(SCHEDULES)
    assert float(fast_loss(replace(decisions(), reward_share=0.0))) == pytest.approx(by_hand()["kl"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_may_be_replayed_does_not_look_at_the_draw(schedule):
    on = replace(decisions(schedule=schedule), reward_share=0.0)
    other = replace(
        on, drafted=torch.tensor([5, 5, 0, 0]), rewards=torch.tensor([0.0, 1, 1, 0]), baseline=0.9
    )
    assert (float(fast_loss(on)) == float(fast_loss(other))) == (schedule in REPLAYING)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_verifiers_logits_are_computed_for_those_who_ask(schedule):
    asked = []
    fast_loss(decisions(asked, schedule=schedule))
    assert bool(asked) == (schedule in ("kl", "tv", "kl_to_rl"))


# Drafts of several depths

COVERED = [0, 2, 3, 5, 8]
"""Tokens of nine that the exit head has."""
WANTED = torch.tensor([3, -1, 0, 4])


def drafts_at_depth(draft, verifier) -> DraftsAtDepth:
    """Drafts over the covered tokens, the verifier over all nine."""
    teacher = Teacher.of(verifier[:, COVERED].float(), verifier.float().logsumexp(-1))
    return DraftsAtDepth(draft, teacher, WANTED, torch.tensor([1.0, 1.0, 0.0, 1.0]))


def judged(objective, draft, verifier, at) -> torch.Tensor:
    """Each record's loss in float64, from whole distributions; what takes no gradient is computed from `at`."""
    whole = verifier.softmax(-1)
    p, q = whole[:, COVERED], draft.softmax(-1)
    narrow = p / p.sum(-1, keepdim=True)
    m = (narrow + q) / 2

    def overlapping(q):
        return torch.minimum(whole, torch.zeros_like(whole).index_copy(1, torch.tensor(COVERED), q)).sum(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    alpha = overlapping(q)
    share = math.exp(-3 * float(overlapping(at.softmax(-1))[[0, 1, 3]].mean()))
    chance = torch.stack(
        [row[x] if x >= 0 else 0 * row[0] for row, x in zip(q, WANTED.tolist(), strict=True)]
    )
    return {
        "kl": kl(narrow, q),
        "js": (kl(narrow, m) + kl(q, m)) / 2,
        "tv": 1 - alpha,
        "alpha": -alpha.log(),
        "lk": share * kl(narrow, q) + (1 - share) * (1 - alpha),
        "expected": -chance,
    }[objective]


@pytest.mark.parametrize("objective", BY_DEPTH)
def test_an_objective_of_a_depth_against_whole_distributions_and_finite_differences(objective):
    """A third of the verifier's mass is outside the exit head; it is lost for alpha, and renormalised for KL."""
    draft, verifier = random_logits(4, 5, 1), 2 * random_logits(4, 9, 2)
    logits, weights = draft.float().requires_grad_(), torch.tensor([1.0, 2.0, -1.0, 0.5])
    found = BY_DEPTH[objective](drafts_at_depth(logits, verifier))
    torch.testing.assert_close(
        found.double(), judged(objective, draft, verifier, draft), atol=1e-5, rtol=1e-5
    )
    gradient = torch.autograd.grad((found * weights).sum(), logits)[0]
    for n, token in itertools.product(range(4), range(5)):
        step = torch.zeros_like(draft)
        step[n, token] = 1e-5
        ahead, back = (
            (judged(objective, draft + side * step, verifier, draft) * weights).sum() for side in (1, -1)
        )
        assert float(gradient[n, token]) == pytest.approx(float(ahead - back) / 2e-5, abs=1e-4)
    assert gradient.abs().max() > 1e-2


def test_far_apart_distributions_stay_finite_at_every_depth():
    draft = torch.tensor([[0.0, 300.0, -300.0, 0.0, 0.0]] * 4, requires_grad=True)
    verifier = torch.tensor([[200.0, -300, 0, 0, 0, 0, 0, 0, 0]] * 4)
    for objective in BY_DEPTH.values():
        loss = objective(drafts_at_depth(draft, verifier)).sum()
        assert loss.isfinite() and torch.autograd.grad(loss, draft)[0].isfinite().all()


POSITIONS = torch.tensor([5, 6, 7, 21, 22, 3])
"""Two texts, of three places and two, and padding, which repeats a place."""
WEIGHT = torch.tensor([1.0, 1, 1, 1, 1, 0])


def test_blocks_end_where_their_text_ends():
    inside = within_text(POSITIONS, WEIGHT, 3)
    assert inside.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert not within_text(torch.tensor([8]), torch.ones(1), 3)[1:].any()
    values = [torch.arange(6.0) + 10 * depth for depth in range(3)]
    found = along_blocks(values, inside)
    assert found[:, 0].tolist() == [0, 11, 22] and found[:, 3].tolist() == [3, 14, 0]


def test_the_expected_length_of_blocks_is_that_of_a_plain_loop_with_exact_gradients():
    chances = [torch.rand(6, generator=torch.Generator().manual_seed(depth)).double() for depth in range(3)]
    chances[1][1] = 0.0
    inside, expected = within_text(POSITIONS, WEIGHT, 3), []
    for start, room in enumerate((3, 2, 1, 2, 1, 0)):
        reached, total = 1.0, 0.0
        for depth in range(min(3, room)):
            reached *= float(chances[depth][start + depth])
            total += reached
        expected.append(total)
    assert expected_accepted(along_blocks(chances, inside)).tolist() == pytest.approx(expected)
    given = [chance.requires_grad_() for chance in chances]
    assert torch.autograd.gradcheck(lambda *values: expected_accepted(along_blocks(values, inside)), given)


@pytest.mark.parametrize("baselines", [(0.0, 0.0, 0.0), (0.7, -1.0, 2.0)])
@pytest.mark.parametrize("wanted", [(2, 0, 1), (2, -1, 1)])
def test_reinforce_of_blocks_over_all_actions_is_the_exact_gradient(baselines, wanted):
    """Three places of one text, three depths, three tokens: 729 ways to act, each weighted by the policy."""
    logits = [random_logits(3, 3, seed).requires_grad_() for seed in (1, 2, 3)]
    policy = [one.detach().softmax(-1) for one in logits]
    inside = within_text(torch.arange(3), torch.ones(3), 3)
    places = [(depth, place) for depth in range(3) for place in range(depth, 3)]  # those of blocks that exist
    index, baseline = torch.tensor(wanted), torch.tensor(baselines, dtype=torch.float64)
    expected, mean_return = [torch.zeros(3, 3, dtype=torch.float64) for _ in range(3)], 0.0
    for chosen in itertools.product(range(3), repeat=6):
        actions = torch.zeros(3, 3, dtype=torch.long)
        likelihood = 1.0
        for (depth, place), action in zip(places, chosen, strict=True):
            actions[depth, place] = action
            likelihood *= float(policy[depth][place, action])
        log_probs = [log_prob_of(one, row) for one, row in zip(logits, actions, strict=True)]
        accepted = [(row == index).double() for row in actions]
        losses, means = reinforce_block_loss(
            along_blocks(log_probs, inside), along_blocks(accepted, inside), inside, baseline
        )
        mean_return += likelihood * float(means[0])
        for total, gradient in zip(expected, torch.autograd.grad(losses.sum(), logits), strict=True):
            total += likelihood * gradient
    chances = [log_prob_of(one, index.clamp(min=0)).exp() * (index >= 0) for one in logits]
    exact = expected_accepted(along_blocks(chances, inside))
    found = torch.autograd.grad(-exact.sum(), logits)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert mean_return == pytest.approx(float(exact.detach().mean())) and found[0].abs().max() > 1e-3


def test_reinforce_of_blocks_against_a_plain_loop_of_returns_to_go():
    """What the mean over actions cannot show: which drafts act, and that a return counts from its draft on."""
    draws = torch.Generator().manual_seed(1)
    inside = within_text(POSITIONS, WEIGHT, 3)
    log_probs = -torch.rand(3, 6, generator=draws).double() * inside
    accepted = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    baselines = torch.tensor([0.9, 0.4, -0.2], dtype=torch.float64)
    losses, returns = [], [[], [], []]
    for block in range(6):
        losses.append(0.0)
        for depth in range(3):
            if not inside[depth, block] or not all(accepted[:depth, block]):
                break
            run = list(itertools.takewhile(bool, accepted[depth:, block].tolist()))
            returns[depth].append(len(run))
            losses[-1] -= (len(run) - float(baselines[depth])) * float(log_probs[depth, block])
    found, means = reinforce_block_loss(log_probs, accepted, inside, baselines)
    assert found.tolist() == pytest.approx(losses) and sum(map(len, returns)) < int(inside.sum())
    assert means.tolist() == pytest.approx([sum(values) / len(values) for values in returns])


def test_a_baseline_stays_where_nothing_acted():
    accepted = torch.zeros(3, 4)
    means = reinforce_block_loss(accepted, accepted, torch.ones(3, 4), torch.tensor([0.5, 0.25, 2.0]))[1]
    assert means.tolist() == [0.0, 0.25, 2.0]


def test_actions_are_drawn_from_the_policy():
    draft = torch.tensor([[0.3, -0.7, 1.1, 0.0, 0.5]]).expand(20_000, 5)
    teacher = Teacher.of(draft)
    drafts = DraftsAtDepth(draft, teacher, torch.full((20_000,), 2), torch.ones(20_000))
    log_probs, accepted = drafts.act(torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert float(accepted.mean()) == pytest.approx(float(draft[0].softmax(-1)[2]), abs=0.015)
    torch.testing.assert_close(log_probs[accepted > 0], draft.log_softmax(-1)[accepted > 0, 2])
    assert (log_probs[accepted == 0] != draft[0].log_softmax(-1)[2]).all()
