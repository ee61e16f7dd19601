"""The steps of a block that runs ahead of the host: by torch's operators, and as one kernel each.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import pytest
from conftest import tiny_config

from kangaroo.decoding import block_kernels, outcome
from kangaroo.decoding.cache import KVCache
from kangaroo.decoding.drafting import LONGEST_NGRAM, LookupIndex
from kangaroo.decoding.outcome import NONE, BlockState, Drafts, Verdicts
from kangaroo.decoding.planning import Plan

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPACITY = 40
WAYS = [outcome, block_kernels]
PLANS = [
    Plan(),
    Plan(4),
    Plan(looked_up=7),
    Plan(3, branches=1),
    Plan(4, branches=2, looked_up=4, sure=2),
    Plan(2, looked_up=6, sure=3),
]


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """What is called in `outcome` runs there, on a GPU, too."""
    monkeypatch.setattr(outcome, "by_kernels", lambda tensor: False)


def state_of(plan: Plan, texts: int = 1, feedback_size: int = 0) -> BlockState:
    return BlockState.of(torch.empty(0, device=DEVICE), texts, plan, CAPACITY, feedback_size)


def looked_up(way, texts: list[list[int]], plan: Plan, slots: int) -> tuple[list[list[int]], list[int]]:
    """Tokens and matches that are found after some texts."""
    state = state_of(plan, len(texts))
    state.text[:, LONGEST_NGRAM:] = torch.randint(
        0, 4, (len(texts), CAPACITY)
    )  # after a text it means nothing
    for row, text in enumerate(texts):
        state.text[row, LONGEST_NGRAM : LONGEST_NGRAM + len(text)] = torch.tensor(text)
        state.length[row] = len(text)
    matched = way.look_up(state, plan, slots)
    return state.block[-1, :, 1 : 1 + plan.looked_up].tolist(), matched.tolist()


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=2, max_size=2),
    st.integers(1, 9),
    st.integers(1, LONGEST_NGRAM),
)
def test_a_lookup_on_the_device_is_that_of_the_host(way, texts, count, sure):
    found, matched = looked_up(way, texts, Plan(looked_up=count, sure=sure), 25)
    for row, text in enumerate(texts):
        expected, length = LookupIndex(text).propose(count)
        assert matched[row] == length
        assert found[row] == (expected if length >= sure else [NONE] * count)


@pytest.mark.parametrize("way", WAYS)
def test_a_lookup_in_a_long_text_reads_all_of_it(way, monkeypatch):
    """Longer than what a program compares at once."""
    monkeypatch.setattr(block_kernels, "POSITIONS", 8)
    text = [9, 8, 7, 6, 5, *range(10, 30), 9, 8, 7, 6]
    found, matched = looked_up(way, [text], Plan(looked_up=3), 32)
    assert found == [[5, 10, 11]] and matched == [4]


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_has_grown_beyond_what_is_read_stays_within_it(way):
    """A text that is over goes on within its row while others of its batch are read; nothing is looked up outside."""
    state = state_of(Plan(looked_up=7))
    state.text[0, LONGEST_NGRAM : LONGEST_NGRAM + 8] = torch.tensor([5, 6, 7, 5, 6, 7, 5, 6])
    state.text[0, LONGEST_NGRAM + 8 :] = 99
    state.length[0] = 36
    matched = way.look_up(state, Plan(looked_up=7), 8)
    assert int(matched) <= LONGEST_NGRAM and 99 not in state.block


@st.composite
def blocks(draw):
    """A plan, and a seed for what it drafted."""
    return draw(st.sampled_from(PLANS)), draw(st.integers(1, 3)), draw(st.integers(0, 10_000))


def drafted(plan: Plan, texts: int, seed: int) -> tuple[BlockState, Drafts, Verdicts]:
    """A state in the middle of a text, and drafts that are often right."""
    torch.manual_seed(seed)
    state = state_of(plan, texts)
    width = plan.longest + 1

    def numbers(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, most, shape, device=DEVICE)

    state.begin(numbers(9, texts, width), numbers(CAPACITY - width, texts), numbers(width, texts))
    own = numbers(9, plan.chains, texts, width)
    right = torch.rand(plan.chains, texts, width - 1, device=DEVICE) < 0.7
    state.block[..., 1:] = own[..., :-1].where(right, NONE)
    state.block[: plan.learned_chains, :, 1 + plan.learned :] = (
        NONE  # chains may have fewer drafts than others
    )
    confidence = torch.rand(plan.learned_chains, texts, plan.learned, device=DEVICE)
    certainty = torch.rand(plan.chains, texts, width, device=DEVICE)
    return state, Drafts(confidence, numbers(5, texts)), Verdicts(own, certainty)


@settings(deadline=None, max_examples=150)
@given(blocks(), st.sampled_from([0.0, 0.3, 0.6]), st.booleans())
def test_the_kernel_accepts_what_the_operators_accept(block, threshold, fed_back):
    plan, texts, seed = block
    found = []
    for way in WAYS:
        state, drafts, verdicts = drafted(plan, texts, seed)
        numbers, winners = way.accept(state, plan, drafts, verdicts, threshold, fed_back)
        found.append([numbers, winners, *state.tensors()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@settings(deadline=None, max_examples=60)
@given(blocks(), st.sampled_from([0.0, 0.5]))
def test_a_block_leaves_what_its_verifier_said(block, threshold):
    """By plain loops: which drafts count, what is committed, and where the next block begins."""
    plan, texts, seed = block
    state, drafts, verdicts = drafted(plan, texts, seed)
    before, tokens = state.length.tolist(), state.block[..., 1:].tolist()
    _, winners = outcome.accept(state, plan, drafts, verdicts, threshold, fed_back=True)
    for row in range(texts):
        counts = []
        for chain in range(plan.chains):
            own = verdicts.own[chain, row].tolist()
            count = 0
            while count < plan.longest and tokens[chain][row][count] == own[count]:
                is_learned = chain < plan.learned_chains and count < plan.learned
                count += 1
                if is_learned and threshold and drafts.confidence[0, row, count - 1] < threshold:
                    break
            counts.append(count)
        best = counts.index(max(counts))
        assert int(winners[row]) == best * texts + row and int(state.right[row]) == counts[best]
        assert state.own[row].tolist() == verdicts.own[best, row].tolist()
        assert int(state.length[row]) == min(before[row] + counts[best] + 1, CAPACITY - plan.longest - 1)
        assert int(state.block[0, row, 0]) == int(verdicts.own[best, row, counts[best]])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(0, 1000), st.sampled_from([(4, 2, 16), (3, 3, 24)]))
def test_all_rows_get_what_the_winner_has_read(texts, seed, shape):
    plan = Plan(3, branches=1, looked_up=3)
    heads, groups, size = shape
    config = tiny_config(hidden_size=heads * size, heads=heads, groups=groups, head_dim=size)
    found = []
    for way in WAYS:
        state, drafts, verdicts = drafted(plan, texts, seed)
        like = torch.empty(0, device=DEVICE)
        cache = KVCache(config, [DEVICE] * 2, texts, CAPACITY, like, chains=plan.chains)
        for store in cache.stores:
            store.copy_(torch.randn(store.shape, generator=torch.Generator().manual_seed(seed)))
        _, winners = outcome.accept(state, plan, drafts, verdicts, 0.0, fed_back=False)
        way.share(state, cache, winners)
        found.append(cache.stores)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_threshold_is_never_rounded_down():
    """A confidence is compared as float32, as if in float64."""
    for threshold in (0.1, 0.3, 0.6, 0.7, 0.9, 1 / 3):
        least = torch.tensor(block_kernels.at_least(threshold), dtype=torch.float32)
        below = least.nextafter(torch.tensor(0.0))
        assert float(below) < threshold <= float(least)
