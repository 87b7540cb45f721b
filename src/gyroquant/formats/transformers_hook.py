"""Registers gyroquant's folders with transformers, without importing transformers.

After `import gyroquant`, ``AutoModelForCausalLM.from_pretrained(folder)`` has to work, but the import must not take the
seconds that torch and transformers need. So the tables of transformers get placeholders, which import our classes on
first use. If the tables exist, the placeholders are entered at once. Otherwise a finder on `sys.meta_path` enters them
as soon as transformers has made the tables: it lets the other finders find the module, and wraps its loader.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
"""The module of transformers that holds its tables of quantization methods."""
METHOD = "gyroquant"
"""The value of `quantization_config.quant_method` in our folders."""
_CLASSES = {"AUTO_QUANTIZATION_CONFIG_MAPPING": "GyroquantConfig", "AUTO_QUANTIZER_MAPPING": "GyroquantHfQuantizer"}


class OnFirstUse:
    """A placeholder for a class of `hf_quantizer`, which is imported at the first call or attribute access."""

    def __init__(self, name: str):
        self._name = name

    def _loaded(self) -> Any:
        return getattr(import_module("gyroquant.formats.native.hf_quantizer"), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded(), name)


def announce() -> None:
    """Enters our method in the tables of transformers, now or as soon as transformers has made them."""
    tables = sys.modules.get(TABLES)
    if tables is not None:
        _enter(tables)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(tables: ModuleType) -> None:
    for table, name in _CLASSES.items():
        entries = getattr(tables, table, None)
        if entries is not None:  # versions without this table must still import; they refuse our folders themselves
            entries.setdefault(METHOD, OnFirstUse(name))


class _Finder(MetaPathFinder):
    """Finds the module of the tables through the other finders, and wraps its loader. It finds no other module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _EnteringLoader(spec.loader, self)
                return spec
        return None


class _EnteringLoader(Loader):
    """Runs a module with its own loader, enters our method in it, and removes the finder."""

    def __init__(self, loader: Loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _enter(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


__all__ = ["METHOD", "TABLES", "announce"]
