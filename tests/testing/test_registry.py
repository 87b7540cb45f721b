"""One registry for every kind: found by scan, duplicates refused, the nearest name suggested, nothing untested."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import tiny_models
from extend_page import install_plugin

from gyroquant import registry
from gyroquant.errors import InputError, RecipeError
from gyroquant.maps import Identity, Map
from gyroquant.methods import Context, Method
from gyroquant.models.graph.sites import Site
from gyroquant.models.graph.spec import ARCHITECTURES, WRAPPERS, Architecture, architectures, register
from gyroquant.registry import KINDS, Registry, registries, restored

CONTRACTS = ("method", "solver", "step", "grid", "map", "observer", "format")


def test_every_registry_has_the_name_of_its_kind_and_something_in_it() -> None:
    for kind, items in registries().items():
        assert items.kind == kind
        assert len(items) > 0
    assert list(registries()) == list(KINDS)


@pytest.mark.parametrize("kind", CONTRACTS)
def test_every_registered_class_gives_examples_of_itself(kind: str) -> None:
    for item in dict.fromkeys(registries()[kind].values()):
        assert {type(example) for example in item.examples()} == {item}


def test_every_model_type_has_a_tiny_model() -> None:
    """Decoders of models that take images are tested inside these, whose tiny models stand in the tests."""
    described = {tiny_models.CONFIGS[name]().model_type for name in tiny_models.CONFIGS}
    wrapped = {make().get_text_config().model_type for make in tiny_models.WRAPPERS.values()}
    assert set(ARCHITECTURES) <= described | wrapped
    assert all(architecture.examples for architecture in architectures())
    names = [name for architecture in architectures() for name in architecture.examples]
    assert len(names) == len(set(names))


def test_every_wrapper_has_a_tiny_model() -> None:
    assert set(WRAPPERS) - {make().model_type for make in tiny_models.WRAPPERS.values()} == {"paligemma"}


def doubled(name: str) -> type[Method]:
    class Doubled(Method):
        method: Literal["walsh"] = "walsh"

        def choose(self, site: Site, context: Context) -> Map:
            return Identity(site.n)

    return Doubled


def test_two_classes_of_one_name_are_refused_naming_both() -> None:
    with (
        restored(),
        pytest.raises(InputError, match=r"two methods are called 'walsh': gyroquant\.methods\.walsh\.Walsh and .*Doub"),
    ):
        doubled("walsh")


def test_two_descriptions_of_one_model_type_are_refused_naming_both() -> None:
    mine = Architecture("mine", ("llama",), "layers", (), (), "half")
    with restored(), pytest.raises(InputError, match=r"called 'llama': \S+ and .*test_registry"):
        register(mine)


def test_a_class_that_is_defined_again_replaces_itself() -> None:
    kinds: Registry[Any] = Registry("thing")
    first, second = (type("Thing", (), {}) for _ in range(2))
    kinds.add("thing", first)
    kinds.add("thing", second)
    assert kinds["thing"] is second


def test_unknown_names_come_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"there is no method 'wlsh'; did you mean 'walsh'\? Known are absmax, "):
        Method.registry.find("wlsh")


def test_what_is_registered_within_restored_is_forgotten() -> None:
    with restored():
        type("Mine", (Map,), {})
        assert "mine" in Map.registry
    assert "mine" not in Map.registry


def test_a_kind_is_found_by_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_things").mkdir()
    (tmp_path / "some_things" / "__init__.py").write_text("")
    (tmp_path / "some_things" / "one.py").write_text("from things_registry import things\nthings.add('one', 1)\n")
    holder: Any = ModuleType("things_registry")
    holder.things = Registry("thing", "some_things")
    monkeypatch.setitem(sys.modules, "things_registry", holder)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert dict(holder.things) == {"one": 1}


def test_a_plug_in_that_fails_is_named_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path, "broken_example", "Map")
    (tmp_path / "broken_example" / "__init__.py").write_text("raise RuntimeError('of its own')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds: Registry[Any] = Registry("thing")
    for _ in range(2):
        with pytest.raises(InputError, match=r"'example' of the package broken_example cannot be loaded.*Fix it"):
            kinds.find("anything")


def test_suggestions_are_made_in_one_place() -> None:
    """Other rooms take the nearest name, or the whole sentence, from the registry."""
    source = Path(registry.__file__).parent
    users = [path for path in source.rglob("*.py") if "difflib" in path.read_text()]
    assert users == [source / "registry.py"]
