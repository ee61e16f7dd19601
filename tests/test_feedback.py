"""A drafter with feedback: the decoder drafts what the parallel pass over the text says, at every depth of a block."""

from __future__ import annotations

import pytest
import torch
from conftest import EOS, capture_passes, random_prompts, tiny_kangaroo
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from dvirl.config import DVIConfig, SGPConfig
from dvirl.evaluation.agreement import measure_blocks
from dvirl.models.drafters import WEIGHTS, _drafter_settings
from dvirl.rollout import Responses, generate
from dvirl.runs.errors import DvirlError
from kangaroo.adapter import at_positions, rotary_for
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.drafting import BlockPolicy
from kangaroo.decoding.planning import Plan

pytestmark = pytest.mark.no_cover

WAYS = [
    DecodeConfig(4),
    DecodeConfig(5, threshold=0.02),
    DecodeConfig(3, source="hybrid"),
    DecodeConfig(4, source="lookup"),
    DecodeConfig(4, deterministic=True),
    DecodeConfig(6, source="hybrid", adaptive=True),
    DecodeConfig(4, branches=2),
    DecodeConfig(3, source="hybrid", branches=1),
]


def model_with_feedback(seed=1, **args):
    args = {"drafter": "layer", "drafter_layers": 2, "deep_scale": 0.3, **args}
    model = tiny_kangaroo(seed, feedback=True, **args).double()
    adapter = model.adapter_model
    for fuse in filter(None, (adapter.fuse, adapter.fuse_later, adapter.fuse_middle)):
        fuse.weight.data += 0.3 * torch.randn_like(fuse.weight)
    return model


@torch.no_grad()
def choices(model, chains):
    """The two likeliest tokens for each draft of each chain, a text and its drafts: all by one parallel pass."""
    rows = [torch.tensor([*text, *drafts[:-1]]) for text, drafts in chains]
    # What stands to the right of a text changes nothing of it.
    base, ids = model.base_model, pad_sequence(rows, batch_first=True)
    with base.without_adapters("lora_S"):
        verifier_hidden = base.forward_deep(base.forward_shallow(ids), middle_layer=model.middle_layer)
    longest = max(len(drafts) for _, drafts in chains)
    states = model.drafter_depths(ids, base.forward_shallow(ids), verifier_hidden, longest)
    for row, (text, drafts) in enumerate(chains):
        own = torch.stack([states[depth][row, len(text) - 1 + depth] for depth in range(len(drafts))])
        yield model.token_ids(model.head_logits(own).topk(2).indices).tolist()


def check_blocks(model, prompt, blocks):
    """Each learned draft is that of its depth, after the text and the drafts before it; how many were checked."""
    text, chains, places = list(prompt), [], []
    for block in blocks:
        for draft in (chain.draft for chain in (block, *block.beside)):
            if draft.num_learned:
                chains.append((text, draft.tokens[: draft.num_learned].tolist()))
                places.append(draft.chain)
        text = [*text, *block.committed]
    if not chains:  # nothing was learned, all of it was looked up
        return 0
    for (text, drafts), place, likeliest in zip(chains, places, choices(model, chains), strict=True):
        expected = [two[int(depth + 1 == place)] for depth, two in enumerate(likeliest)]
        assert drafts == expected, text
    return sum(len(drafts) for _, drafts in chains)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.source}-{how.draft_len}-{how.adaptive}")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("recurrent", "middle_layer"), [(False, 3), (True, 0)])
