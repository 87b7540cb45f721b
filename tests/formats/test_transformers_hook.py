"""`import gyroquant` is enough for transformers to open our folders, whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import fresh_process
import pytest
import saved_models
import tiny_models

from gyroquant.formats import transformers_hook as hook
from gyroquant.models.stores.packed_description import METHOD
from gyroquant.models.stores.source import open_model

OPEN = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.get_parameter(sys.argv[2]).double().sum().item())
"""
ORDERS = {
    "gyroquant first": "import sys, gyroquant, transformers",
    "transformers first": "import sys, transformers, gyroquant",
    "its models first": "import sys, transformers\nfrom transformers import LlamaForCausalLM\nimport gyroquant",
    "its models after": "import sys, gyroquant, transformers\nfrom transformers import LlamaForCausalLM",
    "a part of ours first": "import sys\nimport gyroquant.models.execution.online\nimport transformers",
    "its tables first": "import sys, gyroquant\nimport transformers.quantizers.auto\nimport transformers",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as gyroquant writes it."""
    out = tmp_path_factory.mktemp("hook") / "packed"
    saved_models.rounded(tiny_models.build("llama_tied"), out)
    return out


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return fresh_process.run(code, *arguments, imported=fresh_process.PACKAGES)


@pytest.mark.parametrize("order", ORDERS)
def test_either_may_be_imported_first(order: str, packed: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    expected = open_model(packed).read([name])[name].double().sum().item()
    done = run(ORDERS[order] + OPEN, packed, name)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected, rel=1e-3)  # which was rounded to 16 bits


def test_the_hook_imports_nothing_of_ours_and_goes_away() -> None:
    code = """
import sys, gyroquant
assert [type(finder).__name__ for finder in sys.meta_path][0] == "_Finder"
assert "transformers" not in sys.modules
import transformers.quantizers.auto as tables
assert tables.__loader__ is tables.__spec__.loader and type(tables.__loader__).__name__ == "SourceFileLoader"
assert "gyroquant" in tables.AUTO_QUANTIZER_MAPPING and "gyroquant" in tables.AUTO_QUANTIZATION_CONFIG_MAPPING
assert not [name for name in sys.modules if name.startswith("gyroquant.models")]
assert "_Finder" not in [type(finder).__name__ for finder in sys.meta_path]
from gyroquant.formats.native.hf_quantizer import GyroquantConfig, GyroquantHfQuantizer
assert tables.AUTO_QUANTIZER_MAPPING["gyroquant"] is GyroquantHfQuantizer
assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING["gyroquant"] is GyroquantConfig
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_without_transformers_gyroquant_can_be_imported() -> None:
    code = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
import gyroquant
print(gyroquant.__version__)
try:
    import transformers.quantizers.auto
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1].startswith("transformers")


def test_a_second_announcement_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, hook.TABLES, raising=False)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    hook.announce()
    hook.announce()
    assert sum(isinstance(finder, hook._Finder) for finder in sys.meta_path) == 1


def test_the_finder_finds_nothing_but_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = hook._Finder()
    assert finder.find_spec("json", None) is None
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert finder.find_spec(hook.TABLES, None) is None  # nobody else finds it: it is not installed


def test_a_module_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder stays until the tables are there."""

    class Loader:
        fails = True

        def create_module(self, spec: ModuleSpec) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            if self.fails:
                raise ImportError("half installed")
            module.AUTO_QUANTIZER_MAPPING = {}  # type: ignore[attr-defined]

    loader, finder = Loader(), hook._Finder()
    others = type("Others", (), {"find_spec": staticmethod(lambda name, *rest: ModuleSpec(name, loader))})  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "meta_path", [finder, others])
    for fails in (True, False):
        loader.fails = fails
        spec = finder.find_spec(hook.TABLES, None)
        assert spec is not None
        assert spec.loader is not None
        module = ModuleType(hook.TABLES)
        module.__spec__ = spec
        if fails:
            with pytest.raises(ImportError):
                spec.loader.exec_module(module)
            assert finder in sys.meta_path
        else:
            spec.loader.exec_module(module)
            assert hook.METHOD in module.AUTO_QUANTIZER_MAPPING  # the other table is absent, which is no error
            assert finder not in sys.meta_path


def test_the_names_of_the_method_agree() -> None:
    assert hook.METHOD == METHOD
