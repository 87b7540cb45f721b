"""The journal of a run: what it keeps, what it goes on from, and what it refuses."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import fault_injection
import process_checks
import pytest
import torch
from fault_injection import Fault
from safetensors.torch import load_file, save_file

import gyroquant as gq
from gyroquant.calibration.offload import Spilled
from gyroquant.pipeline import quantize_model as blocks
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.stages import measure
from gyroquant.system.journal import Journal, JournalError, get_state, put_state

FIRST = "block-00000.json"


def killed(folders: dict[str, Path], out: Path, corpus: Path, name: str = "gptq", at: int | str = FIRST) -> Path:
    """The journal of a run that was killed when a block was done, or at another step."""
    fault = Fault("kill", at, before=isinstance(at, int))
    code, _ = fault_injection.disturbed(fault, partial(fault_injection.quantize, folders["llama"], out, corpus, name))
    assert code == -signal.SIGKILL
    return out.with_name(f".{out.name}.journal")


def test_no_block_is_rounded_twice(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded, original = [], blocks.quantize_block

    def count(job: object, index: int, *rest: object) -> object:
        rounded.append(index)
        return original(job, index, *rest)  # type: ignore[arg-type]

    killed(folders, tmp_path / "out", corpus)
    monkeypatch.setattr(blocks, "quantize_block", count)
    fault_injection.quantize(folders["llama"], tmp_path / "out", corpus, "gptq")
    assert rounded == [1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))] == ["out"]


def test_what_differs_is_told_and_nothing_is_thrown_away(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    there = killed(folders, out, corpus)
    before = sorted(path.name for path in there.iterdir())
    (tmp_path / "text.txt").write_text(corpus.read_text()[500:])
    other = gq.load_recipe("gptq", [*fault_injection.SMALL, "weights.bits=3"])
    for model, recipe, text, what in (
        (folders["llama"], other, corpus, r"recipe\.weights\.bits was 4, now 3"),
        (folders["llama_tied"], gq.load_recipe("gptq", fault_injection.SMALL), corpus, "model was"),
        (folders["llama"], gq.load_recipe("gptq", fault_injection.SMALL), tmp_path / "text.txt", "text was"),
    ):
        with pytest.raises(gq.InputError, match=f"unfinished run with other settings: {what}.*--fresh"):
            pipeline.run(prepare(model, out, recipe, text))
        assert sorted(path.name for path in there.iterdir()) == before
    pipeline.run(prepare(folders["llama"], out, other, corpus, fresh=True))
    assert not there.exists()


def begun_by_last_release(out: Path) -> Path:
    """A journal as gyroquant 0.1.0 began it, with a proof and half a block; returns its folder."""
    there = out.with_name(f".{out.name}.journal")
    there.mkdir()
    facts = {
        "format": 1,
        "model": "0" * 64,
        "recipe": {"weights": {"bits": 4}, "finish": None},
        "versions": {"gyroquant": "0.1.0", "torch": "2.9.1"},
    }
    for name, data in (("run", facts), ("proof", {"result": {"relative_logit_error": 1e-7}})):
        text = json.dumps(data)
        whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "data": text}
        (there / f"{name}.json").write_text(json.dumps(whole))
    (there / ".tmpAbCdEf").write_bytes(b"half a block")
    return there


def test_a_journal_of_the_last_release_is_refused_by_name(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    there = begun_by_last_release(out)
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    for _ in range(2):  # the refusal is no beginning either
        with pytest.raises(JournalError, match=r"gyroquant 0\.1\.0 began.*journal.*\(1, .* 2\).*--fresh"):
            fault_injection.quantize(folders["llama"], out, corpus, "rtn")
        assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    fault_injection.quantize(folders["llama"], out, corpus, "rtn", fresh=True)
    assert not there.exists()
    assert (out / "gyroquant.json").exists()


def test_a_journal_that_names_no_release_is_refused_too(tmp_path: Path) -> None:
    with Journal(tmp_path / "out") as journal:
        journal.begin({"a": 1})
        journal.write("run", ["another format altogether"])
    with (
        pytest.raises(JournalError, match="an unknown release of gyroquant began"),
        Journal(tmp_path / "out") as journal,
    ):
        journal.begin({"a": 1})


def test_a_journal_that_was_being_removed_is_nobodys(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Its blocks are those of another recipe."""
    there = killed(folders, tmp_path / "out", corpus)
    (there / "run.json").unlink()
    (there / ".tmpAbCdEf").write_bytes(b"half a block")
    other = gq.load_recipe("gptq", [*fault_injection.SMALL, "weights.bits=3"])
    for name in ("out", "clean"):
        pipeline.run(prepare(folders["llama"], tmp_path / name, other, corpus))
    assert fault_injection.content(tmp_path / "out") == fault_injection.content(tmp_path / "clean")
    assert not there.exists()


