"""Additive codebooks (AQLM): eight weights of a row are a sum of entries of codebooks that are fitted to the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids.base import GroupParams, GroupSize, stored
from gyroquant.grids.half_scale import ScaleOnlyGrid
from gyroquant.grids.tiled import root_mean_square

LENGTH = 8  # weights of a vector
_BEAM = 8  # partial sums that a search keeps
_SCORES = 1 << 22  # numbers that are compared at once
_SAMPLE = 128  # vectors for each entry that k-means looks at
_LLOYD = 25  # iterations of k-means
_JOINT = 5  # rounds in which all codebooks are fitted together afterwards
_SWEEPS = 2  # over the codebooks of a vector, in a search by second moments


@dataclass(frozen=True, eq=False)
class _Books:
    """The codebooks of one matrix, shape (codebooks, entries, 8): fp32 numbers that fp16 holds. Equal only to itself,
    so that grids with codebooks can be compared.
    """

    numbers: Tensor


class AdditiveGrid(ScaleOnlyGrid):
    """AQLM's additive codebooks (Egiazarian et al., arXiv 2401.06118).

    Eight neighbouring weights of a row are the scale of the row times a sum of entries, one of each codebook. There are
    ``8 bits / codebook_bits`` codebooks with 2^codebook_bits entries of eight fp16 numbers. All rows of a matrix share
    them, and they are stored with it: at 2 bits, two codebooks of 256 entries take 65,536 bits.

    `with_tensor_scale` fits them to a matrix: k-means on the weights over the root mean square of their row, one
    codebook after another, each on what the earlier ones left. That is AQLM's start. Then all are fitted together, in
    rounds of search and means. `refine` fits them to the outputs of a layer.

    `encode` keeps the eight best partial sums from one codebook to the next (beam search), so numbers of this grid may
    get other codes when they are coded again.
    """

    has_bit_widths: ClassVar[bool] = True
    has_codebooks: ClassVar[bool] = True

    grid: Literal["additive"] = "additive"
    bits: Annotated[int, Field(ge=1, le=4)] = 2
    group_size: GroupSize = -1
    codebook_bits: Annotated[int, Field(ge=4, le=16)] = 8
    _books: _Books | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> AdditiveGrid:
        if LENGTH * self.bits % self.codebook_bits:
            fit = [str(size) for size in range(4, 17) if LENGTH * self.bits % size == 0]
            raise ValueError(
                f"codebook_bits {self.codebook_bits} does not divide the {LENGTH * self.bits} bits of eight weights: "
                f"use {', '.join(fit)}"
            )
        if self.group_size % LENGTH and self.group_size != -1:
            raise ValueError(f"group_size is -1 or a multiple of {LENGTH} weights, not {self.group_size}")
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(codebook_bits=4), cls(), cls(bits=3, codebook_bits=6, group_size=64), cls(bits=1)]

    @property
    def codebooks(self) -> int:
        """The number of codebooks."""
        return LENGTH * self.bits // self.codebook_bits

    @property
    def books(self) -> Tensor:
        """The codebooks, shape (codebooks, entries, 8), fp32. Raises InputError for a grid that is not bound."""
        if self._books is None:
            raise InputError(
                "an additive grid needs codebooks of the whole weight: call with_tensor_scale(weight) first"
            )
        return self._books.numbers

    @property
    def tile_columns(self) -> int:
        return LENGTH

    @property
    def keeps_codes(self) -> bool:
        return False

    @property
    def tensor_bits(self) -> int:
        return super().tensor_bits + 16 * LENGTH * self.codebooks * 2**self.codebook_bits

    def group_of(self, columns: int, name: str = "a weight") -> int:
        if columns % LENGTH:
            raise RecipeError(
                f"the grid additive codes {LENGTH} weights of a row together, and {name} has {columns} inputs: take "
                "another grid, or put such layers into weights.ignore"
            )
        return super().group_of(columns, name)

    def with_tensor_scale(self, *weights: Tensor) -> Self:
        if self._books is not None:
            return self
        bound = super().with_tensor_scale(*weights)
        if not all(bool(weight.isfinite().all()) for weight in weights):
            return bound  # fit refuses the numbers, which are named there
        vectors = []
        for weight in weights:
            groups = self._grouped(weight)
            vectors.append((groups / bound.fit(groups).scale).reshape(-1, LENGTH))
        return bound.with_books(_fitted(torch.cat(vectors), self.codebooks, 2**self.codebook_bits))

    def with_stored_scale(self, arrays: dict[str, Tensor]) -> Self:
        shape = (self.codebooks, 2**self.codebook_bits, LENGTH)
        return super().with_stored_scale(arrays).with_books(stored(arrays, "codebooks", shape).float())

    def with_books(self, books: Tensor) -> Self:
        """This grid with the storable codebooks nearest to `books`, shape (codebooks, entries, 8)."""
        bound = self.model_copy()
        bound._books = _Books(books.half().float())
        return bound

    def _full_scale(self, groups: Tensor) -> Tensor:
        return root_mean_square(groups)

    def fit(self, groups: Tensor) -> GroupParams:
        return self.scaled(self._full_scale(groups))

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        books = self.books.to(zero.device)
        low, high = (ends.sum(0) for ends in (books.amin(1), books.amax(1)))
        return torch.zeros_like(zero) + low.amin(), torch.zeros_like(zero) + high.amax()

    def entries(self, codes: Tensor) -> Tensor:
        """The entries that codes of whole vectors choose, shape (..., vectors, codebooks), for codes (..., n)."""
        shift = self.bits * torch.arange(LENGTH, device=codes.device)
        word = (codes.unflatten(-1, (-1, LENGTH)).long() << shift).sum(-1, keepdim=True)
        place = self.codebook_bits * torch.arange(self.codebooks, device=codes.device)
        return (word >> place) & (2**self.codebook_bits - 1)

    def codes(self, entries: Tensor) -> Tensor:
        """The inverse of `entries`: a word of 8 * bits bits, of which each weight has `bits`; uint8."""
        place = self.codebook_bits * torch.arange(self.codebooks, device=entries.device)
        word = (entries.long() << place).sum(-1, keepdim=True)
        shift = self.bits * torch.arange(LENGTH, device=entries.device)
        return ((word >> shift) & (2**self.bits - 1)).to(torch.uint8).flatten(-2)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        steps = (weights.float() / params.scale).reshape(-1, LENGTH)
        return self.codes(_nearest_sums(steps, self.books.to(steps))).view(weights.shape)

    def encode_by(self, weights: Tensor, params: GroupParams, second_moments: Tensor, codes: Tensor) -> Tensor:
        """As `Grid.encode_by`. Each codebook in turn gets its best entry, with those of the others as they are."""
        books, wanted = self.books.to(weights), weights / params.scale
        entries = self.entries(codes).squeeze(-2)
        pulls = books @ second_moments
        offsets = (pulls * books).sum(-1) / 2
        rest = wanted - _sums(books, entries)
        for _ in range(_SWEEPS):
            before = entries.clone()
            for m, book in enumerate(books):
                rest += book[entries[:, m]]
                parts = _pieces(rest, len(book))
                entries[:, m] = torch.cat([_best(part, pulls[m], offsets[m]) for part in parts])
                rest -= book[entries[:, m]]
            if torch.equal(before, entries):
                break
        return self.codes(entries[:, None])

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return _sums(self.books.to(params.scale), self.entries(codes)).flatten(-2) * params.scale

    def fake(self, x: Tensor) -> Tensor:
        if self._books is None:
            raise RecipeError("the grid additive has codebooks for a whole weight, so it is for weights only")
        return super().fake(x)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        return super().pack(codes, params) | {"codebooks": self.books.half()}


def _sums(books: Tensor, entries: Tensor) -> Tensor:
    """The sums of the chosen entries, shape (..., 8), for entries of shape (..., codebooks)."""
    total = books[0][entries[..., 0]]
    for m in range(1, len(books)):
        total += books[m][entries[..., m]]
    return total


def _pieces(x: Tensor, scores: int) -> tuple[Tensor, ...]:
    """Vectors, shape (vectors, 8), in parts of which each vector is compared with `scores` others."""
    return x.split(max(1, _SCORES // scores))


def _best(x: Tensor, book: Tensor, offset: Tensor) -> Tensor:
    """The entry with the largest product with x, less its offset, shape (vectors,)."""
    return torch.addmm(-offset, x, book.T).argmax(1)


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    """The entry of a codebook nearest to each vector of x, shape (vectors, 8)."""
    offset = book.square().sum(1) / 2
    return torch.cat([_best(part, book, offset) for part in _pieces(x, len(book))])


def _nearest_sums(x: Tensor, books: Tensor, beam: int = _BEAM) -> Tensor:
    """Entries, shape (vectors, codebooks), whose sum is near x, shape (vectors, 8): beam search.

    The `beam` best sums of the first codebooks are continued with every entry of the next one.
    """
    parts = [_beam_search(part, books, beam) for part in _pieces(x, books.shape[1] * beam)]
    return torch.cat(parts) if parts else torch.empty(0, len(books), dtype=torch.int64, device=x.device)


def _beam_search(x: Tensor, books: Tensor, beam: int) -> Tensor:
    rest, entries = x[:, None], torch.empty(len(x), 1, 0, dtype=torch.int64, device=x.device)
    for m, book in enumerate(books):
        squares, ones = rest.square().sum(-1, keepdim=True), torch.ones_like(rest[..., :1])
        columns = torch.cat([book, -book.square().sum(1, keepdim=True) / 2, -torch.ones_like(book[:, :1])], 1)
        scores = (torch.cat([rest, ones, squares / 2], -1).flatten(0, 1) @ columns.T).view(len(x), -1)
        last = m == len(books) - 1
        found = scores.argmax(1, keepdim=True) if last else scores.topk(min(beam, scores.shape[1])).indices
        parent, entry = found // len(book), found % len(book)
        chosen = entries.gather(1, parent[..., None].expand(-1, -1, entries.shape[2]))
        entries = torch.cat([chosen, entry[..., None]], -1)
        rest = rest.gather(1, parent[..., None].expand(-1, -1, LENGTH)) - book[entry]
    return entries[:, 0]


def _fitted(vectors: Tensor, codebooks: int, entries: int) -> Tensor:
    """Codebooks for vectors, shape (vectors, 8): k-means one after another on the rest, then all together."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(vectors), generator=generator)[: _SAMPLE * entries].to(vectors.device)
    sample, books = vectors[order], list[Tensor]()
    rest = sample
    for _ in range(codebooks):
        books.append(_k_means(rest, entries))
        rest = rest - books[-1][_nearest(rest, books[-1])]
    found = torch.stack(books)
    for _ in range(_JOINT if codebooks > 1 else 0):
        chosen = _nearest_sums(sample, found, _BEAM // 2)
        left = sample - _sums(found, chosen)
        for m in range(codebooks):
            left += found[m][chosen[:, m]]
            found[m] = _means(left, chosen[:, m], found[m])
            left -= found[m][chosen[:, m]]
    return found


def _k_means(vectors: Tensor, entries: int) -> Tensor:
    """Centres for vectors in random order, shape (entries, 8). Centres that no vector is nearest to get new places."""
    centres = vectors[:entries].clone()
    if len(centres) < entries:
        centres = torch.cat([centres, centres.new_zeros(entries - len(centres), LENGTH)])
    before = torch.empty(0)
    for _ in range(_LLOYD):
        chosen = _nearest(vectors, centres)
        if torch.equal(chosen, before):
            break
        before = chosen
        unused = torch.bincount(chosen, minlength=entries) == 0
        centres = _means(vectors, chosen, centres)
        count = min(int(unused.sum()), len(vectors))
        if count:  # to the vectors that are farthest from their own centres
            far = (vectors - centres[chosen]).square().sum(1).topk(count).indices
            centres[unused.nonzero()[:count, 0]] = vectors[far]
    return centres


def _means(vectors: Tensor, chosen: Tensor, before: Tensor) -> Tensor:
    """The mean of the vectors that chose each entry; the entry itself where none did."""
    count = torch.bincount(chosen, minlength=len(before))[:, None]
    total = torch.zeros_like(before).index_add_(0, chosen, vectors)
    return torch.where(count > 0, total / count.clamp_min(1), before)
