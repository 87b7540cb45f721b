"""DuQuant's rotations spread peaks, keep the best of what they tried, and are what their recipe folds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.calibration.observers import TokenSample
from gyroquant.maps import BlockDiagonal, Dense, Identity, Permutation, Product
from gyroquant.methods import Context
from gyroquant.methods.duquant import DuQuant, greedy_rotations, spreading
from gyroquant.methods.permutations import zigzag
from gyroquant.models.graph.sites import Site


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outliers(n: int = 64, tokens: int = 300) -> torch.Tensor:
    """Vectors with channels of large magnitude, all of them in the first block of 16, and one massive entry."""
    x = torch.randn(tokens, n, generator=generator(1))
    x[:, :4] *= 20
    x[7, 2] = 500
    return x


def choose(x: torch.Tensor, **options: int) -> gq.maps.Map:
    sample = TokenSample(x.shape[1])
    sample(x)
    site = Site(name="R4", block=0, label="R4 of block 0", n=x.shape[1])
    return DuQuant(**options).choose(site, Context(seed=3, group_size=16, statistics={TokenSample: sample}))


@pytest.mark.parametrize("n", [2, 16, 60])
def test_the_first_row_of_the_spreading_matrix_is_uniform(n: int) -> None:
    m = spreading(n, generator())
    assert torch.allclose(m[0], torch.full((n,), n**-0.5, dtype=torch.float64))
    assert torch.allclose(m @ m.T, torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_one_step_spreads_the_largest_channel_of_every_block_evenly() -> None:
    x = 1e-3 * torch.randn(5, 32, generator=generator())
    x[2, 9], x[4, 16] = 8.0, -4.0  # channel 9 of block 0, channel 0 of block 1
    rotations = greedy_rotations(x, spreading(16, generator()), steps=1)
    assert torch.allclose(rotations[0, 9], torch.full((16,), 0.25, dtype=torch.float64))
    assert torch.allclose(rotations[1, 0], torch.full((16,), 0.25, dtype=torch.float64))


def test_it_is_the_greedy_of_the_paper() -> None:
    """Step by step with explicit matrices E S E, and the best prefix in the end."""
    x, spread, steps = outliers()[:, :16], spreading(16, generator()), 30
    y, whole = x.double(), torch.eye(16, dtype=torch.float64)
    tried = [(float(y.abs().max()), whole)]
    for _ in range(steps):
        d = int(y.abs().amax(0).argmax())
        swap = torch.eye(16, dtype=torch.float64)
        swap[[0, d]] = swap[[d, 0]]
        step = swap @ spread @ swap
        y, whole = y @ step, whole @ step
        tried.append((float(y.abs().max()), whole))
    lowest, expected = min(tried, key=lambda one: one[0])
    found = greedy_rotations(x, spread, steps)[0]
    assert torch.allclose(found, expected, atol=1e-9)
    assert lowest < 0.5 * tried[0][0]


def test_more_steps_are_never_worse_and_none_may_be_best() -> None:
    x, spread = outliers(), spreading(16, generator())

    def peaks(steps: int) -> torch.Tensor:
        rotated = x.view(-1, 4, 16).movedim(1, 0).double() @ greedy_rotations(x, spread, steps)
        return rotated.abs().amax((1, 2))

    before = x.abs().view(-1, 4, 16).amax((0, 2))
    assert bool((peaks(1) <= before + 1e-4).all())
    assert bool((peaks(64) <= peaks(8) + 1e-4).all())
    flat = torch.ones(3, 16) * torch.tensor([[1.0], [-1.0], [1.0]])
    assert torch.equal(greedy_rotations(flat, spread, 16)[0], torch.eye(16, dtype=torch.float64))


def test_it_is_rotation_permutation_rotation() -> None:
    x = outliers(tokens=200)  # all of them fit into the sample
    m = choose(x, block=16, steps=40)
    assert isinstance(m, Product)
    first, order, second = m.parts
    assert isinstance(first, BlockDiagonal)
    assert isinstance(order, Permutation)
    assert isinstance(second, BlockDiagonal)
    rotated = first.apply(x.bfloat16().float())
    assert torch.equal(order.index, zigzag(rotated.abs().amax(0), 16))
    assert m.orthogonal
    assert m.apply(x).abs().max() < 0.25 * x.abs().max()  # more than any rotation of blocks of 16 can reach
    assert m.apply(x).abs().max() < first.apply(x).abs().max()


def test_blocks_are_the_largest_that_fit() -> None:
    assert isinstance(choose(outliers(64)), Dense)
    m = choose(outliers(576), steps=2)
    assert isinstance(m, Product)
    assert isinstance(m.parts[0], BlockDiagonal)
    assert {part.n for part in m.parts[0].parts} == {96}


def test_a_sample_is_small_and_holds_the_peaks() -> None:
    x = torch.randn(5000, 8, generator=generator())
    x[3333, 5] = 90
    sample = TokenSample(8)
    for piece in x.split([1, 700, 13, 4286]):
        sample(piece)
    value = sample.value
    assert len(value) <= 512
    assert value.abs().max() == 90
    strongest = x.abs().amax(1).topk(256).indices
    assert torch.equal(value[:256].sort(0).values, x[strongest].bfloat16().float().sort(0).values)
    even = x[::32].bfloat16().float()
    assert torch.equal(value[256:], even)
    few = TokenSample(8)
    few(x[:3])
    assert len(few.value) == 6


def test_sites_without_tokens_are_left_alone() -> None:
    assert isinstance(choose(torch.zeros(0, 32), block=16), Identity)


@pytest.mark.parametrize("model", ["llama", "qwen2_moe"])
def test_its_recipe_is_exact_online_and_saved(
    model: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    small = ["calibration.nsamples=4", "calibration.seqlen=32", "calibration.dtype=float32"]
    out = tmp_path / "out"
    result = gq.quantize(
        folders[model],
        gq.load_recipe("duquant-w8a8", small),
        corpus,
        out=out,
        options=gq.OutputOptions(save_dtype="float32"),
    )
    assert result.gyroquant_manifest["proof"]["relative_logit_error"] < 5e-6
    assert result.gyroquant_manifest["bits"]["stored_bits"]["maps"] > 0
    assert gq.evaluate(out, corpus, folders[model], window=32)["kl"] < 0.02


def test_it_can_stand_in_front_of_every_linear_layer() -> None:
    model = tiny_models.build("llama")
    recipe = gq.load_recipe("rtn", ["transform.linear={method: duquant, block: 16, steps: 8}", *tiny_models.amount()])
    assert gq.transform(model, recipe, tiny_models.tokens(model)).relative_logit_error < 5e-6
