"""The stable core: accept lengths on a fixed-seed batch are what they were.

The golden values come from `python tests/test_stable_core.py`, run when the core was written (2026-11-22), and for the
drafters with layers again when these began to start from base layer k as they should (with LoRA in place they had
started from noise; the decoder was not touched). Those of the published layout were made when it was first read; all
but the last blocks are also what the plain recomputation of tests/test_kangaroo_layout.py finds. They change only
together with a benchmark before and after (see CONTRIBUTING.md).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from conftest import EOS, random_prompts, tiny_kangaroo, tiny_model, write_published

from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.kangaroo_model import KangarooModel

CASES = {
    "none-base": (dict(exit_layer=3), DecodeConfig(4)),
    "adapter-base-threshold": (dict(exit_layer=3, drafter="adapter", adapter_window=5), DecodeConfig(6, 0.3)),
    "layer-adapted": (dict(exit_layer=2, drafter="layer"), DecodeConfig(3, target="adapted")),
}
GOLDEN: dict[str, list[list[int]]] = {
    "none-base": [
        [1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1],
    ],
    "adapter-base-threshold": [
        [1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1],
    ],
    "layer-adapted": [
        [1, 3, 4, 2, 2, 2, 1, 1, 4, 3, 1],
        [1, 4, 2, 4, 3, 4, 4, 2],
        [1, 4, 4, 4, 4, 2, 3, 2],
        [1, 4, 4, 4, 4, 4, 3],
    ],
    "published-layout": [
        [1, 2, 1, 2, 1, 3, 3, 4, 4, 2, 1],
        [1, 2, 2, 1, 3, 2, 5, 1, 2, 2, 2, 1],
        [1, 4, 1, 1, 7, 1, 1, 4, 4],
        [1, 3, 4, 3, 3, 2, 2, 2, 2, 2],
    ],
}


def lengths_of(model, config):
    return [
        [block.block_len for block in model.generate(prompt, 24, config, (EOS,)).blocks]
        for prompt in random_prompts(4, 4)
    ]


def accept_lengths(name):
    args, config = CASES[name]
    return lengths_of(tiny_kangaroo(4, deep_scale=0.2, **args), config)


def published_lengths(folder):
    write_published(folder, 3)
    return lengths_of(
        KangarooModel(tiny_model(3, deep_scale=0.1), folder, None, 2), DecodeConfig(6, 0.2, "adapted")
    )


@pytest.mark.parametrize("name", CASES)
def test_accept_lengths_are_unchanged(name):
    assert accept_lengths(name) == GOLDEN[name]


def test_accept_lengths_of_a_published_adapter_are_unchanged(tmp_path):
    assert published_lengths(tmp_path) == GOLDEN["published-layout"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(
            {
                **{name: accept_lengths(name) for name in CASES},
                "published-layout": published_lengths(Path(scratch)),
            }
        )
