"""Second moments that follow the gradient of the loss: the weights of tokens, and what solvers make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from selection import some
from torch import Tensor
from transformers import AutoModelForCausalLM

import gyroquant as gq
from gyroquant.errors import RecipeError, UnsupportedModelError
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.token_weights import AT_ONCE, TokenWeights, collect
from gyroquant.rounding import Guided
from gyroquant.system.progress import Progress

SMALL = ["weights.bits=3", "weights.group_size=16", "calibration.seqlen=32", "calibration.dtype=float32"]


def job(model: Any, out: Path, corpus: Path, *changes: str, recipe: str = "gptq", nsamples: int = 4) -> Job:
    loaded = gq.load_recipe(recipe, [*SMALL, f"calibration.nsamples={nsamples}", *changes])
    return prepare(model, out, loaded, corpus, tokenizer=tiny_models.tokenizer())


def by_autograd(folder: Path, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """The gradients at the outputs of all linear layers, (tokens, out), by one backward pass of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(module: Any, inputs: Any, output: Tensor, name: str = name) -> None:
                output.retain_grad()
                outputs.setdefault(f"model.layers.{name}.weight", []).append(output)

            module.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(seed)
    for window in tokens:
        predicted = model(window[None]).logits[0].log_softmax(-1)
        labels = torch.multinomial(predicted.detach().exp(), 1, generator=generator)
        (-predicted.gather(1, labels).sum()).backward()
    return {name: torch.cat([output.grad[0] for output in each]) for name, each in outputs.items()}  # type: ignore[index]


@pytest.mark.parametrize("groups", [1, 3])
def test_weights_of_tokens_are_mean_squares_of_the_gradient(
    groups: int, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    made = job(folders["llama_tied"], tmp_path / "out", corpus, "seed=5")
    assert made.tokens is not None
    with torch.no_grad():
        found = collect(made, TokenWeights(Guided(groups=groups)), Progress())
    expected = by_autograd(folders["llama_tied"], made.tokens, 5)
    assert found.keys() == expected.keys() == made.targets.keys()
    for name, gradient in expected.items():
        squares = torch.stack([part.square().mean(1) for part in gradient.tensor_split(groups, 1)])
        torch.testing.assert_close(found[name].float(), squares / squares.mean(1, keepdim=True), rtol=2e-3, atol=1e-4)


def test_windows_beyond_those_that_run_at_once_count_too(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    made = job(folders["llama_tied"], tmp_path / "out", corpus, nsamples=AT_ONCE + 2)
    with torch.no_grad():
        found = collect(made, TokenWeights(Guided(groups=1)), Progress())
    for name, weights in found.items():
        assert weights.shape == (1, (AT_ONCE + 2) * 32), name
        assert float(weights[:, AT_ONCE * 32 :].mean()) > 0.1


def test_the_power_flattens_weights_and_no_gradient_counts_tokens_equally(folders: dict[str, Path]) -> None:
    op = open_model(folders["llama_tied"]).graph.block_linears[0]
    rows, gradient = op.numel // op.in_features, torch.tensor([1.0, 4.0, 16.0])
    collected = {power: TokenWeights(Guided(groups=1, power=power)) for power in (1.0, 0.5)}
    for tokens in collected.values():
        tokens.visit(0, {})(op, torch.zeros(3, op.in_features), gradient[:, None].expand(3, rows))
    assert collected[1.0].result()[op.weight][0].tolist() == pytest.approx([3 / 273, 48 / 273, 768 / 273], rel=1e-3)
    assert collected[0.5].result()[op.weight][0].tolist() == pytest.approx([3 / 21, 12 / 21, 48 / 21], rel=1e-3)
    nothing = TokenWeights(Guided(groups=2))
    nothing.visit(0, {})(op, torch.zeros(3, op.in_features), None)
    assert nothing.result()[op.weight].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("recipe", some(["gptq", "gptaq", "quip", "qronos"], ("gptq", "gptaq")))
def test_tokens_that_count_equally_change_no_code(
    recipe: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are rounded independently, so groups of them give the same codes as all of them together."""

    def equal(self: TokenWeights) -> dict[str, Tensor]:
        return {name: torch.ones_like(torch.cat(found, 1)).half() for name, found in self._squares.items()}

    monkeypatch.setattr(TokenWeights, "result", equal)
    for name, more in (("plain", []), ("guided", ["weights.guided={groups: 3}"])):
        pipeline.run(job(folders["llama_tied"], tmp_path / name, corpus, *more, recipe=recipe))
    plain, guided = (open_model(tmp_path / name) for name in ("plain", "guided"))
    for name in plain.description["tensors"]:
        assert torch.equal(plain.quantized(name).codes, guided.quantized(name).codes), name


def test_the_loss_falls_where_it_depends_on_few_tokens(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """The error that the Fisher information weights is smaller than that of a plain solver, on the same tokens."""
    errors = {}
    for name, more in (("plain", []), ("guided", ["weights.guided={groups: 1}"])):
        made = job(folders["llama_tied"], tmp_path / name, corpus, *more, nsamples=16)
        pipeline.run(made)
        weights = by_autograd(folders["llama_tied"], made.tokens, 0)
        errors[name] = weighted_error(folders["llama_tied"], tmp_path / name, made.tokens, weights)
    assert errors["guided"] < 0.97 * errors["plain"]


def weighted_error(folder: Path, rounded: Path, tokens: Tensor, gradients: dict[str, Tensor]) -> float:
    """The output errors of the layers of the first block's attention on unrounded inputs, weighted and summed."""
    model, store, total = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), open_model(rounded), 0.0
    layer, inputs = model.model.layers[0].self_attn, []
    layer.q_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    for kind in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{kind}.weight"
        error = torch.cat(inputs) @ (getattr(layer, kind).weight.detach() - store.quantized(name).dequantize()).T
        squares = gradients[name].square().mean(1)
        total += float((error.square().sum(1) * squares / squares.mean()).sum())
    return total


def test_what_cannot_be_guided_is_refused(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="guided changes second moments, and no step of this recipe reads them"):
        gq.load_recipe("rtn", ["weights.guided={groups: 1}"])
    with pytest.raises(UnsupportedModelError, match=r"weights\.guided needs the gradient .* experts .* stacked"):
        job(folders["mixtral"], tmp_path / "out", corpus, "weights.guided={groups: 1}")


def test_one_backward_pass_serves_bits_and_guidance(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    plain = TokenWeights.visit

    def visit(self: TokenWeights, index: int, tensors: Any) -> Any:
        runs.append(index)
        return plain(self, index, tensors)

    monkeypatch.setattr(TokenWeights, "visit", visit)
    allocate = "weights.allocate={budget: 5.2, bits: [3, 4, 6], nsamples: 4, costs: gradient}"
    manifest = pipeline.run(
        job(folders["llama_tied"], tmp_path / "out", corpus, allocate, "weights.guided={groups: 2}")
    )
    assert runs == [1, 0]  # each block once
    assert manifest["allocation"]["per_weight"] <= 5.2
    assert {"allocate", "guide"} <= manifest["stage_seconds"].keys()
