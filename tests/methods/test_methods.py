"""The contract of methods, for every one that is registered, and what is special about some."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant import maps
from gyroquant.calibration.observers import AbsMax, Observer
from gyroquant.errors import RecipeError
from gyroquant.maps import BlockDiagonal, Hadamard, Map, Walsh
from gyroquant.methods import Context, Method
from gyroquant.models.graph.sites import Site, find_sites
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.resources import observer_bytes
from gyroquant.testing import CONTEXT, check_method, parametrize_with_checks

RANDOM_HADAMARD = {"method": "hadamard", "random_signs": True}
GSR = {"method": "walsh", "block": "group"}


def method(**options: object) -> Method:
    return Method.registry[str(options["method"])](**options)


def sites(model: str, name: str, structure: Any = "orthogonal") -> list[Site]:
    return find_sites(open_model(tiny_models.build(model)).graph, name, structure=structure)


@parametrize_with_checks(Method.registry)
def test_every_method_keeps_its_contract(instance: Method, check: Any) -> None:
    check(instance)


def test_other_seeds_and_other_sites_give_other_signs() -> None:
    first, second = sites("llama", "R2")
    random = method(**RANDOM_HADAMARD)
    assert not torch.equal(random.choose(first, CONTEXT).dense(), random.choose(second, CONTEXT).dense())
    other = random.choose(first, Context(seed=8, group_size=32))
    assert not torch.equal(random.choose(first, CONTEXT).dense(), other.dense())


def test_gsr_has_walsh_blocks_of_the_group_size() -> None:
    m = method(**GSR).choose(sites("llama", "R1")[0], CONTEXT)
    assert isinstance(m, BlockDiagonal)
    assert isinstance(m.parts[0], Walsh)
    assert (m.parts[0].n, m.repeat) == (32, 2)
    whole = method(**GSR).choose(sites("llama", "R1")[0], Context(seed=0, group_size=-1))
    assert isinstance(whole, Walsh)


def test_quarots_hadamards_in_and_across_heads_are_one_over_all_of_them() -> None:
    place = sites("llama", "attn_out")[0]
    inside = maps.blocks(maps.hadamard(16), 64)
    by_shared_input = (inside @ method(method="across_heads").choose(place, CONTEXT)).dense()
    assert torch.allclose(by_shared_input, maps.hadamard(64).dense(), atol=1e-12)


def test_heads_without_a_matrix_name_the_remedy() -> None:
    place = replace(sites("llama", "attn_out")[0], heads=9, n=9 * 16)
    with pytest.raises(RecipeError, match=r"order 9, the number of heads.*attn_out.method=hadamard"):
        method(method="across_heads").check(place, CONTEXT)


def test_lh_has_the_columns_of_gsr_in_another_order() -> None:
    site = sites("llama", "R1")[0]
    gsr = method(**GSR).choose(site, CONTEXT).dense()
    lh = Method.registry["hadamard"](block="group").choose(site, CONTEXT).dense()
    for start in (0, 32):
        a, b = ({tuple(c) for c in m[:, start : start + 32].T.tolist()} for m in (gsr, lh))
        assert a == b


def test_plain_hadamard_is_the_matrix_itself() -> None:
    assert isinstance(method(method="hadamard").choose(sites("llama", "R4")[0], CONTEXT), Hadamard)


def test_blocks_that_do_not_divide_name_the_nearest() -> None:
    site = sites("llama", "R1")[0]
    with pytest.raises(RecipeError, match=r"blocks of 24 do not divide; the nearest size that does is 16"):
        Method.registry["walsh"](block=24).choose(site, CONTEXT)


def test_orders_without_a_hadamard_matrix_name_a_block() -> None:
    site = Site(name="R4", block=0, label="R4 of block 0", n=92)
    with pytest.raises(RecipeError, match=r"R4 of block 0: no Hadamard matrix of order 92.*blocks of 4"):
        Method.registry["hadamard"]().choose(site, CONTEXT)


@pytest.fixture
def kinds() -> Any:
    """The registered methods, put back afterwards."""
    with Method.registry.restored() as registry:
        yield registry


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
    check_method(Method.registry["greedy"](), site)
    transformed = tiny_models.build("llama")
    before = transformed.model.layers[0].mlp.up_proj.weight.detach().clone()
    gq.transform(transformed, gq.load_recipe(recipe, tiny_models.amount()), tiny_models.tokens(transformed))
    assert not torch.allclose(transformed.model.layers[0].mlp.up_proj.weight, before)
    greedy(False, seen)
    with pytest.raises(AssertionError, match=r"greedy.*a method that reads the weights"):
        check_method(Method.registry["greedy"](), site)
    with pytest.raises(RecipeError, match="needs_weights"):
        gq.transform(
            tiny_models.build("llama"), gq.load_recipe(recipe, tiny_models.amount()), tiny_models.tokens(transformed)
        )


@pytest.mark.parametrize("says", [False, True])
def test_methods_that_say_the_wrong_thing_of_chance_are_found(kinds: Any, says: bool) -> None:
    class Dice(Method):
        method: Literal["dice"] = "dice"

        @property
        def random(self) -> bool:
            return says

        def choose(self, site: Site, context: Context) -> Map:
            return maps.hadamard(site.n) if says else maps.random_signs(site.n, context.generator(site))

    with pytest.raises(AssertionError, match="declares that it is random" if says else "has to declare it"):
        check_method(Dice(), sites("llama", "R1")[0])


def test_observers_say_how_large_they_are(kinds: Any) -> None:
    class Silent:
        def __init__(self, n: int):
            self.n = n

        def __call__(self, x: torch.Tensor) -> None:
            pass

    with pytest.raises(TypeError, match="Silent is not an observer"):
        greedy(False, (Silent,))
    with pytest.raises(RecipeError, match="observer Silent does not declare how much memory"):
        observer_bytes(Silent, 64)


@parametrize_with_checks(Observer.registry)
def test_every_observer_keeps_its_contract(instance: Observer, check: Any) -> None:
    check(instance)
