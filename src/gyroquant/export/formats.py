"""Formats of other programs: what each can hold, as data, and what a model needs held. One format a file beside this.

A format is asked before any work whether it holds a model, and answers with every reason why not.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gyroquant.errors import InputError
from gyroquant.export.folder import OutputFolder
from gyroquant.grids import Grid, GroupParams, IntegerGrid, QuantizedWeight
from gyroquant.models.online import Attachment, CacheQuantizer, InputQuantizer
from gyroquant.models.packed import PackedStore, matrix_shape
from gyroquant.rounding.base import weight_error

_PLACES = {
    "input": "in front of {module}",
    "output": "behind {module}",
    "qk": "on the queries and keys of {module} (R3)",
    "experts_in": "in front of the experts of {module}",
    "experts_act": "inside the experts of {module}",
}


@dataclass(frozen=True)
class Layer:
    """A rounded parameter: its grid, how many weights a row of it has, and how many rows there are where that is known.

    `plain` ones are rounded in the basis that they are stored in, `stacked` ones hold several experts, `wide` ones have
    scales that fp16 does not hold.
    """

    name: str
    grid: Grid
    columns: int
    plain: bool = True
    stacked: bool = False
    wide: bool = False
    rows: int = 0


@dataclass(frozen=True)
class Needs:
    """What has to be held of a model: its rounded layers, what runs with it, and its configuration if that is known."""

    model_type: str
    layers: tuple[Layer, ...]
    online: tuple[Attachment, ...] = ()
    config: Any = None


def needs_of(store: PackedStore) -> Needs:
    """What a folder that gyroquant wrote needs."""
    description = store.description
    ops = {op.weight: op for group in (*store.graph.blocks, store.graph.outer) for op in group.linears}
    layers = []
    for name, entry in description["tensors"].items():
        op = ops[name]
        spec = description["grids"][entry["grid"]]
        rows, columns = matrix_shape(store.shapes[name], op.entry.transposed)
        columns = entry.get("basis", {}).get("order", columns)
        grid, wide = Grid.kinds[spec["grid"]](**spec), bool(entry.get("tensor_scale")) and _wide(store.quantized(name))
        layers.append(Layer(name, grid, columns, "basis" not in entry, op.entry.stacked, wide, rows))
    return Needs(store.config.model_type, tuple(layers), store.online, store.config)


def _wide(weight: QuantizedWeight) -> bool:
    """Whether fp16 scales would change a weight by more than rounding them does anyway."""
    scale = weight.params.scale.half().float()
    if not bool(scale.isfinite().all()):
        return True
    halved = replace(weight, params=GroupParams(scale, weight.params.zero))
    return weight_error(weight.dequantize(), halved.dequantize()) > 2.0**-22


@dataclass(frozen=True)
class WeightType:
    """One way in which a format holds rounded weights: integer codes of some widths, with a scale for every `block`
    weights of a row, so that it holds groups of that size and its multiples; without a `block`, groups of any size.
    """

    name: str
    bits: tuple[int, ...]
    symmetric: bool = True
    asymmetric: bool = True
    midrise: bool = False
    block: int | None = None

    def holds(self, layer: Layer) -> bool:
        """Whether the codes and scales of a layer fit exactly."""
        grid = layer.grid
        if not isinstance(grid, IntegerGrid) or grid.bits not in self.bits:
            return False
        kind = self.midrise if halves(grid) else self.symmetric if grid.symmetric else self.asymmetric
        return kind and (self.block is None or grid.group_of(layer.columns, layer.name) % self.block == 0)

    def __str__(self) -> str:
        kinds = ("symmetric", "asymmetric", "midrise")
        said = " or ".join(kind for kind in kinds if getattr(self, kind))
        widths = f"{', '.join(map(str, self.bits))} bits"
        groups = "groups of any size" if self.block is None else f"groups of {self.block} or multiples of it"
        return f"{self.name} ({widths}, {said}, {groups})"


def halves(grid: IntegerGrid) -> bool:
    """Whether the zero point of a grid lies half-way between two codes."""
    return grid.midrise or (grid.symmetric and grid.bits == 1)


@dataclass(frozen=True)
class Carries:
    """What a format can hold: kinds of weights, the points where maps may run, whether weights may be rounded in a
    basis of their inputs, and which architectures (None: all). A `dense` one holds every weight as plain numbers, and
    one that holds `wrappers` holds models which also take images, with the decoder inside. `wide_scales` are scales
    beyond fp16.
    """

    weights: tuple[WeightType, ...] = ()
    dense: bool = False
    points: frozenset[str] = frozenset()
    model_types: tuple[str, ...] | None = None
    basis: bool = False
    experts: bool = False
    wrappers: bool = False
    wide_scales: bool = False

    def type_of(self, layer: Layer) -> WeightType | None:
        """The first way in which a layer fits, if there is one."""
        return next((one for one in self.weights if one.holds(layer)), None)


class Format(ABC):
    """A format. Subclasses register themselves under their `name`, but for variants of another; `packages` are what
    writing it needs.
    """

    kinds: ClassVar[dict[str, Format]] = {}
    name: ClassVar[str]
    title: ClassVar[str]
    carries: ClassVar[Carries]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""

    def __init_subclass__(cls, variant: bool = False) -> None:
        if not variant:
            Format.kinds[cls.name] = cls()

    @abstractmethod
    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """Writes all files of a model that `problems` finds nothing against; returns what was set on the way."""

    def problems(self, needs: Needs) -> list[str]:
        """Every reason why a model does not fit, empty when it does."""
        return [
            *self._architecture(needs.model_type),
            *_first_of_each(self._layers(needs.layers)),
            *_first_of_each(self._online(needs.online)),
        ]

    def check_packages(self) -> None:
        """Raises InputError when something that writing needs is not installed."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"the format {self.name} needs {', '.join(missing)}: install it with "
                f'pip install "gyroquant[{self.extra}]"'
            )

    def _architecture(self, model_type: str) -> Iterable[str]:
        known = self.carries.model_types
        if known is not None and model_type not in known:
            yield f"{self.title} is written for {', '.join(known)}, not for {model_type}"

    def _layers(self, layers: Iterable[Layer]) -> Iterable[tuple[str, str]]:
        if self.carries.dense:
            return
        for layer in layers:
            if layer.stacked and not self.carries.experts:
                yield "experts", f"{self.title} cannot hold the stacked experts {layer.name}"
            elif not layer.plain and not self.carries.basis:
                yield "basis", f"{self.title} cannot hold {layer.name}, which is rounded in a basis of its own"
            elif self.carries.type_of(layer) is None:
                grid = _described(layer.grid)
                yield grid, f"{self.title} has no type for {grid} ({layer.name}); {self._nearest(layer.grid)}"
            elif layer.wide and not self.carries.wide_scales:
                yield (
                    "wide",
                    f"{self.title} has fp16 scales, and those of {layer.name} are too small or too large for them; add "
                    "the layer to weights.ignore",
                )

    def _nearest(self, grid: Grid) -> str:
        """What this format has instead: the types of as many bits, or all."""
        same = [one for one in self.carries.weights if grid.bits in one.bits]
        return "it has " + " and ".join(map(str, same or self.carries.weights))

    def _online(self, online: Iterable[Attachment]) -> Iterable[tuple[str, str]]:
        for one in online:
            if isinstance(one, InputQuantizer):
                yield "inputs", f"{self.title} does not round activations as this recipe does; set activations=null"
            elif isinstance(one, CacheQuantizer):
                yield "cache", f"{self.title} does not round the KV cache as this recipe does; set kv_cache=null"
            elif one.insertion.point not in self.carries.points:
                place = _PLACES[one.insertion.point].format(module=one.module)
                yield (
                    one.insertion.point,
                    f"{self.title} has no place for the map that runs {place}; leave that site out",
                )


