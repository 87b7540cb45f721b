"""llama.cpp's ternary types: -1, 0 and 1 times one scale for 256 weights.

Layouts and decoders: ``ggml-quants.c`` of llama.cpp.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams, stored
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.half_scale import half
from gyroquant.grids.k_quants import KQuantGrid
from gyroquant.grids.super_block import SUPER_BLOCK, SuperBlockGrid

# Runs of codes of a block that share bytes: codes a byte, and codes between those that share one.
_RUNS = ((160, 5, 32), (80, 5, 16), (16, 4, 4))
_BYTES = 52  # of the trits of a block

Bytes = NDArray[np.uint8]


class TernaryGrid(SuperBlockGrid):
    """The types TQ1_0 and TQ2_0 of llama.cpp, exactly as it decodes them: -d, 0 and d, with an fp16 d for 256 weights.

    - `kind`: how codes are stored: `TQ1_0`, five in a byte (1.6875 true bits), or `TQ2_0`, two bits each (2.0625 true
      bits, which llama.cpp decodes faster). Both stand for the same numbers.

    d is the scale of least squared error. llama.cpp's own d is the largest weight, for models that are ternary already.
    Both come to the same there.
    """

    grid: Literal["ternary"] = "ternary"
    bits: Literal[2] = 2
    group_size: Literal[256] = 256
    kind: Literal["TQ1_0", "TQ2_0"] = "TQ1_0"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(kind="TQ2_0")]

    @property
    def type_name(self) -> str:
        return self.kind

    @property
    def _group(self) -> int:
        return SUPER_BLOCK

    def for_columns(self, columns: int) -> Grid:
        """As that of `KQuantGrid` for 2 bits."""
        return self if columns % SUPER_BLOCK == 0 else KQuantGrid(bits=2).for_columns(columns)

    @property
    def code_bits(self) -> float:
        return 8 * _BYTES / SUPER_BLOCK if self.kind == "TQ1_0" else 2.0

    @property
    def code_count(self) -> int:
        return 3

    @property
    def group_bits(self) -> int:
        return 16

    def _fitted(self, groups: Tensor) -> GroupParams:
        sizes = groups.abs().sort(-1, descending=True).values
        sums, counts = sizes.cumsum(-1), torch.arange(1, groups.shape[-1] + 1, device=groups.device)
        means = sums / counts  # the best scale if the largest weights are not 0 and all others are
        best = (means * sums).argmax(-1, keepdim=True)
        return self.round_params(means.gather(-1, best), torch.zeros_like(sizes[..., :1]))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        return GroupParams(half(scale), torch.zeros_like(zero))

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(zero, -1.0), torch.full_like(zero, 1.0)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return ((weights / params.scale).round_().clamp_(-1, 1) + 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return (codes.float() - 1) * params.scale

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        if self.kind == "TQ2_0":
            stream = pack(codes, 2)
        else:
            stream = torch.from_numpy(to_trits(codes.cpu().numpy().reshape(-1, SUPER_BLOCK)).reshape(-1))
        return {"codes": stream, "scales": params.scale.squeeze(-1).half()}

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        blocks, stream = columns // self.group_of(columns), arrays["codes"]
        scale = stored(arrays, "scales", (rows, blocks)).float().unsqueeze(-1)
        if self.kind == "TQ2_0":
            codes = unpack(stream, 2, shape)
        else:
            if stream.dtype != torch.uint8 or stream.numel() != rows * blocks * _BYTES:
                raise InputError(f"{stream.numel()} bytes cannot hold {rows * columns} codes of {self.kind}")
            codes = torch.from_numpy(from_trits(stream.cpu().numpy().reshape(-1, _BYTES))).view(rows, columns)
        if int(codes.max()) > 2:
            raise InputError("some codes cannot hold one of three numbers")
        return codes, GroupParams(scale, torch.zeros_like(scale))


def to_trits(codes: Bytes) -> Bytes:
    """Codes 0 to 2 of blocks, shape (blocks, 256), as llama.cpp's TQ1_0 stores them, shape (blocks, 52).

    Five codes are the digits of a fraction with denominator 243, of which a byte has the first 8 bits. The last 16
    codes are four in a byte.
    """
    parts, start = list[Bytes](), 0
    for count, digits, apart in _RUNS:
        run = codes[:, start : start + count].astype(np.uint16).reshape(len(codes), -1, digits, apart)
        powers = 3 ** np.arange(4, 4 - digits, -1)
        number = (run * powers[:, None].astype(np.uint16)).sum(-2, dtype=np.uint32)
        parts.append(((number * 256 + 242) // 243).astype(np.uint8).reshape(len(codes), -1))
        start += count
    return np.concatenate(parts, 1)


def from_trits(stream: Bytes) -> Bytes:
    """The inverse of `to_trits`."""
    parts, start = list[Bytes](), 0
    for count, digits, apart in _RUNS:
        size = count // digits
        run = stream[:, start : start + size].reshape(len(stream), -1, 1, apart)
        shifted = run * (3 ** np.arange(digits)).astype(np.uint8)[:, None]  # modulo 256
        parts.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(stream), -1))
        start += size
    return np.concatenate(parts, 1)
