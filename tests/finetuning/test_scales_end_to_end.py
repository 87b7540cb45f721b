"""The last touch: its gradients against plain autograd, what it may change, and what it must not."""

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from selection import some

import gyroquant as gq
from gyroquant.calibration.stream import Stream
from gyroquant.errors import InputError, RecipeError, UnsupportedModelError
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.finetuning.scales import Finetune, _Batches, _Model
from gyroquant.inspection import dry_run
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import cost_probe
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.stages import finetune as stage

SMALL = ["weights.group_size=16", "calibration.nsamples=24", "calibration.seqlen=32", "calibration.dtype=float32"]
FINETUNE = "finetune={steps: 20, batch_size: 4, lr: 0.005}"


def job(model: Path, out: Path, corpus: Path, *changes: str, recipe: str = "gptq", **options: object) -> Job:
    loaded = gq.load_recipe(recipe, [*SMALL, *changes])
    return prepare(model, out, loaded, corpus, tokenizer=tiny_models.tokenizer(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [16, -1])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_moe", "gpt2", "gpt_neox"])
def test_gradients_are_those_of_the_whole_model(
    name: str, size: int, keep: bool, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Block by block or with all blocks kept, against one backward pass through everything. Scales of whole rows get
    theirs from outputs.
    """
    changes = ["weights.bits=4", f"weights.group_size={size}", "weights.symmetric=true", "transform.R2.method=hadamard"]
    pipeline.run(job(folders[name], tmp_path / "out", corpus, *changes))
    store, original, ids = (
        open_model(tmp_path / "out"),
        open_model(folders[name]),
        tiny_models.tokens(tiny_models.build(name)),
    )
    assert isinstance(store, PackedStore)
    outer = original.read(original.graph.outer_params())
    stream = Stream(BlockRunner(original.skeleton(), original.graph), ids, outer)
    for index in range(len(original.graph.blocks)):
        stream.run(index, original.read(original.graph.block_params(index)))
    model = _Model(store, Finetune(), torch.float32, keep)
    batches = _Batches(model, stream, outer, ids, Finetune())
    batches._adam.step = lambda: None  # type: ignore[method-assign]
    found: dict[str, torch.Tensor] = {}
    batches._adam.zero_grad = lambda: found.update(  # type: ignore[method-assign]
        {name: tensor.grad.clone() for name, tensor in model.moved.items() if tensor.grad is not None}
    )
    with torch.no_grad():
        loss = batches.step([0, 1], 0)
        whole = gq.load(folders[name], dtype="float32")
        wanted = whole(ids).logits.log_softmax(-1)
    assert bool(model._by_output) == (size == -1)
    model._by_output.clear()
    for tensor in model.moved.values():
        tensor.grad = None
    names = tuple(n for n in store.shapes if n not in store.graph.tied)
    weights = model.params(names)
    weights |= {alias: weights[source] for alias, source in store.graph.tied.items()}
    student = store.skeleton()
    logits = torch.func.functional_call(student, weights, (), {"input_ids": ids}, tie_weights=False).logits
    direct = mean_divergence(wanted, logits.log_softmax(-1), None)
    direct.backward()
    assert loss == pytest.approx(float(direct.detach()), rel=1e-4)
    for label, tensor in model.moved.items():
        assert tensor.grad is not None, label
        if float(tensor.grad.norm()) > 1e-6:
            gap = float((found[label] - tensor.grad).norm() / tensor.grad.norm())
            assert gap < 1e-3, (label, gap)


@pytest.mark.parametrize("size", some([16, -1], [-1]))
def test_what_is_kept_in_memory_changes_no_byte(
    size: int, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [
        "weights.bits=2",
        "weights.symmetric=true",
        f"weights.group_size={size}",
        FINETUNE,
        "transform.R4.method=hadamard",
    ]
    for name, share in (("kept", 0.25), ("again", 0.0)):
        monkeypatch.setattr(stage, "_SHARE", share)
        manifest = pipeline.run(job(folders["llama_tied"], tmp_path / name, corpus, *changes, FINETUNE))
        assert manifest["finetuned"]["kept"]
    kept, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "again"))
    assert kept == again


@pytest.mark.parametrize("name", some(["llama_tied", "qwen2_moe"], ["llama_tied"]))
def test_a_finished_model_is_nearer_to_the_original_and_no_larger(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = ["weights.bits=2", "transform.R1.method=hadamard", "transform.R4.method=hadamard"]
    plain = pipeline.run(job(folders[name], tmp_path / "plain", corpus, *changes))
    done = pipeline.run(job(folders[name], tmp_path / "done", corpus, *changes, FINETUNE))
    assert plain["finetuned"] is None
    assert done["finetuned"]["kept"]
    assert len(done["finetuned"]["losses"]) == 20
    assert done["finetuned"]["held_out"][1] < done["finetuned"]["held_out"][0]
    assert done["bits"] == plain["bits"]
    before, after = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "done"))
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        if key.endswith(("_codes", "_zeros")) or (before[key].dim() > 1 and not key.endswith("_scales")):
            assert torch.equal(before[key], after[key]), key
    assert any(not torch.equal(before[key], after[key]) for key in before if key.endswith("_scales"))
    assert any(not torch.equal(before[key], after[key]) for key in before if key.endswith("norm.weight"))
    kl = {
        out: gq.evaluate(tmp_path / out, corpus, folders[name], window=32, tokenizer=tiny_models.tokenizer())["kl"]
        for out in ("plain", "done")
    }
    assert kl["done"] < kl["plain"]


@pytest.mark.parametrize(
    "changes",
    [
        ["activations.bits=4", "kv_cache.bits=4"],
        pytest.param(["weights.basis={padding: pad}"], marks=pytest.mark.slow),
        pytest.param(["weights.grid=nvfp4", "weights.group_size=16"], marks=pytest.mark.slow),
        ["weights.tune={iters: 5, batch_size: 2}", "weights.allocate={budget: 4.2, bits: [2, 4]}"],
    ],
    ids=str,
)
def test_it_composes_and_is_repeatable(
    changes: list[str], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    for out in ("one", "two"):
        brief = "finetune={steps: 4, batch_size: 2, lr: 0.005}"
        manifest = pipeline.run(job(folders["llama_tied"], tmp_path / out, corpus, *changes, brief))
        assert manifest["finetuned"]["held_out"][1] > 0
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    loaded = gq.load(tmp_path / "one", dtype="float32")
    assert loaded(tiny_models.tokens(loaded)).logits.isfinite().all()


def test_what_does_not_help_is_not_kept(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    wild = "finetune={steps: 3, lr: 0.1, batch_size: 1, held_out: 8}"
    pipeline.run(job(folders["llama_tied"], tmp_path / "plain", corpus, "weights.bits=8"))
    manifest = pipeline.run(job(folders["llama_tied"], tmp_path / "done", corpus, "weights.bits=8", wild))
    assert not manifest["finetuned"]["kept"]
    plain, done = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "done"))
    assert all(torch.equal(plain[key], done[key]) for key in plain)


def test_what_cannot_be_is_refused(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--dense keeps no scales"):
        job(folders["llama_tied"], tmp_path / "out", corpus, FINETUNE, dense=True)
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        gq.load_recipe("gptq", ["finetune={stps: 3}"])
    with pytest.raises(InputError, match="held_out is 24 windows"):
        job(folders["llama_tied"], tmp_path / "out", corpus, "finetune={held_out: 24}")
    with pytest.raises(RecipeError, match="leave nothing to tune"):
        gq.load_recipe("gptq", ["finetune={scales: false, gains: false}"])
    with pytest.raises(InputError, match="calibrates on text"):
        prepare(folders["llama_tied"], tmp_path / "out", gq.load_recipe("rtn", [*SMALL, FINETUNE]))


def test_its_time_and_memory_are_predicted(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_probe, "peak_memory_bytes", lambda: 0)
    plain = dry_run.dry_run_job(job(folders["llama_tied"], tmp_path / "out", corpus, "finetune=null"))
    asked = dry_run.dry_run_job(job(folders["llama_tied"], tmp_path / "out", corpus, "finetune={steps: 500}"))
    assert asked.seconds > 3 * plain.seconds
    assert asked.peak_memory_bytes > plain.peak_memory_bytes
