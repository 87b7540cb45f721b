"""The operations from which the graph of a model is built, and what all formats build from them in the same way:
products with rounded matrices, and maps. Each graph format has one implementation of the operations.

A value is a node or an output in the format's library. It may have any leading dimensions. All arithmetic in a graph is
in fp32, whatever the dtype of a stored constant is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.formats.base import Layer, halves
from gyroquant.grids import Basis, EvenGrid, GroupParams, IntegerGrid, QuantizedWeight
from gyroquant.maps import (
    BlockDiagonal,
    Diagonal,
    Hadamard,
    Identity,
    KroneckerLeft,
    Map,
    Permutation,
    Product,
    Signs,
    Walsh,
    hadamard,
    sequency_order,
)


def stored_scale(weight: QuantizedWeight) -> Tensor:
    """The scales of a matrix, (rows, groups, 1), in fp16 if that holds them exactly, else in fp32."""
    scale = weight.params.scale
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale


def in_whole_steps(weight: QuantizedWeight, stored_bits: int) -> QuantizedWeight:
    """The same matrix on a grid whose zero point is a code, if its zero point lies half-way between two codes and its
    codes are stored in a wider type: then codes can count half steps, which takes one more bit. 3 bits in 4 are -7, -5
    .. 7 halves of the scale. Others, and those whose halved scales fp16 does not hold, are returned as they are.
    """
    grid, params = weight.grid, weight.params
    half = params.scale / 2
    if not isinstance(grid, IntegerGrid) or not halves(grid) or stored_bits <= grid.bits:
        return weight
    if not torch.equal(half.half().float(), half.float()):
        return weight
    wider = grid.model_copy(update={"bits": grid.bits + 1, "midrise": False})
    zero = torch.full_like(params.zero, 2.0**grid.bits)
    return replace(weight, grid=wider, codes=2 * weight.codes + 1, params=GroupParams(half, zero))


def replaced_zero(grid: EvenGrid) -> float:
    """The code that stands in place of zero points that are no codes: the upper of the two middle ones."""
    return 2.0 ** (grid.bits - 1)


def left_out(weight: QuantizedWeight) -> Tensor:
    """What a matrix with `replaced_zero` leaves out of the numbers of each group, shape (rows, groups), fp32."""
    assert isinstance(weight.grid, EvenGrid)
    return ((replaced_zero(weight.grid) - weight.params.zero) * weight.params.scale)[..., 0]


def joined_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several matrices of one grid, columns and group size as one matrix."""
    if len(weights) == 1:
        return weights[0]
    scale = torch.cat([weight.params.scale for weight in weights])
    zero = torch.cat([weight.params.zero for weight in weights])
    codes = torch.cat([weight.codes for weight in weights])
    return replace(weights[0], codes=codes, params=GroupParams(scale, zero))


def wider_codes(layers: Iterable[Layer], bits_in_file: Callable[[Layer], int]) -> dict[str, Any]:
    """The codes for which a runtime has no type of their width, and which the file holds in a wider one, exactly: how
    many matrices, and the names of tables. Empty if there are none.
    """
    found: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        bits, held = int(layer.grid.bits), bits_in_file(layer)
        if held != bits:
            found.setdefault((bits, held), []).append(layer)
    texts = []
    for (bits, held), wider in sorted(found.items()):
        tables = [layer.name for layer in wider if layer.table]
        count = len(wider) - len(tables)
        parts = ([f"{count} layers"] if count else []) + tables
        texts.append(f"{bits} bits in {held}: {', '.join(parts)}")
    return {"wider_codes": texts} if texts else {}


