"""Formats: what each can hold, and what a model needs, both as data. Every format is one file in this folder.

`check_fit` compares the two before any work, and reports every reason why a model does not fit.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.formats.runtime import Runtime
from gyroquant.formats.ties import modules_around, runs_at, tie_points
from gyroquant.grids import EvenGrid, Grid, GroupParams, IntegerGrid, LookupGrid, QuantizedWeight, SuperBlockGrid
from gyroquant.grids.error import weight_error
from gyroquant.models.deriving.derive import derived
from gyroquant.models.execution.low_rank import LowRankBranch
from gyroquant.models.execution.online import CacheQuantizer, InputQuantizer, OnlineOp
from gyroquant.models.graph.model_graph import TOKENS, ModelGraph
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.graph.spec import Architecture, Linear, described
from gyroquant.models.stores.packed import PackedStore
from gyroquant.registry import Registry

_PLACES = {
    "input": "before {module}",
    "output": "after {module}",
    "qk": "on the queries and keys of {module} (R3)",
    "experts_in": "before the experts of {module}",
    "parameter": "before {module}",
    "experts_act": "inside the experts of {module}",
}


@dataclass(frozen=True)
class Layer:
    """A rounded parameter.

    name: the parameter's name.
    grid: the grid on which it is rounded.
    columns: weights in a row.
    plain: whether it is rounded in the basis in which it is stored.
    stacked: whether it holds several experts.
    wide: whether fp16 cannot hold its scales.
    rows: the number of rows, or 0 if it is unknown.
    table: whether it is a table of embeddings.
    low_rank: whether it has a low-rank branch.
    """

    name: str
    grid: Grid
    columns: int
    plain: bool = True
    stacked: bool = False
    wide: bool = False
    rows: int = 0
    table: bool = False
    low_rank: bool = False


@dataclass(frozen=True)
class ModelRequirements:
    """What a format must hold of a model.

    model_type: the architecture.
    layers: the rounded layers.
    online: the online operations.
    config: the configuration, or None if it is unknown.
    graph: the model matched with its description, or None if it is unknown; see `architecture`.
    """

    model_type: str
    layers: tuple[Layer, ...]
    online: tuple[OnlineOp, ...] = ()
    config: Any = None
    graph: ModelGraph | None = None

    @property
    def architecture(self) -> Architecture | None:
        """The description of the architecture: that of `graph`, or the registered or derived one. None: unknown."""
        if self.graph is not None:
            return self.graph.architecture
        found = described(self.model_type)
        if found is not None or self.config is None:
            return found
        try:
            return derived(self.config.get_text_config(decoder=True)).architecture
        except UnsupportedModelError:  # a class that transformers does not have
            return None

    @property
    def tie_points(self) -> tuple[HookPoint, ...]:
        """Where online maps keep the head tied to the embedding; see `gyroquant.formats.ties`."""
        return tie_points(self.online, self.architecture) if self.online else ()

    def around_blocks(self, layer: Layer) -> bool:
        """Whether a layer is an embedding or a head."""
        return layer.table or layer.name.removesuffix(".weight") in modules_around(self.architecture, (Linear,))


def requirements_of(store: PackedStore) -> ModelRequirements:
    """The requirements of the model in a folder that gyroquant wrote."""
    description = store.description
    layers = []
    for name, entry in description["tensors"].items():
        op = store.graph.op(name)
        spec = description["grids"][entry["grid"]]
        rows, columns = op.matrix_shape
        columns = entry.get("basis", {}).get("order", columns)
        grid, wide = (
            Grid.registry[spec["grid"]](**spec),
            bool(entry.get("tensor_scale")) and _wide(store.quantized(name)),
        )
        plain, table = "basis" not in entry, op.entry.reads == TOKENS
        low_rank = "low_rank" in entry
        layers.append(Layer(name, grid, columns, plain, op.entry.stacked, wide, rows, table, low_rank))
    online = tuple(op for op in store.online if not isinstance(op, LowRankBranch))  # these belong to layers
    return ModelRequirements(store.config.model_type, tuple(layers), online, store.config, store.graph)


def _wide(weight: QuantizedWeight) -> bool:
    """Whether a scale overflows in fp16, or fp16 scales change a weight more than the usual rounding to fp16 does."""
    scale = weight.params.scale.half().float()
    if not bool(scale.isfinite().all()):
        return True
    halved = replace(weight, params=GroupParams(scale, weight.params.zero))
    return weight_error(weight.dequantize(), halved.dequantize()) > 2.0**-22


@dataclass(frozen=True)
class WeightType:
    """One way in which a format holds rounded weights: codes with a scale for every block of a row.

    name: what the format calls it.
    bits: the widths of codes that fit.
    symmetric, asymmetric, midrise: the kinds of integer grids that fit.
    float_zero: whether grids with float zero points fit.
    table: the table of lookup grids that fit; then no other grid does.
    k_quant: whether only the `SuperBlockGrid` of this name fits.
    block: weights that share a scale. Groups of this size and its multiples fit. None: groups of any size fit.
    """

    name: str
    bits: tuple[int, ...]
    symmetric: bool = True
    asymmetric: bool = True
    midrise: bool = False
    float_zero: bool = False
    table: str = ""
    k_quant: bool = False
    block: int | None = None

    def holds(self, layer: Layer) -> bool:
        """Whether the codes and scales of a layer fit exactly."""
        grid = layer.grid
        if grid.bits not in self.bits:
            return False
        if self.k_quant or isinstance(grid, SuperBlockGrid):
            return self.k_quant and isinstance(grid, SuperBlockGrid) and grid.type_name == self.name
        if isinstance(grid, LookupGrid) and self.table:
            return grid.table == self.table and (self.block is None or grid.group_of(layer.columns) % self.block == 0)
        if not isinstance(grid, EvenGrid) or self.table:
            return False
        if not getattr(self, kind_of(grid), False):
            return False
        return self.block is None or grid.group_of(layer.columns, layer.name) % self.block == 0

    def __str__(self) -> str:
        kinds = ("symmetric", "asymmetric", "midrise", "float_zero")
        supported = " or ".join(kind for kind in kinds if getattr(self, kind)) if not self.table else "its own table"
        supported = "the grid k_quant, iq, ternary, iqk or iq_kt" if self.k_quant else supported
        widths = f"{', '.join(map(str, self.bits))} bits"
        groups = "groups of any size" if self.block is None else f"groups of {self.block} or multiples of it"
        return f"{self.name} ({widths}, {supported}, {groups})"


def halves(grid: EvenGrid) -> bool:
    """Whether the zero point of a grid always lies half-way between two codes."""
    return isinstance(grid, IntegerGrid) and (grid.midrise or (grid.symmetric and grid.bits == 1))


def kind_of(grid: EvenGrid) -> str:
    """What the zero points of a grid are, by the name that `WeightType` has for it."""
    if not isinstance(grid, IntegerGrid):
        return "float_zero" if grid.float_zero else grid.grid
    return "midrise" if halves(grid) else "symmetric" if grid.symmetric else "asymmetric"


@dataclass(frozen=True)
class FormatCapabilities:
    """What a format can hold.

    weights: the types of rounded weights.
    dense: whether it holds every weight as a plain number.
    points: the hook points at which online maps can run.
    model_types: the supported architectures. None: all.
    any_grid: whether it holds the codes and scales of every grid, as the grid packs them.
    basis: whether weights may be rounded in a basis of their inputs.
    experts: whether it holds stacked experts.
    tables: whether it holds rounded tables of embeddings.
    decodes: whether it holds rounded embeddings and heads that do not fit as plain numbers.
    unties: whether it holds a model with `keep_ties` as one with a head of its own; see `gyroquant.formats.ties`.
    wrappers: whether it holds models that contain the decoder and also take images.
    wide_scales: whether it holds scales that fp16 cannot hold.
    low_rank: whether it holds layers with a low-rank branch, or decodes the branch into the weight.
    """

    weights: tuple[WeightType, ...] = ()
    dense: bool = False
    points: frozenset[str] = frozenset()
    model_types: tuple[str, ...] | None = None
    any_grid: bool = False
    basis: bool = False
    experts: bool = False
    tables: bool = False
    decodes: bool = False
    unties: bool = False
    wrappers: bool = False
    wide_scales: bool = False
    low_rank: bool = False

    def type_of(self, layer: Layer) -> WeightType | None:
        """The first type of weights that holds a layer, or None."""
        return next((weight_type for weight_type in self.weights if weight_type.holds(layer)), None)


class Format(ABC):
    """A format: its writer, its runtime, and the packages that both need.

    Subclasses register themselves under their `name`, except variants of another format.
    `gyroquant.testing.check_format` checks that a new format does what it declares.
    """

    registry: ClassVar[Registry[type[Format]]] = Registry("format", "gyroquant.formats")
    name: ClassVar[str]
    title: ClassVar[str]
    """What people call it."""
    capabilities: ClassVar[FormatCapabilities]
    """What it can hold."""
    runtime: ClassVar[type[Runtime] | None] = None
    """The program that opens it. Exports are checked with it. None: they cannot be checked."""
    packages: ClassVar[tuple[str, ...]] = ()
    """The modules that the writer imports and that gyroquant does not install by default."""
    extra: ClassVar[str] = ""
    """The extra of gyroquant that installs `packages`."""
    ours: ClassVar[bool] = False
    """Whether only gyroquant opens it. It is then not suggested in place of a format of another program."""
    library: ClassVar[str] = ""
    """What the hub calls the library that opens it. Default: the name of the format."""
    usage: ClassVar[str] = ""
    """How to open an export in FOLDER, as Markdown for its model card. Default: a sentence with the title."""

    def __init_subclass__(cls, variant: bool = False) -> None:
        if variant:
            return
        Format.registry.add(cls.name, cls)
        if cls.runtime is not None:
            Runtime.registry.add(cls.name, cls.runtime)

    @classmethod
    def examples(cls) -> list[Self]:
        """Formats that cover the options of this class, for tests. Formats have no options, so there is one."""
        return [cls()]

    @abstractmethod
    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """Writes all files of a model that fits (see `incompatibilities`). Returns facts for the manifest."""

    def weight_in_file(self, store: PackedStore, name: str) -> Tensor | None:
        """A rounded parameter with the numbers that the file stands for. None: exactly those of the saved model."""
        return None

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        """Every reason why a model does not fit. Empty if it fits."""
        ties = needs.tie_points
        online = [op for op in needs.online if not (self.capabilities.unties and runs_at(op, ties))]
        return [
            *self._architecture(needs.model_type),
            *_first_of_each(self._layers(self.packed(needs).layers)),
            *_first_of_each(self._online(online, ties)),
        ]

    def decoded(self, needs: ModelRequirements) -> dict[str, str]:
        """The rounded embeddings and heads that do not fit and that the file holds as plain numbers, each with the
        reason. Empty if `capabilities.decodes` is False.
        """
        if not self.capabilities.decodes:
            return {}
        layers = [layer for layer in needs.layers if needs.around_blocks(layer)]
        return {layer.name: text for layer in layers for _, text in self._layers([layer])}

    def changes(self, needs: ModelRequirements) -> list[str]:
        """What the file holds otherwise than the saved model, if that fits, one sentence each."""
        sentences = [f"{name} becomes plain numbers ({reason})" for name, reason in self.decoded(needs).items()]
        if self.capabilities.unties and needs.tie_points:
            sentences.append("the tied head becomes a matrix of its own, in 16 bits (keep_ties needs online maps)")
        return sentences

    def packed(self, needs: ModelRequirements) -> ModelRequirements:
        """What the file must hold as codes: the requirements without the layers that are `decoded`."""
        decoded = self.decoded(needs)
        return replace(needs, layers=tuple(layer for layer in needs.layers if layer.name not in decoded))

    def check_packages(self) -> None:
        """Raises InputError if a package that the writer needs is not installed."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            target = f'"gyroquant[{self.extra}]"' if self.extra else " ".join(missing)
            raise InputError(f"the format {self.name} needs {', '.join(missing)}: install it with pip install {target}")

    def _architecture(self, model_type: str) -> Iterable[str]:
        supported = self.capabilities.model_types
        if supported is not None and model_type not in supported:
            yield f"{self.title} does not support {model_type}; it supports {', '.join(supported)}"

    def _layers(self, layers: Iterable[Layer]) -> Iterable[tuple[str, str]]:
        for layer in layers:
            if layer.low_rank and not self.capabilities.low_rank:
                yield (
                    "low_rank",
                    f"{self.title} cannot hold the low-rank branch of {layer.name}; leave weights.low_rank out of the "
                    "recipe",
                )
            if self.capabilities.dense:
                continue
            if layer.table and not self.capabilities.tables:
                yield (
                    "tables",
                    f"{self.title} cannot hold the rounded embedding {layer.name}; leave embeddings out of the recipe",
                )
            elif layer.stacked and not self.capabilities.experts:
                yield "experts", f"{self.title} cannot hold the stacked experts {layer.name}"
            elif not layer.plain and not self.capabilities.basis:
                yield "basis", f"{self.title} cannot hold {layer.name}, which is rounded in its own weights.basis"
            elif not self.capabilities.any_grid and self.capabilities.type_of(layer) is None:
                grid = _describe_grid(layer.grid)
                yield grid, f"{self.title} has no type for {grid} ({layer.name}); {self._available_types(layer.grid)}"
            elif layer.wide and not self.capabilities.wide_scales:
                yield (
                    "wide",
                    f"{self.title} has fp16 scales, and the scales of {layer.name} are too small or too large for "
                    "fp16; add the layer to weights.ignore",
                )

    def _available_types(self, grid: Grid) -> str:
        """The types of this format that have as many bits as a grid, or all types if none has."""
        same_bits = [weight_type for weight_type in self.capabilities.weights if grid.bits in weight_type.bits]
        return "it has " + " and ".join(map(str, same_bits or self.capabilities.weights))

    def _online(self, online: Iterable[OnlineOp], ties: Collection[HookPoint] = ()) -> Iterable[tuple[str, str]]:
        for op in online:
            if isinstance(op, LowRankBranch):
                continue  # reported with its layer
            if isinstance(op, InputQuantizer):
                yield "inputs", f"{self.title} does not round activations as this recipe does; set activations=null"
            elif isinstance(op, CacheQuantizer):
                yield "cache", f"{self.title} does not round the KV cache as this recipe does; set kv_cache=null"
            elif op.hook_point.point not in self.capabilities.points:
                place = _PLACES[op.hook_point.point].format(module=op.module)
                remedy = "set keep_ties=false" if runs_at(op, ties) else "leave that site out of the recipe"
                yield op.hook_point.point, f"{self.title} cannot run the online map {place}; {remedy}"


