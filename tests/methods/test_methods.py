"""What every method must satisfy. A new method adds one line to METHODS."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch

import gyroquant as gq
from gyroquant import maps
from gyroquant.calibration.measure import Want
from gyroquant.errors import RecipeError
from gyroquant.grids import IntegerGrid
from gyroquant.maps import BlockDiagonal, Hadamard, Map, Walsh
from gyroquant.methods import Context, Method
from gyroquant.models.sites import Site, find_sites
from gyroquant.models.source import open_model

METHODS: dict[str, dict[str, object]] = {
    "identity": {"method": "identity"},
    "hadamard": {"method": "hadamard"},
    "random hadamard": {"method": "hadamard", "random_signs": True},
    "block hadamard": {"method": "hadamard", "block": 16},
    "walsh": {"method": "walsh"},
    "gsr": {"method": "walsh", "block": "group"},
    "orthogonal": {"method": "orthogonal", "block": 8},
    "butterfly": {"method": "butterfly", "block": 16},
    "massdiff": {"method": "massdiff", "block": 16},
    "zigzag": {"method": "zigzag", "block": 16},
    "absmax": {"method": "absmax", "block": 16},
    "random permutation": {"method": "random_permutation", "block": 16},
    "pair pca": {"method": "pair_pca"},
    "head pca": {"method": "head_pca"},
    "spectral scale": {"method": "spectral_scale"},
    "spectral scale of the paper": {"method": "spectral_scale", "energy": "paper", "alpha": 0.25},
    "unit scale": {"method": "unit_scale"},
    "across heads": {"method": "across_heads"},
    "duquant": {"method": "duquant", "block": 16, "steps": 20},
    "smooth": {"method": "smooth"},
    "awq": {"method": "awq", "steps": 4},
}
CONTEXT = Context(seed=7, group_size=32, grid=IntegerGrid(group_size=32))
SITES = ("R1", "R2", "attn_out", "qk", "R3", "R4", "attn_in", "mlp_in")
MEANT_FOR = {"pair pca": {"qk"}, "head pca": {"R2", "qk"}, "across heads": {"attn_out"}}
"""The sites of the methods that refuse all others."""


def method(name: str) -> Method:
    options = METHODS[name]
    return Method.kinds[str(options["method"])](**options)


def sites(model: str, name: str, structure: str = "orthogonal") -> list[Site]:
    return find_sites(open_model(tiny.build(model)).graph, name, structure=structure)


def choose(chosen: Method, site: Site, context: Context = CONTEXT) -> Map:
    """The map for a site whose vectors are random, with channels of very different size."""
    generator = torch.Generator().manual_seed(site.n)
    want = Want(site, chosen.statistics)
    want(torch.randn(200, site.n, generator=generator) * torch.rand(site.n, generator=generator).exp())

    def weights() -> Iterator[torch.Tensor]:
        again = torch.Generator().manual_seed(site.n)
        yield from (torch.randn(24, width * site.n, generator=again) for width in (2, 4))

    chosen.check(site, context)
    return chosen.choose(site, replace(context, statistics=want.seen, weights=weights))


def test_every_method_has_a_row() -> None:
    from_files = {"stored"}  # tests/learning/test_rotations.py
    assert {str(options["method"]) for options in METHODS.values()} == set(Method.kinds) - from_files


@pytest.mark.parametrize("name", METHODS)
class TestContract:
    @pytest.mark.parametrize("site", SITES)
    def test_maps_fit_their_sites_and_are_what_they_say(self, name: str, site: str) -> None:
        chosen = method(name)
        for place in sites("llama", site, chosen.structure):
            if site not in MEANT_FOR.get(name, SITES):
                with pytest.raises(gq.GyroquantError, match=chosen.method):
                    choose(chosen, place)
                continue
            m = choose(chosen, place)
            assert m.n == place.n
            assert m.orthogonal or chosen.structure in ("any", "diagonal")
            assert m.permuting or chosen.structure != "permutation"
            assert m.diagonal or chosen.structure != "diagonal"
            eye = torch.eye(m.n, dtype=torch.float64)
            assert torch.allclose(m.dense() @ m.inverse().dense(), eye, atol=1e-9)

    def test_the_same_seed_gives_the_same_map(self, name: str) -> None:
        site = sites("llama", max(MEANT_FOR.get(name, {"R1"})))[0]
        one, again = (choose(method(name), site).dense() for _ in range(2))
        assert torch.equal(one, again)

    @pytest.mark.parametrize("model", ["llama", "qwen2_moe", "gpt2"])
    def test_folding_it_wherever_it_fits_is_exact(self, name: str, model: str) -> None:
        """What is measured is measured on the model itself, and what a site cannot take it refuses."""
        used = []
        for site in MEANT_FOR.get(name, SITES):
            changes = [f"transform.{site}={METHODS[name]}", "weights.group_size=16", *tiny.amount()]
            try:
                transformed = tiny.build(model)
                proof = gq.transform(transformed, gq.load_recipe("rtn", changes), tiny.tokens(transformed))
            except gq.UnsupportedModelError:
                continue
            used.append(site)
            assert proof.relative_logit_error < 5e-6
            assert proof.worst_block_error < 1e-5
        expected = {"R1", "R4"} if method(name).structure != "diagonal" else {"attn_in", "mlp_in"}
        if name in MEANT_FOR:
            assert bool(used) == (name != "pair pca" or model != "gpt2")  # GPT-2 has no pairs
        else:
            assert expected <= set(used)


def test_other_seeds_and_other_sites_give_other_signs() -> None:
    first, second = sites("llama", "R2")
    random = method("random hadamard")
    assert not torch.equal(random.choose(first, CONTEXT).dense(), random.choose(second, CONTEXT).dense())
    other = random.choose(first, Context(seed=8, group_size=32))
    assert not torch.equal(random.choose(first, CONTEXT).dense(), other.dense())


def test_gsr_has_walsh_blocks_of_the_group_size() -> None:
    m = method("gsr").choose(sites("llama", "R1")[0], CONTEXT)
    assert isinstance(m, BlockDiagonal)
    assert isinstance(m.parts[0], Walsh)
    assert (m.parts[0].n, m.repeat) == (32, 2)
    whole = method("gsr").choose(sites("llama", "R1")[0], Context(seed=0, group_size=-1))
    assert isinstance(whole, Walsh)


def test_quarots_hadamards_in_and_across_heads_are_one_over_all_of_them() -> None:
    place = sites("llama", "attn_out")[0]
    inside = maps.blocks(maps.hadamard(16), 64)
    together = (inside @ method("across heads").choose(place, CONTEXT)).dense()
    assert torch.allclose(together, maps.hadamard(64).dense(), atol=1e-12)


def test_heads_without_a_matrix_name_the_remedy() -> None:
    place = replace(sites("llama", "attn_out")[0], heads=9, n=9 * 16)
    with pytest.raises(RecipeError, match=r"order 9, the number of heads.*attn_out.method=hadamard"):
        method("across heads").check(place, CONTEXT)


def test_lh_has_the_columns_of_gsr_in_another_order() -> None:
    site = sites("llama", "R1")[0]
    gsr = method("gsr").choose(site, CONTEXT).dense()
    lh = Method.kinds["hadamard"](block="group").choose(site, CONTEXT).dense()
    for start in (0, 32):
        a, b = ({tuple(c) for c in m[:, start : start + 32].T.tolist()} for m in (gsr, lh))
        assert a == b


def test_plain_hadamard_is_the_matrix_itself() -> None:
    assert isinstance(method("hadamard").choose(sites("llama", "R4")[0], CONTEXT), Hadamard)


def test_blocks_that_do_not_divide_name_the_nearest() -> None:
    site = sites("llama", "R1")[0]
    with pytest.raises(RecipeError, match=r"blocks of 24 do not divide; the nearest size that does is 16"):
        Method.kinds["walsh"](block=24).choose(site, CONTEXT)


def test_orders_without_a_hadamard_matrix_name_a_block() -> None:
    site = Site(name="R4", block=0, label="R4 of block 0", n=92)
    with pytest.raises(RecipeError, match=r"R4 of block 0: no Hadamard matrix of order 92.*blocks of 4"):
        Method.kinds["hadamard"]().choose(site, CONTEXT)