def test_drafts_are_those_of_the_parallel_pass(how, captured, recurrent, middle_layer, monkeypatch):
    window = 7 if how.threshold else 64
    model = model_with_feedback(adapter_window=window, recurrent=recurrent, middle_layer=middle_layer)
    prompts = [part * 2 for part in random_prompts(3, 2)]
    # Triton's interpreter takes half a second a block; a plan that adapts needs its blocks to do so.
    length = 16 if captured and not how.adaptive else 30
    plain = [model.generate(prompt, length, DecodeConfig(0), (EOS,)).tokens for prompt in prompts]
    own = {tuple(prompt): [*prompt, *tokens] for prompt, tokens in zip(prompts, plain, strict=True)}

    def look_up(policy):
        """A lookup that is right in every second block."""
        text = policy._index.tokens
        answer = next(own[key] for key in own if list(key) == text[: len(key)])
        return answer[len(text) + len(policy._drafts) :][:3] if len(text) % 2 else [7, 7]

    if how.source == "hybrid" and not how.adaptive:
        monkeypatch.setattr(BlockPolicy, "look_up", look_up)
        monkeypatch.setattr(BlockPolicy, "ahead", lambda policy: None)
    if captured:
        capture_passes(model, monkeypatch)
    checked = 0
    for prompt, expected in zip(prompts, plain, strict=True):
        found = model.generate(prompt, length, how, (EOS,))
        assert found.tokens == expected
        checked += check_blocks(model, prompt, found.blocks)
    together = model.generate_batch(prompts, length, how, (EOS,))
    assert [one.tokens for one in together] == plain
    checked += sum(
        check_blocks(model, prompt, one.blocks) for prompt, one in zip(prompts, together, strict=True)
    )
    assert (checked > 60) == (how.source != "lookup")


