"""What a run reads is not replaced, and a folder for activations serves many runs."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import fault_injection
import pytest
import torch
import yaml
from fault_injection import Fault
from safetensors.torch import save_file

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.inspection.model import inspect_model
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.validation import only_journal_left
from gyroquant.system.journal import Journal

RTN = {"weights": {"bits": 4, "group_size": 16}}


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message: str, out: Path, *arguments: Any, **options: Any) -> None:
    """Has `prepare` refuse, and looks that it touched nothing."""
    before = everything(out.parent)
    with pytest.raises(InputError, match=message):
        prepare(arguments[0], out, *arguments[1:], overwrite=True, **options)
    assert everything(out.parent) == before


def test_what_a_recipe_reads_is_not_replaced(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", folders["llama"]
    out.mkdir()
    (out / "text.txt").write_text(corpus.read_text())
    (out / "mine.yaml").write_text(yaml.safe_dump(RTN))
    width = 64
    save_file({"R1": torch.eye(width)}, out / "r.safetensors")
    (tmp_path / "link.yaml").symlink_to(out / "mine.yaml")
    (out / "inside.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(RTN))
    deleted = "holds .*{}, which replacing it would delete"
    for name in (out / "mine.yaml", tmp_path / "link.yaml", out / "inside.yaml"):
        refused(deleted.format(name.name), out, model, name)
        refused(deleted.format(name.name), out, model, gq.load_recipe(name), reads=[name])
    text = {"calibration": {"text": str(out / "text.txt")}, **RTN}
    refused(deleted.format("text.txt"), out, model, text)
    stored = {"transform": {"R1": {"method": "stored", "file": str(out / "r.safetensors")}}, **RTN}
    refused(deleted.format("r.safetensors"), out, model, stored, corpus)
    stored["transform"]["R1"] = [{"method": "hadamard"}, stored["transform"]["R1"]]
    refused(deleted.format("r.safetensors"), out, model, stored, corpus)
    prepare(model, out, {"description": "x" * 5000, **RTN}, overwrite=True)  # texts that name no file are no matter


def test_a_folder_for_activations_has_to_be_one_and_not_the_destination(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for offload, message in (
        (tmp_path / "file", "file cannot be written: .* is not a writable folder"),
        (tmp_path / "file" / "x", "x cannot be written: .*file is not a writable folder"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (tmp_path / "out", "lies in .*out, which may hold only the result"),
        (tmp_path / "out" / "x", "lies in .*out, which may hold only the result"),
    ):
        refused(message, tmp_path / "out", folders["llama"], RTN, offload=offload)


def test_a_folder_for_activations_serves_many_runs(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out, hidden = tmp_path / "out", tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "hidden_states.bin").write_bytes(b"of another program")
    before = everything(hidden)
    work = partial(fault_injection.quantize, folders["llama"], out, corpus, "gptq", offload=hidden)
    code, _ = fault_injection.disturbed(Fault("kill", "block-00000.json", before=False), work)
    assert code == -signal.SIGKILL
    assert everything(hidden) == before
    assert not out.exists()
    first = prepare(
        folders["llama"], tmp_path / "one", gq.load_recipe("gptq", fault_injection.SMALL), corpus, offload=hidden
    )
    stream = first.stream(*started(first), hidden)  # as that of a run at the same time
    assert stream.hidden is not None
    states = stream.hidden.clone()
    work()
    assert torch.equal(stream.hidden, states)
    assert everything(hidden) == before
    fault_injection.quantize(folders["llama"], tmp_path / "one", corpus, "gptq")
    assert fault_injection.content(out) == fault_injection.content(tmp_path / "one")


def test_a_dry_run_looks_at_the_folder_for_activations_too(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "hidden_states.bin").write_bytes(b"of another program")
    asked = partial(inspect_model, folders["llama"], "gptq", fault_injection.SMALL, corpus, dry_run=True)
    assert asked(offload=tmp_path).prediction is not None
    with pytest.raises(InputError, match="is not a writable folder"):
        asked(offload=tmp_path / "hidden_states.bin")


def started(job: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """What a job's stream begins with."""
    from gyroquant.models.execution.runner import BlockRunner
    from gyroquant.models.folding.fold import folded_outer

    outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
    return BlockRunner(job.store.skeleton(), job.graph), job.tokens, outer


def test_a_folder_whose_run_only_left_its_journal_is_done(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    work = partial(fault_injection.quantize, folders["llama"], out, corpus, "rtn")

    def stop(journal: Journal) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "close", stop)
        work()
    assert only_journal_left(out)
    before = everything(out)
    work()
    assert everything(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not only_journal_left(out)
    with pytest.raises(InputError, match="not empty"):
        work()
