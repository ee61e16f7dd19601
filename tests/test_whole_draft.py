"""A whole model that drafts: verified as any other draft, judged by every command, refused by name if its tokens differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import (
    EOS,
    VOCAB,
    capture_passes,
    copied,
    random_prompts,
    tiny_config,
    tiny_kangaroo,
    tiny_model,
)
from published import write_model
from safetensors.torch import load_file, save_file
from test_batch import NAME, SETTINGS
from test_cli import TINY
from test_distill import question_file
from test_export import export, made
from test_lossless import as_hugging_face, hf_greedy
from test_published_adapter import COMMANDS, CPU
from test_sampling import VOCAB as FEW
from test_sampling import five_tokens, p_value
from transformers import LlamaForCausalLM

from dvirl import cli
from dvirl.evaluation.agreement import measure_agreement
from dvirl.models.drafters import load_drafter
from dvirl.models.export import plain_llama
from dvirl.models.loading import load
from dvirl.rollout import Responses
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

pytestmark = pytest.mark.no_cover

FIXED = [how for how in SETTINGS if how.target == "base" and not how.adaptive]
FIXED.append(DecodeConfig(4, deterministic=True))
"""Ways to decode whose blocks do not depend on the clock."""
SHAPES = [
    dict(),
    dict(hidden_size=24, heads=2, groups=1, num_hidden_layers=1, rope_theta=77.0, tied=False, vocab_size=VOCAB + 40),
    dict(hidden_size=48, heads=3, groups=3, num_hidden_layers=6, rms_norm_eps=1e-3, attention_bias=True),
]  # fmt: skip


def plain_model(config, tensors):
    other = EarlyExitLlamaForCausalLM(config).eval()
    other.load_state_dict(tensors, strict=False)
    other.tie_weights()
    return other


def drafting(base, other):
    """The model `base`, for which the model `other` drafts."""
    model = KangarooModel(base, EARLY_STOP_LAYER=1)
    model.draft_with(other)
    return model


def same_draft_twice(seed=2, deep_scale=0.3):
    """A model with a drafter of ours, and the same model with that drafter as a model of its own."""
    args = dict(drafter="layer", drafter_layers=2, adapter_window=None, head="lora", head_rank=8)
    model, twin = (tiny_kangaroo(seed, deep_scale=deep_scale, **args) for _ in range(2))
    model.head_up.data += 0.02 * torch.randn(model.head_up.shape)
    model.exit_norm.weight.data.uniform_(0.5, 1.5)
    other = plain_model(*plain_llama(model))
    twin.draft_with(other)
    return model, twin


def random_model(seed=5, **changes):
    torch.manual_seed(seed)
    return EarlyExitLlamaForCausalLM(tiny_config(**changes)).eval()


def first_layers(base, count):
    """The first layers of a model, its norm and head as a model of its own, of other positions."""
    config = tiny_config(num_hidden_layers=count, rope_theta=4000.0)
    return plain_model(config, base.state_dict())


def blocks_of(decoded):
    return [
        (block.start, block.committed, block.num_accepted, block.draft.tokens.tolist())
        for block in decoded.blocks
    ]


# The same draft, as a drafter of ours and as a model of its own


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("how", FIXED, ids=NAME)
def test_an_exported_drafter_drafts_the_same_blocks(how, captured, monkeypatch):
    ours, whole = same_draft_twice()
    prompts = [random_prompts(1)[0] * 5, *random_prompts(3, 4)]
    if captured:
        for model in (ours, whole):
            capture_passes(model, monkeypatch)
    expected, found = (model.generate_batch(prompts, 24, how, (EOS,), seed=3) for model in (ours, whole))
    assert list(map(blocks_of, found)) == list(map(blocks_of, expected))
    if how.source == "learned" and how.draft_len:
        assert max(block.num_accepted for one in found for block in one.blocks) > 1


def test_it_is_judged_as_the_drafter_is(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path, exit_layer=1, drafter="layer", drafter_layers=1, draft_vocab=0)
    assert export(folder, tmp_path / "out", "--dtype", "float32") == 0
    monkeypatch.chdir(tmp_path)
    question_file(tmp_path / "q.jsonl", [["aaa"], ["a b"]])
    flags = ["--questions", "q.jsonl", "--any_category", "--answer_tokens", "12", "--methods", "plain,kangaroo,fixed",
             "--kangaroo_threshold", "0.1", "--int8_draft", "false", *CPU]  # fmt: skip
    judged = {"ours": ("drafter", []), "whole": ("out", ["--model_name", "base"])}
    for run, (draft, more) in judged.items():
        assert cli.main(["evaluate", "--draft", draft, "--run_dir", run, *flags, *more]) == 0
    assert "# out on q.jsonl" in (tmp_path / "whole/report.md").read_text()
    for name in ("plain", "kangaroo", "fixed"):
        answers = [
            [
                json.loads(line)["choices"][0]
                for line in Path(run, f"answers/{name}-1.jsonl").read_text().splitlines()
            ]
            for run in judged
        ]
        for one, other in zip(*answers, strict=True):
            assert one["tokens"] == other["tokens"] and one["accept_lengths"] == other["accept_lengths"]


def test_agreement_is_the_drafters():
    ours, whole = same_draft_twice()
    prompts = [[5, token, 7, 8] for token in range(20, 26)]
    tokens = [prompt + ours.generate(prompt, 16, DecodeConfig(0)).tokens for prompt in prompts]
    responses = Responses(torch.tensor(tokens), torch.full((6,), 4), torch.full((6,), 16))
    expected, found = (dataclasses.asdict(measure_agreement(model, responses)) for model in (ours, whole))
    assert found.pop("answers") == expected.pop("answers") and 0.1 < found["rate"] < 1
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.real
def test_the_drafter_in_the_box_drafts_the_same_blocks_as_a_model_of_its_own(real):
    ours = load_drafter("smollm2-135m-k2", copied(real)).model
    whole = drafting(real.model, plain_model(*plain_llama(ours)))
    # Its own rows alone: an export also has the model's for tokens outside the draft vocabulary.
    whole.exit_proj.weight = torch.nn.Parameter(whole.exit_proj.weight[ours.draft_ids], requires_grad=False)
    whole.draft_ids = ours.draft_ids
    prompts = [real.chat.encode([text]) for text in ("Name three rivers.", "What is two and two?")]
    expected, found = (
        model.generate_batch(prompts, 24, DecodeConfig(4), real.eos_ids) for model in (ours, whole)
    )
    assert list(map(blocks_of, found)) == list(map(blocks_of, expected))
    assert sum(block.num_accepted for one in found for block in one.blocks) > 10


# Another model


@pytest.mark.parametrize("shape", SHAPES, ids=["alike", "one layer, more rows", "deeper, biases"])
def test_the_output_is_the_verifiers_greedy_output_whatever_model_drafts(shape):
    base = tiny_model(1, deep_scale=0.3)
    reference = as_hugging_face(base)
    model = drafting(base, random_model(**shape))
    prompts = random_prompts(3, 1)
    expected = [hf_greedy(reference, prompt, 24, EOS) for prompt in prompts]
    for how in FIXED:
        if not how.temperature:
            assert [one.tokens for one in model.generate_batch(prompts, 24, how, (EOS,))] == expected, how
    for how in (DecodeConfig(4, adaptive=True), DecodeConfig(6, source="hybrid", adaptive=True, branches=2)):
        assert model.generate(prompts[0], 24, how, (EOS,)).tokens == expected[0], how


@torch.no_grad()
def accepted_by_hand(verifier: LlamaForCausalLM, draft: LlamaForCausalLM, prompt, length: int, count: int):
    """Accepted drafts of every block by two models of Hugging Face, without caches."""

    def greedy(model, tokens):
        return int(model(torch.tensor([tokens])).logits[0, -1, :VOCAB].argmax())

    tokens = [*prompt, greedy(verifier, prompt)]
    accepted = []
    while len(tokens) < len(prompt) + length:
        drafts = []
        while len(drafts) < min(count, len(prompt) + length - len(tokens) - 1):
            drafts.append(greedy(draft, tokens + drafts))
        right = 0
        while right < len(drafts) and drafts[right] == greedy(verifier, tokens + drafts[:right]):
            right += 1
        tokens += [*drafts[:right], greedy(verifier, tokens + drafts[:right])]
        accepted.append(right)
    return accepted


@pytest.mark.parametrize("make", [lambda base: first_layers(base, 2), lambda base: random_model(**SHAPES[1])])
def test_blocks_are_those_of_two_models_of_hugging_face(make):
    base = tiny_model(1, deep_scale=0.3)
    base.model.norm.weight.data.uniform_(0.5, 1.5)
    other = make(base)
    models = [as_hugging_face(model) for model in (base, other)]
    model = drafting(base, other)
    found = []
    for prompt in random_prompts(3, 8):
        blocks = model.generate(prompt, 24, DecodeConfig(3)).blocks[1:]
        found += [block.num_accepted for block in blocks]
        assert found[-len(blocks) :] == accepted_by_hand(*models, prompt, 24, 3)
    assert max(found) == 3 or other.config.num_hidden_layers == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_by_the_verifier_itself_are_all_accepted(temperature):
    model = drafting(tiny_model(), tiny_model())
    how = DecodeConfig(4, temperature=temperature, draft_temperature=temperature)
    for decoded in model.generate_batch(random_prompts(4), 30, how):
        assert [block.num_accepted for block in decoded.blocks] == [
            len(block.draft.tokens) for block in decoded.blocks
        ]
        assert sum(block.num_accepted for block in decoded.blocks) == 23


@pytest.mark.parametrize("rows", [FEW - 1, FEW + 2])
def test_samples_follow_the_verifiers_distribution(rows):
    base = five_tokens().base_model
    other = random_model(vocab_size=rows, num_hidden_layers=1, hidden_size=16, heads=2, initializer_range=0.6)
    model = drafting(base, other)
    chance, rate = p_value(model, DecodeConfig(3, temperature=0.9, draft_temperature=1.4), 8_000)
    assert chance > 1e-3 and 0.02 < rate < 0.98


@pytest.mark.parametrize("rows", [VOCAB - 60, VOCAB + 60])
def test_rows_that_only_one_of_both_has_are_never_drafted(rows):
    model = drafting(tiny_model(1), random_model(vocab_size=rows, tied=rows > VOCAB))
    prompts = [[VOCAB - 1, 5], [VOCAB - 2] * 7]
    for decoded in model.generate_batch(prompts, 40, DecodeConfig(4)):
        drafts = torch.cat([block.draft.tokens for block in decoded.blocks])
        assert len(drafts) > 20 and int(drafts.max()) < min(rows, VOCAB)


def test_only_the_untouched_verifier_can_be_drafted_for():
    model = drafting(tiny_model(), tiny_model())
    with pytest.raises(ValueError, match="a whole model or a drafter"):
        model.generate([5], 4, DecodeConfig(2, target="adapted"))


def test_a_model_of_one_layer_drafts_but_cannot_be_split():
    one = random_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="this model of 1 layers takes 1 to 0"):
        KangarooModel(one, EARLY_STOP_LAYER=1)


# From the command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model, a smaller one of the same tokens, and questions."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", "plain", vocab_size=340)
    smaller(tmp_path)
    question_file(tmp_path / "q.jsonl", [["aaa"], ["a b"]])
    return tmp_path


def smaller(folder, tokenizer="llama2", **changes):
    values = dict(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, **changes
    )
    return write_model(folder / "adapter", "plain", tokenizer, **values)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_judges_takes_a_whole_model(here, command, capsys):
    assert cli.main([command, *COMMANDS[command], "--model_name", "model"]) == 0
    assert capsys.readouterr().out


def test_an_evaluation_goes_on_with_the_same_draft_and_with_no_other(here, capsys):
    asked = ["evaluate", *COMMANDS["evaluate"], "--model_name", "model"]
    assert cli.main(asked) == 0 and cli.main(asked) == 0
    answers = sorted(Path("out/answers").glob("*.jsonl"))
    assert answers and all(len(path.read_text().splitlines()) == 2 for path in answers)
    path = here / "adapter/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"].neg_()
    save_file(tensors, path)
    capsys.readouterr()
    assert cli.main(asked) == 2
    assert "the content of draft has changed since then" in capsys.readouterr().err


def changed(folder, **entries):
    path = folder / "adapter/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def broken(folder):
    path = folder / "adapter/model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda here: smaller(here, "llama3"), "adapter: token 0 is "),
        (lambda here: smaller(here, "added-token"), "is '[PAD]', and None for the model that verifies"),
        (lambda here: changed(here, bos_token="</s>"), "adapter: bos_token is '</s>', and '<s>' for the model"),
        (broken, "not a readable file of tensors"),
        (lambda here: (here / "adapter/model.safetensors").unlink(), "adapter: no weights; expected"),
        (lambda here: smaller(here, model_type="mistral"), "architecture is 'mistral', expected 'llama'"),
        (lambda here: (here / "adapter/config.json").unlink(), "no drafter 'adapter'; expected a folder"),
        (lambda here: (here / "adapter/config.json").write_text("{"), "adapter/config.json: not valid JSON"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_draft_is_refused_in_one_sentence(here, spoil, message, capsys):
    spoil(here)
    capsys.readouterr()
    assert cli.main(["evaluate", *COMMANDS["evaluate"], "--model_name", "model"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "chat format" not in line]
    assert len(lines) == 1 and lines[0].startswith("dvirl: ") and message in lines[0]
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["export", "adapter", "x", "--model_name", "model"], "the draft is a plain model already"),
        (["chat", "--draft", "adapter", "--model_name", "model", "--replay", "q.txt"], "to learn live"),
        (["train", "--start_from", "adapter", "--model_name", "model", "--run_dir", "x", *TINY], "adapter: a whole model drafts as it is"),
    ],
)  # fmt: skip
def test_what_needs_a_drafter_of_ours_refuses_a_whole_model(here, flags, message, capsys):
    (here / "q.txt").write_text("aaa")
    assert cli.main(flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "chat format" not in line]
    assert lines[-1].startswith("dvirl: ") and message in lines[-1] and not (here / "x").exists()


def test_a_tokenizer_that_names_no_ends_fits(here):
    path = here / "adapter/tokenizer_config.json"
    path.write_text("{}")
    drafter = load_drafter("adapter", load("model", "float32", "cpu"))
    assert drafter.folder.name == "adapter" and not any(
        one.requires_grad for one in drafter.model.parameters()
    )
    with pytest.raises(DvirlError, match="exit_layer is 9"):
        load_drafter("adapter", load("model", "float32", "cpu"), exit_layer=9)
