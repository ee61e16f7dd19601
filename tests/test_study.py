"""Studies: every kind on a tiny model, what they measure against plain recomputation, and the committed YAML files."""

from __future__ import annotations

import json
import math
import pickle
import statistics
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, VOCAB, random_prompts, scramble_lora, tiny_loaded, tiny_split
from safetensors.torch import load_file
from test_lossless import as_hugging_face

from dvirl import train_dvi
from dvirl.cli import main as cli
from dvirl.config import SGPConfig
from dvirl.data.sources import Prompt
from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.evaluation.agreement import measure_agreement, measure_blocks
from dvirl.evaluation.inference_kangaroo import measure_acceptance
from dvirl.experiments import figures as figures_module
from dvirl.experiments import grid, runner, streams
from dvirl.experiments import study as study_module
from dvirl.experiments.distillation import settings_of
from dvirl.experiments.figures import draft_cost, judge_answers, judge_verifier
from dvirl.experiments.staleness import stale_gradients
from dvirl.experiments.streams import adaptation_figures
from dvirl.experiments.study import Study
from dvirl.experiments.summary import row_name
from dvirl.experiments.summary import summary as summarise
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import from_mapping, read_yaml
from dvirl.scale import distill
from dvirl.scale.corpus import answer, write_shard
from dvirl.scale.distill import DistillConfig, Distiller
from dvirl.train_dvi import make_trainer
from dvirl.trainer import DVITrainer

