"""The Kronecker pair of second moments: its factors against autograd, and what the solver makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.kronecker import KeptFactors, KroneckerSums
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.token_weights import AT_ONCE, TokenWeights, keep
from gyroquant.rounding import Guided
from gyroquant.system.journal import Journal
from gyroquant.system.progress import Progress

SMALL = ["weights.bits=3", "weights.group_size=16", "calibration.seqlen=32", "calibration.dtype=float32"]


def job(model: Any, out: Path, corpus: Path, *changes: str, recipe: str = "gptq", nsamples: int = 4) -> Job:
    loaded = gq.load_recipe(recipe, [*SMALL, f"calibration.nsamples={nsamples}", *changes])
    return prepare(model, out, loaded, corpus, tokenizer=tiny_models.tokenizer())


def by_autograd(folder: Path, tokens: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and gradients at the outputs of all linear layers, (tokens, features), of each window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                output.retain_grad()
                seen.setdefault(f"model.layers.{name}.weight", []).append((inputs[0][0].detach(), output))

            module.register_forward_hook(note)
    generator = torch.Generator()
    for number, window in enumerate(tokens):
        if number % AT_ONCE == 0:
            generator.manual_seed(number)
        predicted = model(window[None]).logits[0].log_softmax(-1)
        labels = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
        (-predicted.gather(1, labels).sum()).backward()
    return {name: [(x, output.grad[0]) for x, output in each] for name, each in seen.items()}  # type: ignore[index]


def expected(kind: str, windows: list[tuple[Tensor, Tensor]], part: slice, power: float = 1) -> tuple[Tensor, Tensor]:
    """H_O and H_I of some outputs, whose diagonals have the mean 1."""
    if kind == "tokens":
        x, g = (torch.cat(each) for each in zip(*windows, strict=True))
        g = g[:, part]
        of_x, of_g = (each.square().sum(1, keepdim=True) ** power for each in (x, g))
        pair = (g * of_x).T @ g, (x * of_g).T @ x
    else:
        products = [g[:, part].T @ x for x, g in windows]
        pair = sum(p @ p.T for p in products), sum(p.T @ p for p in products)  # type: ignore[assignment]
    return tuple(h / h.diagonal().mean() for h in pair)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "groups", "power"),
    [
        ("tokens", 1, 1),
        ("tokens", 3, 1),
        ("tokens", 2, 0.5),
        ("tokens", 1, 0),
        ("sequences", 1, 1),
        ("sequences", 2, 1),
    ],
)
def test_the_factors_are_those_of_the_gradient(
    kind: str, groups: int, power: float, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """They come back from the journal, block by block. More windows than run at once are added up."""
    settings = f"weights.guided={{groups: {groups}, kronecker: {kind}, power: {power}, damp_percent: 0.5}}"
    made = job(folders["llama_tied"], tmp_path / "out", corpus, settings, nsamples=AT_ONCE + 2)
    windows = by_autograd(folders["llama_tied"], made.tokens)
    assert made.recipe.weights.guided is not None
    with torch.no_grad(), Journal(tmp_path / "out") as journal:
        journal.begin({})
        keep(made, TokenWeights(made.recipe.weights.guided, journal.folder), journal, Progress())
        kept, weights = KeptFactors(journal), journal.tensors("token-weights")
        assert not [*journal.folder.glob("*.bin")]
        for index, group in enumerate(made.graph.blocks):
            found = kept.of(index)
            assert found.keys() == {op.weight for op in group.linears if op.weight in made.targets}
            for name, pairs in found.items():
                rows = torch.arange(len(windows[name][0][1][0])).tensor_split(groups)
                for number, (pair, part) in enumerate(zip(pairs, rows, strict=True)):
                    outputs, inputs = expected(kind, windows[name], slice(int(part[0]), int(part[-1]) + 1), power)
                    torch.testing.assert_close(pair.outputs - 0.5 * torch.eye(len(part)), outputs, rtol=1e-3, atol=1e-4)
                    if kind == "sequences":
                        torch.testing.assert_close(pair.inputs, inputs, rtol=1e-3, atol=1e-4)
                        continue
                    assert pair.inputs is None
                    x = torch.cat([x for x, _ in windows[name]])
                    weighted = (x * weights[name][number].float()[:, None]).T @ x
                    torch.testing.assert_close(weighted / weighted.diagonal().mean(), inputs, rtol=1e-2, atol=1e-3)
        assert bool(weights) == (kind == "tokens")


def test_an_exact_product_gives_its_factors() -> None:
    """Where the gradient at a token does not depend on its input, the Hessian is a Kronecker product."""
    op = open_model(tiny_models.build("llama")).graph.block_linears[0]
    rows, columns = op.numel // op.in_features, op.in_features
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(8, n, generator=generator) @ torch.randn(n, n, generator=generator) for n in (columns, rows))
    sums = KroneckerSums(Guided(groups=1, kronecker="tokens", damp_percent=0))
    for each in g:  # every input with every gradient
        sums.add(op, x, each.expand(8, rows))
    (pair,) = sums.factors(op)
    wanted = g.T @ g
    torch.testing.assert_close(pair.outputs, wanted / wanted.diagonal().mean(), rtol=1e-4, atol=1e-5)


def weighted_error(folder: Path, rounded: Path, windows: dict[str, list[tuple[Tensor, Tensor]]]) -> float:
    """The mean over layers of ``tr(H_O D H_I D^T)``, divided by that of the weights."""
    store, model, errors = open_model(rounded), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for name, seen in windows.items():
        outputs, inputs = expected("tokens", seen, slice(None))
        weight = model.get_parameter(name).detach()
        sizes = [((outputs @ d @ inputs) * d).sum() for d in (weight - store.quantized(name).dequantize(), weight)]
        errors.append(float(sizes[0] / sizes[1]))
    return sum(errors) / len(errors)


def test_the_error_that_both_factors_weight_falls(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    errors = {}
    for kind in ("null", "tokens", "sequences"):
        guided = [] if kind == "null" else [f"weights.guided={{groups: 1, kronecker: {kind}}}"]
        made = job(folders["llama_tied"], tmp_path / kind, corpus, *guided, "weights.scale=minmax", nsamples=8)
        pipeline.run(made)
        windows = by_autograd(folders["llama_tied"], made.tokens)
        errors[kind] = weighted_error(folders["llama_tied"], tmp_path / kind, windows)
    assert errors["tokens"] < 0.9 * errors["null"]
    assert errors["sequences"] < 0.95 * errors["null"]


def test_much_damping_leaves_the_weights_of_tokens(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """With equal outputs, codes are those of `guided` alone."""
    stores = []
    for name, more in (("tokens", ""), ("both", ", kronecker: tokens, damp_percent: 100")):
        changes = [f"weights.guided={{groups: 2{more}}}", "calibration.inputs=original", "weights.scale=minmax"]
        pipeline.run(job(folders["llama_tied"], tmp_path / name, corpus, *changes))
        stores.append(open_model(tmp_path / name))
    for name in stores[0].description["tensors"]:
        same = (stores[0].quantized(name).codes == stores[1].quantized(name).codes).float().mean()
        assert float(same) > 0.95, name


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("gptaq", ["weights.guided={kronecker: tokens}"], "the solver gptaq cannot weight outputs: take gptq"),
        ("qronos", ["weights.guided={kronecker: tokens}"], "the solver qronos cannot weight outputs: take gptq"),
        ("gptq", ["weights.guided={kronecker: tokens}", "weights.refine={}"], "undoes the feedback between rows"),
        ("gptq", ["weights.guided={kronecker: sequences}", "weights.target={}"], "does not know: take kronecker: tok"),
        ("gptq", ["weights.guided={kronecker: sequences, power: 0.5}"], "leave power out"),
        ("gptq", ["weights.guided={power: 0}"], "leave guided out, or set kronecker"),
        ("gptq", ["weights.guided={damp_percent: 0.1}"], "set kronecker to tokens or sequences"),
        ("gptq", ["weights.guided={kronecker: both}"], r"weights\.guided\.kronecker.*'tokens' or 'sequences'"),
        ("gptq", ["weights.guided={kronecker: tokens, damp_percent: -1}"], r"weights\.guided\.damp_percent"),
    ],
)
def test_what_cannot_weight_outputs_is_refused(recipe: str, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        gq.load_recipe(recipe, changes)


def test_without_it_a_recipe_does_not_mention_it() -> None:
    plain = gq.load_recipe("gptq", ["weights.guided={groups: 2}"])
    assert plain.to_dict()["weights"]["guided"] == {"groups": 2, "power": 1.0}
    with_target = gq.load_recipe("gptq", ["weights.guided={kronecker: tokens}", "weights.target={}"])
    assert gq.load_recipe(with_target.to_dict()) == with_target


def test_the_memory_of_the_factors_is_counted(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    models = {
        kind: MemoryModel(job(folders["llama"], tmp_path / kind, corpus, f"weights.guided={{groups: 2{more}}}"))
        for kind, more in (("", ""), ("tokens", ", kronecker: tokens"), ("sequences", ", kronecker: sequences"))
    }
    shapes = [(op.numel // op.in_features, op.in_features) for op in models[""].group.linears if op.entry.quantize]
    outputs = sum(4 * 2 * (rows // 2) ** 2 for rows, _ in shapes)
    assert models[""].kronecker() == 0
    assert models["tokens"].kronecker() == outputs
    assert models["sequences"].kronecker() == outputs + sum(4 * 2 * columns**2 for _, columns in shapes)
    assert models["tokens"].second_moments() - models[""].second_moments() == outputs