def _describe_grid(grid: Grid) -> str:
    if not isinstance(grid, EvenGrid):
        return f"the grid {grid.grid}"
    groups = "one group a row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    return f"{grid.bits}-bit {kind_of(grid)} weights in {groups}"


def _first_of_each(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """The first sentence of each kind, from pairs (kind, sentence)."""
    first: dict[str, str] = {}
    for kind, text in reasons:
        first.setdefault(kind, text)
    return list(first.values())


def format_named(name: str) -> Format:
    """A format by its name. Raises InputError for an unknown name."""
    return Format.registry.find(name)()


def check_fit(format_: Format, needs: ModelRequirements) -> None:
    """Raises InputError if a model does not fit a format, with every reason and the formats that do hold the model."""
    problems = _all_incompatibilities(format_, needs)
    if problems:
        others = [
            name for name, other in Format.registry.items() if not other.ours and _holds_unchanged(other(), needs)
        ]
        instead = f" Formats that hold it as it is: {', '.join(others)}." if others else ""
        raise InputError("; ".join(problems) + "." + instead)


def _holds_unchanged(format_: Format, needs: ModelRequirements) -> bool:
    return not (_all_incompatibilities(format_, needs) or format_.changes(needs))


def _all_incompatibilities(format_: Format, needs: ModelRequirements) -> list[str]:
    wrapper = needs.config is not None and needs.config.get_text_config(decoder=True) is not needs.config
    if wrapper and not format_.capabilities.wrappers:  # the other checks expect the settings of a decoder
        return [f"{format_.title} cannot hold the parts of {needs.model_type} outside its decoder"]
    return format_.incompatibilities(needs)
