"""What every opponent promises, and what becomes of a run that ends well, badly, or not at all."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path

import fakes
import pytest
import tiny
import torch
from safetensors.torch import save_file

from gyroquant.models.source import open_model
from gyroquant.opponents import Opponent, OpponentError, Size, Task
from gyroquant.opponents.base import SIDES
from gyroquant.opponents.environment import default_folder, python_of
from gyroquant.opponents.scripted import Scripted

OURS = [kind for kind in Opponent.kinds.values() if issubclass(kind, Scripted)]
SCRIPTS = sorted(SIDES.rglob("*.py"))
SIZES = [Size(*one) for one in itertools.product((2, 3, 4), (32, 64, 128), (False, True))]


@pytest.mark.parametrize("kind", Opponent.kinds.values(), ids=Opponent.kinds)
def test_an_opponent_says_who_it_is_and_what_it_can(kind: type[Opponent]) -> None:
    assert re.fullmatch(r"[\w.-]+", kind.name)  # a folder is named by it
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", kind.home)
    assert all(re.match(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", one) for one in kind.requirements)
    assert kind.variants
    for variant, size in itertools.product(kind.variants, SIZES):
        reason = kind().problem(variant, size)
        assert reason == reason.strip()
        assert "\n" not in reason


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_an_opponent_that_is_run_by_a_script_has_it(kind: type[Scripted]) -> None:
    assert SIDES / kind.script in SCRIPTS
    usable = set(kind.variants) - set(kind.refused)
    assert usable
    for variant in kind.variants:
        assert bool(kind().problem(variant, Size(4, 64))) == (variant in kind.refused)
    variant = sorted(usable)[0]
    assert "codes of 5 bits" in kind().problem(variant, Size(5, 64))
    assert "multiples of 32" in kind().problem(variant, Size(4, 48))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_compile_and_need_nothing_of_ours(path: Path) -> None:
    tree = ast.parse(path.read_text())
    compile(tree, str(path), "exec")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] == "gyroquant" for name in names)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)}, model / "model.safetensors")
    return Task(model, tmp_path / "tokens.safetensors", out, Size(2, 32, symmetric=True), seed=3)


# A safetensors file with 64 x 32 codes of 2 bits, written without any library.
WRITES = """
import json
name = "model.layers.0.mlp.up_proj.qweight"
header = json.dumps({name: {"dtype": "I32", "shape": [128], "data_offsets": [0, 512]}}).encode()
(out / "files").mkdir()
(out / "files" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(512))
(out / "files" / "arguments.json").write_text(json.dumps(arguments))
report.write_text(json.dumps({"seconds": 7.5, "peak_memory_bytes": 11, "versions": {"fake": "1"}}))
"""
DENSE = '(out / "dense").mkdir(); (out / "dense" / "config.json").touch()'


def test_a_run_that_ends_well(task: Task, tmp_path: Path) -> None:
    with fakes.fake() as kind:
        outcome = kind().run("plain", task, fakes.interpreter(tmp_path, WRITES + DENSE))
    assert outcome.true_bits == 2
    assert outcome.bytes == sum(path.stat().st_size for path in (task.out / "files").iterdir())
    assert (outcome.seconds, outcome.peak_memory_bytes, outcome.versions) == (7.5, 11, {"fake": "1"})
    assert outcome.dense == task.out / "dense"
    given = json.loads((task.out / "files" / "arguments.json").read_text())
    assert given[:2] == ["-I", str(SIDES / "fake.py")]
    assert given[2:5] == [str(task.model), str(task.tokens), str(task.out)]
    assert {"--bits=2", "--group-size=32", "--symmetric", "--seed=3", '--settings={"speed": 1}'} <= set(given)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('the codes do not fit')", "ended with status 1: the codes do not fit"),
        ("import os; print('half way', flush=True); os.kill(os.getpid(), 9)", "killed by SIGKILL; .*: half way"),
        ("print('all done')", "ended with status 0: all done"),
        ("", "ended with status 0: it printed nothing"),
        (WRITES, "ended well and left no model"),
        (WRITES.replace("up_proj", "gate_proj") + DENSE, r"stores nothing for the layer model.layers.0.mlp.up_proj"),
    ],
)
def test_a_run_that_does_not(body: str, reason: str, task: Task, tmp_path: Path) -> None:
    with fakes.fake() as kind, pytest.raises(OpponentError, match=reason):
        kind().run("plain", task, fakes.interpreter(tmp_path, body))


def test_what_cannot_be_asked_for_is_not_run(task: Task, tmp_path: Path) -> None:
    python = fakes.interpreter(tmp_path, "(out / 'ran').touch()")
    with fakes.fake(refused={"plain": "it needs a machine of another kind"}) as kind:
        with pytest.raises(OpponentError, match="another kind"):
            kind().run("plain", task, python)
        with pytest.raises(OpponentError, match="no variant other; it has plain"):
            kind().run("other", task, python)
    assert not (task.out / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [Size(4, 32), Size(3, 32), Size(2, 32, symmetric=True)], ids=str)
def test_the_program_itself(kind: type[Scripted], size: Size, tmp_path: Path) -> None:
    """Its rounded weights are near the original ones, and of no more levels a group than its bits allow."""
    try:
        python = python_of(kind, default_folder(), make=False)
    except OpponentError as error:
        pytest.skip(str(error))
    model = tiny.build("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    save_file({"tokens": tiny.tokens(model, batch=4, length=64)}, tmp_path / "tokens.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    variant = next(iter(kind.variants))
    outcome = kind().run(variant, Task(tmp_path / "model", tmp_path / "tokens.safetensors", out, size), python)
    assert size.bits + 16 / 32 <= outcome.true_bits < size.bits + 2
    assert outcome.seconds > 0
    assert outcome.peak_memory_bytes > 0
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (open_model(folder).read([name])[name] for folder in (tmp_path / "model", outcome.dense))
    assert 0 < (after - before).norm() / before.norm() < 2.0**-size.bits * 4
    assert max(len(group.unique()) for group in after.view(-1, 32)) <= 2**size.bits