@pytest.mark.parametrize(("feedback", "recurrent"), [(False, False), (True, False), (True, True)])
def test_blocks_that_run_ahead_may_change_their_length(feedback, recurrent, monkeypatch):
    """After plain blocks the drafter catches up; after others everything is read already."""
    model = (
        model_with_feedback(recurrent=recurrent, middle_layer=3 * recurrent)
        if feedback
        else tiny_kangaroo(1, drafter="layer", deep_scale=0.3, lora=False).double()
    )
    prompts = random_prompts(3, 2)
    length = 36
    plain = [model.generate(prompt, length, DecodeConfig(0)).tokens for prompt in prompts]

    def ahead(policy):
        plans = (Plan(), Plan(3), Plan(1), Plan(looked_up=3), Plan(4), Plan(3, 1), Plan(), Plan(2, 1, 3, 2))
        return plans[getattr(policy, "blocks", 0) // 2 % len(plans)]

    def observe(policy, verification, index):
        policy.blocks = getattr(policy, "blocks", 0) + 1

    held = capture_passes(model, monkeypatch)
    monkeypatch.setattr(BlockPolicy, "ahead", ahead)
    monkeypatch.setattr(BlockPolicy, "observe", observe)
    lengths = set()
    how = DecodeConfig(4, source="hybrid", branches=1)
    for prompt, expected in zip(prompts, plain, strict=True):
        found = model.generate(prompt, length, how)
        assert found.tokens == expected
        lengths |= {block.draft.num_learned for block in found.blocks}
        assert not feedback or check_blocks(model, prompt, found.blocks)
    together = model.generate_batch(prompts, length, how)
    assert [one.tokens for one in together] == plain
    assert {0, 1, 3, 4} <= lengths and all(one.ahead for one in held)


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_depths_of_one_pass_by_hand(recurrent):
    """Depth j at position t, against the layers run on its own block: keys of depth 1 up to the block's start."""
    model = model_with_feedback(drafter_layers=1, recurrent=recurrent)
    adapter, width = model.adapter_model, model.base_model.config.hidden_size
    exits, deep, embedded = (torch.randn(2, 9, width).double() for _ in range(3))
    found = adapter.forward_unrolled(exits, deep, 3, embedded)
    for start in range(9 - 2):
        feedback, states = deep[:, : start + 1], []
        for depth in range(1, 4):  # the block's first draft stands at `start`
            fused = adapter.fused(exits[:, : start + 1], feedback[:, : start + 1])
            if depth > 1:
                later = slice(start + 1, start + depth)
                inputs = (embedded if recurrent else exits)[:, later]
                fused = torch.cat([fused, adapter.fused(inputs, feedback[:, later], recurrent)], dim=1)
            states.append(adapter.forward_early_stop(fused)[:, -1])
            torch.testing.assert_close(found[depth - 1][:, start + depth - 1], states[-1])
            feedback = torch.cat([feedback, states[-1][:, None]], dim=1)
    assert adapter.rotary.max_seq_len_cached >= rotary_for(model.base_model.config).max_seq_len_cached


@pytest.mark.parametrize(("recurrent", "window"), [(False, None), (True, None), (True, 3)])
def test_later_drafts_at_some_positions_are_those_at_all(recurrent, window):
    """Values and gradients; the first few positions of later depths, whose blocks began before them, mean nothing."""
    model = model_with_feedback(drafter_layers=2, recurrent=recurrent)
    adapter, width = model.adapter_model, model.base_model.config.hidden_size
    adapter.window = window
    exits, deep, embedded = (torch.randn(2, 12, width).double() for _ in range(3))
    later = torch.tensor([[3], [5]]) + torch.arange(6)
    depths = range(1, 5)
    whole = adapter.forward_unrolled(exits, deep, len(depths), embedded)
    some = adapter.forward_unrolled(exits, deep, len(depths), embedded, later)
    torch.testing.assert_close(some[0], whole[0])
    kept = [(at_positions(one, later)[:, depth - 2 :], other[:, depth - 2 :])
            for depth, one, other in zip(depths, whole, some, strict=True) if depth > 1]  # fmt: skip
    gradients = []
    for pairs in zip(*kept, strict=True):
        loss = sum((state * state.cos()).sum() for state in pairs)
        gradients.append(torch.autograd.grad(loss, list(adapter.layers.parameters())))
    for one, other in [*kept, *zip(*gradients, strict=True)]:
        torch.testing.assert_close(one, other)


def test_a_fresh_drafter_with_feedback_is_the_one_without():
    plain = tiny_kangaroo(1, drafter="layer")
    fresh = tiny_kangaroo(1, drafter="layer", feedback=True)
    ids = torch.tensor([random_prompts(1)[0]])
    torch.testing.assert_close(plain(ids).exit_logits, fresh(ids).exit_logits)
    assert fresh.feedback and not plain.feedback


def test_feedback_needs_the_target_base():
    with pytest.raises(ValueError, match="a drafter with feedback needs"):
        model_with_feedback().generate([1, 2], 3, DecodeConfig(2, target="adapted"))


@pytest.mark.parametrize(
    ("settings", "changes"),
    [(DVIConfig, {"target": "adapted"}), (DVIConfig, {"exit_states": "stored"}), (SGPConfig, {})],
)
def test_settings_that_do_not_go_with_feedback_are_refused(settings, changes):
    with pytest.raises(DvirlError, match="feedback"):
        settings(feedback=True, **changes)


def test_a_fresh_map_of_middle_states_changes_nothing(tmp_path):
    """So training can go on from a drafter without one; and only then may a file lack it."""
    plain = model_with_feedback(recurrent=True)
    (tmp_path / "drafter").mkdir()
    save_file(plain.drafter_state(), tmp_path / "drafter" / "drafter.safetensors")
    model = model_with_feedback(2, recurrent=True, middle_layer=3)
    with pytest.raises(ValueError, match="fuse_middle"):
        model.load_drafter(tmp_path / "drafter")
    fresh = tiny_kangaroo(
        1, feedback=True, drafter="layer", drafter_layers=2, recurrent=True, middle_layer=3
    ).double()
    fresh.load_drafter(tmp_path / "drafter", to_start=True)
    ids = torch.tensor(random_prompts(1, 4))
    exits = plain.base_model.forward_shallow(ids)
    found = plain.base_model.forward_deep(exits, middle_layer=3)
    last, middle = found.chunk(2, dim=-1)
    assert torch.equal(last, plain.base_model.forward_deep(exits)) and not torch.equal(last, middle)
    torch.testing.assert_close(
        middle.square().mean(dim=-1), torch.ones_like(middle[..., 0]), atol=1e-3, rtol=0
    )
    expected = plain.drafter_depths(ids, exits, last, 3)
    for one, other in zip(fresh.drafter_depths(ids, exits, found, 3), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layer", [1, 2, 4, 9])
def test_a_middle_layer_is_one_of_the_deep_layers_before_the_last(layer):
    with pytest.raises(
        ValueError, match=f"middle_layer is {layer}; expected 0, or above exit_layer 2 and below 4"
    ):
        tiny_kangaroo(1, 2, drafter="layer", feedback=True, middle_layer=layer)


def test_a_middle_layer_needs_feedback():
    with pytest.raises(DvirlError, match="middle_layer is 3; expected feedback with it"):
        DVIConfig(middle_layer=3)
    with pytest.raises(ValueError, match="middle_layer is 3; expected feedback with it"):
        tiny_kangaroo(1, drafter="layer", middle_layer=3)


def test_a_recurrent_drafter_needs_feedback():
    with pytest.raises(DvirlError, match="recurrent is true; expected feedback with it"):
        DVIConfig(recurrent=True)
    with pytest.raises(ValueError, match="recurrent is true; expected feedback with it"):
        tiny_kangaroo(1, drafter="layer", recurrent=True)


def test_drafters_from_before_feedback_have_none(tmp_path):
    """The shipped one's config.yaml does not name it."""
    settings, _ = _drafter_settings(WEIGHTS[0] / "smollm2-135m-k2")
    assert (settings.feedback, settings.recurrent, settings.drafter_layers) == (False, False, 2)


# Tokens a block


def near_the_verifier(**kind):
    """A drafter with the verifier's own deep layers, a little changed, for most of its tokens: blocks of all lengths."""
    covered = [token for token in range(264) if token % 9]
    model = tiny_kangaroo(
        1, lora=False, drafter="layer", drafter_layers=2, deep_scale=0.0, draft_vocab=covered, **kind
    ).double()
    for parameter in model.adapter_model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def answered(model, count, longest) -> tuple[list[list[int]], Responses]:
    """Prompts, and the model's greedy answers of several lengths: cut off at random, as ends of sequence do."""
    prompts = random_prompts(count, 4)
    responses = generate(model.base_model, prompts, longest, keep_states=False).stored()
    lengths = torch.tensor([1 + (5 * row) % longest for row in range(count)])
    responses = Responses(responses.tokens, responses.prompt_lens, lengths)
    return prompts, responses.take(torch.arange(count))


@pytest.mark.parametrize("kind", [{}, {"feedback": True}, {"feedback": True, "recurrent": True}])
def test_tokens_a_block_are_what_the_decoder_commits_from_every_position(kind):
    """Four drafts after each prefix of each answer, step by step."""
    torch.manual_seed(0)
    model = near_the_verifier(**kind)
    prompts, responses = answered(model, 12, 14)
    accepted, rooms = [], []
    for prompt, row, length in zip(
        prompts, responses.tokens.tolist(), responses.response_lens.tolist(), strict=True
    ):
        for position in range(1, length):
            text = row[: len(prompt) + position - 1]
            block = model.generate(text, 8, DecodeConfig(4)).blocks[1]
            accepted.append(min(block.num_accepted, length - position))
            rooms.append(length - position)
    found = measure_blocks(model, responses, 4)
    assert found.tokens_a_block == pytest.approx(1 + sum(accepted) / len(accepted)) and max(accepted) > 2
    for depth, rate in enumerate(found.by_depth):
        reached = [
            one > depth for one, room in zip(accepted, rooms, strict=True) if one >= depth and room > depth
        ]
        assert rate == pytest.approx(sum(reached) / len(reached))


@torch.no_grad()
def test_expected_tokens_a_block_are_those_of_a_loop_over_whole_distributions():
    """Speculative sampling at temperature 1: sum(min(p, q)) of each draft along the greedy answer, p over all tokens."""
    model = near_the_verifier(feedback=True, recurrent=True)
    base = model.base_model
    prompts, responses = answered(model, 6, 8)
    expected, blocks = 0.0, 0
    for prompt, row, length in zip(prompts, responses.tokens, responses.response_lens.tolist(), strict=True):
        ids = row[None, : len(prompt) + length].long()
        with base.without_adapters("lora_S"):
            verifier = base.forward_deep(base.forward_shallow(ids))
        states = model.drafter_depths(ids, base.forward_shallow(ids), verifier, 3)
        p = base.lm_head(verifier)[0].softmax(-1)
        for start in range(len(prompt), len(prompt) + length - 1):
            reached = 1.0
            for depth in range(min(3, len(prompt) + length - 1 - start)):
                q = torch.zeros_like(p[0])
                q[model.draft_ids] = (
                    model.head_logits(states[depth][0, start + depth]).softmax(-1).to(q.dtype)
                )
                reached *= float(torch.minimum(p[start + depth], q).sum())
                expected += reached
            blocks += 1
    assert measure_blocks(model, responses, 3).expected_tokens == pytest.approx(
        1 + expected / blocks, rel=1e-5
    )