FILES = sorted((Path(__file__).parents[1] / "configs").glob("study-*.yaml"))
BASE = dict(
    exit_layer=2, num_prompts=64, held_out=8, max_new_tokens=10, rollout_batch=8, judge_batch=2, fast_batch=1,
    lora_rank=4, lr_shallow=1e-2, draft_vocab=200, dtype="float32", threads=1, slow_every=0, replay=0,
    warmup_steps=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Studies load their models and prompts themselves; give them tiny ones."""

    def prompts(config, loaded):
        made = random_prompts(
            16, config.seed
        )  # few, and held out as well: nothing carries over in a random model
        return PromptSplit(PromptStream(made, config.seed), made[-config.held_out :])

    replies = [Prompt((f"question {n}",), "x", f"reply {n}") for n in range(9)]
    for module in (study_module, train_dvi):
        monkeypatch.setattr(module, "load_for", lambda *_: tiny_loaded(deep_scale=0.6))
    for module in (train_dvi, grid, streams):
        monkeypatch.setattr(module, "load_prompts", prompts)
    for module in (figures_module, grid):
        monkeypatch.setattr(module, "chatterbot_prompts", lambda: replies)


def a_study(kind="grid", **changes) -> Study:
    values = dict(question="?", kind=kind, seeds=[0], variants={"kl": {"schedule": "kl"}}, base=BASE)
    return Study(**{**values, **changes})


def run(study, workers=1) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return list(runner.run(study, Path(folder) / "x.rows.jsonl", workers).values())


def timeless(rows) -> list[dict]:
    return [{**row, "figures": {k: v for k, v in row["figures"].items() if k != "wall_s"}} for row in rows]


DISTILLED = dict(
    exit_layer=2, drafter_layers=1, feedback=True, recurrent=True, draft_vocab=200, lora_rank=4, head_rank=8, batch=4,
    depths=3, num_prompts=24, held_out=12, max_new_tokens=10, write_batch=8, warmup_steps=0, lr=1e-2, log_every=2,
    dtype="float32", device="cpu", threads=1,
)  # fmt: skip


def conversed(count, seed) -> list[list[int]]:
    """Prompts that stand for those of conversations; a quarter of every seed's are the same."""
    return random_prompts(count, seed)[count // 4 :] + random_prompts(24, 1)[: count // 4]


@pytest.fixture
def distilled(tmp_path, monkeypatch) -> dict:
    """Settings of a study of kind distill: its start is a drafter that a distillation of the tiny model ships."""
    written = []

    def conversations(loaded, count, seed, max_new_tokens, *_):
        written.append((count, seed))
        return answer(loaded, conversed(count, seed), max_new_tokens, 8)

    monkeypatch.setattr(distill, "write_conversations", conversations)
    loaded = tiny_loaded(deep_scale=0.6)
    write_shard(tmp_path / "shard-00000.safetensors", answer(loaded, random_prompts(16, 3), 10, 8))
    own = {name: value for name, value in DISTILLED.items() if name in DistillConfig.__dataclass_fields__}
    config = DistillConfig(**own, responses_from=str(tmp_path), run_dir=str(tmp_path / "start"), passes=2)
    start = Distiller(config, loaded).train(False).drafter
    return {"base": {**DISTILLED, "start_from": start}, "kind": "distill", "written": written}


def stop_after(monkeypatch, count):
    """The command is killed when so many variants have been kept; the list grows with what is kept."""
    original, kept = runner.keep, []

    def keep(path, rows):
        original(path, rows)
        kept.append(rows[0])
        if len(kept) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "keep", keep)
    return kept


def a_trainer(tmp_path, **changes) -> DVITrainer:
    return DVITrainer(
        a_study().config(0, tmp_path / "run", changes), tiny_loaded(deep_scale=0.6), tiny_split(8)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_committed_study_is_valid_in_both_sizes(path, tmp_path):
    full = from_mapping(Study, read_yaml(path), str(path))
    quick = full.small()
    assert len(full.seeds) >= 3 and full.question.endswith("?") and set(quick.variants) <= set(full.variants)
    if full.kind == "distill":
        for one in (full, quick):
            configs = [settings_of(one, 0, tmp_path, variant) for variant in one.variants.values()]
            assert all(config.start_from for config in configs)
        assert configs[0].num_prompts <= 256 and len(configs) == 2
        return
    for one in (full, quick):
        for variant in one.variants.values():
            own = {name: value for name, value in variant.items() if name not in ("replay_share", "mode")}
            assert one.config(0, tmp_path, own)
        for start in one.starts.values():
            if start:
                assert SGPConfig(**start.get("sgp", {})) and one.config(0, tmp_path, start)
        for domain in [
            *one.extra.get("clients", {}).values(),
            *(one.extra.get(k) for k in ("first", "then")),
        ]:
            assert domain is None or one.config(0, tmp_path, domain)
    assert quick.config(0, tmp_path).num_prompts <= 256


def test_a_grid_trains_every_variant_from_every_start_on_the_same_responses():
    starts = {
        "untrained": None,
        "kl": {"schedule": "kl", "num_prompts": 8},
        "sgp": {"sgp": {"epochs": 1, "lr": 1e-2}},
    }
    variants = {"kl": {"schedule": "kl"}, "rl": {"schedule": "reinforce"}}
    base = {**BASE, "num_prompts": 24}
    rows = run(a_study(starts=starts, variants=variants, seeds=[0, 1], base=base))
    assert [(r["start"], r["variant"], r["seed"]) for r in rows] == [
        (s, v, seed) for seed in (0, 1) for s in starts for v in variants
    ]
    for row in rows:
        figures = row["figures"]
        assert figures["tokens"] == next(r for r in rows if r["seed"] == row["seed"])["figures"]["tokens"]
        assert (figures["start_tokens"] == 0) == (row["start"] == "untrained")
        assert 0 <= figures["accept_rate"] <= 1 and "ppl" not in figures and row["curve"]["tokens"][-1] > 0
    found = {(r["start"], r["variant"]): r["figures"] for r in rows if r["seed"] == 0}
    assert found["untrained", "kl"]["agreement"] > found["untrained", "kl"]["agreement_before"] + 0.05
    assert found["kl", "kl"]["start_tokens"] > 40
    assert found["kl", "kl"]["agreement_before"] != found["untrained", "kl"]["agreement_before"]


def test_starts_and_variants_learn_from_different_prompts(monkeypatch):
    taken: dict[str, list] = {}
    original = PromptStream.take

    def take(stream, count):
        prompts = original(stream, count)
        taken.setdefault(id(stream), []).extend(map(tuple, prompts))
        return prompts

    monkeypatch.setattr(PromptStream, "take", take)
    run(a_study(starts={"kl": {"schedule": "kl", "num_prompts": 8}}, base={**BASE, "num_prompts": 8}))
    start, variant = (set(prompts) for prompts in taken.values())
    assert len(start) == len(variant) == 8 and not start & variant
    with pytest.raises(DvirlError, match="the source has 16 prompts, and the starts take 64"):
        run(a_study(starts={"kl": {"schedule": "kl"}}))


def test_the_table_has_means_and_deviations_over_seeds():
    rows = [{"variant": "a", "seed": s, "figures": {"x": v}} for s, v in enumerate((0.1, 0.4, 0.7))]
    table = summarise([*rows, {"start": "s", "variant": "a", "seed": 0, "figures": {"x": 2.0}}])
    assert table["a"]["x"] == {"mean": pytest.approx(0.4), "std": pytest.approx(0.3), "n": 3}
    assert table["s/a"]["x"] == {"mean": 2.0, "std": 0.0, "n": 1}
    assert table["a"]["x"]["std"] == pytest.approx(statistics.stdev([0.1, 0.4, 0.7]))


def test_a_seed_without_a_figure_is_left_out_of_its_mean():
    rows = [{"start": "untrained", "variant": "kl", "seed": seed, "figures": {"ece": ece, "none": float("nan")}}
            for seed, ece in enumerate((0.2, float("nan"), 0.4))]  # fmt: skip
    found = summarise(rows)["untrained/kl"]
    assert found["ece"] == {"mean": pytest.approx(0.3), "std": pytest.approx(0.1414, abs=1e-4), "n": 2}
    assert found["none"]["n"] == 0 and found["none"]["mean"] != found["none"]["mean"]


def test_the_judged_accept_rate_is_the_step_by_step_decoders(tmp_path):
    trainer = a_trainer(tmp_path, draft_len=3)
    scramble_lora(trainer.model, ["lora_S"], 0.1)
    prompts = random_prompts(6, 5)
    found = judge_answers(trainer, trainer.answer(prompts))
    steps = measure_acceptance(trainer.model, prompts, 10, trainer.config.decode, (EOS,))
    assert found["accept_rate"] == pytest.approx(steps.accept_rate) and found["mat"] == pytest.approx(
        steps.mat
    )


@pytest.mark.parametrize("changes", [{}, {"slow_every": 1}, {"target": "adapted"}])
def test_held_out_prompts_are_answered_anew_where_the_verifier_changes(monkeypatch, changes):
    seen, judge_own = [], grid.judge_answers
    monkeypatch.setattr(grid, "judge_answers", lambda *given: seen.append(given[1]) or judge_own(*given))
    run(a_study(variants={"kl": {"schedule": "kl", "num_prompts": 8, "lr_deep": 0.1, **changes}}))
    before, after = seen
    assert (before is after) == (not changes) and before.prompts() == after.prompts()
    assert torch.equal(before.tokens, after.tokens) == (not changes)


def test_where_nothing_is_drafted_there_is_no_accept_rate(tmp_path):
    trainer = a_trainer(tmp_path)
    trainer.loaded = replace(trainer.loaded, eos_ids=tuple(range(VOCAB)))  # every answer is one token
    found = judge_answers(trainer, trainer.answer(random_prompts(3, 5)))
    assert math.isnan(found["accept_rate"]) and math.isnan(found["mat"]) and math.isnan(found["agreement"])


def test_perplexity_and_drift_equal_hugging_faces(monkeypatch, tmp_path):
    trainer = a_trainer(tmp_path)
    assert judge_verifier(trainer)["drift_kl"] == pytest.approx(0.0, abs=1e-6)
    scramble_lora(trainer.model, ["lora_S", "lora_D"], 0.2)
    for target, off in (("base", ["lora_S"]), ("adapted", [])):
        trainer.config = replace(trainer.config, target=target)
        found = judge_verifier(trainer, batch=4)
        base, chat = trainer.loaded.model, trainer.loaded.chat
        own, untouched = as_hugging_face(base, *off), as_hugging_face(base, "lora_S", "lora_D")
        nll, drift, changed, count = 0.0, 0.0, 0, 0
        for prompt in figures_module.chatterbot_prompts():
            context, reply = chat.encode(prompt.turns), chat.encode_response(prompt.response)
            with torch.no_grad():
                p, q = (
                    m(torch.tensor([context + reply])).logits[0].log_softmax(-1) for m in (untouched, own)
                )
            for at, token in enumerate(reply, start=len(context) - 1):
                nll -= float(q[at, token])
                drift += float((q[at].exp() * (q[at] - p[at])).sum())
                changed += int(p[at].argmax() != q[at].argmax())
                count += 1
        assert found["ppl"] == pytest.approx(math.exp(nll / count), rel=1e-3)
        assert found["drift_kl"] == pytest.approx(drift / count, rel=1e-3) and found["drift_kl"] > 1e-3
        assert found["drift_tokens"] == pytest.approx(changed / count)
    few, first = judge_verifier(trainer, replies=3), figures_module.chatterbot_prompts()[:3]
    monkeypatch.setattr(figures_module, "chatterbot_prompts", lambda: first)
    assert few == judge_verifier(trainer) and few["ppl"] != pytest.approx(found["ppl"])


def test_the_cost_of_a_draft_is_the_weights_that_it_reads(tmp_path):
    trainer = a_trainer(tmp_path, drafter="layer", draft_vocab=100)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    head, norm = 264 * 32, 32
    assert draft_cost(trainer.model) == pytest.approx(
        (3 * layer + norm + 100 * 32) / (4 * layer + norm + head)
    )


def test_fresh_records_give_an_unbiased_gradient_and_old_ones_do_not(tmp_path):
    trainer = a_trainer(
        tmp_path, schedule="kl", num_prompts=48, buffer_size=10000, draft_vocab=0, max_new_tokens=16
    )
    trainer.answer = trainer._generate
    for group in trainer.collect():
        trainer.judge(group)
    now = stale_gradients(trainer, trainer.buffer.recent(8), 64)
    assert now["hidden_error"] < 1e-5 and now["cos_many"] > 0.9
    trainer.buffer.take_fresh()
    before = trainer.buffer.recent(8)
    for _ in range(4):
        trainer.advance()
    old = stale_gradients(trainer, before, 64)
    assert old["hidden_error"] > 0.01 and old["reward_now"] > old["reward_stored"]
    assert old["cos_many"] > 0.9 > old["cos_stale"]


def test_staleness_has_a_row_for_every_age():
    rows = run(a_study("staleness", extra={"ages": 3, "records": 30, "draws": 4}))
    assert [row["variant"] for row in rows] == [f"kl, age {age} of 3" for age in (1, 2, 3)]
    ages = [row["figures"]["age_responses"] for row in rows]
    assert ages == sorted(ages) and rows[0]["figures"]["hidden_error"] < rows[-1]["figures"]["hidden_error"]


def test_adaptation_probes_both_domains_and_says_what_was_forgotten():
    extra = {"first": {"seed": 1}, "then": {"seed": 2}, "prompts": 64, "probes": 2}
    rows = run(
        a_study(
            "adaptation", variants={"none": {"replay_share": 0.0}, "half": {"replay_share": 0.5}}, extra=extra
        )
    )
    assert [row["variant"] for row in rows] == ["none", "half"]
    for row in rows:
        assert row["curve"]["prompts"] == [0, 32, 64, 96, 128]
        assert row["curve"]["first"][0] < row["curve"]["first"][2]
    curve = {"prompts": [0, 8, 16, 24], "first": [0.1, 0.3, 0.5, 0.4], "then": [0.1, 0.1, 0.2, 0.6]}
    assert adaptation_figures(curve, 16) == pytest.approx(
        {"first_switch": 0.5, "first_end": 0.4, "then_switch": 0.2, "then_end": 0.6, "forgotten": 0.1}
    )


REWARDED = {
    "kl": {},
    "block": {"objective": "block", "kl_weight": 0.2},
    "reinforce": {"objective": "reinforce_block", "reward_from": 0.5},
}


def test_objectives_go_on_from_one_drafter_with_the_same_text(distilled, tmp_path):
    """The rows are those of runs by themselves; the text is written once, and nobody learns from what is judged."""
    questions = tmp_path / "fruit.jsonl"
    questions.write_text('{"question_id": 1, "category": "", "turns": ["Name a fruit"]}')
    written = distilled.pop("written")
    study = a_study(**distilled, variants=REWARDED, seeds=[0, 1], extra={"questions": str(questions)})
    rows = run(study)
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for s in (0, 1) for v in REWARDED]
    assert written == [(24, 4242), (12, 4243)]
    figures = [row["figures"] for row in rows]
    for name in ("agreement", "tokens_a_block", "expected_tokens", "depth_3", "fruit_agreement"):
        assert len({one[f"{name}_before"] for one in figures}) == 1
    assert (
        len({one["tokens"] for one in figures}) == 1 and len({one["expected_tokens"] for one in figures}) == 6
    )
    for row in (rows[1], rows[5]):
        config = settings_of(study, row["seed"], tmp_path / row["variant"], REWARDED[row["variant"]])
        alone = Distiller(replace(config, responses_from=str(texts(tmp_path))), tiny_loaded(deep_scale=0.6))
        alone.begin_again(replace(alone.config, run_dir=f"{config.run_dir}-again"))
        alone.train(False)
        held_out = answer(tiny_loaded(deep_scale=0.6), conversed(12, 4243)[:9], 10, 8)
        assert row["figures"]["expected_tokens"] == measure_blocks(alone.model, held_out, 3).expected_tokens
        assert row["figures"]["ece"] == measure_agreement(alone.model, held_out).ece


def texts(tmp_path) -> Path:
    folder = tmp_path / "learned"
    folder.mkdir(exist_ok=True)
    learned = answer(tiny_loaded(deep_scale=0.6), conversed(24, 4242), 10, 8)
    write_shard(folder / "shard-00000.safetensors", learned)
    return folder


def test_a_missing_start_or_question_file_is_said_before_the_text_is_written(distilled):
    written = distilled.pop("written")
    for changes, said in (
        ({"start_from": ""}, "no drafter ''"),
        ({"questions": "none.jsonl"}, "'none.jsonl': no such file"),
    ):
        study = a_study("distill", base={**distilled["base"], **changes}, variants={"kl": {}})
        with pytest.raises(DvirlError, match=said):
            run(study)
    assert not written


def test_text_is_kept_where_it_is_asked_to(distilled, tmp_path):
    written = distilled.pop("written")
    distilled["base"]["text"] = str(tmp_path / "text")
    study = a_study(**distilled, variants={"kl": {}})
    assert timeless(run(study)) == timeless(run(study)) and len(written) == 2


def test_federated_clients_are_averaged_by_tokens(monkeypatch, tmp_path):
    seen = []
    original = streams.average_adapters

    def spy(folders, tokens, out):
        mean = original(folders, tokens, out)
        seen.append(
            (
                [load_file(f / "drafter.safetensors") for f in folders],
                tokens,
                load_file(mean / "drafter.safetensors"),
            )
        )
        return mean

    monkeypatch.setattr(streams, "average_adapters", spy)
    variants = {mode: {"mode": mode} for mode in ("averaged", "apart", "pooled")}
    extra = {"clients": {"a": {"seed": 1}, "b": {"seed": 2}}, "rounds": 2, "prompts": 8}
    rows = run(a_study("federated", variants=variants, extra=extra))
    assert [row["variant"] for row in rows] == list(variants) and len(seen) == 2
    for parts, tokens, mean in seen:
        key = "exit_proj.weight"
        expected = sum(part[key] * n for part, n in zip(parts, tokens, strict=True)) / sum(tokens)
        torch.testing.assert_close(mean[key], expected)
        assert not torch.equal(parts[0][key], parts[1][key])
    figures = [row["figures"] for row in rows]
    assert figures[0]["a_on_b"] == figures[0]["b_on_b"] and figures[1]["a_on_b"] != figures[1]["b_on_b"]
    assert all(row["curve"]["round"] == [1, 2] for row in rows)


def test_the_command_writes_what_repeats_it(tmp_path, capsys):
    config, out = tmp_path / "study-tiny.yaml", tmp_path / "out.json"
    config.write_text(json.dumps({"question": "?", "kind": "grid", "seeds": [0, 1], "base": BASE,
                                  "variants": {"kl": {"schedule": "kl"}}, "quick": {"base": {"num_prompts": 4}}}))  # fmt: skip
    assert (
        cli(["study", str(config), "--quick", "--seeds", "4", "--set", "draft_len=3", "--out", str(out)]) == 0
    )
    content = json.loads(out.read_text())
    assert content["settings"]["base"] | {"draft_len": 3, "num_prompts": 4} == content["settings"]["base"]
    assert content["settings"]["seeds"] == [4] and len(content["rows"]) == 1
    assert content["command"].startswith("dvirl study") and "torch" in content["versions"]
    assert "accept_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [({"kind": "poem"}, "kind is 'poem'; expected one of grid, staleness, adaptation, federated, distill"),
     ({"seeds": []}, "at least one seed"), ({"variants": {"x": {"exit_layr": 2}}}, "study: unknown setting exit_layr"),
     ({"colour": 1}, "unknown setting colour"),
     ({"starts": {}}, "at least one seed, one variant and one start"),
     ({"seeds": [0, 1, 0]}, "seeds are [0, 1, 0]; expected different ones"),
     ({"base": {**BASE, "seed": 5, "run_dir": "x"}}, "base or --set has run_dir, seed; expected what the study does not"),
     ({"quick": {"variant": ["kl"]}}, "quick has variant; expected some of base, extra, seeds, starts, variants"),
     ({"kind": "federated"}, "quick or extra does not fit the study (KeyError('clients'))"),
     ({"kind": "adaptation", "extra": {"first": {}, "then": {}, "prompts": 0, "probes": 2}},
      "extra has prompts: 0; expected 1 to 100,000"),
     ({"kind": "federated", "extra": {"clients": 3, "rounds": 2, "prompts": 8}},
      "extra has clients: 3; expected settings of prompts"),
     ({"variants": {"long": {"max_new_tokens": 32}}}, "long has its own max_new_tokens; expected in base, for all alike"),
     ({"starts": {"kl": {"held_out": 3}}}, "kl has its own held_out; expected in base"),
     ({"kind": "federated", "variants": {"a": {"mode": "apart"}},
       "extra": {"clients": {"a": {}, "b": {}}, "rounds": 2, "prompts": 4}},
      "rollout_batch is 8; expected at most the 4 prompts of a round")],
)  # fmt: skip
def test_bad_studies_are_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "x.yaml"
    values = {"question": "?", "kind": "grid", "seeds": [0], "variants": {"kl": {}}, "base": BASE}
    path.write_text(json.dumps({**values, **content}))
    assert cli(["study", str(path), "--out", str(tmp_path / "o.json")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("variants", "asked", "message"),
    [
        ("{kl: {schedule: kl}, kl: {schedule: ce}}", [], "x.yaml: not valid YAML (kl is there 2 times)"),
        (
            "{kl: {}}",
            ["--set", "draft_len=[1"],
            "--set draft_len: not valid YAML (while parsing a flow sequence",
        ),
        (
            "{kl: {}}",
            ["--set", "seed=5"],
            "base or --set has seed; expected what the study does not set itself",
        ),
    ],
)
def test_what_yaml_would_drop_or_not_read_is_one_sentence(tmp_path, capsys, variants, asked, message):
    path = tmp_path / "x.yaml"
    path.write_text(f"{{question: '?', kind: grid, seeds: [0], variants: {variants}}}")
    assert cli(["study", str(path), "--minutes", "0", "--out", str(tmp_path / "o.json"), *asked]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "o.json").exists()


class Pool:
    """Stands in for processes, which could not see the tiny model; what goes to them and comes back is pickled."""

    def __init__(self, workers, mp_context):
        assert workers == 3

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, work, *arguments):
        for one in zip(*arguments, strict=True):
            yield pickle.loads(pickle.dumps(work(*pickle.loads(pickle.dumps(one)))))


