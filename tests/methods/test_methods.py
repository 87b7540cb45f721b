"""What every method must satisfy. A new method adds one line to METHODS."""

import pytest
import tiny
import torch

from gyroquant.errors import RecipeError
from gyroquant.maps import BlockDiagonal, Hadamard, Walsh
from gyroquant.methods import Context, Method
from gyroquant.models.fold import FoldPlan
from gyroquant.models.prove import prove
from gyroquant.models.runner import BlockRunner
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
}
CONTEXT = Context(seed=7, group_size=32)


def method(name: str) -> Method:
    options = METHODS[name]
    return Method.kinds[str(options["method"])](**options)


def sites(model: str, name: str) -> list[Site]:
    return find_sites(open_model(tiny.build(model)).graph, name)


def test_every_method_has_a_row() -> None:
    assert {str(options["method"]) for options in METHODS.values()} == set(Method.kinds)


@pytest.mark.parametrize("name", METHODS)
class TestContract:
    @pytest.mark.parametrize("site", ["R1", "R2", "R3", "R4"])
    def test_maps_fit_their_sites(self, name: str, site: str) -> None:
        for place in sites("llama", site):
            m = method(name).choose(place, CONTEXT)
            assert m.n == place.n
            assert m.orthogonal

    def test_the_same_seed_gives_the_same_map(self, name: str) -> None:
        site = sites("llama", "R1")[0]
        one, again = (method(name).choose(site, CONTEXT).dense() for _ in range(2))
        assert torch.equal(one, again)

    @pytest.mark.parametrize("model", ["llama", "qwen2_moe", "gpt2"])
    def test_folding_it_everywhere_is_exact(self, name: str, model: str) -> None:
        built = tiny.build(model)
        store = open_model(built)
        plan = FoldPlan(store.graph)
        for site_name in ("R1", "R2", "R3", "R4"):
            for site in find_sites(store.graph, site_name):
                plan.add(site, method(name).choose(site, Context(seed=1, group_size=16)))
        prove(store, plan, BlockRunner(built, store.graph), tiny.tokens(built), 5e-6)


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
