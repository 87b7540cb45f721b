"""What the check of an export finds, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyroquant.errors import ProofError
from gyroquant.formats import usage_check as in_use
from gyroquant.formats.export import TOLERANCE, export
from gyroquant.formats.runtime import Runtime
from gyroquant.formats.usage_check import Usage, compare_usage, faults, read_in_pieces, reading, texts_of, usage_of
from gyroquant.inspection.verify_export import verify_export

WORDS = 50
PROMPT = torch.arange(32) % WORDS


class Table(Runtime):
    """A model whose logits are those of the last two tokens, changed as is said."""

    formats = ()
    title = "a table"

    def __init__(
        self,
        exact: bool = True,
        read: Callable[[Tensor], Tensor] = lambda logits: logits,
        step: Callable[[Tensor], Tensor] = lambda logits: logits,
        batch: Callable[[Tensor], Tensor] = lambda logits: logits,
    ):
        super().__init__(Path(), exact)
        self.table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))
        self.read, self.step, self.batch = read, step, batch
        self.calls: list[int] = []
        self.start()

    def start(self) -> None:
        self.last, self.first = 0, True

    def feed(self, ids: Tensor) -> Tensor:
        self.calls.append(ids.shape[1])
        before = torch.cat((torch.tensor([self.last]), ids[0, :-1]))
        logits = self.table[ids[0]] + 0.3 * self.table[before]
        changed = (self.read if self.first else self.step)(logits)
        self.last, self.first = int(ids[0, -1]), False
        return changed

    def _batch(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        before = torch.nn.functional.pad(ids[:, :-1] * mask[:, :-1], (1, 0))
        return self.batch(self.table[ids] + 0.3 * self.table[before])


def usage() -> Usage:
    return usage_of(Table(), PROMPT, PROMPT[:9], 32)


def found(runtime: Runtime, tolerance: float = TOLERANCE) -> list[str]:
    return faults(compare_usage(runtime, usage(), tolerance), tolerance, runtime.exact)


def test_the_same_model_has_no_faults() -> None:
    measured = compare_usage(Table(), usage(), TOLERANCE)
    assert faults(measured, TOLERANCE, True) == []
    assert measured["relative_logit_error"] == measured["kl"] == 0
    assert measured["greedy_tokens_alike"] == measured["greedy_tokens"] == 32


@pytest.mark.parametrize(
    ("part", "said"),
    [("read", "a prompt in one call"), ("step", "single tokens after it"), ("batch", "a padded batch")],
)
@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x * torch.nan])
def test_each_part_counts(part: str, said: str, change: Callable[[Tensor], Tensor]) -> None:
    assert any(one.startswith(said) for one in found(Table(**{part: change})))


def test_a_program_without_batches_is_held_to_the_rest() -> None:
    class Alone(Table):
        unpadded = "it reads one text"

    measured = compare_usage(Alone(), usage(), TOLERANCE)
    assert measured["batch_error"] is None
    assert measured["batch_not_run"] == "it reads one text"
    assert faults(measured, TOLERANCE, True) == []


def swapped(after: int, times: int, gap: float) -> Callable[[Tensor], Tensor]:
    """Puts another token first, by so little more than the first one has, in some steps."""
    count = iter(range(10_000))

    def change(logits: Tensor) -> Tensor:
        if not after <= next(count) < after + times:
            return logits
        best, second = logits.topk(2).indices[0]
        changed = logits.clone()
        changed[0, second] = changed[0, best] + gap
        return changed

    return change


def test_by_default_two_greedy_tokens_may_differ_and_a_third_not() -> None:
    def wrong(times: int) -> list[str]:
        return found(Table(False, step=swapped(3, times, 1.0)), 0.0)

    assert wrong(0) == wrong(2) == []
    assert wrong(3) == ["29 of 32 greedy tokens are the same and 0 are near ties; 30 are required"]


def test_a_token_that_differs_is_no_fault_where_the_logits_allow_it() -> None:
    """And the tokens after it are held to the same text."""
    margin = float(usage().steps.topk(2).values[5].diff().abs())
    near = 1.01 * margin / usage().scale
    measured = compare_usage(Table(step=swapped(5, 1, 1e-4)), usage(), near)
    assert measured["greedy_tokens_alike"] == 31
    assert measured["greedy_near_ties"] == 1
    assert faults(measured, near, True) == []
    measured = compare_usage(Table(step=swapped(5, 1, 1e-4)), usage(), near / 3)
    assert measured["greedy_near_ties"] == 0
    assert "31 of 32 greedy tokens" in faults(measured, near / 3, True)[-1]


def test_nothing_is_held_against_weights_that_were_rounded_again() -> None:
    assert found(Table(read=lambda x: -x, step=lambda x: -x), inf) == []


def test_short_models_are_given_short_texts() -> None:
    ids = torch.arange(52)
    assert [len(one) for one in texts_of(ids, 32, None)[:2]] == [32, 20]
    assert texts_of(ids, 32, 48)[2] == 24
    prompt, shorter, count = texts_of(ids, 32, 16)
    assert (len(prompt), len(shorter), count) == (8, 7, 8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300))
def test_a_window_is_read_through_the_cache(length: int) -> None:
    ids, runtime = torch.arange(length) % WORDS, Table()
    whole = runtime.logits(ids)
    runtime.calls.clear()
    assert torch.equal(read_in_pieces(runtime, ids), whole)
    sizes = reading(length)
    assert runtime.calls[0] <= sizes["first"]
    assert sum(runtime.calls) == length
    single = sizes["single"]
    assert single == 0 or runtime.calls[-single:] == [1] * single


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in groups of 48 of rows of 96."""
    model = tiny_models.build("llama", hidden_size=96, head_dim=24, intermediate_size=192)
    return saved_models.rounded(model, tmp_path_factory.mktemp("saved") / "out", group_size=48).folder


