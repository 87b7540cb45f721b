"""Generations of the original, read by both models."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.evaluation import perplexity
from gyroquant.evaluation.diagnosis.generations import compare_generations, passes, read_generations
from gyroquant.models.stores.source import open_model

ROWS = [
    {"prompt": tiny_models.prose(5, seed), "completion": tiny_models.prose(length, seed + 9)}
    for seed, length in enumerate((7, 12, 3))
]


def read(source: Any, bos: tuple[int, ...] = ()) -> Any:
    return read_generations(source, open_model(tiny_models.build("llama")), tiny_models.tokenizer(), bos)


def test_a_file_and_a_list_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    found = read(path, (1,))
    assert found == read(ROWS, (1,))
    assert [(len(g.ids), g.prompt) for g in found] == [(13, 6), (18, 6), (9, 6)]
    assert found[0].ids[0] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"text": "w1"}], "entry 1 of the generations is not a generation"),
        ([ROWS[0], {"prompt": "w1", "completion": ""}], "entry 2 .* empty prompt or completion"),
        ([{"prompt": "", "completion": "w1"}], "empty prompt or completion"),
        ([{"prompt": "w1", "completion": tiny_models.prose(128)}], "129 tokens, and the model has 128 positions"),
        ("nowhere.jsonl", "nowhere.jsonl cannot be read"),
    ],
)
def test_what_is_no_generation_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(gq.InputError, match=message):
        read(rows)


def test_steps_are_those_of_each_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_models.build("llama"), tiny_models.build("llama", seed=3)
    with torch.no_grad():
        for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
            ours.copy_(theirs + 0.15 * ours)
    generations = read(ROWS)
    expected, same = [], 0
    for g in generations:
        with torch.no_grad():
            chosen = [m(torch.tensor([g.ids])).logits[0, g.prompt - 1 : -1].argmax(-1) for m in (first, second)]
        differ = (chosen[0] != chosen[1]).nonzero().flatten().tolist()
        expected.append(differ[0] + 1 if differ else None)
        same += len(chosen[0]) - len(differ)
    stores = (open_model(second), open_model(first))
    for chunk in (1 << 28, 2 * 18 * 64 * 4):  # all at once, and two at once
        monkeypatch.setattr(perplexity, "_CHUNK_BYTES", chunk)
        found = compare_generations(*stores, generations, torch.float32, "cpu", lambda: None)
        assert found["first"] == expected
        assert found["agreement"] == same / 22
        assert found["lengths"] == [7, 12, 3]
    assert passes(generations, stores, torch.float32) == [range(2), range(2, 3)]
    same_model = compare_generations(stores[1], open_model(deepcopy(first)), generations, torch.float32, "cpu", str)
    assert same_model["first"] == [None] * 3
    assert same_model["agreement"] == 1
