"""Sampled answers: the same whatever drafts, and by the verifier's own distribution.

Against plain sampling token for token, and against every sequence that a tiny model can say.
"""

from __future__ import annotations

import random
from argparse import Namespace
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import capture_passes, random_prompts, tiny_config, tiny_kangaroo

from kangaroo.decoding import ahead, sampling
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.drafting import Memory
from kangaroo.decoding.sampling import Sampling, gumbel_noise
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

pytestmark = pytest.mark.no_cover

VOCAB, LENGTH, DRAWS, ROWS = 5, 3, 10_000, 2_000
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
    """The control: noise that is the same for two tokens changes the odds."""
    honest = sampling.gumbel_noise

    def wrong(keys, ids):
        return honest(keys, ids.clamp(min=1))

    monkeypatch.setattr(sampling, "gumbel_noise", wrong)
    how = DecodeConfig(3, temperature=0.9, draft_temperature=1.4)
    assert p_value(five_tokens(draft_vocab=[0, 3]), how, 10_000)[0] < 1e-6


DRAFTING = [
    DecodeConfig(3, temperature=0.9),
    DecodeConfig(4, temperature=0.9, draft_temperature=1.4),
    DecodeConfig(4, temperature=1.3, draft_temperature=1.3, top_k=20, top_p=0.9, branches=2),
    DecodeConfig(3, temperature=1.0, draft_temperature=0.5, source="hybrid", branches=1, threshold=0.1),
    DecodeConfig(6, temperature=0.8, source="lookup"),
    DecodeConfig(4, temperature=1.0, draft_temperature=1.0, adaptive=True, source="hybrid", branches=1),
]


@pytest.mark.parametrize("captured", [False, True], ids=["step by step", "ahead of the host"])
@pytest.mark.parametrize(
    "how", DRAFTING, ids=lambda how: f"{how.source}-{how.draft_temperature}-{how.branches}"
)
def test_a_seed_gives_the_same_answer_whatever_drafts(how, captured, monkeypatch):
    """Also in a batch, by blocks that run ahead of the host, and by a drafter that reads the verifier's states."""
    prompts = random_prompts(2)
    length = 16 if captured else 24
    started = []
    honest = ahead._Blocks.start
    monkeypatch.setattr(ahead._Blocks, "start", lambda *a: started.append(1) or honest(*a))
    for settings in ({}, {"feedback": True, "recurrent": True, "drafter": "layer"}):
        model = tiny_kangaroo(1, **settings)
        plainly = replace(
            how, draft_len=0, draft_temperature=0.0, source="learned", branches=0, adaptive=False
        )
        plain = [model.generate(prompt, length, plainly, seed=7).tokens for prompt in prompts]
        if captured:
            capture_passes(model, monkeypatch)
        alone = [model.generate(prompt, length, how, seed=7) for prompt in prompts]
        together = model.generate_batch(prompts, length, how, seed=7)
        assert [each.tokens for each in alone] == plain
        assert [each.tokens for each in together] == plain
        drafted = sum(block.num_drafted for each in alone for block in each.blocks)
        accepted = sum(block.num_accepted for each in alone for block in each.blocks)
        # What pays by the clock may be no drafts at all.
        assert how.adaptive or (drafted >= 3 and (accepted > 0 or how.source == "lookup"))
    assert bool(started) == captured


def test_drafts_that_share_the_noise_agree_more_often_than_ones_that_do_not():
    """(1 - TV) / (1 + TV) is the least of arXiv 2408.07978, 1 - TV the most that any rule could accept."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    keys = torch.randint(2**63 - 1, (20_000,), generator=generator)
    drawn = Sampling(1.0).perturbed(p.expand(len(keys), -1), keys).argmax(dim=-1)
    drafted = Sampling(0.8).perturbed(q.expand(len(keys), -1), keys).argmax(dim=-1)
    chances, proposed = (
        Sampling(at).scores(row[None]).softmax(dim=-1)[0] for row, at in ((p, 1.0), (q, 0.8))
    )
    shared = torch.minimum(chances, proposed).sum()
    agree = (drawn == drafted).double().mean()
    assert shared / (2 - shared) - 0.01 < agree < shared + 0.01
    assert agree > (chances * proposed).sum() + 0.05
    found = torch.bincount(drawn, minlength=40) / len(keys)
    assert (found - chances).abs().max() < 0.012


def test_noise_is_standard_gumbel_and_the_hash_that_is_named():
    keys = torch.randint(2**63 - 1, (500,), generator=torch.Generator().manual_seed(1))
    noise = gumbel_noise(keys, torch.arange(1_000))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.std() == pytest.approx(np.pi / 6**0.5, abs=0.01)
    uniform = (-(-noise).exp()).exp()
    ordered = uniform.flatten().sort().values
    gap = (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()
    assert gap < 1.95 / len(ordered) ** 0.5  # Kolmogorov and Smirnov, one in a thousand
    # Neighbouring tokens and places have nothing to do with each other.
    for one, other in ((uniform[:, :-1], uniform[:, 1:]), (uniform[:-1], uniform[1:])):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.01
    # SplitMix64 from seed 1234567 as published, by Python's integers.
    mask, state, found = 2**64 - 1, 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = [-np.log(-np.log(((z >> 12) + 0.5) / 2**52)) for z in found]
    ours = gumbel_noise(torch.tensor([1234567]), torch.tensor([1, 2, 3]))[0]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_a_branch_of_a_sampled_answer_takes_the_likeliest_other_token_where_one_is_left(monkeypatch):
    """With top_k=1 drafts are argmax drafts, and so are branches."""
    for prompt in random_prompts(2):
        model = tiny_kangaroo(2, deep_scale=0.3)
        greedy = model.generate(prompt, 16, DecodeConfig(3, branches=2))
        cold = model.generate(prompt, 16, DecodeConfig(3, temperature=1.0, top_k=1, branches=2), seed=3)
        for one, other in zip(greedy.blocks, cold.blocks, strict=True):
            drafts = [
                [chain.draft.tokens.tolist() for chain in (block, *block.beside)] for block in (one, other)
            ]
            assert drafts[0] == drafts[1]
            torch.testing.assert_close(one.draft.confidence, other.draft.confidence)


def test_all_bits_of_a_seed_count():
    model, prompt = tiny_kangaroo(1), random_prompts(1)[0]
    how = DecodeConfig(2, temperature=3.0)
    answers = [model.generate(prompt, 20, how, seed=seed).tokens for seed in (1, -1, 1 + 2**32, 1 + 2**61, 0)]
    assert len(set(map(tuple, answers))) == 5


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
        found = Sampling(how.temperature, how.top_k, how.top_p).scores(logits).softmax(dim=-1)[0].numpy()
        np.testing.assert_allclose(found, by_hand(logits[0].double().numpy(), how), atol=1e-12)


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
