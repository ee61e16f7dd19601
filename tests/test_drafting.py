"""What to draft and how far: lookup, fixed and governed choices, step costs. None of it may change an answer."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import capture_passes, random_prompts, tiny_kangaroo
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.decoding import timing
from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification
from kangaroo.decoding.costs import StepCosts, monotone
from kangaroo.decoding.drafting import (
    LONGEST_NGRAM,
    AdaptivePolicy,
    BlockPolicy,
    LookupIndex,
    Memory,
    ScriptedPolicy,
)
from kangaroo.decoding.planning import Plan, Planner, _Continuations, hoped
from kangaroo.decoding.sampling import count_accepted
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import Stages

COSTS = StepCosts((10.0, 11.0, 11.5, 12.0, 12.5, 13.0, 13.5, 14.0, 14.5), 1.5)
WAYS = [
    DecodeConfig(n, source=s, adaptive=a)
    for s in ("learned", "lookup", "hybrid")
    for n, a in ((3, False), (8, True))
]


# Lookup


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 6))
def test_a_lookup_finds_what_followed_the_longest_ending_last_time(text, count):
    proposed, matched = LookupIndex(text).propose(count)
    for size in range(min(LONGEST_NGRAM, len(text)), 0, -1):
        starts = [at for at in range(size, len(text)) if text[at - size : at] == text[-size:]]
        if starts:
            assert matched == size
            going_on = list(text)
            for offset in range(
                count
            ):  # the text after the last such place, which may run into what it proposes
                going_on.append(going_on[starts[-1] + offset])
            assert proposed == going_on[len(text) :]
            return
    assert (proposed, matched) == ([], 0)


def test_a_lookup_grows_with_the_text_as_if_made_anew():
    text = [random.Random(0).randrange(4) for _ in range(60)]
    growing = LookupIndex(text[:5])
    for start in range(5, 60, 5):
        growing.extend(text[start : start + 5])
        assert growing.propose(4) == LookupIndex(text[: start + 5]).propose(4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=8), st.lists(st.integers(0, 3), max_size=6)
)
def test_a_memory_knows_what_followed_most_often_in_the_texts_that_it_keeps(texts, ending):
    memory = Memory(30)
    for text in texts:
        memory.add(text)
    kept = texts[len(texts) - len(memory.texts) :]
    assert sum(map(len, kept)) <= 30 and [list(text) for text in memory.texts] == kept
    assert not kept or len(kept) == len(texts) or sum(map(len, kept)) + len(texts[-len(kept) - 1]) > 30
    proposed, matched = memory.propose(ending, 1)
    for size in (3, 2):
        pairs = [(text[at : at + size], text[at + size]) for text in kept for at in range(len(text) - size)]
        followers = [token for ngram, token in pairs if ngram == ending[-size:] and len(ending) >= size]
        if followers:
            most = max(map(followers.count, followers))
            assert matched == size and followers.count(proposed[0]) == most
            return
    assert (proposed, matched) == ([], 0)


def test_a_long_text_is_remembered_by_its_end_and_forgotten_without_a_trace():
    memory = Memory(5)
    memory.add(range(9))
    assert list(memory.texts) == [(4, 5, 6, 7, 8)] and memory.propose([5, 6], 9) == ([7, 8], 2)
    memory.add([1, 1, 1, 1, 1])
    assert memory.propose([5, 6], 9) == ([], 0) and memory.propose([1, 1, 1], 2) == ([1, 1], 3)
    assert all(1 in ngram for ngram in memory._followers)


def test_earlier_texts_go_on_where_the_text_itself_knows_less():
    memory = Memory(50)
    memory.add([7, 8, 9, 10, 11])
    known = LookupIndex([1, 8, 9, 2, 8, 9], memory)
    assert known.propose(2) == ([2, 8], 2)  # the text's own among equals
    assert LookupIndex([1, 9, 2, 7, 8, 9], memory).propose(3) == ([10, 11], LONGEST_NGRAM + 3)
    assert LookupIndex([1, 2, 3, 7], memory).propose(2, [8, 9]) == ([10, 11], LONGEST_NGRAM + 3)
    assert LookupIndex([1, 2, 3], memory).propose(2) == ([], 0)


def test_what_is_remembered_wrongly_is_soon_no_longer_drafted():
    """By measured acceptance, like all sources: a memory that is always wrong costs a few blocks."""
    memory = Memory(50)
    memory.add([1, 2, 3, 4, 5, 6, 7, 8])
    policy = AdaptivePolicy(DecodeConfig(4, source="lookup", adaptive=True), COSTS)
    drafted = []
    for _ in range(60):
        policy.begin(LookupIndex([9, 1, 2, 3], memory), 9)
        tokens = policy.look_up()
        drafted.append(len(tokens))
        draft = DraftBlock(torch.tensor(tokens, dtype=torch.long), torch.full((len(tokens),), math.nan))
        policy.observe(
            Verification(4, (0,), min(1, len(tokens)), 0, draft), LookupIndex([9, 1, 2, 3], memory)
        )
    assert drafted[0] == 4 and sum(map(bool, drafted[20:])) < 10


# Losslessness


@pytest.mark.no_cover
@pytest.mark.parametrize("target", ["base", "adapted"])
@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.source}-{how.adaptive}")
def test_no_choice_changes_an_answer(how, target):
    model = tiny_kangaroo(deep_scale=0.3, drafter="layer")
    model._costs = COSTS
    looked, learned = 0, 0
    for prompt in (part * 2 for part in random_prompts(6)):
        plain = model.generate(prompt, 40, DecodeConfig(0, target=target)).tokens
        found = model.generate(prompt, 40, DecodeConfig(**{**vars(how), "target": target}))
        assert found.tokens == plain
        assert all(len(block.draft.tokens) <= how.draft_len for block in found.blocks)
        looked += sum(len(block.draft.tokens) - block.draft.num_learned for block in found.blocks)
        learned += sum(block.draft.num_learned for block in found.blocks)
    assert (looked > 0) == (how.source != "learned") and (
        learned == 0 if how.source == "lookup" else learned > 0
    )


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_blocks_stay_within_their_length_and_tails_stand_behind_the_drafts(longest):
    """A model whose deep layers say nothing accepts every draft, so that blocks are as long as they may be."""
    model, how = (
        tiny_kangaroo(deep_scale=0.0, lora=False),
        DecodeConfig(longest, source="hybrid", adaptive=True),
    )
    model._costs, tails = StepCosts(COSTS.verify[: longest + 1], 5.0), 0
    for prompt in (part * 3 for part in random_prompts(6)):
        index = LookupIndex(prompt)
        for block in model.decode_blocks(prompt, 60, how):
            drafts, learned = block.draft.tokens.tolist(), block.draft.num_learned
            assert len(drafts) <= longest
            if len(drafts) > learned:
                assert drafts[learned:] == index.propose(len(drafts) - learned, drafts[:learned])[0]
                tails += 1
            index.extend(block.committed)
    assert tails


def test_what_is_looked_up_is_verified_and_has_no_confidence():
    model = tiny_kangaroo()
    prompt = random_prompts(1)[0]
    own = model.generate(prompt, 12, DecodeConfig(0)).tokens
    text, wrong = LookupIndex(prompt), [own[1], own[2], (own[3] + 1) % 264, own[4]]
    found = []
    with model.decoding(len(prompt) + 12):
        for script, room in (
            (ScriptedPolicy(0), 12),
            (ScriptedPolicy(0, wrong), 11),
            (ScriptedPolicy(1, own[5:9]), 4),
        ):
            row = Text(text, len(text.tokens) + room, script)
            found += model.base_model.spec_decode_step([row], DecodeConfig())
            text.extend(found[-1].committed)
    _, second, third = found
    assert second.committed == tuple(own[1:4]) and (second.num_accepted, second.num_drafted) == (2, 3)
    assert second.draft.num_learned == 0 and second.draft.confidence.isnan().all()
    assert (
        third.draft.num_learned == 1 and third.draft.tokens[1:].tolist() == own[5:7]
    )  # room for three drafts
    assert third.draft.confidence.isnan().tolist() == [False, True, True]
    assert third.committed == tuple(own[4 : 4 + len(third.committed)])


def test_fixed_choices_by_hand():
    drafts: list[int] = []

    def block(index, room, *settings, **more):
        chooser = BlockPolicy(DecodeConfig(*settings, **more))
        count = chooser.begin(index, room)
        for token in drafts[:count]:
            if not chooser.keep_drafting(token, 0.5):
                break
        return count, chooser.look_up()

    index, one = LookupIndex([1, 2, 3, 4, 1, 2]), LookupIndex([1, 2, 3, 1])
    drafts = [3, 4, 9]
    assert block(index, 9, 3) == (3, [])
    assert block(index, 2, 3, source="lookup") == (0, [3, 4])
    assert block(index, 9, 5, source="hybrid") == (3, [])  # what the drafts say last is unknown
    drafts = [3, 4, 1]
    assert block(index, 9, 5, source="hybrid") == (3, [2, 3])
    assert block(index, 9, 5, source="hybrid", target="adapted") == (3, [2, 3])
    assert block(index, 4, 5, source="hybrid") == (3, [2])
    assert block(index, 9, 5, threshold=0.6, source="hybrid") == (3, [])  # the first draft ends the block
    drafts = [1]
    assert block(LookupIndex([1, 2, 3]), 9, 2, source="hybrid") == (1, [])  # one token matches
    assert block(one, 9, 2, source="lookup") == (0, [2, 3])
    assert block(LookupIndex([1, 2]), 9, 2, source="lookup") == (0, [])
    assert block(index, 0, 2) == (0, [])


def test_a_lookup_behind_drafts_is_one_in_the_text_that_they_would_make():
    rng = random.Random(1)
    for _ in range(200):
        text, drafts = (
            [rng.randrange(3) for _ in range(20)],
            [rng.randrange(3) for _ in range(rng.randrange(5))],
        )
        index, size = LookupIndex(text), 0
        proposed, matched = index.propose(5, drafts)
        for size in range(min(LONGEST_NGRAM, 20), 0, -1):
            ending = [*text, *drafts][-size:]
            starts = [at for at in range(size, 20) if text[at - size : at] == ending]
            if starts:
                break
        going_on = [*text, *drafts]
        for offset in range(5):
            going_on.append(going_on[starts[-1] + offset])
        assert (proposed, matched) == (going_on[20 + len(drafts) :], size)


# Costs


def test_costs_by_hand():
    assert COSTS.block(0) == 10.0 and COSTS.block(0, 2) == 11.5 and COSTS.block(2) == 14.5
    assert COSTS.block(1, 2) == 13.5
    assert COSTS.speedup(0.5, 2) == pytest.approx(1.75 * 10 / 14.5)
    assert COSTS.speedup(COSTS.break_even(4), 4) == pytest.approx(1.0, abs=1e-6)
    assert StepCosts((10.0, 21.0), 1.0).break_even(1) == math.inf


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_first_draft_of_a_recurrent_drafter_costs_by_itself(recurrent, captured, monkeypatch):
    """Clockwork: a step 10 ms, a row 1, a draft 2, the first of a block 3 more; a single draft is waited for, 7.

    Where the host looks at each draft, those of a long block are noted one by one, and the third is delayed.
    """
    clock = [0.0]

    def step(stages, texts, config):
        policy = texts[0].policy
        rows = policy.num_learned + len(policy._looked_up)
        for depth in range(policy.num_learned):
            clock[0] += (2 + 3 * (recurrent and not depth) + 9 * (depth == 2 and not captured)) / 1e3
            for _ in texts:
                policy.keep_drafting(0, 1.0)
        clock[0] += (10 + rows + 7 * (policy.num_learned == 1)) / 1e3

    monkeypatch.setattr(Stages, "drafts_at_once", lambda stages, wanted: wanted if captured else 1)
    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    monkeypatch.setattr(timing, "spec_decode_step", step)
    model = tiny_kangaroo(drafter="layer", feedback=recurrent, recurrent=recurrent)
    assert model.measure_costs(5, repeats=3, context=8, rows=2).draft == pytest.approx(2.0)
    costs = model.measure_costs(5, repeats=3, context=8)
    assert costs.verify == pytest.approx([10, 11, 12, 13, 14, 15])
    assert (costs.draft, costs.first) == pytest.approx((2.0, 3.0 * recurrent))
    assert costs.block(3, 1) == pytest.approx(14 + 6 + 3 * recurrent) and costs.block(0, 2) == pytest.approx(
        12
    )


def test_noise_is_pooled_so_that_costs_grow():
    assert monotone([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 2.0, 2.0, 4.5, 4.5)
    assert monotone([9.0, 1.0, 2.0]) == (4.0, 4.0, 4.0) and monotone([1.0, 1.5, 7.0]) == (1.0, 1.5, 7.0)


def test_measured_costs_are_positive_grow_and_are_measured_once():
    model = tiny_kangaroo(drafter="layer")
    costs = model.step_costs(3)
    assert len(costs.verify) == 4 and costs.verify[0] > 0 and costs.draft > 0
    assert list(costs.verify) == sorted(costs.verify) and model.step_costs(2) is costs
    assert (
        model.generate([1, 2, 3], 10, DecodeConfig(3)).tokens
        == tiny_kangaroo(drafter="layer").generate([1, 2, 3], 10, DecodeConfig(3)).tokens
    )


# The policy


def simulate(chance, blocks=600, source="learned", seed=0, costs=COSTS, matched=0):
    """Decode an endless text in which each draft is right with a chance; the speed over plain decoding."""
    rng, policy = random.Random(seed), AdaptivePolicy(DecodeConfig(8, source=source, adaptive=True), costs)
    index = LookupIndex([1, 2, 1] if matched else [1])
    tokens = time = 0.0
    for _ in range(blocks):
        learned = most = policy.begin(index, 50)
        if most:
            learned = 1
            while policy.keep_drafting(3, chance) and learned < most:
                learned += 1
        count = learned + len(policy.look_up())
        accepted = 0
        while accepted < count and rng.random() < chance:
            accepted += 1
        confidence = torch.tensor([chance] * learned + [math.nan] * (count - learned))
        draft = DraftBlock(torch.zeros(count, dtype=torch.long), confidence, torch.zeros(learned, 4))
        scored = min(count, accepted + 1)
        verified = Verification(0, (0,) * (accepted + 1), scored, accepted, draft, torch.ones(count + 1))
        policy.observe(verified, index)
        tokens, time = tokens + accepted + 1, time + costs.block(learned, count - learned)
    return tokens / time * costs.verify[0]


@pytest.mark.parametrize("source", ["learned", "hybrid"])
def test_drafts_that_are_never_right_cost_three_percent_at_most(source):
    assert simulate(0.0, source=source) > 0.97
    assert simulate(0.0, source="lookup", matched=1) > 0.97
    dear = StepCosts(tuple(10.0 + 4 * n for n in range(9)), 5.0)
    assert simulate(0.1, source=source, costs=dear) > 0.97


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
def test_the_policy_comes_near_the_best_fixed_length(chance):
    best = max(COSTS.speedup(chance, count) for count in range(9))
    assert best > 1.2 and simulate(chance) > 0.95 * best


# Plans of blocks that run ahead


def plans_of(
    seed: int, chance: float, lookup: float, after: float, blocks: int = 300, source: str = "hybrid"
) -> list[Plan]:
    """The plans that a planner chooses where drafts, lookups and lookups after drafts are right with some chances."""
    planner = Planner(DecodeConfig(7, source=source, adaptive=True))
    rng = random.Random(seed)
    plans = []

    def right(most: int, chance: float) -> int:
        return next((count for count in range(most) if rng.random() >= chance), most)

    for _ in range(blocks):
        plan = planner.plan()
        plans.append(plan)
        planner.timed(plan, 0.6 * hoped(plan), 256)
        learned = right(plan.learned, chance)
        accepted = learned
        if learned == plan.learned:
            accepted += right(plan.looked_up, after if learned else lookup)
        committed = tuple(range(accepted + 1))
        unknown = [math.nan] * plan.looked_up
        chances = torch.tensor([0.9] * plan.learned + unknown)
        draft = DraftBlock(torch.zeros(plan.longest, dtype=torch.long), chances, torch.zeros(plan.learned, 4))
        scored = min(plan.longest, accepted + 1)
        planner.observe(Verification(9, committed, scored, accepted, draft, torch.ones(plan.longest + 1)))
        for depth in range(learned + 1):
            # What was verified is known, and what was not is as often right.
            verified = depth == plan.learned and plan.looked_up
            known = accepted - depth if verified else right(7, after if depth else lookup)
            following = committed[depth:]
            planner.count_lookup(depth, [*following[:known], -1], following, learned == plan.learned)
    return plans


@pytest.mark.parametrize("seed", range(3))
def test_a_lookup_that_is_right_is_found_without_being_tried(seed):
    """What it would have given is known from the text; so it is taken where it goes further, and only there."""
    plans = plans_of(seed, chance=0.3, lookup=0.95, after=0.95)
    assert all(plan.looked_up == 7 and not plan.learned for plan in plans[150:])
    plans = plans_of(seed, chance=0.8, lookup=0.02, after=0.02)
    assert all(plan.learned >= 3 for plan in plans[150:])
    # Together where drafts are needed to tell which lookup is right.
    plans = plans_of(seed, chance=0.85, lookup=0.2, after=0.95)
    assert sum(plan.learned > 0 and plan.looked_up > 0 for plan in plans[50:]) > 200
    plans = plans_of(seed, chance=0.02, lookup=0.02, after=0.02)
    # A lookup costs little: one that was right lately is within the margin for a while.
    assert sum(not plan.learned for plan in plans[50:]) > 220 and Plan() in plans[50:]


def test_plans_go_on_by_a_lookup_as_far_as_a_block_may_be_long():
    for longest, lengths in (
        (15, {3: 12, 4: 11}),
        (4, {3: 1}),
        (3, {2: 1}),
        (2, {1: 1}),
        (1, {1: 0}),
        (40, {3: 12, 4: 11}),
    ):
        how = dict(source="hybrid", adaptive=True, branches=1)
        planner = Planner(DecodeConfig(longest, **how))
        assert {plan.learned: plan.looked_up for plan in planner._plans if plan.learned} == lengths
        assert Plan() in planner._plans and Plan(looked_up=min(longest, 15)) in planner._plans
        # In sampled answers lookups are seldom right: learned drafts alone are a choice, too.
        sampled = Planner(DecodeConfig(longest, temperature=1.0, **how))
        assert set(planner._plans) <= set(sampled._plans)
        for plan in sampled._plans:
            assert plan.longest < 16 and plan.longest <= longest and not (plan.branches and plan.looked_up)
        assert longest < 2 or {plan.branches for plan in sampled._plans} == {0, 1}
    planner = Planner(DecodeConfig(8, adaptive=True, branches=3))
    assert {(plan.learned, plan.branches) for plan in planner._plans if plan.branches} == {(2, 2), (3, 3)}


def test_what_only_branches_gave_is_counted_by_hand():
    planner = Planner(DecodeConfig(3, adaptive=True, branches=1))
    draft = DraftBlock(torch.zeros(3, dtype=torch.long), torch.full((3,), 0.9), torch.zeros(3, 4))
    branch = replace(draft, chain=1)
    lost = Verification(9, (), 1, 0, draft, torch.ones(4))
    won = Verification(9, (1, 2, 3), 3, 2, branch, torch.ones(4), (lost,))
    for _ in range(400):
        planner.observe(won)
    assert planner._branched.value == pytest.approx(2.0, abs=0.01)
    assert planner._tokens(Plan(3, 1)) == pytest.approx(planner._tokens(Plan(3)) + 2.0, abs=0.01)
    longer = replace(lost, num_accepted=3, num_drafted=3)  # the winner was cut at its end
    for _ in range(400):
        planner.observe(replace(won, beside=(longer,)))
    assert planner._branched.value == pytest.approx(0.0, abs=0.01)


def test_what_only_earlier_texts_know_is_no_reason_for_a_plan():
    """They are not on the device; with learned drafts before a lookup as without."""
    memory = Memory(100)
    memory.add(list(range(50)))
    policy = AdaptivePolicy(DecodeConfig(15, source="hybrid", adaptive=True), COSTS)
    for start in range(0, 40, 3):
        index = LookupIndex([100 + start, start, start + 1], memory)
        drafts = [start + 2, start + 3, start + 4]
        observed(policy, index, drafts, tuple(range(start + 2, start + 9)))
    assert policy._after_drafts[LONGEST_NGRAM + 3].value > 0.9  # the host may use it
    for plan in (Plan(looked_up=15), Plan(3, looked_up=12)):
        gain = policy._planner._tokens(plan) - policy._planner._tokens(replace(plan, looked_up=0))
        assert gain < 0.5


def test_a_plan_is_worth_its_drafts_and_the_lookup_after_them_by_hand():
    """Three drafts of which each is right in two of five cases, and a lookup that is always right after them."""
    planner = Planner(DecodeConfig(5, source="hybrid", adaptive=True))
    draft = DraftBlock(torch.zeros(3, dtype=torch.long), torch.full((3,), 0.9), torch.zeros(3, 4))
    for _ in range(400):
        for accepted in (0, 2, 0):  # two of the five drafts that are scored
            scored = accepted + 1
            committed = tuple(range(accepted + 1))
            planner.observe(Verification(9, committed, scored, accepted, draft, torch.ones(4)))
        planner.count_lookup(3, [5, 6, 7], [5, 6, 7], True)
        planner.count_lookup(5, [5, 6, 7], [1], True)  # no plan has five drafts
        planner.count_lookup(0, [5], [6], True)
    assert planner._acceptance.value == pytest.approx(0.4, abs=0.05)
    chance = planner._acceptance.value
    drafted = 1 + chance + chance**2 + chance**3
    assert planner._tokens(Plan(3)) == pytest.approx(drafted)
    assert planner._tokens(Plan(3, looked_up=2)) == pytest.approx(drafted + 2 * chance**3, abs=0.01)
    assert planner._tokens(Plan(looked_up=5)) == pytest.approx(1.0, abs=0.01)


def test_a_lookup_is_counted_as_far_as_it_is_known():
    """Right in all that was committed, it may have gone on: that is no mistake, and no success either."""
    known = _Continuations(4)
    for _ in range(400):
        known.count([1, 2, 3, 4], [1, 2], True)
    assert known.expected(2) == pytest.approx(2.0, abs=0.02)
    assert known.expected(4) == pytest.approx(2.0 + 0.8 + 0.8**2, abs=0.05)  # as at the start
    for _ in range(400):
        known.count([1, 2, 9, 4], [1, 2, 3, 4, 5], True)
    assert known.expected(4) == pytest.approx(2.0, abs=0.05)
    for _ in range(400):
        known.count([], [1, 2], True)
    assert known.expected(4) < 0.05
    for _ in range(400):
        known.count([1, 2, 3, 4], [1, 2], False)
    assert known.expected(4) == pytest.approx(2.0, abs=0.05)


def test_times_are_kept_for_every_number_of_slots():
    planner = Planner(DecodeConfig(6, adaptive=True))
    planner.timed(Plan(), 10.0, 256)
    planner.timed(Plan(6), 100.0, 256)
    assert planner.plan() != Plan(6)
    planner.timed(Plan(), 20.0, 512)
    planner.timed(Plan(6), 21.0, 512)
    assert planner.plan() == Plan(6)
    planner.timed(Plan(), 10.0, 256)  # the next answer begins with fewer
    assert planner.plan() != Plan(6)


def observed(policy, index, drafts, committed):
    """Let a policy see a block of learned drafts, as many of them right as the text says."""
    accepted = count_accepted(drafts, committed)
    states = torch.zeros(len(drafts), 4)
    block = DraftBlock(torch.tensor(drafts, dtype=torch.long), torch.full((len(drafts),), 0.9), states)
    scored = min(len(drafts), accepted + 1)
    policy.observe(Verification(len(index.tokens), committed, scored, accepted, block), index)


def test_a_lookup_counts_whether_or_not_it_was_verified():
    """By the length of the ending, and apart where drafts are part of it; as far as the text says."""
    policy = AdaptivePolicy(DecodeConfig(4, source="hybrid", adaptive=True), COSTS)
    index = LookupIndex([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    values = lambda: [policy._lookups[2].value, policy._after_drafts[3].value, policy._after_drafts[4].value]  # noqa: E731
    for _ in range(200):
        observed(policy, index, [3, 4], (3, 4, 0))  # after the drafts 5 was looked up
    # The lookup at the block's start (3, 4, 5, 6) is right twice and then wrong, after one draft once.
    assert values() == pytest.approx([2 / 3, 1 / 2, 0.0], abs=0.01)
    other = policy._lookups[1].value
    observed(policy, LookupIndex([1, 2]), [3], (3,))  # nothing to look up
    assert policy._lookups[1].value == other


def test_a_draft_that_the_lookup_says_too_is_followed_by_it():
    """And one that it contradicts by another draft; a draft is made first, since it tells the two apart."""
    policy = AdaptivePolicy(DecodeConfig(6, source="hybrid", adaptive=True), COSTS)
    index = LookupIndex([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    for _ in range(100):
        observed(policy, index, [3], (3, 4, 5, 6, 7, 8))  # the same
        observed(policy, index, [20], (20, 21))  # another
    assert policy.begin(index, 9) == 6
    assert not policy.keep_drafting(3, 0.9) and policy.look_up() == [4, 5, 6, 7, 8]
    assert policy.begin(index, 9) == 6
    assert policy.keep_drafting(20, 0.9)


def test_the_policy_is_a_function_of_costs_and_text():
    found = []
    for _ in range(2):
        model = tiny_kangaroo(deep_scale=0.3)
        model._costs = COSTS
        how = DecodeConfig(8, source="hybrid", adaptive=True)
        found.append([[b.committed for b in model.generate(p, 40, how).blocks] for p in random_prompts(4)])
    assert found[0] == found[1]


@pytest.mark.parametrize(("adaptive", "longest"), [(True, 3), (False, 1)])
def test_a_threshold_does_not_count_where_costs_decide(adaptive, longest, monkeypatch):
    """In blocks that run ahead as in others."""
    model = tiny_kangaroo(deep_scale=0.3)
    model._costs = COSTS
    monkeypatch.setattr(Planner, "plan", lambda planner: Plan(3))
    made = capture_passes(model, monkeypatch)
    blocks = model.generate([5, 6, 7], 30, DecodeConfig(3, threshold=1.0, adaptive=adaptive)).blocks
    assert max(block.draft.num_learned for block in blocks) == longest and made[0].ahead


@pytest.mark.parametrize("bad", [dict(source="guess"), dict(draft_len=-1)])
def test_bad_settings_are_said(bad):
    with pytest.raises(ValueError, match="expected"):
        DecodeConfig(**bad)


def test_a_memory_is_what_its_texts_make_it_also_after_some_were_forgotten():
    """Of followers that came equally often the latest one counts, in whichever order the others went."""
    rng = random.Random(0)
    for _ in range(50):
        memory = Memory(rng.randrange(5, 60))
        for _ in range(30):
            memory.add([rng.randrange(4) for _ in range(rng.randrange(2, 12))])
        again = Memory(memory.capacity)
        for text in memory.texts:
            again.add(text)
        for ending in itertools.product(range(4), repeat=3):
            assert memory.propose(ending, 4) == again.propose(ending, 4)