def test_an_error_of_another_run_throws_nothing_away(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    there = killed(folders, tmp_path / "out", corpus)
    before = sorted(path.name for path in there.iterdir())
    broken = Path(shutil.copytree(folders["llama"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(gq.GyroquantError, match="finite"):
        pipeline.run(prepare(broken, tmp_path / "out", gq.load_recipe("gptq", fault_injection.SMALL), corpus))
    assert sorted(path.name for path in there.iterdir()) == before


def test_a_folder_in_place_is_done_whatever_is_left_of_its_journal(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    there = killed(folders, out, corpus, at="out")  # as soon as the folder has its name
    assert out.exists()
    assert there.exists()
    (there / "run.json").unlink()  # as if it had died while it removed the journal
    before = fault_injection.content(out)
    with pytest.raises(gq.InputError, match="is not empty"):
        pipeline.run(prepare(folders["llama"], out, gq.load_recipe("rtn", fault_injection.SMALL), corpus))
    assert not there.exists()
    shutil.rmtree(out)
    (killed(folders, out, corpus, at="out") / "run.json").unlink()
    fault_injection.quantize(folders["llama"], out, corpus, "gptq")
    assert fault_injection.content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_to_be_replaced_comes_back_though_another_run_is_refused(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed(folders, out, corpus)
    (tmp_path / ".out.old").mkdir()  # as if that had died between the two renamings of a replacement
    (tmp_path / ".out.old" / "kept").write_text("")
    with pytest.raises(gq.InputError, match="unfinished run"):
        fault_injection.quantize(folders["llama"], out, corpus, "rtn")
    assert [path.name for path in out.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["block-00000.safetensors", "block-00000.json", "proof.json", "states-0-0.bin"])
def test_damage_is_noticed(name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    there = killed(folders, out, corpus)
    data = bytearray((there / name).read_bytes())
    data[len(data) // 2] ^= 1
    (there / name).write_bytes(data)
    with pytest.raises(gq.InputError, match=f"{name} is damaged.*--fresh"):
        fault_injection.quantize(folders["llama"], out, corpus, "gptq")
    assert not out.exists()
    assert (there / name).exists()
    fault_injection.quantize(folders["llama"], out, corpus, "gptq", fresh=True)


@pytest.mark.parametrize("state", ["learning", "measured", "tuning", "finetuning"])
def test_stages_go_on_inside(
    state: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died while learning, tuning or finishing takes up the state that it kept."""
    name, taken = "learned, measured, tuned and finished", []
    at = f"{state}.json" if state == "measured" else f"{state}.safetensors"
    there = killed(folders, tmp_path / "out", corpus, name, at)
    if state == "measured":
        monkeypatch.setattr(measure, "measured_plan", lambda *asked: pytest.fail("it was measured again"))
    for stage in ("finetuning.rotations", "rounding.steps.signround", "finetuning.scales"):
        module: Any = importlib.import_module(f"gyroquant.{stage}")
        original = module.get_state

        def took(path: Path, mark: str, original: Any = original) -> Any:
            found = original(path, mark)
            taken.extend([path.stem] if found is not None else [])
            return found

        monkeypatch.setattr(module, "get_state", took)
    fault_injection.quantize(folders["llama"], tmp_path / "out", corpus, name)
    assert not there.exists()
    assert state == "measured" or state in taken


def test_an_error_of_the_users_leaves_nothing_and_an_interruption_what_is_done(tmp_path: Path) -> None:
    for error, kept in ((gq.InputError("x"), False), (KeyboardInterrupt(), True), (MemoryError(), True)):
        with pytest.raises(type(error)) as found, Journal(tmp_path / "out") as journal:
            journal.begin({"a": 1})
            journal.stage("proof", lambda: 1)
            raise error
        assert (tmp_path / ".out.journal").exists() == kept == hasattr(found.value, "kept")
    with pytest.raises(KeyboardInterrupt) as found, Journal(tmp_path / "new") as journal:
        journal.begin({"a": 1})
        raise KeyboardInterrupt
    assert not hasattr(found.value, "kept")
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]


def test_states_are_known_by_their_mark(tmp_path: Path) -> None:
    path, tensors = tmp_path / "state", {"a": torch.arange(3)}
    assert get_state(path, "x") is None
    put_state(path, tensors, "x", [1, float("inf")])
    found = get_state(path, "x")
    assert found is not None
    assert torch.equal(found[0]["a"], tensors["a"])
    assert found[1] == [1, float("inf")]
    assert get_state(path, "y") is None
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"x"):  # the end cut off, another number in the tensor
        path.write_bytes(damaged)
        assert get_state(path, "x") is None
    path.write_bytes(whole)
    assert get_state(path, "x") is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_hidden_states_come_back_bit_for_bit(on_disk: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    spilled = [Spilled(tmp_path / str(i), (3, 5, 7), dtype) for i in range(2)]
    tensors = [one.tensor if on_disk else torch.empty(3, 5, 7, dtype=dtype) for one in spilled]
    states = [one.path for one in spilled] if on_disk else tensors
    wanted = [torch.randn(3, 5, 7).to(dtype) for _ in tensors]
    with Journal(tmp_path / "out") as journal:
        journal.begin({})
        for tensor, value in zip(tensors, wanted, strict=True):
            tensor.copy_(value)
        first = journal.put_states("a", states)
        for tensor in tensors:
            tensor.zero_()
        journal.put_states("b", states)  # the turn before stays
        journal.get_states(first, states)
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
        with pytest.raises(gq.InputError, match="damaged"):
            journal.get_states(first, [torch.empty(3, 5, 6, dtype=dtype) for _ in states])


def test_a_second_run_is_refused_until_the_first_is_dead(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    ready, over, out = context.Event(), context.Event(), tmp_path / "out"
    other = context.Process(target=process_checks.hold, args=(out, ready, over))
    other.start()
    assert ready.wait(120)
    with pytest.raises(gq.InputError, match=r"another run writes .*out: wait for it, or choose another name"):
        fault_injection.quantize(folders["llama"], out, corpus, "rtn")
    other.kill()
    other.join()
    fault_injection.quantize(folders["llama"], out, corpus, "rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_an_interrupted_command_says_that_it_goes_on(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gyroquant", "quantize", str(folders["llama"]), str(tmp_path / "out")]
    command += ["--recipe", "gptq", "--text", str(corpus), "--seqlen", "128", "--set", "weights.group_size=16"]
    command += ["--set", "weights.tune.iters=100000", "--nsamples", "8", "--set", "calibration.dtype=float32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.journal/tuning*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "interrupted; run the same command again to continue" in messages
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
