"""ik_llama.cpp's KT types: 8 or 4 weights of a row at once, from a list of points that a generator of numbers makes.

The idea is the computed code of QTIP (arXiv 2406.11235), without a state that vectors share. Layouts and decoders:
``iqk_quantize.cpp`` of ik_llama.cpp, a fork of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import GroupParams
from gyroquant.grids.bitpack import pack, packed_bytes, unpack
from gyroquant.grids.ik_scales import IkGrid, ScaleType
from gyroquant.grids.iqk import NUMBERS
from gyroquant.grids.tiled import compiled, has_compiler, root_mean_square

MIDDLE = 126  # the code of 0, and the largest magnitude
_MULTIPLIER, _MASK, _START = 0xCBAC1FED, 0x3F3F3F3F, 4096
_SECOND = -4.0  # the zero point of groups with the second list; a step of 1 must not lead from one list to the other
_LIMIT = 1e4  # magnitude of steps that are searched, so that their squares stay finite
_SCORES = 1 << 20  # of points that are compared at once without numba
_CLOSE = (0, -1, 1, -2, 2)
_WIDE = (0, -1, 6, 7, -8, -7, 13, 14, -15, -14)  # pairs of neighbours, which have different signs
_QUICK = 0.25  # the share of the squared distance for `nearest_in_boxes` when scales are tried


class _Type(NamedTuple):
    """A type.

    scales: how scales are stored.
    length: weights of a point.
    index_bits: bits of the place of a point in its list.
    signs: whether points are magnitudes, with a sign for each weight.
    deviation: the best standard deviation of normal numbers in units of the scale.
    moves: from the nearest multiple to all that are tried, in the order of magnitudes.
    """

    scales: ScaleType
    length: int
    index_bits: int
    signs: bool
    deviation: float
    moves: tuple[int, ...]


_TYPES = {
    2: _Type(ScaleType("IQ2_KT", 32, NUMBERS[4], 0.0, True, False), 8, 16, False, 35.0, _CLOSE),
    3: _Type(ScaleType("IQ3_KT", 32, tuple(range(16)), 0.0, True, False), 8, 16, True, 33.0, _CLOSE),
    4: _Type(ScaleType("IQ4_KT", 32, tuple(range(-64, 64)), _SECOND, True, False), 4, 15, False, 33.0, _WIDE),
}


class KtGrid(IkGrid):
    """The types IQ2_KT, IQ3_KT and IQ4_KT of ik_llama.cpp, exactly as it decodes them. `bits` chooses the type.

    - 2 bits: 8 weights are one of 65,536 points. 2.125 true bits, and 32 bits for each row.
    - 3 bits: the magnitudes of 8 weights are one of 65,536 points, and their signs are stored beside them. 3.125 true
      bits, and 32 bits for each row.
    - 4 bits: 4 weights are one of 32,768 points. There are two lists of points, and `GroupParams.zero` says which one
      a group has: 0, or -4 for the second. 4 true bits, and 32 bits for each row.

    The coordinates of points are whole numbers up to 126, spread as a normal distribution. The scales of groups of 32
    weights are multiples of one number of the row. `allocate` may also choose 5 and 6 bits, which are Q5_K and Q6_K.
    """

    scale_step: ClassVar[float] = 2.0

    grid: Literal["iq_kt"] = "iq_kt"
    bits: Literal[2, 3, 4] = 2
    group_size: Literal[32] = 32

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(bits=bits) for bits in (2, 3, 4)]

    @property
    def _type(self) -> _Type:
        return _TYPES[self.bits]

    @property
    def _scale_type(self) -> ScaleType:
        return self._type.scales

    @property
    def tile_columns(self) -> int:
        return self._type.length

    @property
    def code_bits(self) -> float:
        return self._type.index_bits / self._type.length + self._type.signs

    @property
    def code_count(self) -> int:
        return 2 * MIDDLE + 1

    def _free(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = (root_mean_square(groups) / self._type.deviation).clamp_min(1e-30)
        return scale, torch.zeros_like(scale), torch.ones_like(scale)

    def _best_number(self, scale: Tensor, squares: Tensor) -> Tensor:
        return scale

    def _near(self, ratio: Tensor) -> Iterator[Tensor]:
        """Multiples of either sign: negative points are as good as the points, but other ones."""
        allowed = _by_size(self._scale_type.multiples).to(ratio)
        sizes = allowed.abs()
        place = torch.bucketize(ratio.abs().contiguous(), (sizes[1:] + sizes[:-1]) / 2)
        for move in self._type.moves:
            yield allowed[(place + move).clamp(0, len(allowed) - 1)]

    def _error(self, groups: Tensor, params: GroupParams) -> Tensor:
        steps = groups / params.scale
        distance = self._search(steps, params.zero, _QUICK)[1].view(*groups.shape[:-1], -1)
        return distance.sum(-1, keepdim=True) * params.scale.square()

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.full_like(zero, float(MIDDLE))
        return -top, top

    def _search(self, steps: Tensor, zero: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """The codes of the nearest points, uint8, shape of `steps`, and the squared distances, shape (vectors,)."""
        length = self._type.length
        if steps.shape[-1] % length:
            raise InputError(f"{self.type_name} codes {length} weights together, not {steps.shape[-1]}")
        vectors = steps.reshape(-1, length).float().nan_to_num(0.0, _LIMIT, -_LIMIT).clamp(-_LIMIT, _LIMIT)
        sizes = vectors.abs() if self._type.signs else vectors
        codes = torch.empty(vectors.shape, dtype=torch.uint8, device=steps.device)
        distance = torch.empty(len(vectors), device=steps.device)
        own = zero.expand(steps.shape).reshape(-1, length)[:, 0] != 0
        for choice in (False, True) if self._type.scales.choice else (False,):
            mine = slice(None) if not self._type.scales.choice else (own == choice).nonzero()[:, 0]
            index, distance[mine] = self._nearest_points(sizes[mine], choice, share)
            codes[mine] = point_codes(self.bits, choice).to(steps.device)[index]
        if self._type.signs:
            codes = torch.where(vectors < 0, 2 * MIDDLE - codes, codes)
        return codes.view(steps.shape), distance

    def _nearest_points(self, x: Tensor, choice: bool, share: float) -> tuple[Tensor, Tensor]:
        """The places of the nearest points in their list, int64, and the squared distances, both of shape (vectors,).

        On a CPU with numba, boxes of points are searched, otherwise all points.
        """
        if x.device.type == "cpu" and has_compiler():
            search = compiled("tree_search", "nearest_in_boxes")
            found, distance = search(
                x.detach().contiguous().numpy(), _boxes(self.bits, choice), share, torch.get_num_threads()
            )
            return torch.from_numpy(found).long(), torch.from_numpy(distance)
        points = _points(self.bits, choice).to(x)
        offset, parts = points.square().sum(1) / 2, x.split(max(1, _SCORES // len(points)))
        index = torch.cat([torch.addmm(offset, part, points.T, beta=-1).argmax(1) for part in parts])
        return index, (points[index] - x).square().sum(1)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return self._search(weights / params.scale, params.zero)[0]

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return (codes.float() - MIDDLE) * params.scale

    def words(self, codes: Tensor, params: GroupParams) -> tuple[Tensor, Tensor]:
        """The place of each point in its list, int64, shape (rows, points), and the signs of 8 weights as a byte, shape
        (rows, columns / 8), which are 0 in types without signs.
        """
        rows, columns = codes.shape
        negative = codes < MIDDLE if self._type.signs else torch.zeros_like(codes, dtype=torch.bool)
        places = torch.where(negative, 2 * MIDDLE - codes, codes).view(rows, -1, self._type.length)
        keys, own = _keys(places), (params.zero.expand(-1, -1, self.group_size).reshape(rows, columns) != 0)
        choices = own[:, :: self._type.length]
        index = torch.empty(keys.shape, dtype=torch.int64)
        for choice in (False, True) if self._type.scales.choice else (False,):
            known, order = _sorted_keys(self.bits, choice)
            mine = choices == choice
            index[mine] = order[torch.searchsorted(known, keys[mine]).clamp(max=len(known) - 1)]
        signs = negative.view(rows, -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)
        return index, signs.sum(-1, dtype=torch.uint8)

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        index, signs = self.words(codes, params)
        parts = [pack((index & 255).to(torch.uint8), 8)]
        parts.append(pack((index >> 8).to(torch.uint8), self._type.index_bits - 8))
        if self._type.signs:
            parts.append(signs.flatten())
        return {"codes": torch.cat(parts)} | self._packed_scales(params)

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        (rows, columns), stream, high = shape, arrays["codes"], self._type.index_bits - 8
        points = columns // self._type.length
        signs = rows * columns // 8 if self._type.signs else 0
        sizes = [packed_bytes(rows * points, 8), packed_bytes(rows * points, high), signs]
        if stream.numel() != sum(sizes):
            raise InputError(f"{stream.numel()} bytes cannot hold {rows * columns} codes of {self.type_name}")
        params = self._unpacked_scales(arrays, shape)
        low, more, signs_of = stream.split(sizes)
        index = unpack(low, 8, (rows, points)).long() | unpack(more, high, (rows, points)).long() << 8
        codes = point_codes(self.bits, False)[index].flatten(1)
        if self._type.scales.choice:
            chosen = params.zero.expand(-1, -1, self.group_size).reshape(rows, columns) != 0
            codes = torch.where(chosen, point_codes(self.bits, True)[index].flatten(1), codes)
        if self._type.signs:
            negative = signs_of.view(rows, -1, 1) >> torch.arange(8, dtype=torch.uint8) & 1
            codes = torch.where(negative.flatten(1) > 0, 2 * MIDDLE - codes, codes)
        return codes, params


@cache
def point_codes(bits: int, choice: bool) -> Tensor:
    """The codes of all points of a list, uint8, shape (points, length): their coordinates plus 126.

    A linear congruential generator starts at the place of the point plus 4096. Each of its 32-bit numbers gives a
    coordinate: the sum of the lowest six bits of its four bytes, less 126.
    """
    kind = _TYPES[bits]
    count = 1 << kind.index_bits
    state = np.arange(count, dtype=np.uint32) + np.uint32(_START + choice * count)
    points = np.empty((count, kind.length), np.uint8)
    for i in range(kind.length):
        state = state * np.uint32(_MULTIPLIER)  # modulo 2^32
        points[:, i] = (state & np.uint32(_MASK)).view(np.uint8).reshape(count, 4).sum(1)
    codes = torch.from_numpy(points)
    return torch.maximum(codes, 2 * MIDDLE - codes) if kind.signs else codes


@cache
def _points(bits: int, choice: bool) -> Tensor:
    """The points of a list, fp32, shape (points, length)."""
    return point_codes(bits, choice).float() - MIDDLE


@cache
def _by_size(multiples: tuple[int, ...]) -> Tensor:
    """The multiples but 0, by rising magnitude, fp32."""
    return torch.tensor(sorted(set(multiples) - {0}, key=lambda multiple: (abs(multiple), -multiple))).float()


@cache
def _boxes(bits: int, choice: bool) -> object:
    return compiled("tree_search", "boxes_of")(_points(bits, choice).numpy())


def _keys(codes: Tensor) -> Tensor:
    """Codes of points, uint8, shape (..., 8 or 4), as one whole number each, shape (...)."""
    dtype = torch.int64 if codes.shape[-1] == 8 else torch.int32
    return codes.contiguous().view(dtype).squeeze(-1)


@cache
def _sorted_keys(bits: int, choice: bool) -> tuple[Tensor, Tensor]:
    """The keys of the points of a list, rising, and their places in the list."""
    return torch.sort(_keys(point_codes(bits, choice)))


__all__ = ["MIDDLE", "KtGrid", "point_codes"]