def _described(grid: Grid) -> str:
    if not isinstance(grid, IntegerGrid):
        return f"the grid {grid.grid}"
    kind = "midrise" if halves(grid) else "symmetric" if grid.symmetric else "asymmetric"
    groups = "one group a row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.bits}-bit {kind} weights in {groups}"


def _first_of_each(found: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence of each kind."""
    first: dict[str, str] = {}
    for kind, text in found:
        first.setdefault(kind, text)
    return list(first.values())


def format_named(name: str) -> Format:
    """A format by its name. Raises InputError for an unknown one."""
    if name not in Format.kinds:
        raise InputError(f"there is no format {name!r}; formats are {', '.join(sorted(Format.kinds))}")
    return Format.kinds[name]


def check_fit(format_: Format, needs: Needs) -> None:
    """Raises InputError with every reason why a model does not fit a format, and the formats that it does fit."""
    problems = _all_problems(format_, needs)
    if problems:
        others = [name for name, one in sorted(Format.kinds.items()) if not _all_problems(one, needs)]
        instead = f" Formats that hold it as it is: {', '.join(others)}." if others else ""
        raise InputError("; ".join(problems) + "." + instead)


def _all_problems(format_: Format, needs: Needs) -> list[str]:
    wrapper = needs.config is not None and needs.config.get_text_config(decoder=True) is not needs.config
    if wrapper and not format_.carries.wrappers:  # whose settings are those of its decoder elsewhere
        return [f"{format_.title} has no place for what {needs.model_type} has around its decoder"]
    return format_.problems(needs)