def test_workers_spread_seeds_and_starts(monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    study = a_study(seeds=[0, 1], base=SHORT)
    assert timeless(run(study, 1)) == timeless(run(study, 3))


TWO = {"kl": {"schedule": "kl"}, "rl": {"schedule": "reinforce"}}
SHORT = {**BASE, "num_prompts": 16}
RESUMED = {
    "grid": dict(variants={**TWO, "slow": {"slow_every": 2, "lr_deep": 1e-2}}, base={**SHORT, "num_prompts": 8},
                 starts={"untrained": None, "kl": {"schedule": "kl", "num_prompts": 8}}),
    "staleness": dict(variants=TWO, base=SHORT, extra={"ages": 2, "records": 30, "draws": 4}),
    "adaptation": dict(variants={"none": {"replay_share": 0.0}, "half": {"replay_share": 0.5}, "all": {"replay_share": 1.0}},
                       extra={"first": {"seed": 1}, "then": {"seed": 2}, "prompts": 16, "probes": 2}),
    "federated": dict(variants={mode: {"mode": mode} for mode in ("averaged", "apart", "pooled")},
                      extra={"clients": {"a": {"seed": 1}, "b": {"seed": 2}}, "rounds": 2, "prompts": 8}),
}  # fmt: skip


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", [*RESUMED, "distill"])
def test_an_interrupted_study_goes_on_with_equal_rows(kind, monkeypatch, tmp_path, request):
    """Killed after its first variant, and, gone on with, after its second."""
    if kind == "distill":
        study = a_study(kind, base=request.getfixturevalue("distilled")["base"], variants=REWARDED)
    else:
        study = a_study(kind, **RESUMED[kind])
    kept = tmp_path / "x.rows.jsonl"
    whole = timeless(run(study))
    ages = 2 if kind == "staleness" else 1
    for stop in (1, 2):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                runner.run(study, kept)
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        assert lines[0]["base"] == study.base and len(lines) == 1 + stop * ages
    again = stop_after(monkeypatch, 0)
    rows = runner.run(study, kept)
    assert timeless(rows.values()) == whole and list(rows) == study.row_names()
    assert len(again) == len(whole) // ages - 2


@pytest.mark.no_cover
def test_a_start_is_trained_again_only_if_variants_are_missing(monkeypatch, tmp_path):
    study, kept, begun = a_study(**RESUMED["grid"]), tmp_path / "x.rows.jsonl", []
    original = grid._begin
    monkeypatch.setattr(
        grid,
        "_begin",
        lambda config, settings, split: begun.append(settings) or original(config, settings, split),
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            runner.run(study, kept)
    assert begun == [None]
    runner.run(study, kept)
    assert begun == [None, study.starts["kl"]]
    runner.run(study, kept)
    assert len(begun) == 2


def test_torn_lines_are_dropped_and_half_written_variants_run_again(monkeypatch, tmp_path):
    study, kept = a_study("staleness", **RESUMED["staleness"]), tmp_path / "x.rows.jsonl"
    whole = timeless(runner.run(study, kept).values())
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text(
        "".join(lines[:4]) + lines[4][:30]
    )  # settings, both ages of kl, one of rl, and half a line
    again = stop_after(monkeypatch, 0)
    assert timeless(runner.run(study, kept).values()) == whole and [row["variant"] for row in again] == [
        "rl, age 1 of 2"
    ]
    assert all(isinstance(json.loads(line), dict) for line in kept.read_text().splitlines())


@pytest.mark.no_cover
def test_more_seeds_and_variants_go_on_and_other_settings_do_not(monkeypatch, tmp_path):
    kept = tmp_path / "x.rows.jsonl"
    study = a_study(base={**SHORT, "num_prompts": 8})
    runner.run(study, kept)
    more = replace(study, seeds=[1, 0], variants={**TWO, **study.variants})
    again = stop_after(monkeypatch, 0)
    rows = runner.run(more, kept)
    assert (
        list(rows) == ["untrained/kl/1", "untrained/rl/1", "untrained/kl/0", "untrained/rl/0"]
        and len(again) == 3
    )
    before = kept.read_text()
    for changes, said in (
        ({"base": {**more.base, "draft_len": 3}}, "base"),
        ({"starts": {"x": None}}, "starts"),
        ({"extra": {"x": 1}}, "extra"),
        ({"seeds": [0]}, "seeds"),
        ({"variants": {"kl": {"schedule": "kl", "kl_kind": "js"}, "rl": TWO["rl"]}}, "variants"),
        ({"variants": {"kl": TWO["kl"]}}, "variants"),
    ):
        with pytest.raises(
            DvirlError, match=rf"x\.rows\.jsonl: the run there has other settings: {said} \(.*; remove it, or"
        ):
            runner.run(replace(more, **changes), kept)
        assert kept.read_text() == before
    kept.write_text(before.splitlines(keepends=True)[0])  # settings without rows bind nobody
    assert runner.run(replace(more, seeds=[0], variants={"kl": TWO["kl"]}), kept)


@pytest.mark.no_cover
@pytest.mark.parametrize("workers", [1, 3])
def test_a_task_that_fails_does_not_lose_the_others(workers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    study, kept = a_study(**{**RESUMED["grid"], "variants": TWO, "seeds": [0, 1]}), tmp_path / "x.rows.jsonl"
    original = grid.learn

    def failing(config, split, tape):
        if config.seed == 0 and config.start_from:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(config, split, tape)

    with monkeypatch.context() as patch:
        patch.setattr(grid, "learn", failing)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
            runner.run(study, kept, workers)
    assert str(kept) in caught.value.__notes__[0] and "in failing" in capsys.readouterr().err
    names = [row_name(json.loads(line)) for line in kept.read_text().splitlines()[1:]]
    assert names == [name for name in study.row_names() if name not in ("kl/kl/0", "kl/rl/0")]
    again = stop_after(monkeypatch, 0)
    assert list(runner.run(study, kept, workers)) == study.row_names() and len(again) == 2


def written(tmp_path, **changes) -> list[str]:
    """A study file and the command that runs it."""
    values = {
        "question": "?",
        "kind": "grid",
        "seeds": [0],
        "base": {**BASE, "num_prompts": 4},
        "variants": TWO,
    }
    (tmp_path / "s.yaml").write_text(json.dumps({**values, **changes}))
    return ["study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out.json")]


def test_a_bad_task_is_one_sentence_and_the_others_rows_stay(tmp_path, capsys):
    command = written(tmp_path, starts={"untrained": None, "bad": {"exit_layer": 9, "num_prompts": 4}})
    assert cli(command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("untrained/")]
    assert len(said) == 1 and said[0].startswith("dvirl: ") and "9" in said[0]
    assert (
        len((tmp_path / "out.rows.jsonl").read_text().splitlines()) == 3
        and not (tmp_path / "out.json").exists()
    )
    assert cli([*command, "--set", "draft_len=3"]) == 2
    said = capsys.readouterr().err
    assert (
        "out.rows.jsonl: the run there has other settings: base (" in said
        and "; remove it, or give another" in said
    )


def test_minutes_stop_before_a_row_and_the_same_command_goes_on(monkeypatch, tmp_path, capsys):
    command, clock, original = written(tmp_path, seeds=[0, 1]), [0.0], runner.keep
    prompts, begun = grid._prompts, []

    def keep(*arguments):
        original(*arguments)
        clock[0] += 90

    for module in (runner, study_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock[0], strftime=time.strftime))
    monkeypatch.setattr(runner, "keep", keep)
    monkeypatch.setattr(grid, "_prompts", lambda task: begun.append(task.seed) or prompts(task))
    assert cli([*command, "--minutes", "1"]) == 0 and begun == [0]
    first, out = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert first["complete"] is False and first["missing"] == [
        "untrained/rl/0",
        "untrained/kl/1",
        "untrained/rl/1",
    ]
    assert [row["variant"] for row in first["rows"]] == ["kl"] and first["summary"]["untrained/kl"]["mat"][
        "n"
    ] == 1
    assert (
        "3 rows are missing, untrained/rl/0; untrained/kl/1; untrained/rl/1; the same command goes on" in out
    )
    assert cli([*command, "--minutes", "0"]) == 0 and begun == [0]
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == first["rows"]


def test_a_whole_study_is_complete_and_leaves_no_rows_file(tmp_path, capsys):
    assert cli(written(tmp_path)) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["complete"] is True and content["missing"] == [] and len(content["rows"]) == 2
    assert "missing" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "s.yaml"]


