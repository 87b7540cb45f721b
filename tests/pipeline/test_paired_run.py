"""Whole runs with a solver that looks at the unrounded model too."""

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import gyroquant as gq
from gyroquant.grids import QuantizedWeight
from gyroquant.inspection import dry_run
from gyroquant.pipeline import cost_probe
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.rounding import InputStatistics
from gyroquant.rounding.solvers.gptq import Gptq
from gyroquant.rounding.solvers.qronos import Qronos

SMALL = ["weights.group_size=16", "calibration.nsamples=32", "calibration.seqlen=32", "calibration.dtype=float32"]


def job(model: object, out: Path, corpus: Path, *changes: str, **options: object) -> Job:
    loaded = gq.load_recipe("qronos", [*SMALL, *changes])
    return prepare(model, out, loaded, corpus, tokenizer=tiny_models.tokenizer(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_moe"])
@pytest.mark.parametrize("changes", [[], ["weights.solver.act_order=true", "transform.R1.method=hadamard"]])
def test_the_same_run_gives_the_same_bytes(
    name: str, changes: list[str], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Also with the hidden states of both models in files."""
    for out, options in (("one", {}), ("two", {"offload": tmp_path / "scratch"})):
        manifest = pipeline.run(job(folders[name], tmp_path / out, corpus, "weights.bits=3", *changes, **options))
        assert not manifest["warnings"]
        assert all(0 < layer["output_error"] < 1 for layer in manifest["layers"])
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("in_turn", [True, False])
def test_only_what_comes_behind_rounded_layers_is_corrected(
    in_turn: bool, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first layers, or, where a block is observed at once, all but those of the first block."""
    changes = ["weights.bits=2", f"weights.true_sequential={in_turn}"]
    pipeline.run(job(folders["llama"], tmp_path / "paired", corpus, *changes))
    monkeypatch.setattr(Qronos, "needs_original", False)
    pipeline.run(job(folders["llama"], tmp_path / "alone", corpus, *changes))
    paired, alone = (load_file(tmp_path / out / "model.safetensors") for out in ("paired", "alone"))
    first = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj") if in_turn else ("layers.0.",)
    for key in paired:
        if key.endswith("_codes"):
            assert torch.equal(paired[key], alone[key]) == any(name in key for name in first), key


def test_what_one_layer_has_corrected_the_next_does_not_correct_again(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Observed all at once, gate, up and down would each undo the same drift, and overshoot together."""
    kl = {}
    for in_turn in (True, False):
        changes = ["weights.bits=3", "activations.bits=3", f"weights.true_sequential={in_turn}"]
        pipeline.run(job(folders["llama"], tmp_path / str(in_turn), corpus, *changes))
        found = gq.evaluate(
            tmp_path / str(in_turn), corpus, folders["llama"], window=32, tokenizer=tiny_models.tokenizer()
        )
        kl[in_turn] = found["kl"]
    assert kl[True] < 0.95 * kl[False]


def test_layers_come_nearer_to_what_they_gave_before(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``|X W^T - Y Q^T|^2`` on the inputs of every layer behind the first, against GPTQ with the same damping."""
    gains: list[float] = []
    solve = Qronos.solve

    def compared(self: Qronos, weight: torch.Tensor, grid: object, seen: InputStatistics, *args: object) -> object:
        def error(rounded: QuantizedWeight) -> float:
            """Without what no choice of Q changes."""
            change = (rounded.dequantize() - weight).double()
            return float(
                (
                    change
                    * (change @ seen.second_moments.double() - 2 * weight.double() @ seen.input_error_cross.double())
                ).sum()
            )

        result = solve(self, weight, grid, seen, *args)
        if seen.input_error_cross.any():
            gptq = Gptq(damp_percent=self.damping(seen.second_moments)).solve(weight, grid, seen)
            gains.append((error(gptq) - error(result)) / float(((weight @ seen.second_moments) * weight).sum()))
        return result

    monkeypatch.setattr(Qronos, "solve", compared)
    pipeline.run(job(folders["llama"], tmp_path / "out", corpus, "weights.bits=2"))
    assert len(gains) == 7  # the first layers' input has not drifted
    assert min(gains) > 0


def test_both_streams_are_predicted(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_probe, "peak_memory_bytes", lambda: 0)
    monkeypatch.setattr(cost_probe, "_BATCHES", 1)  # of 128 samples
    bytes_of = {}
    for solver in ("gptq", "qronos"):
        changes = [f"weights.solver={solver}", "calibration.nsamples=180"]
        made = job(tiny_models.build("llama"), tmp_path / "out", corpus, *changes)
        bytes_of[solver] = dry_run.dry_run_job(made).peak_memory_bytes
    assert bytes_of["qronos"] == 2 * bytes_of["gptq"] > 0