def test_a_graph_that_is_wrong_after_its_first_call_is_not_put_in_place(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps keys that are too large for later calls."""
    pytest.importorskip("openvino")
    import numpy as np
    from openvino import opset13

    assign, larger = opset13.assign, opset13.constant(np.array(1.5, np.float32))
    monkeypatch.setattr(opset13, "assign", lambda x, where: assign(opset13.multiply(x, larger), where))
    with pytest.raises(ProofError, match=r"another model .* in fp32: single tokens after it: relative error"):
        export(out, "openvino", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    export(out, "openvino", tmp_path / "x", check=False)
    result = verify_export_quickly(tmp_path / "x", out, monkeypatch)
    assert not result["passed"]
    assert result["ways"]["exact"]["prompt_error"] < 1e-5 < TOLERANCE < result["ways"]["exact"]["step_error"]


def verify_export_quickly(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("gyroquant.inspection.verify_export.footprint", lambda *asked, exact: {})
    return verify_export(folder, out, tokens=8, window=32)


def test_a_graph_that_sees_padding_is_not_put_in_place(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from gyroquant.formats.openvino.decoder import OpenVinoDecoder

    mask = OpenVinoDecoder._mask

    def blind(self: Any, window: int | None) -> Any:
        from openvino import opset13

        seen = self.attended
        self.attended = opset13.add(opset13.multiply(seen, opset13.constant(0)), opset13.constant(1))
        made = mask(self, window)
        self.attended = seen
        return made

    monkeypatch.setattr(OpenVinoDecoder, "_mask", blind)
    with pytest.raises(ProofError, match=r"another model .*in fp32: a padded batch: relative error [^;]*\. No export"):
        export(out, "openvino", tmp_path / "x")


def test_groups_that_the_program_computes_wrongly_would_be_found(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written as they are, prompts are right and single tokens wrong; as they are written, both are right."""
    pytest.importorskip("openvino")
    from importlib import import_module

    assert export(out, "openvino", tmp_path / "x")["check"]["step_error"] < 1e-5
    monkeypatch.setattr(
        import_module("gyroquant.formats.openvino.operations"), "held_group", lambda group, columns: group
    )
    with pytest.raises(ProofError, match=r"in fp32: single tokens after it: relative error"):
        export(out, "openvino", tmp_path / "y")


def test_the_texts_are_as_long_as_is_said() -> None:
    assert (in_use.PROMPT, in_use.STEPS) == (32, 32)