@pytest.mark.no_cover
def test_prompts_are_written_once_a_seed_with_the_studys_threads(monkeypatch):
    original, seeds = grid.load_prompts, []

    def counting(config, loaded):
        seeds.append((config.seed, torch.get_num_threads()))
        return original(config, loaded)

    monkeypatch.setattr(grid, "load_prompts", counting)
    torch.set_num_threads(2)
    run(a_study(**{**RESUMED["grid"], "variants": {"kl": {"schedule": "kl"}}, "seeds": [0, 1]}))
    assert seeds == [(0, 1), (1, 1)]


@pytest.mark.no_cover
@pytest.mark.parametrize("kind", RESUMED)
def test_models_and_cached_memory_are_freed_after_prompts_and_rows(kind, monkeypatch, tmp_path):
    events, models = [], []
    load, load_prompts, keep = study_module.load_for, grid.load_prompts, runner.keep

    def loading(*_):
        loaded = load()
        models.append(weakref.ref(loaded.model))
        return loaded

    def freed():
        events.append(sum(model() is not None for model in models))

    monkeypatch.setattr(torch.cuda, "empty_cache", freed)
    for module in (study_module, train_dvi):
        monkeypatch.setattr(module, "load_for", loading)
    for module in (grid, streams):
        monkeypatch.setattr(module, "load_prompts", lambda *a: events.append("prompts") or load_prompts(*a))
    monkeypatch.setattr(runner, "keep", lambda *a: events.append("row") or keep(*a))
    study = a_study(kind, **RESUMED[kind])
    runner.run(replace(study, starts={"untrained": None}), tmp_path / "x.rows.jsonl")
    written = {
        "grid": ["prompts", 0],
        "staleness": [],
        "adaptation": ["prompts", 1] * 2,
        "federated": ["prompts", 1] * 2,
    }
    assert events == [*written[kind], *["row", 0] * len(study.variants), 0]


def test_a_failed_task_leaves_no_model_behind(monkeypatch, tmp_path):
    models = []
    monkeypatch.setattr(
        grid, "judge_answers", lambda trainer, _: models.append(weakref.ref(trainer)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        runner.run(a_study(seeds=[0, 1]), tmp_path / "x.rows.jsonl")
    assert len(models) == 2 and not any(model() for model in models)


def test_a_start_that_does_not_fit_is_said(tmp_path):
    trainer = a_trainer(tmp_path)
    folder = trainer.save_checkpoint()
    with pytest.raises(DvirlError, match="does not fit this model"):
        make_trainer(a_study().config(0, tmp_path / "b", {"start_from": str(folder), "lora_rank": 2}))
    with pytest.raises(DvirlError, match="lora_S, drafter.safetensors missing"):
        make_trainer(a_study().config(0, tmp_path / "c", {"start_from": str(tmp_path)}))
