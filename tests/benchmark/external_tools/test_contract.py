"""What every external tool promises, and what becomes of a run that ends well, badly, or not at all."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import fake_tools
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from gyroquant.benchmark.external_tools import ExternalTool, ExternalToolError, Size, Task
from gyroquant.benchmark.external_tools.base import RUNNERS
from gyroquant.benchmark.external_tools.environment import default_folder, python_of
from gyroquant.benchmark.external_tools.scripted import ScriptedTool
from gyroquant.benchmark.external_tools.stored import layer_weights
from gyroquant.errors import GyroquantError
from gyroquant.models.stores.source import open_model
from gyroquant.system.subprocesses import KilledError

OURS = [kind for kind in ExternalTool.registry.values() if issubclass(kind, ScriptedTool)]
SCRIPTS = sorted(RUNNERS.rglob("*.py"))
SIZES = [Size(*one) for one in itertools.product((2, 3, 4), (32, 64, 128), (False, True))]


@pytest.mark.parametrize("kind", ExternalTool.registry.values(), ids=ExternalTool.registry)
def test_an_external_tool_says_who_it_is_and_what_it_can(kind: type[ExternalTool]) -> None:
    assert re.fullmatch(r"[\w.-]+", kind.name)  # a folder is named by it
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", kind.home)
    assert all(re.match(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", one) for one in kind.requirements)
    assert kind.variants
    assert kind.rotated <= set(kind.variants)
    for variant, size in itertools.product(kind.variants, SIZES):
        reason = kind().problem(variant, size)
        assert reason == reason.strip()
        assert "\n" not in reason


def test_what_rotates() -> None:
    assert {
        (kind.name, one) for kind in ExternalTool.registry.values() for one in kind.variants if kind.rotates(one)
    } == {
        ("brevitas", "rotation + GPTQ"),
        ("brevitas", "rotation + MassDiff + Qronos"),
        ("gptqmodel", "GPTQ + rotation"),
        ("llm-compressor", "GPTQ + QuIP"),
        ("llm-compressor", "GPTQ + SpinQuant R1 R2"),
    }


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_an_external_tool_that_is_run_by_a_script_has_it(kind: type[ScriptedTool]) -> None:
    assert RUNNERS / kind.script in SCRIPTS
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
def task(folders: dict[str, Path], tmp_path: Path) -> Task:
    """A run at 2 bits without scales; `made` beside its folder has what a program would write there."""
    out, made, model = tmp_path / "out", tmp_path / "made", folders["llama"]
    out.mkdir()
    shutil.copytree(model, made / "dense")
    (made / "files").mkdir()
    codes = {f"{name}.qweight": torch.zeros(n // 16, dtype=torch.int32) for name, n in layer_weights(model).items()}
    save_file(codes | {"lm_head.weight": torch.zeros(96, 64)}, made / "files" / "model.safetensors")
    (made / "files" / "config.json").write_text("{}")
    report(made)
    return Task(model, tmp_path / "tokens.safetensors", out, Size(2, 32, symmetric=True), seed=3)


def report(made: Path, reload_error: float = 0.1) -> None:
    said = {"seconds": 7.5, "peak_memory_bytes": 11, "versions": {"fake": "1"}, "reload_error": reload_error}
    (made / "report.json").write_text(json.dumps(said))


MAKES = """
import json, shutil
shutil.copytree(out.parent / "made", out, dirs_exist_ok=True)
(out.parent / "arguments.json").write_text(json.dumps(arguments))
"""


def test_a_run_that_ends_well(task: Task, tmp_path: Path) -> None:
    with fake_tools.fake() as kind:
        outcome = kind().run("plain", task, fake_tools.interpreter(tmp_path, MAKES))
    assert outcome.true_bits == 2
    assert outcome.file_bytes == sum(path.stat().st_size for path in (task.out / "files").iterdir())
    assert outcome.bytes == outcome.file_bytes - 96 * 64 * 2  # the head at 16 bits
    layers = sum(layer_weights(task.model).values()) // 4
    parts = {"layers": layers, "embeddings": 0, "head": 96 * 64 * 2, "rest": 0}
    assert outcome.weight_bytes == parts | {"total": layers + 96 * 64 * 2}
    assert (outcome.seconds, outcome.peak_memory_bytes, outcome.versions) == (7.5, 11, {"fake": "1"})
    assert outcome.dense == task.out / "dense"
    given = json.loads((tmp_path / "arguments.json").read_text())
    assert given[:2] == ["-I", str(RUNNERS / "fake.py")]
    assert given[2:5] == [str(task.model), str(task.tokens), str(task.out)]
    assert {"--bits=2", "--group-size=32", "--symmetric", "--seed=3", '--settings={"speed": 1}'} <= set(given)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('the codes do not fit')", "ended with status 1; .*: the codes do not fit"),
        ("import os; print('half way', flush=True); os.abort()", "killed by SIGABRT; .*: half way"),
        ("print('all done')", "ended with status 0; .*: all done"),
        ("", "ended with status 0; .*: it printed nothing"),
        (MAKES + "shutil.rmtree(out / 'dense')", "ended with status 0 but wrote no model"),
    ],
)
def test_a_run_that_does_not(body: str, reason: str, task: Task, tmp_path: Path) -> None:
    with fake_tools.fake() as kind, pytest.raises(ExternalToolError, match=reason):
        kind().run("plain", task, fake_tools.interpreter(tmp_path, body))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_that_the_system_ends_is_no_failure_of_the_program(name: str, task: Task, tmp_path: Path) -> None:
    body = f"import os, signal; print('half way', flush=True); os.kill(os.getpid(), signal.{name})"
    with (
        fake_tools.fake() as kind,
        pytest.raises(KilledError, match=f"fake.py was killed by {name}; .*: half way") as found,
    ):
        kind().run("plain", task, fake_tools.interpreter(tmp_path, body))
    assert found.value.number == signal.Signals[name]
    assert not isinstance(found.value, GyroquantError)  # which would be a result


def test_a_layer_that_is_not_stored_is_named(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "made" / "files" / "model.safetensors"
    stored = load_file(path)
    del stored["model.layers.0.mlp.up_proj.qweight"]
    save_file(stored, path)
    with (
        fake_tools.fake() as kind,
        pytest.raises(ExternalToolError, match=r"nothing for the layer model.layers.0.mlp.up_proj"),
    ):
        kind().run("plain", task, fake_tools.interpreter(tmp_path, MAKES))


@pytest.mark.parametrize("error", [0.101, float("nan")])
def test_files_that_are_not_what_ran_are_refused(error: float, task: Task, tmp_path: Path) -> None:
    report(tmp_path / "made", error)
    reason = f"files of fake do not hold the model that it ran: the logits differ by {error:.3g} .* more than 0.1"
    with fake_tools.fake() as kind, pytest.raises(ExternalToolError, match=reason):
        kind().run("plain", task, fake_tools.interpreter(tmp_path, MAKES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, task: Task, tmp_path: Path) -> None:
    path = tmp_path / "made" / "dense" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][5, 7] = value
    save_file(weights, path, {"format": "pt"})
    reason = r"the weights of fake are not usable: .*model.embed_tokens.weight holds values that are not finite"
    with fake_tools.fake() as kind, pytest.raises(ExternalToolError, match=reason):
        kind().run("plain", task, fake_tools.interpreter(tmp_path, MAKES))


def test_what_cannot_be_asked_for_is_not_run(task: Task, tmp_path: Path) -> None:
    python = fake_tools.interpreter(tmp_path, "(out / 'ran').touch()")
    with fake_tools.fake(refused={"plain": "it needs a machine of another kind"}) as kind:
        with pytest.raises(ExternalToolError, match="another kind"):
            kind().run("plain", task, python)
        with pytest.raises(ExternalToolError, match="no variant other; it has plain"):
            kind().run("other", task, python)
    assert not (task.out / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [Size(4, 32), Size(3, 32), Size(2, 32, symmetric=True)], ids=str)
def test_the_program_itself(kind: type[ScriptedTool], size: Size, tmp_path: Path) -> None:
    """Its rounded weights are near the original ones, and of no more levels a group than its bits allow."""
    try:
        python = python_of(kind, default_folder(), make=False)
    except ExternalToolError as error:
        pytest.skip(str(error))
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    save_file({"tokens": tiny_models.tokens(model, batch=4, length=64)}, tmp_path / "tokens.safetensors")
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
