"""Several texts at once, passes of one size, and captured passes: the tokens of one text alone."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from functools import cache
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import EOS, Recorded, capture_passes, random_prompts, tiny_config, tiny_kangaroo

from dvirl.rollout import generate
from kangaroo.adapter import rotary_for
from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig
from kangaroo.decoding.drafting import BlockPolicy, LookupIndex
from kangaroo.decoding.passes import SHORTEST_VIEW, CudaGraphs, _Captured, view
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import Stage, StageWeights
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM

SETTINGS = [
    DecodeConfig(0),
    DecodeConfig(4),
    DecodeConfig(4, target="adapted"),
    DecodeConfig(6, threshold=0.01),
    DecodeConfig(4, source="hybrid"),
    DecodeConfig(5, source="lookup", target="adapted"),
    DecodeConfig(3, draft_temperature=1.0, temperature=0.8, top_k=50, top_p=0.9),
    DecodeConfig(5, source="hybrid", adaptive=True),
    DecodeConfig(4, adaptive=True),
    DecodeConfig(4, source="lookup"),
    DecodeConfig(4, branches=2),
    DecodeConfig(5, threshold=0.02, branches=3),
    DecodeConfig(3, source="hybrid", branches=2),
    DecodeConfig(4, temperature=0.8, branches=2),
    DecodeConfig(6, source="hybrid", adaptive=True, branches=2),
]
NAME = "{0.source}-{0.draft_len}-{0.target}-{0.adaptive}-{0.branches}".format
DRAFTERS = [dict(), dict(drafter="adapter", adapter_window=5), dict(drafter="layer", drafter_layers=2)]


def row_by_row(model, prompts, how, length=24):
    return [model.generate(prompt, length, how, (EOS,), seed=3) for prompt in prompts]


@pytest.mark.no_cover
@pytest.mark.parametrize("how", SETTINGS, ids=NAME)
@pytest.mark.parametrize("args", DRAFTERS, ids=lambda args: args.get("drafter", "none"))
def test_a_batch_gives_what_each_row_gives_alone(how, args):
    """Deep layers that say little make drafts come true often, and differently from row to row."""
    model, prompts = tiny_kangaroo(2, deep_scale=0.3, lora=False, **args).double(), random_prompts(5, 2)
    prompts = [prompts[0] * 9, *prompts[1:3], prompts[3] * 3, prompts[4]]
    alone = row_by_row(model, prompts, how)
    together = model.generate_batch(prompts, 24, how, (EOS,), seed=3)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    lengths = [[block.block_len for block in one.blocks] for one in together]
    if how.adaptive:  # alone its blocks are chosen, together they are fixed
        return
    assert lengths == [[block.block_len for block in one.blocks] for one in alone]
    if how.draft_len > 3 and how.source == "learned" and not how.temperature:
        assert len({tuple(row) for row in lengths}) > 1 and max(map(max, lengths)) > 2


def stretched(model):
    """The model under dynamic positions whose context of training is 8 tokens."""
    rotary = rotary_for(
        tiny_config(rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=8)
    )
    model.base_model.rotary = model.adapter_model.rotary = rotary
    return model


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", [torch.float32, torch.double])  # by our own kernels, and not
@pytest.mark.parametrize("how", SETTINGS[:6], ids=NAME)
def test_each_text_of_a_batch_has_the_angles_of_its_own_length(how, dtype):
    """Under dynamic positions the angles of a prompt depend on its length, not on that of the longest."""
    model = stretched(tiny_kangaroo(2, drafter="layer", deep_scale=0.3)).to(dtype)
    prompts = random_prompts(6, 2, longest=30)
    assert min(map(len, prompts)) < 8 < sorted(map(len, prompts))[3]
    alone = row_by_row(model, prompts, how)
    together = model.generate_batch(prompts, 24, how, (EOS,), seed=3)
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        assert [block.block_len for block in one.blocks] == [block.block_len for block in other.blocks]
    # They begin alike, as prompts of one chat format do.
    prompts = [prompts[0][:3] + prompt for prompt in prompts]
    plain = [model.generate(prompt, 24, DecodeConfig(0, target=how.target), (EOS,)) for prompt in prompts]
    rollout = generate(model.base_model, prompts, 24, (EOS,), how.target)
    assert rollout.responses() == [one.tokens for one in plain]


@pytest.mark.parametrize("target", ["base", "adapted"])
def test_prompts_that_are_read_one_by_one_may_be_over_and_may_fail(target, monkeypatch):
    """On a CPU prompts of more than 64 tokens; an error leaves every stage its own cache."""
    model = tiny_kangaroo(2, drafter="layer")
    prompts = [[5] * 80, [6] * 3, [7] * 5]
    how = DecodeConfig(2, target=target)
    policy = BlockPolicy(how)
    with model.decoding(200, target, 3):
        texts = [
            Text(LookupIndex(prompt), len(prompt) + 9 * (row != 1), policy)
            for row, prompt in enumerate(prompts)
        ]
        over = model.base_model.spec_decode_step(texts, how)
        assert [one is None for one in over] == [False, True, False]
    alone = model.generate(prompts[2], 1, how).tokens
    assert list(over[2].committed) == alone

    run = Stage.__call__
    left = [4]

    def failing(self, *args):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("on purpose")
        return run(self, *args)

    monkeypatch.setattr(Stage, "__call__", failing)
    with model.decoding(200, target, 3) as stages:
        caches = [stage.cache for stage in (stages.shallow, stages.drafter, stages.base, stages.deep)]
        with pytest.raises(RuntimeError, match="on purpose"):
            model.base_model.spec_decode_step(
                [Text(LookupIndex(prompt), 99, policy) for prompt in prompts], how
            )
        assert caches == [stage.cache for stage in (stages.shallow, stages.drafter, stages.base, stages.deep)]
        assert not stages.passes.prompt_lens


def test_what_is_captured_under_passes_of_one_size_drafts_in_such_passes_too(monkeypatch):
    """With target "adapted" the verifier reads what drafting computed."""
    model = tiny_kangaroo(2, drafter="layer", deep_scale=0.1)
    capture_passes(model, monkeypatch)
    run = Stage.__call__
    sizes = Counter()

    def watched(self, inputs, *feedback):
        if self.weights.embed is not None and self.cache.length:
            sizes[inputs.shape[1]] += 1
        return run(self, inputs, *feedback)

    monkeypatch.setattr(Stage, "__call__", watched)
    how = DecodeConfig(6, target="adapted", deterministic=True)
    decoded = model.generate(random_prompts(1, 2)[0], 24, how, (EOS,))
    assert max(block.num_drafted for block in decoded.blocks) > 1
    assert set(sizes) == {PASS_ROWS}


@pytest.mark.no_cover
@pytest.mark.parametrize("how", SETTINGS, ids=NAME)
def test_passes_of_one_size_give_the_same_tokens(how, monkeypatch):
    sizes, rows = [], set()
    run = Stage.__call__

    def watched(self, inputs, *feedback):
        if len(self.weights.layers) == 2 and inputs.is_floating_point():  # the deep layers
            sizes.append(inputs.shape[1])
            rows.add(inputs.shape[0])
        return run(self, inputs, *feedback)

    monkeypatch.setattr(Stage, "__call__", watched)
    model, prompts = tiny_kangaroo(2, drafter="layer", deep_scale=0.1).double(), random_prompts(3, 2)
    alone = row_by_row(model, prompts, how)
    sizes.clear()
    rows.clear()
    fixed = DecodeConfig(**{**vars(how), "deterministic": True})
    assert [one.tokens for one in row_by_row(model, prompts, fixed)] == [one.tokens for one in alone]
    assert set(sizes) - {len(prompt) for prompt in prompts} <= {PASS_ROWS} and rows == {1}
    assert [one.tokens for one in model.generate_batch(prompts, 24, fixed, (EOS,), seed=3)] == [
        one.tokens for one in alone
    ]


def blocks_of(decoded):
    """All that a record says of each block, chain by chain."""
    found = []
    for block in decoded.blocks:
        for one in (block, *block.beside):
            draft = one.draft
            outcome = (one.start, one.committed, one.num_drafted, one.num_accepted)
            found.append((draft.chain, *outcome, draft.tokens.tolist()))
            sums = draft.exit_hidden.double().sum(dim=-1)
            for numbers in (draft.confidence, one.verifier_confidence, sums):
                found.append([f"{float(number):.4f}" for number in numbers])
    return found


def served():
    """A model and the texts that it is asked for."""
    return tiny_kangaroo(2, drafter="layer", deep_scale=0.1, lora=False).double(), random_prompts(6, 2)


@cache
def served_without_capture(how):
    return row_by_row(*served(), how)


@pytest.mark.no_cover
@pytest.mark.parametrize(("rows", "own_kernels"), [(1, False), (3, True)])
@pytest.mark.parametrize("how", SETTINGS, ids=NAME)
def test_what_was_captured_once_serves_every_later_text(how, rows, own_kernels, monkeypatch):
    model, prompts = served()
    expected = served_without_capture(how)
    alone = [one.tokens for one in expected]
    fresh, held = model.base_model.new_stages, {}

    def stages(capacity, *args):
        """The stages of the first time, their caches emptied, as on CUDA."""
        found = held.setdefault(args[1:], fresh(SHORTEST_VIEW, *args))
        found.reset()
        found.passes.graphs = found.passes.graphs or Recorded()
        found.passes.own_kernels = own_kernels
        return found

    monkeypatch.setattr(model.base_model, "new_stages", stages)
    for start in range(0, 6, rows):
        found = model.generate_batch(prompts[start : start + rows], 24, how, (EOS,), seed=3)
        assert [one.tokens for one in found] == alone[start : start + rows]
        if not how.adaptive:  # which chooses other lengths where several drafts are made at once
            assert list(map(blocks_of, found)) == list(map(blocks_of, expected[start : start + rows]))
    assert all(one.passes.graphs.held for one in held.values())


@pytest.mark.parametrize("target", ["base", "adapted"])
@pytest.mark.parametrize(
    ("captured", "lengths", "shapes"),
    [
        (False, (40, 3, 17), [(1, 40), (1, 3), (1, 17)]),
        (True, (40, 3, 17), [(3, 64)]),  # by our kernels
        (True, (200, 3, 17), [(1, 256), (1, 9), (1, 64)]),
    ],
)
def test_prompts_of_a_captured_batch_are_read_as_if_alone(captured, lengths, shapes, target, monkeypatch):
    """In bfloat16 a library rounds by the shape of the whole batch; the padding of others must not be seen."""
    model = tiny_kangaroo(2, drafter="layer", lora=False).to(
        torch.bfloat16 if len(shapes) > 1 else torch.double
    )
    seen, run = [], Stage.__call__

    def watched(self, inputs, *feedback):
        if self.weights.embed is not None and not self.passes.begun:
            seen.append(tuple(inputs.shape))
        return run(self, inputs, *feedback)

    if len(shapes) > 1:
        monkeypatch.setattr("kangaroo.decoding.layers._cpu_kernels_work", lambda: False)
    capture_passes(model, monkeypatch, prompts=captured)
    prompts = [[token] * length for token, length in zip((5, 6, 9), lengths, strict=True)]
    how = DecodeConfig(2, target=target)
    alone = [model.generate(prompt, 6, how) for prompt in prompts]
    monkeypatch.setattr(Stage, "__call__", watched)
    together = model.generate_batch(prompts, 6, how)
    assert seen == shapes
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.blocks[0].verifier_confidence, other.blocks[0].verifier_confidence)
        assert one.tokens == other.tokens


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "how", [DecodeConfig(0), DecodeConfig(4), DecodeConfig(3, source="hybrid", branches=1)]
)
@pytest.mark.parametrize("length", [200, 230])
def test_a_long_prompt_is_read_by_a_captured_pass_like_a_short_one(how, length, monkeypatch):
    """By a library, which reads the prompt's own slots: nothing of its padding stays."""
    model = tiny_kangaroo(2, drafter="layer", deep_scale=0.1, lora=False).double()
    prompt = torch.randint(5, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = model.generate(prompt, 20, how).tokens
    made = capture_passes(model, monkeypatch)
    for _ in range(2):
        assert model.generate(prompt, 20, how).tokens == expected
    assert made[0].passes.takes_prompt(length)


def test_later_tokens_as_many_as_a_prompt_are_no_prompt(monkeypatch):
    """What was captured for a prompt reads and writes its slots; with target "adapted" they are the verifier's."""
    model = tiny_kangaroo(2, drafter="layer", deep_scale=0.1).double()
    prompt = torch.randint(5, 60, (7,), generator=torch.Generator().manual_seed(1)).tolist() * 14
    expected = model.generate(prompt, 40, DecodeConfig(0, target="adapted")).tokens
    capture_passes(model, monkeypatch)
    # A block of 80 tokens is as wide as the prompt is when it is padded.
    long = DecodeConfig(80, source="lookup", target="adapted")
    assert model.generate(prompt, 100, long).tokens[:40] == expected


@pytest.mark.parametrize(("kind", "captured"), [("linear", True), ("dynamic", False)])
def test_a_model_whose_angles_depend_on_the_length_reads_prompts_as_they_are(kind, captured, monkeypatch):
    """Padding would count as text."""
    monkeypatch.setattr(StageWeights, "fused", True)  # as on CUDA
    model = EarlyExitLlamaForCausalLM(tiny_config(rope_scaling={"type": kind, "factor": 2.0}))
    model.set_exit_layer(2)
    assert model.new_stages(64).passes.own_kernels == captured
    drafted = tiny_kangaroo(2, drafter="layer", lora=False)
    drafted.adapter_model.rotary = model.rotary
    assert drafted.base_model.new_stages(64, drafted.drafter_parts()).passes.own_kernels == captured


@pytest.mark.parametrize("branches", [0, 2])
def test_what_drafts_goes_on_from_the_committed_text_alone(branches, monkeypatch):
    """Whichever chain was right, and however many drafts were made at once: a fresh decoding drafts the same."""
    how = DecodeConfig(8, source="hybrid", branches=branches)
    model = tiny_kangaroo(2, drafter="layer", deep_scale=0.1, lora=False).double()
    fresh = model.base_model.new_stages
    captured = fresh(SHORTEST_VIEW, model.drafter_parts(), "base", 1, 1 + branches)
    captured.passes.graphs = Recorded()
    seen = Counter()
    for prompt in random_prompts(4 + 4 * branches, 2):
        text = list(prompt)
        own = text + model.generate(prompt, 40, DecodeConfig(0)).tokens

        def look_up(policy, own=own):
            """A lookup that is right in some blocks."""
            start = len(policy._index.tokens)
            right = own[start + len(policy._drafts) :]
            return right[:3] if start % 3 == 0 else [7, 7]

        monkeypatch.setattr(BlockPolicy, "look_up", look_up)
        monkeypatch.setattr(BlockPolicy, "ahead", lambda policy: None)
        monkeypatch.setattr(model.base_model, "new_stages", lambda *args: captured)
        captured.reset()
        for block in model.decode_blocks(prompt, 40, how):
            for chain in (block, *block.beside):
                if chain.draft.num_learned:
                    count = chain.draft.num_learned
                    expected = step_by_step(model, text, count, chain.draft.chain)
                    assert chain.draft.tokens[:count].tolist() == expected
                    seen[chain.draft.chain, chain is block] += 1
            looked_up = block.main_chain.num_accepted - block.main_chain.draft.num_learned
            if looked_up >= 0:  # else a draft before it is wrong
                seen["lookup is right" if looked_up else "lookup is wrong"] += 1
            text += block.committed
        assert text == own
        monkeypatch.setattr(model.base_model, "new_stages", fresh)
    assert seen["lookup is right"] > 2 and seen["lookup is wrong"] > 2
    assert all(seen[branch, True] > 1 for branch in range(branches + 1))
    assert not branches or all(seen[branch, False] > 2 for branch in range(branches + 1))


def step_by_step(model, text, count, branch):
    """The next drafts after a text, each from scratch; a branch takes the second choice once."""
    drafts = []
    for depth in range(1, count + 1):
        with torch.no_grad():
            logits = model(torch.tensor([[*text, *drafts]])).exit_logits[0, -1]
        drafts.append(int(model.token_ids(logits.topk(2).indices[int(depth == branch)])))
    return drafts


@pytest.mark.no_cover
@pytest.mark.parametrize(("deep_scale", "doubtful"), [(0.03, 0.0), (0.0, 0.4)])
def test_a_lookup_after_drafts_is_the_same_ahead_of_the_host(deep_scale, doubtful, monkeypatch):
    """On texts that hold their own answers; no lookup follows a doubtful draft, whatever matches."""
    model = tiny_kangaroo(2, deep_scale=deep_scale, lora=False).double()
    prompts = []
    for prompt in random_prompts(2, 2):
        own = model.generate(prompt, 14, DecodeConfig(0)).tokens
        prompts.append([*prompt, *own, *prompt, *own, *prompt])
    drafts = [block.draft.confidence for block in model.generate(prompts[0], 24, DecodeConfig(4)).blocks]
    threshold = float(torch.cat(drafts).quantile(doubtful)) if doubtful else 0.0
    how = DecodeConfig(2, threshold, source="hybrid")
    expected = row_by_row(model, prompts, how)
    chains = [block.main_chain for one in expected for block in one.blocks]
    assert any(len(chain.draft.tokens) > chain.draft.num_learned for chain in chains)
    accepted = [chain.num_accepted > chain.draft.num_learned for chain in chains]
    doubts = [chain.draft.num_learned > 0 and chain.draft.confidence[0] < threshold for chain in chains]
    assert any(doubts) if doubtful else any(accepted)
    held = capture_passes(model, monkeypatch)
    found = model.generate_batch(prompts, 24, how, (EOS,), seed=3)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert list(map(blocks_of, found)) == list(map(blocks_of, expected)) and held[0].ahead


def test_a_batch_that_is_empty_or_holds_an_empty_prompt_is_refused():
    for prompts in ([], [[3], []]):
        with pytest.raises(ValueError, match="there is no prompt|prompt is empty"):
            tiny_kangaroo(0).generate_batch(prompts, 5, DecodeConfig(2))


def test_views_are_powers_of_two_within_the_capacity():
    assert [view(needed, 1000) for needed in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1000]


def test_deterministic_needs_a_block_that_fits_its_passes():
    with pytest.raises(ValueError, match=f"expected below {PASS_ROWS}"):
        DecodeConfig(PASS_ROWS, deterministic=True)


class Forgetful(Recorded):
    """Keeps what a CUDA graph keeps: nothing of what was run."""

    def __call__(self, key, run, *inputs):
        return run(*inputs)

    def in_place(self, key, run, state):
        return run()


def test_stages_that_are_dropped_are_freed_at_once(monkeypatch):
    """A CUDA graph that the garbage collector finds during a capture breaks the capture."""
    model = tiny_kangaroo(2, drafter="layer", lora=False)
    monkeypatch.setattr(conftest, "Recorded", Forgetful)
    held = capture_passes(model, monkeypatch)
    gc.collect()
    gc.disable()
    try:
        for how in (DecodeConfig(4, branches=1), DecodeConfig(3, source="hybrid"), DecodeConfig(0)):
            model.generate([5, 6, 7], 20, how)
        dropped = [weakref.ref(stages) for stages in held]
        assert all(stages.ahead for stages in held)
        held.clear()
        assert [one() for one in dropped] == [None] * 3
    finally:
        gc.enable()


class Queue:
    """Stands for a busy GPU: what it is asked to do happens when somebody waits for it, in its order."""

    def __init__(self):
        self.asked = []

    def later(self, work):
        self.asked.append(work)

    def synchronize(self):
        while self.asked:
            self.asked.pop(0)()

    def record(self):
        """As an event, this one stands for all that was asked for."""


class OnQueue:
    """The memory of that GPU."""

    def __init__(self, memory, queue):
        self.memory, self.queue = memory, queue

    def copy_(self, source, non_blocking=False):
        self.queue.later(lambda: self.memory.copy_(source))


def test_inputs_are_not_written_over_before_they_are_copied():
    """Prompts of a batch are read one after another, and nothing waits between them."""
    queue, seen = Queue(), []
    host, device = torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    graph = SimpleNamespace(replay=lambda: queue.later(lambda: seen.append(device.view(torch.long).tolist())))
    pinned = host.view(torch.long)
    captured = _Captured(
        graph, [device.view(torch.long)], [pinned], (host, OnQueue(device, queue)), (), queue
    )
    graphs = CudaGraphs([])
    graphs._captured["pass", torch.Size([2])] = captured
    for tokens in ([1, 2], [3, 4], [5, 6]):
        graphs("pass", None, torch.tensor(tokens))
    queue.synchronize()
    assert seen == [[1, 2], [3, 4], [5, 6]]


def test_captured_prompts_keep_the_angles_that_they_read(monkeypatch):
    """A longer text gives the model a longer table; what was captured reads the one before."""
    model = tiny_kangaroo(2, drafter="layer", lora=False).double()
    made = capture_passes(model, monkeypatch)
    rotary = [model.base_model.rotary, model.adapter_model.rotary]
    model.generate(list(range(5, 105)), 8, DecodeConfig(3))
    read = [weakref.ref(one.cos_cached) for one in rotary]
    for one in rotary:
        one.table(4096, one.cos_cached.device)
    gc.collect()
    assert made and all(one() is not None for one in read)


def test_a_text_that_is_over_goes_on_beyond_what_the_others_read(monkeypatch):
    """On the device it grows until the host looks at the batch: there are angles for all of its row."""
    prompts = [[7, 9, 11, 13] * 56, [5, 6, 7], [9, 8]]
    model = tiny_kangaroo(1, drafter="layer", deep_scale=0.0, lora=False).double()
    answers = [model.generate(prompt, 100, DecodeConfig(0)).tokens for prompt in prompts]
    end = next(token for token in answers[0][2:] if token not in answers[0][:2] + answers[1] + answers[2])
    expected = [model.generate(prompt, 100, DecodeConfig(0), (end,)).tokens for prompt in prompts]
    assert [len(tokens) < 10 for tokens in expected] == [True, False, False]
    monkeypatch.setattr(conftest, "SHORTEST_VIEW", 2 * SHORTEST_VIEW)  # a longer row than what is read
    model = tiny_kangaroo(1, drafter="layer", deep_scale=0.0, lora=False).double()
    capture_passes(model, monkeypatch)
    found = model.generate_batch(prompts, 100, DecodeConfig(4), (end,))
    assert [one.tokens for one in found] == expected
