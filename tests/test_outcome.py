"""The steps of a block that runs ahead of the host, one kernel each; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.decoding import block_kernels
from kangaroo.decoding.cache import KVCache
from kangaroo.decoding.drafting import LONGEST_NGRAM, LookupIndex
from kangaroo.decoding.outcome import NONE, BlockState
from kangaroo.decoding.planning import Plan

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CAPACITY = 40
PLANS = [
    Plan(),
    Plan(4),
    Plan(looked_up=7),
    Plan(3, branches=1),
    Plan(4, branches=2, looked_up=4, sure=2),
    Plan(2, looked_up=6, sure=3),
    Plan(3, looked_up=12),
]


def state_of(plan: Plan, texts: int = 1, feedback_size: int = 0) -> BlockState:
    return BlockState.of(torch.empty(0, device=DEVICE), texts, plan, CAPACITY, feedback_size)


def looked_up(
    texts: list[list[int]], plan: Plan, slots: int, drafts: list[int] | None = None
) -> tuple[list[list[int]], list[int]]:
    """Tokens and matches that are found after some texts and the same drafts of each."""
    state = state_of(plan, len(texts))
    state.text[:, LONGEST_NGRAM:] = torch.randint(
        0, 4, (len(texts), CAPACITY)
    )  # after a text it means nothing
    for row, text in enumerate(texts):
        state.text[row, LONGEST_NGRAM : LONGEST_NGRAM + len(text)] = torch.tensor(text)
        state.length[row] = len(text)
    state.block[0, :, 1 : 1 + plan.learned] = torch.tensor(drafts or [])
    matched = block_kernels.look_up(state, plan, slots)
    return state.block[0, :, 1 + plan.learned :].tolist(), matched.tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=2, max_size=2),
    st.lists(st.integers(0, 3), max_size=6),
    st.integers(1, 9),
    st.integers(1, LONGEST_NGRAM),
)
def test_a_lookup_on_the_device_is_that_of_the_host(texts, drafts, count, sure):
    found, matched = looked_up(texts, Plan(len(drafts), looked_up=count, sure=sure), 25, drafts)
    for row, text in enumerate(texts):
        expected, length = LookupIndex(text).propose(count, drafts)
        assert matched[row] == length
        assert found[row] == (expected if length >= sure else [NONE] * count)


def test_a_lookup_in_a_long_text_reads_all_of_it(monkeypatch):
    """Longer than what a program compares at once."""
    monkeypatch.setattr(block_kernels, "POSITIONS", 8)
    text = [9, 8, 7, 6, 5, *range(10, 30), 9, 8, 7, 6]
    found, matched = looked_up([text], Plan(looked_up=3), 32)
    assert found == [[5, 10, 11]] and matched == [4]


def test_a_text_that_has_grown_beyond_what_is_read_stays_within_it():
    """A text that is over goes on within its row while others of its batch are read; nothing is looked up outside."""
    state = state_of(Plan(looked_up=7))
    state.text[0, LONGEST_NGRAM : LONGEST_NGRAM + 8] = torch.tensor([5, 6, 7, 5, 6, 7, 5, 6])
    state.text[0, LONGEST_NGRAM + 8 :] = 99
    state.length[0] = 36
    matched = block_kernels.look_up(state, Plan(looked_up=7), 8)
    assert int(matched) <= LONGEST_NGRAM and 99 not in state.block


@st.composite
def blocks(draw):
    """A plan, and a seed for what it drafted."""
    return draw(st.sampled_from(PLANS)), draw(st.integers(1, 3)), draw(st.integers(0, 10_000))


def drafted(
    plan: Plan, texts: int, seed: int
) -> tuple[BlockState, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
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
    state.block[1:, :, 1 + plan.learned :] = NONE  # branches have no lookup
    confidence = torch.rand(plan.chains, texts, plan.learned, device=DEVICE)
    certainty = torch.rand(plan.chains, texts, width, device=DEVICE)
    return state, (confidence, numbers(5, texts)), (own, certainty)


@pytest.mark.no_cover
@settings(deadline=None, max_examples=80)
@given(blocks(), st.sampled_from([0.0, 0.3, 0.6]), st.booleans())
def test_a_block_leaves_what_its_verifier_said(block, threshold, fed_back):
    """By plain loops: which drafts count, what is committed, where the next block begins, and what the host is told."""
    plan, texts, seed = block
    state, drafts, verdicts = drafted(plan, texts, seed)
    before, tokens = state.length.tolist(), state.block[..., 1:].tolist()
    (confidence, matched), (owns, certainty) = drafts, verdicts
    numbers, winners = block_kernels.accept(state, plan, drafts, verdicts, threshold, fed_back)
    for row in range(texts):
        counts = []
        for chain in range(plan.chains):
            own = owns[chain, row].tolist()
            count = 0
            while count < plan.longest and tokens[chain][row][count] == own[count]:
                count += 1
                if count <= plan.learned and confidence[0, row, count - 1] < threshold:
                    break
            counts.append(count)
        best = counts.index(max(counts))
        won = owns[best, row].tolist()
        for part in range(row, len(winners), texts):
            assert int(winners[part]) == best * texts + row and state.own[part].tolist() == won
            assert int(state.right[part]) == counts[best] and int(state.start_at[part]) == before[row]
        length = min(before[row] + counts[best] + 1, CAPACITY - plan.longest - 1)
        assert int(state.length[row]) == length
        for chain in range(plan.chains):
            assert int(state.block[chain, row, 0]) == won[counts[best]]
            assert int(state.starts[chain * texts + row]) == length - 1
        if plan.learned:
            read = 0 if fed_back else min(counts[0], plan.learned - 1)
            assert int(state.read[row]) == before[row] + read
        if plan.looked_up:
            place = LONGEST_NGRAM + before[row]
            assert state.text[row, place : place + len(won)].tolist() == won
        whole = [*won, int(matched[row]), *(token for chain in tokens for token in chain[row]), *counts]
        assert numbers[row, : len(whole)].tolist() == whole
        chances = torch.cat([*confidence[:, row], *certainty[:, row]])
        assert torch.equal(numbers[row, len(whole) :].view(torch.float32), chances)


@pytest.mark.no_cover
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(0, 1000), st.sampled_from([(4, 2, 16), (3, 3, 24)]))
def test_all_rows_get_what_the_winner_has_read(texts, seed, shape):
    plan = Plan(3, branches=1, looked_up=3)
    heads, groups, size = shape
    config = tiny_config(hidden_size=heads * size, heads=heads, groups=groups, head_dim=size)
    state, drafts, verdicts = drafted(plan, texts, seed)
    cache = KVCache(
        config, [DEVICE] * 2, texts, CAPACITY, torch.empty(0, device=DEVICE), chains=plan.chains + 1
    )
    (store,) = cache.stores
    store.copy_(torch.randn(store.shape, generator=torch.Generator().manual_seed(seed)))
    expected = store.clone()
    _, winners = block_kernels.accept(state, plan, drafts, verdicts, 0.0, fed_back=False)
    for text in range(texts):
        first = int(state.start_at[text]) - 1
        for chain in range(cache.chains):
            slots = slice(first, first + plan.longest + 1)
            expected[:, :, chain * texts + text, :, slots] = store[:, :, int(winners[text]), :, slots]
    block_kernels.share(state, cache, winners)
    assert torch.equal(store, expected)


def test_a_threshold_is_never_rounded_down():
    """A confidence is compared as float32, as if in float64."""
    for threshold in (0.1, 0.3, 0.6, 0.7, 0.9, 1 / 3):
        least = torch.tensor(block_kernels.at_least(threshold), dtype=torch.float32)
        below = least.nextafter(torch.tensor(0.0))
        assert float(below) < threshold <= float(least)
