"""The base class of maps, `Identity` and `Product`. A map is an invertible linear map of row vectors with structure.

Convention: a map with matrix ``M`` takes a row vector ``x`` to ``x @ M``; ``a @ b`` first applies ``a``, then ``b``.
Maps can be applied along a dimension, inverted, composed and saved, and they count their cost. They do not depend on a
model.

With activations ``y = x @ W.T``, changing the basis of ``y`` by ``M`` multiplies ``W`` along its output axis by ``M``
(``W.apply``), and changing the basis of ``x`` by ``M`` multiplies it along its input axis by the *contragredient*
``inverse().transpose()``, because ``(x @ M) @ (W @ M^-T).T = x @ W.T``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import MapError
from gyroquant.registry import Registry, no_examples

MAX_ORDER = 1 << 20  # of a stored map; dimensions of models are much smaller
_DEPTH = 16  # of maps in maps; our own maps are nested 3 deep at most


class Map(ABC):
    """An invertible linear map of order `n`. Subclasses are frozen dataclasses of ints, tensors and maps."""

    n: int
    registry: ClassVar[Registry[type[Map]]] = Registry("map", "gyroquant.maps", error=MapError)
    kind: ClassVar[str]
    """The name of the class in files. Default: the class name in small letters."""
    array_dims: ClassVar[int] = 1  # number of dimensions of its tensors

    @classmethod
    def examples(cls) -> list[Self]:
        """Maps that cover the options of this kind, for tests. Their order is at most 32, and not all are symmetric."""
        raise no_examples(cls)

    def __init_subclass__(cls) -> None:
        if "kind" not in cls.__dict__:
            cls.kind = cls.__name__.lower()
        Map.registry.add(cls.kind, cls)

    def apply(self, x: Tensor, dim: int = -1) -> Tensor:
        """``x @ M`` along dimension `dim` of x, same shape and dtype as x.

        Raises MapError if the size of that dimension is not n.
        """
        if x.shape[dim] != self.n:
            raise MapError(f"{self!r} has order {self.n}, but dimension {dim} of the tensor has size {x.shape[dim]}")
        if dim in (-1, x.dim() - 1):
            return self._apply(x)
        return self._apply(x.movedim(dim, -1)).movedim(-1, dim)

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """``x @ M`` along the last dimension."""

    @abstractmethod
    def inverse(self) -> Map: ...

    @abstractmethod
    def transpose(self) -> Map: ...

    @property
    @abstractmethod
    def orthogonal(self) -> bool:
        """Whether M is orthogonal (by construction, or checked to 1e-6 for a stored matrix)."""

    @property
    def diagonal(self) -> bool:
        """Whether M is diagonal, and so commutes with the gain of a norm."""
        return False

    @property
    def is_permutation(self) -> bool:
        """Whether M is a permutation matrix, and so passes through elementwise nonlinearities."""
        return False

    @property
    @abstractmethod
    def cost(self) -> int:
        """Multiply-adds to apply the map to one vector."""

    def contragredient(self) -> Map:
        """``M^-T``: parameters that read the changed basis are multiplied with it. M itself if M is orthogonal."""
        return self if self.orthogonal else self.inverse().transpose()

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix M, shape (n, n)."""
        return self.apply(torch.eye(self.n, dtype=dtype))

    def storage_bits(self) -> int:
        """Bits to store the map, without its name and order: the size of an online map in a file."""
        bits = 0
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                bits += value.numel() * (1 if value.dtype == torch.int8 else value.element_size() * 8)
            elif isinstance(value, Map):
                bits += value.storage_bits()
            elif isinstance(value, tuple):
                bits += sum(part.storage_bits() for part in value)
        return bits

    def in_fp32(self) -> Map:
        """This map with its numbers in fp32. It does the same to fp32 vectors and needs half the memory."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                changes[field.name] = value.float()
            elif isinstance(value, Map):
                changes[field.name] = value.in_fp32()
            elif isinstance(value, tuple):
                changes[field.name] = tuple(part.in_fp32() for part in value)
        return dataclasses.replace(self, **changes) if changes else self  # type: ignore[type-var]

    def __matmul__(self, other: Map) -> Map:
        return product(self, other)


@dataclass(frozen=True, eq=False)
class Identity(Map):
    """The identity. It returns its input itself, so the result is exact."""

    n: int
    orthogonal = True
    diagonal = True
    is_permutation = True
    cost = 0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(24)]

    def _apply(self, x: Tensor) -> Tensor:
        return x

    def inverse(self) -> Identity:
        return self

    def transpose(self) -> Identity:
        return self


class OfParts:
    """Facts of a map that is made of other maps: they hold if they hold for every part."""

    parts: tuple[Map, ...]

    @property
    def orthogonal(self) -> bool:
        return all(part.orthogonal for part in self.parts)

    @property
    def diagonal(self) -> bool:
        return all(part.diagonal for part in self.parts)

    @property
    def is_permutation(self) -> bool:
        return all(part.is_permutation for part in self.parts)


@dataclass(frozen=True, eq=False)
class Product(OfParts, Map):
    """Several maps of one order, applied first to last."""

    parts: tuple[Map, ...]

    def __post_init__(self) -> None:
        orders = {part.n for part in self.parts}
        if len(orders) != 1:
            raise MapError(f"a product needs one or more maps of one order, not orders {sorted(orders)}")

    @classmethod
    def examples(cls) -> list[Self]:
        parts = [Map.registry[kind].examples()[-1] for kind in ("hadamard", "diagonal", "householder")]
        return [cls((parts[1],)), cls(tuple(parts))]

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.parts[0].n

    @property
    def cost(self) -> int:
        return sum(part.cost for part in self.parts)

    def _apply(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part._apply(x)
        return x

    def inverse(self) -> Map:
        return Product(tuple(part.inverse() for part in reversed(self.parts)))

    def transpose(self) -> Map:
        return Product(tuple(part.transpose() for part in reversed(self.parts)))


def product(*maps: Map) -> Map:
    """The maps applied first to last, nested products flattened and identities dropped."""
    parts: list[Map] = []
    for m in maps:
        parts += m.parts if isinstance(m, Product) else [m]
    whole = Product(tuple(parts))  # raises MapError for parts of different orders, also for identities
    kept = tuple(part for part in whole.parts if not isinstance(part, Identity)) or whole.parts[:1]
    return kept[0] if len(kept) == 1 else Product(kept)


def dump(m: Map, arrays: dict[str, Tensor], prefix: str = "map") -> dict[str, Any]:
    """A JSON description of a map; its tensors are added to `arrays` under names that start with `prefix`."""
    spec: dict[str, Any] = {"kind": m.kind}
    for field in dataclasses.fields(m):  # type: ignore[arg-type]
        value, key = getattr(m, field.name), f"{prefix}.{field.name}"
        if isinstance(value, Tensor):
            arrays[key] = value.clone(
                memory_format=torch.contiguous_format
            )  # safetensors refuses tensors that share memory
            spec[field.name] = {"array": key}
        elif isinstance(value, Map):
            spec[field.name] = dump(value, arrays, key)
        elif isinstance(value, tuple):
            spec[field.name] = [dump(part, arrays, f"{key}.{i}") for i, part in enumerate(value)]
        else:
            spec[field.name] = value
    return spec


def load(spec: dict[str, Any], arrays: dict[str, Tensor]) -> Map:
    """The map that `dump` described.

    Raises MapError for an unknown kind, a missing array, and a field that is not valid for the kind.
    """
    return _load(spec, arrays, 0)


def _load(spec: Any, arrays: dict[str, Tensor], depth: int) -> Map:
    if not isinstance(spec, dict):
        raise MapError(f"the description of a stored map must be a mapping, not a {type(spec).__name__}")
    if depth > _DEPTH:
        raise MapError(f"a stored map is nested more than {_DEPTH} deep")
    name = spec.get("kind")
    kind = Map.registry.find(name)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in spec or field.default is dataclasses.MISSING:
            values[field.name] = _field(
                kind, str(field.type), spec.get(field.name), f"{name}.{field.name}", arrays, depth
            )
    try:
        loaded = kind(**values)
        order = loaded.n
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise MapError(f"a stored {name} map is damaged: {error}") from error
    if not 1 <= order <= MAX_ORDER:
        raise MapError(f"a stored {name} map has order {order}, which is not between 1 and {MAX_ORDER}")
    return loaded


def _field(kind: type[Map], wanted: str, value: Any, where: str, arrays: dict[str, Tensor], depth: int) -> Any:
    """One field of a stored map, of the type `wanted`. Raises MapError for another type."""
    if wanted == "Tensor" and isinstance(value, dict) and isinstance(value.get("array"), str):
        return _array(kind, value["array"], where, arrays)
    if wanted == "Map":
        return _load(value, arrays, depth + 1)
    if wanted.startswith("tuple") and isinstance(value, list):
        return tuple(_load(part, arrays, depth + 1) for part in value)
    if wanted == "bool" and isinstance(value, bool):
        return value
    if wanted == "int" and isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_ORDER:
        return value
    raise MapError(f"{where} of a stored map is not a {wanted}, or it is out of range")


def _array(kind: type[Map], key: str, where: str, arrays: dict[str, Tensor]) -> Tensor:
    if key not in arrays:
        raise MapError(f"the array {key!r} of {where} of a stored map is missing")
    array = arrays[key]
    if array.dim() != kind.array_dims or not array.numel():
        raise MapError(f"{key} of a stored map has shape {tuple(array.shape)}, not {kind.array_dims} dimensions")
    if not bool(array.isfinite().all()):
        raise MapError(f"{key} of a stored map holds values that are not finite (NaN or infinite)")
    return array
