"""What every method must satisfy. A new method adds one line to METHODS."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import tiny
import torch

import gyroquant as gq
from gyroquant import maps
from gyroquant.calibration.observers import AbsMax, Observer
from gyroquant.errors import RecipeError
from gyroquant.estimate import observer_bytes
from gyroquant.maps import BlockDiagonal, Hadamard, Map, Walsh
from gyroquant.methods import Context, Method
from gyroquant.models.sites import Site, find_sites
from gyroquant.models.source import open_model
from gyroquant.testing import CONTEXT, check_method, choose_on_random

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
SITES = ("R1", "R2", "attn_out", "qk", "R3", "R4", "attn_in", "mlp_in")
MEANT_FOR = {"pair pca": {"qk"}, "head pca": {"R2", "qk"}, "across heads": {"attn_out"}}
"""The sites of the methods that refuse all others."""


def every_observer() -> list[type[Observer]]:
    found, kinds = [], [Observer]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found += [kind] if kind.__module__.startswith("gyroquant") and kind is not Observer else []
    return found


def held_tensors(thing: Any) -> list[torch.Tensor]:
    """The tensors that an object keeps, and those of its observers."""
    parts = [value for value in vars(thing).values() if isinstance(value, torch.Tensor)]
    return parts + [t for value in vars(thing).values() if isinstance(value, Observer) for t in held_tensors(value)]


def method(name: str) -> Method:
    options = METHODS[name]
    return Method.kinds[str(options["method"])](**options)


def sites(model: str, name: str, structure: str = "orthogonal") -> list[Site]:
    return find_sites(open_model(tiny.build(model)).graph, name, structure=structure)


choose = choose_on_random


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

    def test_it_is_what_it_says_of_itself(self, name: str) -> None:
        chosen = method(name)
        check_method(chosen, sites("llama", max(MEANT_FOR.get(name, {"R1"})), chosen.structure)[0])

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


@pytest.fixture
def kinds() -> Any:
    """The registered methods, put back afterwards."""
    before = dict(Method.kinds)
    yield Method.kinds
    Method.kinds.clear()
    Method.kinds.update(before)


def greedy(needs: bool, seen: tuple[Any, ...] = ()) -> type[Method]:
    """Somebody else's method, which scales by what the weights hold."""

    class Greedy(Method):
        method: Literal["greedy"] = "greedy"
        structure: ClassVar[Any] = "diagonal"
        statistics: ClassVar[tuple[Any, ...]] = seen
        needs_weights: ClassVar[bool] = needs

        def choose(self, site: Site, context: Context) -> Map:
            total = torch.zeros(site.n)
            for weight in context.weights():
                total += weight.abs().sum(0).view(-1, site.n).sum(0)
            return maps.Diagonal(1 / total.double().clamp_min(1e-9))

    return Greedy


@pytest.mark.parametrize("seen", [(), (AbsMax,)], ids=["nothing", "statistics"])
def test_weights_come_to_methods_that_say_they_need_them_and_to_no_others(kinds: Any, seen: tuple[Any, ...]) -> None:
    recipe = {"transform": {"mlp_in": {"method": "greedy"}}, "weights": {"bits": 4, "group_size": 32}}
    site = sites("llama", "mlp_in", "diagonal")[0]
    greedy(True, seen)
    check_method(Method.kinds["greedy"](), site)
    transformed = tiny.build("llama")
    before = transformed.model.layers[0].mlp.up_proj.weight.detach().clone()
    gq.transform(transformed, gq.load_recipe(recipe, tiny.amount()), tiny.tokens(transformed))
    assert not torch.allclose(transformed.model.layers[0].mlp.up_proj.weight, before)
    greedy(False, seen)
    with pytest.raises(AssertionError, match="greedy: a method that reads the weights"):
        check_method(Method.kinds["greedy"](), site)
    with pytest.raises(RecipeError, match="needs_weights"):
        gq.transform(tiny.build("llama"), gq.load_recipe(recipe, tiny.amount()), tiny.tokens(transformed))


@pytest.mark.parametrize("says", [False, True])
def test_methods_that_say_the_wrong_thing_of_chance_are_found(kinds: Any, says: bool) -> None:
    class Dice(Method):
        method: Literal["dice"] = "dice"

        @property
        def random(self) -> bool:
            return says

        def choose(self, site: Site, context: Context) -> Map:
            return maps.hadamard(site.n) if says else maps.random_signs(site.n, context.generator(site))

    with pytest.raises(AssertionError, match="says that it is random" if says else "has to say so"):
        check_method(Dice(), sites("llama", "R1")[0])


def test_observers_say_how_large_they_are(kinds: Any) -> None:
    class Silent:
        def __init__(self, n: int):
            self.n = n

        def __call__(self, x: torch.Tensor) -> None:
            pass

    with pytest.raises(TypeError, match="Silent is no observer"):
        greedy(False, (Silent,))
    with pytest.raises(RecipeError, match="observer Silent does not say how much memory"):
        observer_bytes(Silent, 64)


@pytest.mark.parametrize("kind", [kind for kind in every_observer() if kind.__name__ != "CrossGram"])
def test_observers_are_as_large_as_they_say(kind: Any) -> None:
    observer = kind(256)
    for _ in range(4):
        observer(torch.randn(300, 256))
    held = sum(t.numel() * t.element_size() for t in held_tensors(observer))
    assert 0.4 * kind.size_in_bytes(256) <= held <= 1.1 * kind.size_in_bytes(256) + 64