class Operations(ABC):
    """What a graph format provides for any computation."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], tuple[Any, Any]] = {}

    @abstractmethod
    def bits_in_file(self, grid: EvenGrid, columns: int) -> int:
        """The number of bits in which a code of a matrix is stored."""

    @abstractmethod
    def rank(self, x: Any) -> int:
        """The number of dimensions."""

    @abstractmethod
    def numbers(self, tensor: Tensor) -> Any:
        """A constant, stored in the dtype of the tensor and used as fp32."""

    @abstractmethod
    def scalar(self, value: float) -> Any:
        """A constant number."""

    @abstractmethod
    def add(self, x: Any, y: Any) -> Any:
        """x + y."""

    def residual(self, x: Any, y: Any) -> Any:
        """x + y of one shape (batch, length, width), before which or after which a norm may stand."""
        return self.add(x, y)

    @abstractmethod
    def multiply(self, x: Any, y: Any) -> Any:
        """x * y."""

    @abstractmethod
    def divide(self, x: Any, y: Any) -> Any:
        """x / y."""

    @abstractmethod
    def tanh(self, x: Any) -> Any:
        """The hyperbolic tangent."""

    @abstractmethod
    def activated(self, kind: str, x: Any) -> Any:
        """An activation by its name in transformers."""

    @abstractmethod
    def product(self, x: Any, y: Any, transposed: bool = False) -> Any:
        """``x @ y``, or ``x @ y.T``."""

    @abstractmethod
    def reshaped(self, x: Any, keep: int, *sizes: int) -> Any:
        """Keeps the first `keep` dimensions and reshapes the others to `sizes`, of which one may be -1."""

    @abstractmethod
    def transposed(self, x: Any, *order: int) -> Any:
        """The dimensions in another order."""

    @abstractmethod
    def taken(self, x: Any, index: Tensor) -> Any:
        """The entries of the last dimension at the positions in `index`."""

    @abstractmethod
    def cut(self, x: Any, lengths: Sequence[int]) -> list[Any]:
        """The last dimension cut into pieces of these lengths."""

    @abstractmethod
    def concatenated(self, parts: list[Any]) -> Any:
        """Pieces joined along the last dimension."""

    @abstractmethod
    def summed(self, x: Any, keep: bool) -> Any:
        """The sum over the last dimension. With `keep`, that dimension stays, with size 1."""

    @abstractmethod
    def coded(self, x: Any, weight: QuantizedWeight) -> Any:
        """``x @ W.T``, computed from the codes, which stay packed in the file. On grids that are `corrected`, the zero
        point is `replaced_zero` instead; `rounded` corrects for that.
        """

    @abstractmethod
    def gathered(self, table: Any, ids: Any) -> Any:
        """The rows of a table of numbers at token ids of shape (batch, length): (batch, length, row)."""

    @abstractmethod
    def coded_rows(self, ids: Any, weight: QuantizedWeight) -> Any:
        """The rows of a rounded table at token ids, computed from the codes of these rows alone. Zero points are those
        of `coded`. A later `coded` of the same object, a head that is tied to the table, shares its codes.
        """

    @abstractmethod
    def normed(self, x: Any, gain: Tensor, eps: float) -> Any:
        """An RMS norm over the last dimension."""

    def split(self, x: Any, *sizes: int) -> Any:
        """The last dimension split into several: `sizes`, then the remaining size."""
        return self.reshaped(x, self.rank(x) - 1, *sizes, -1)

    def joined(self, x: Any, n: int) -> Any:
        """The last two dimensions joined into one of size `n`."""
        return self.reshaped(x, self.rank(x) - 2, n)

    def swapped(self, x: Any) -> Any:
        """The last two dimensions exchanged."""
        last = self.rank(x) - 1
        return self.transposed(x, *range(last - 1), last, last - 1)

    def stored_form(self, weight: QuantizedWeight) -> QuantizedWeight:
        """A matrix as the file holds it: see `in_whole_steps`."""
        assert isinstance(weight.grid, EvenGrid)
        return in_whole_steps(weight, self.bits_in_file(weight.grid, weight.codes.shape[1]))

    def corrected(self, grid: EvenGrid) -> bool:
        """Whether products of this grid need a correction, because `coded` replaces its zero points: those that are no
        codes.
        """
        return halves(grid) or grid.float_zero

    def rounded(self, x: Any, weight: QuantizedWeight) -> Any:
        """``x @ W.T`` for a rounded matrix.

        If the matrix was rounded in a basis, the inputs are transformed to that basis, by the transpose of decoding.
        Fast kernels need zero points that are codes. For other grids, what the code in their place leaves out of the
        numbers of a group, times the sum of the inputs of the group, is added after the product. Products with the same
        `x` share these sums.
        """
        if weight.basis is not None:
            x = self._in_basis(x, weight.basis)
        weight = self.stored_form(weight)
        y = self.coded(x, weight)
        assert isinstance(weight.grid, EvenGrid)
        if not self.corrected(weight.grid):
            return y
        groups = weight.params.scale.shape[1]
        sums = self._group_sums(x, groups)
        if groups == 1:
            return self.add(y, self.multiply(sums, self._left_out(weight, lambda t: self.numbers(t.T))))
        return self.add(y, self.product(sums, self._left_out(weight, self.numbers), transposed=True))

    def _left_out(self, weight: QuantizedWeight, read: Callable[[Tensor], Any]) -> Any:
        """What `coded` leaves out of the numbers of each group on a grid that is `corrected`. `read` makes a value of
        numbers for each group, shape (rows, groups). The file has scales and zero points in fp16, the scales in the
        bytes of those of the product.
        """
        assert isinstance(weight.grid, EvenGrid)
        scale = read(stored_scale(weight)[..., 0])
        if halves(weight.grid):
            return self.multiply(scale, self.scalar(0.5))
        minus_zero = read(-weight.params.zero[..., 0].half())
        return self.multiply(self.add(minus_zero, self.scalar(replaced_zero(weight.grid))), scale)

    def rounded_together(self, x: Any, weights: Sequence[QuantizedWeight]) -> list[Any]:
        """``x @ W.T`` for several matrices. Those of one grid are one product, whose result is cut: that is faster than
        a small product for each.
        """
        forms = [self.stored_form(weight) for weight in weights]
        together: dict[Any, list[int]] = {}
        for i, form in enumerate(forms):
            alike = i if form.basis is not None else (form.grid, form.codes.shape[1], form.params.scale.shape[1])
            together.setdefault(alike, []).append(i)
        found: dict[int, Any] = {}
        for places in together.values():
            y = self.rounded(x, joined_rows([forms[i] for i in places]))
            pieces = [y] if len(places) == 1 else self.cut(y, [len(forms[i].codes) for i in places])
            found |= zip(places, pieces, strict=True)
        return [found[i] for i in range(len(weights))]

    def _group_sums(self, x: Any, groups: int) -> Any:
        """The sums of the inputs of each group, (.., groups)."""
        if (id(x), groups) not in self._sums:
            sums = self.summed(x, True) if groups == 1 else self.summed(self.split(x, groups), False)
            self._sums[id(x), groups] = sums, x  # x is kept, so that no other value gets its id
        return self._sums[id(x), groups][0]

    def looked_up(self, ids: Any, weight: QuantizedWeight) -> Any:
        """The rows of a rounded table, in its stored form, at token ids of shape (batch, length): (batch, length, row).

        The table may have been rounded in a basis, or on a grid with zero points that are no codes; see `rounded`.
        """
        rows = self.coded_rows(ids, weight)
        assert isinstance(weight.grid, EvenGrid)
        if self.corrected(weight.grid):
            more = self._left_out(weight, lambda t: self.gathered(self.numbers(t), ids))
            groups, columns = weight.params.scale.shape[1], weight.codes.shape[1]
            if groups == 1:
                rows = self.add(rows, more)
            else:
                rows = self.joined(self.add(self.split(rows, groups), self.reshaped(more, 2, groups, 1)), columns)
        return rows if weight.basis is None else self._out_of_basis(rows, weight.basis)

    def _out_of_basis(self, rows: Any, basis: Basis) -> Any:
        """Rows in the basis of a table, decoded."""
        if basis.scale is not None:
            rows = self.multiply(rows, self.numbers(1 / basis.scale[0]))
        rows = self.mapped(hadamard(basis.order).inverse(), rows)
        return rows if basis.order == basis.columns else self.taken(rows, torch.arange(basis.columns))

    def _in_basis(self, x: Any, basis: Basis) -> Any:
        if basis.order > basis.columns:
            zeros = self.multiply(self.taken(x, torch.arange(basis.order - basis.columns)), self.scalar(0.0))
            x = self.concatenated([x, zeros])
        x = self.mapped(hadamard(basis.order), x)
        return x if basis.scale is None else self.multiply(x, self.numbers(1 / basis.scale[0]))

    def mapped(self, m: Map, x: Any) -> Any:
        """``x @ M`` along the last dimension. A map with structure uses it; others are products with their matrix."""
        if isinstance(m, Identity):
            return x
        if isinstance(m, Product):
            for part in m.parts:
                x = self.mapped(part, x)
            return x
        if isinstance(m, Signs | Diagonal):
            return self.multiply(x, self.numbers(m.values.float()))
        if isinstance(m, Permutation):
            return self.taken(x, m.index)
        if isinstance(m, Hadamard):
            return self._kronecker(m, x)
        if isinstance(m, Walsh):
            order = sequency_order(m.n)
            if m.transposed:
                return self._kronecker(Hadamard(m.n, True), self.taken(x, torch.argsort(order)))
            return self.taken(self._kronecker(Hadamard(m.n), x), order)
        if isinstance(m, KroneckerLeft):
            return self.joined(self.swapped(self.mapped(m.map, self.swapped(self.split(x, m.map.n)))), m.n)
        if isinstance(m, BlockDiagonal):
            return self._blocks(m, x)
        return self.product(x, self.numbers(m.dense().float()))

    def _kronecker(self, m: Hadamard, x: Any) -> Any:
        """``A^T X B``, where X is the vector as a matrix, as in `maps.Hadamard`."""
        a, b = m.sides()
        if len(a) == 1:
            return self.product(x, self.numbers(b))
        square = self.product(self.split(x, len(a)), self.numbers(b))
        return self.joined(self.product(self.numbers(a), square), m.n)

    def _blocks(self, m: BlockDiagonal, x: Any) -> Any:
        inside = x if m.repeat == 1 else self.split(x, m.repeat)
        if len(m.parts) == 1:
            inside = self.mapped(m.parts[0], inside)
        else:
            pieces = self.cut(inside, [part.n for part in m.parts])
            inside = self.concatenated([self.mapped(part, piece) for part, piece in zip(m.parts, pieces, strict=True)])
        return inside if m.repeat == 1 else self.joined(inside, m.n)
