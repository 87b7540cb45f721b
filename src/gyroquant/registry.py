"""Registries, one for each kind that can be extended: they find items by name and suggest a name for an unknown one.

The first lookup of a name imports the kind's own modules and the modules that other packages name in the entry point
group `gyroquant.plugins`. A plug-in is therefore available in every process that reads a recipe: the command line, a
worker, a comparison.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, TypeVar

from gyroquant.errors import GyroquantError, InputError

PLUGINS = "gyroquant.plugins"
"""The entry point group. Each entry point names a module. Importing the module registers its classes."""

Item = TypeVar("Item")
KINDS: dict[str, str] = {
    "method": "gyroquant.methods.base:Method",
    "solver": "gyroquant.rounding.base:Solver",
    "step": "gyroquant.rounding.steps.base:LayerStep",
    "grid": "gyroquant.grids.base:Grid",
    "map": "gyroquant.maps.base:Map",
    "observer": "gyroquant.calibration.observers:Observer",
    "objective": "gyroquant.finetuning.settings:OBJECTIVES",
    "format": "gyroquant.formats.base:Format",
    "runtime": "gyroquant.formats.runtime:Runtime",
    "architecture": "gyroquant.models.graph.spec:ARCHITECTURES",
    "wrapper": "gyroquant.models.graph.spec:WRAPPERS",
    "prequantized format": "gyroquant.models.stores.prequantized.base:PrequantizedFormat",
    "external tool": "gyroquant.benchmark.external_tools.base:ExternalTool",
}
"""Every kind, and the place of its registry: a base class with the attribute `registry`, or the registry itself."""
_LOCK = RLock()
_loaded: set[str] = set()


class Registry(Mapping[str, Item], Generic[Item]):
    """Everything of one kind, by name.

    `kind` is the name of the kind in error messages. `packages` are imported, with every module in them, before the
    first lookup. For an unknown name, `find` raises `error` with the nearest known name.
    """

    def __init__(self, kind: str, *packages: str, error: type[GyroquantError] = InputError):
        self.kind, self.packages, self.error = kind, packages, error
        self._items: dict[str, Item] = {}
        self._origins: dict[str, str] = {}
        self._scanned = self._scanning = False

    def add(self, name: str, item: Item, origin: str = "") -> None:
        """Registers an item. `origin` states where it was defined; for a class it is not needed.

        A class that is defined again replaces itself. Raises InputError if another item has that name.
        """
        origin = origin or _origin(item)
        known = self._origins.get(name, origin)
        if known != origin and self._items[name] is not item:
            raise InputError(f"two {self.kind}s are called {name!r}: {known} and {origin}. Rename one of them")
        self._items[name], self._origins[name] = item, origin

    def discard(self, name: str) -> None:
        """Removes an item, if it is registered."""
        self._items.pop(name, None)
        self._origins.pop(name, None)

    @contextmanager
    def restored(self) -> Iterator[Registry[Item]]:
        """The registry, for a with block. Everything registered in the block is removed afterwards. For tests."""
        self.scan()
        before = dict(self._items), dict(self._origins)
        try:
            yield self
        finally:
            self._items, self._origins = before

    def scan(self) -> None:
        """Imports everything that registers items of this kind. Does nothing the second time."""
        if self._scanned:
            return
        with _LOCK:
            if self._scanned or self._scanning:  # a module that is being imported may look up a name
                return
            self._scanning = True
            try:
                for package in self.packages:
                    import_all(package)
                load_plugins()
                self._scanned = True
            finally:
                self._scanning = False

    def find(self, name: object, where: str = "") -> Item:
        """The item of that name. Raises the registry's error, which begins with `where`, for an unknown name."""
        self.scan()
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        raise self.error(f"{where}: ".lstrip(": ") + unknown(self.kind, name, self._items))

    def class_named(self, name: str) -> Any:
        """The registered class of that name, such as `Hadamard`. The ``__getattr__`` of a package returns it.

        Raises AttributeError if there is no such class, and without a lookup for names of modules, which begin with a
        small letter.
        """
        if name[:1].isupper():
            for item in self.values():
                if getattr(item, "__name__", None) == name:
                    return item
        raise AttributeError(f"there is no class {name} of a {self.kind}")

    def __getitem__(self, name: str) -> Item:
        self.scan()
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self.scan()
        return iter(sorted(self._items))

    def registered(self) -> tuple[Item, ...]:
        """Every item once, in the order of registration."""
        self.scan()
        return tuple(dict.fromkeys(self._items.values()))

    def __len__(self) -> int:
        self.scan()
        return len(self._items)


def registries() -> dict[str, Registry[Any]]:
    """The registry of every kind, by the name of the kind, in the order of `KINDS`."""
    by_kind = {}
    for kind, place in KINDS.items():
        module, _, name = place.partition(":")
        item = getattr(import_module(module), name)
        by_kind[kind] = item if isinstance(item, Registry) else item.registry
    return by_kind


@contextmanager
def restored() -> Iterator[None]:
    """Removes, after a with block, everything of every kind that was registered in the block. For tests."""
    with ExitStack() as stack:
        for registry in registries().values():
            stack.enter_context(registry.restored())
        yield


def import_all(package: str) -> None:
    """Imports a package and every module or package directly in it."""
    for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
        import_module(module.name)


def load_plugins() -> None:
    """Imports the modules that other packages name as plug-ins, each once.

    Raises InputError, which names the package, if a module cannot be imported.
    """
    for point in entry_points(group=PLUGINS):
        if point.value in _loaded:
            continue
        _loaded.add(point.value)
        try:
            point.load()
        except Exception as error:
            _loaded.discard(point.value)
            package = "" if point.dist is None else f" of the package {point.dist.name}"
            raise InputError(
                f"the plug-in {point.name!r}{package} cannot be loaded: {type(error).__name__}: {error}. Fix it or "
                "uninstall it"
            ) from error


def no_examples(kind: type[Any]) -> NotImplementedError:
    """The error that `examples` of a base class raises: every class must define its own examples."""
    return NotImplementedError(
        f"{kind.__name__} gives no examples. Define the class method `examples`: it returns a list of objects that "
        "cover the options of the class"
    )


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most similar to `name`; None if there are no known names."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
    return close[0] if close else None


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for an unknown name, with the most similar known one."""
    known = sorted(known)
    close = nearest(name, known)
    meant = f"; did you mean {close!r}?" if close else ""
    return (
        f"there is no {kind} {name!r}{meant} Known are {', '.join(known)}" if known else f"there is no {kind} {name!r}"
    )


def _origin(item: object) -> str:
    """The place where a class was defined, or the text of anything else."""
    return f"{item.__module__}.{item.__qualname__}" if isinstance(item, type) else repr(item)[:200]


__all__ = [
    "KINDS",
    "PLUGINS",
    "Registry",
    "import_all",
    "load_plugins",
    "nearest",
    "no_examples",
    "registries",
    "restored",
    "unknown",
]
