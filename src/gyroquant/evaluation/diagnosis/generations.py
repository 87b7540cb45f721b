"""Generations of the original, such as chains of thought, read by both models: where the choices first differ.

Arxiv 2505.11574 finds that a rounded model's failure at reasoning begins at one early step, and repairs that step. Here
both models read the same generation (teacher forcing). The step is the first token of the completion at which the most
likely token is not the original's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gyroquant.calibration.documents import Row, parse_json
from gyroquant.errors import InputError
from gyroquant.evaluation.diagnosis.greedy import choices, first_difference, summary
from gyroquant.evaluation.perplexity import windows_at_once
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance


@dataclass(frozen=True)
class Generation:
    """The tokens of a prompt and its completion, and how many of them are the prompt's."""

    ids: tuple[int, ...]
    prompt: int


def read_generations(
    source: str | Path | Sequence[Mapping[str, Any]], store: WeightStore, tokenizer: Any, bos: Sequence[int]
) -> list[Generation]:
    """The generations of a file of JSON lines, or of a list of rows, as tokens that begin with `bos`.

    Raises InputError for a file that cannot be read, and, with its place, for a row that is not of the strings `prompt`
    and `completion`, whose prompt or completion has no tokens, or that is longer than the model's positions.
    """
    found, limit = [], store.graph.max_positions
    for row in _rows(source):
        value = row.value
        if not (isinstance(value, Mapping) and all(isinstance(value.get(k), str) for k in ("prompt", "completion"))):
            raise InputError(f"{row.place} is not a generation: give the strings `prompt` and `completion`")
        parts = [
            tokenizer(value[key], add_special_tokens=False, verbose=False)["input_ids"]
            for key in ("prompt", "completion")
        ]
        ids = (*bos, *parts[0], *parts[1])
        if not parts[1] or len(ids) == len(parts[1]):
            raise InputError(f"{row.place} has an empty prompt or completion: leave it out")
        if limit and len(ids) > limit:
            raise InputError(f"{row.place} has {len(ids)} tokens, and the model has {limit} positions: shorten it")
        if max(ids) >= store.text_config.vocab_size:
            raise InputError(f"{row.place} has token {max(ids)}, which the model does not have: give its own tokenizer")
        found.append(Generation(ids, len(ids) - len(parts[1])))
    if not found:
        raise InputError("the generations hold no rows: give at least one")
    return found


def _rows(source: str | Path | Sequence[Mapping[str, Any]]) -> list[Row]:
    if not isinstance(source, str | Path):
        return [Row(value, f"entry {number} of the generations") for number, value in enumerate(source, 1)]
    path = Path(source)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the generations {path} cannot be read: {error}") from error


def passes(generations: Sequence[Generation], stores: Sequence[WeightStore], dtype: torch.dtype) -> list[range]:
    """The generations that run at once, padded to the longest of all, so that their states stay in bounds."""
    at_once = windows_at_once(stores, max(len(g.ids) for g in generations), dtype)
    return [range(i, min(i + at_once, len(generations))) for i in range(0, len(generations), at_once)]


def compare_generations(
    store: WeightStore,
    against: WeightStore,
    generations: Sequence[Generation],
    dtype: torch.dtype,
    device: str,
    advance: Advance,
) -> dict[str, Any]:
    """The first differing steps, as `greedy.summary` returns them, and `agreement`.

    `agreement` is the share of all steps at which both models choose the same token. Reports progress once for each of
    `passes`.
    """
    steps: list[int | None] = []
    same = total = 0
    for piece in passes(generations, (store, against), dtype):
        for ours, theirs in _choices(store, against, [generations[i] for i in piece], dtype, device):
            steps.append(first_difference(theirs, ours))
            same += sum(a == b for a, b in zip(ours, theirs, strict=True))
            total += len(ours)
        advance()
    lengths = [len(generation.ids) - generation.prompt for generation in generations]
    return summary(steps, lengths) | {"agreement": same / total}


def _choices(
    store: WeightStore, against: WeightStore, generations: Sequence[Generation], dtype: torch.dtype, device: str
) -> Iterator[tuple[list[int], list[int]]]:
    """The choices of both models at the tokens of each completion. Padding follows the text, so no token sees it."""
    length = max(len(generation.ids) for generation in generations)
    rows = [[*generation.ids, *[generation.ids[-1]] * (length - len(generation.ids))] for generation in generations]
    ours, theirs = (choices(model, torch.tensor(rows), dtype, device) for model in (store, against))
    for number, generation in enumerate(generations):
        where = slice(generation.prompt - 1, len(generation.ids) - 1)
        yield ours[number, where].tolist(), theirs[number, where].tolist()
