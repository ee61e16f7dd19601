"""What notebooks 01, 02 and 04 analyse: lenses, parts of a step, judged answers, coloured text, results on record."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import EOS, tiny_model, tiny_pair

from dvirl import plots
from dvirl.evaluation.agreement import logit_lens
from dvirl.evaluation.cost import step_parts
from dvirl.evaluation.rejections import accept_events, events_table, judged_events
from dvirl.evaluation.report import read_recorded
from dvirl.experiments.figures import trained_exits
from dvirl.experiments.notebook import caption, show_blocks
from dvirl.rollout import generate
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel

PROMPTS = [[1, 5, 9], [1, 7, 3, 8, 11], [1, 30]]


def words(token):
    return f" <{token}>"


@pytest.fixture
def model():
    return KangarooModel(tiny_model(deep_scale=0.2), None, None, 2)


def test_the_lens_behind_each_layer_is_that_of_hugging_faces_states():
    theirs, ours = tiny_pair()
    responses = generate(ours, PROMPTS, 6, [EOS])
    found = logit_lens(ours, responses)
    row, length = 1, int(responses.prompt_lens[1])
    states = theirs(responses.tokens[row : row + 1].long(), output_hidden_states=True).hidden_states
    for layer, own in found[found.question_id == row].groupby("layer"):
        state = states[layer] if layer == 4 else theirs.model.norm(states[layer])
        logits = theirs.lm_head(state)[0, length:]  # the first token of the answer is left out
        for at, rank in enumerate(own["rank"]):
            token = responses.tokens[row, length + at + 1]
            assert rank == 1 + int((logits[at] > logits[at, token]).sum())
    assert (found[found.layer == 4]["rank"] == 1).all() and not (found[found.layer == 0]["rank"] == 1).all()


def test_judged_events_are_those_of_decoding_step_by_step(model):
    rollout = generate(model.base_model, PROMPTS, 24, [EOS])
    about = [dict(method="m", question_id=at, category="c") for at in range(len(PROMPTS))]
    for how in (DecodeConfig(3), DecodeConfig(5, 0.05)):
        found = judged_events(model, rollout, how, words, about)
        lines = [accept_events(model.generate(prompt, 24, how, [EOS]).blocks, words, **one)
                 for prompt, one in zip(PROMPTS, about, strict=True)]  # fmt: skip
        pd.testing.assert_frame_equal(found, events_table(lines), atol=2e-4)
        assert 0 < found.accepted.mean() < 1


def test_parts_of_a_step_are_all_timed(model):
    block, plain = step_parts(model, 3, context=12, repeats=2), step_parts(model, 0, context=12, repeats=2)
    assert list(block) == list(plain) and len(block) == 5 and min(block.values()) > 0
    assert [part for part in plain if plain[part] == 0] == [
        part for part in plain if part.startswith("drafting")
    ]


def test_coloured_blocks_show_every_draft_escaped(model):
    blocks = model.generate(PROMPTS[1], 16, DecodeConfig(3), [EOS]).blocks
    page = show_blocks(blocks, words, title="a <draft>").data
    drafted = sum(len(block.draft.tokens) for block in blocks)
    own = sum(block.block_len > block.num_accepted for block in blocks)
    assert page.count("confidence ") == drafted and page.count("<span") == 4 + drafted + own + len(blocks)
    assert page.count("<tr>") == 1 + len(blocks)
    drafting = sum(len(block.draft.tokens) > 0 for block in blocks)
    assert page.count("learned</small>") == drafting and page.count("no draft") == len(blocks) - drafting > 0
    assert "a &lt;draft&gt;" in page
    signs = [page.count(f"<div>{sign}") - 1 for sign in "\u2713\u2717\u25cb+"]
    accepted = sum(block.num_accepted for block in blocks)
    rejected = sum(block.num_drafted > block.num_accepted for block in blocks)
    assert signs == [accepted, rejected, drafted - accepted - rejected, own]
    assert page.count("accepted, confidence") == sum(block.num_accepted for block in blocks) > 0
    assert f" &lt;{blocks[0].committed[0]}&gt;" in page and "<1>" not in page


def test_long_answers_and_lookups_say_what_they_are(model):
    how = DecodeConfig(3, source="lookup")
    blocks = model.generate([1, 5, 9, 5, 9, 5, 9, 5], 16, how, [EOS]).blocks
    page = show_blocks(blocks, words, most=2).data
    assert page.count("<tr>") == 4 and f"{len(blocks) - 2} more blocks" in page
    every = show_blocks(blocks, words, most=99).data
    assert "more blocks" not in every and "lookup</small>" in every and "looked up" in every


def test_captions_say_where_results_are_from():
    one, other = read_recorded("study-exit-layers"), read_recorded("cost-h200")
    text = caption(one).data
    assert "recorded 2026-11-22 on NVIDIA H200: <code>dvirl study configs/study-exit-layers.yaml" in text
    assert "<details>" not in text
    both = caption(one, other).data
    assert "<summary>recorded 2026-11-22 on NVIDIA H200 and 2026-11-23 on NVIDIA H200, by 2 commands" in both
    assert both.count("<li>") == 2 and "dvirl cost --model_name smollm2-135m --exit_layers 1 2 4" in both


def test_trained_exits_are_those_of_the_record():
    study = read_recorded("study-exit-layers")
    found = trained_exits(study, "accept_rate")
    row = found[(found.name == "trained head (H200)") & (found.x == 6)].iloc[0]
    figures = study["summary"]["untrained/6, none"]["accept_rate"]
    assert row.y == figures["mean"] and row.high - row.y == pytest.approx(figures["std"])
    assert found.name.nunique() == 2 and len(found) > 8


def test_a_result_that_is_not_on_record_is_said():
    assert read_recorded("study-exit-layers")["summary"]
    with pytest.raises(DvirlError, match="nothing.json: no such result on record"):
        read_recorded("nothing")


def test_curves_and_shares_are_drawn(tmp_path):
    found = pd.DataFrame(
        {"name": ["a", "a", "b"], "x": [1, 2, 1], "y": [0.1, 0.2, 0.2], "low": 0.05, "high": 0.3}
    )
    plots.curves(found, {"title": "t"}, guide=[(0, 0), (1, 1)], save=tmp_path / "a.png")
    about = {"title": "t", "xscale": "log"}
    plots.scatter(found.assign(left=0.5, right=3), about, guide=[(1, 0), (3, 1)], save=tmp_path / "c.png")
    plots.step_shares(
        pd.DataFrame({"p": [1.0, 2.0], "q": [3.0, 0.0]}, ["one", "two"]), save=tmp_path / "b.svg"
    )
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir()) and torch.is_grad_enabled()


def test_a_run_without_an_update_is_no_line_among_others(tmp_path):
    logs = {"some": pd.DataFrame({"tokens": [1, 2], "accept_rate": [0.1, 0.2]})}
    logs["none"] = logs["some"].head(0)
    plots.compare_runs(logs, "t", save=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_points_have_their_intervals_and_names_apart(monkeypatch):
    axes = []
    monkeypatch.setattr(plots.plt, "show", lambda: axes.append(plots.plt.gca()))
    names = ["a, one", "a, two", "a, three", "b, four"]
    found = pd.DataFrame({"name": names, "x": [1.0, 1.0, 1.1, 900.0], "y": [0.5, 0.5, 0.51, 0.9]})
    plots.scatter(found.assign(low=found.y - 0.1, high=found.y + 0.2), {"title": "t", "xscale": "log"})
    boxes = {text.get_text(): text.get_window_extent() for text in axes[0].texts if text.get_text()}
    labels = ["one", "two", "three", "four"]
    assert sorted(boxes) == sorted(labels) and axes[0].get_xscale() == "log"
    assert not any(boxes[one].overlaps(boxes[two]) for one in labels for two in labels if one < two)
    points = axes[0].transData.transform(found[["x", "y"]].to_numpy())
    assert not any(box.count_contains(points) for box in boxes.values())
    frame = axes[0].get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes.values())
    colours = {text.get_text(): text.get_color() for text in axes[0].texts if text.get_text()}
    assert colours["one"] == colours["two"] != colours["four"]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["a", "b"]
    bars, dots, other_bars, other_dots = axes[0].collections
    assert [*dots.get_offsets().tolist(), *other_dots.get_offsets().tolist()] == found[
        ["x", "y"]
    ].to_numpy().tolist()
    segments = [*bars.get_segments(), *other_bars.get_segments()]
    assert [bar[:, 1].round(6).tolist() for bar in segments] == [
        [0.4, 0.7],
        [0.4, 0.7],
        [0.41, 0.71],
        [0.8, 1.1],
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are shown."""
    figures = []
    monkeypatch.setattr(plots.plt, "show", lambda: figures.append(plots.plt.gcf()))
    return figures


def test_speedups_of_all_questions_have_numbers_and_those_of_sets_have_colours(drawn):
    rows = [
        ("a", "qa", 1.2),
        ("a", "rag", 1.6),
        ("a", "overall", 1.4),
        ("plain", "overall", 1.0),
        ("b", "overall", 2.0),
    ]
    found = pd.DataFrame(rows, columns=["method", "task", "speedup"])
    found = found.assign(low=found.speedup - 0.1, high=found.speedup + 0.2)
    plots.speedups(found, "plain")
    plots.speedups(found[found.task != "overall"], "plain")
    together, apart = (figure.axes[0] for figure in drawn)
    assert [text.get_text() for text in together.texts] == ["1.40", "2.00"]
    assert [label.get_text() for label in together.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in apart.get_legend().get_texts()] == ["qa", "rag"]
    ends = [line.get_segments()[0][:, 0].round(6).tolist() for line in apart.collections]
    assert ends == [[1.1, 1.4], [1.5, 1.8]]


def test_drift_is_drawn_where_it_was_measured(drawn):
    log = pd.DataFrame({"tokens": [10.0, 20.0, 30.0], "accept_rate": [0.1, 0.2, 0.3]})
    runs = {
        "never": log.assign(drift_kl=float("nan")),
        "often": log.assign(drift_kl=[0.0, float("nan"), 0.4]),
    }
    plots.acceptance_and_drift(runs, 0.05)
    above, below = drawn[0].axes
    assert [text.get_text() for text in above.texts] == ["never", "often"]
    assert [text.get_text() for text in below.texts] == ["drift_bound", "often"]
    (measured,) = (line for line in below.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert measured.get_xydata().tolist() == [[10.0, 0.0], [30.0, 0.4]]


def test_gradients_have_a_panel_a_loss_and_show_both_lines(drawn):
    rows = [
        (loss, detached, layer, 0.0 if detached and layer == 1 else 2.0)
        for loss in ("loss_main", "sum") for detached in (False, True) for layer in (1, 2)
    ]  # fmt: skip
    plots.gradients(pd.DataFrame(rows, columns=["loss", "detached", "layer", "norm"]), 1)
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["loss_main", "sum"]
    thick, thin = panels[0].lines
    assert thick.get_linewidth() > 3 * thin.get_linewidth()
    assert thin.get_ydata().tolist() == [0.0, 2.0] and panels[0].get_ylim()[0] < 0
