"""Huffman codes of stored arrays: every array comes back bit by bit, near its entropy, and damage is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gyroquant.errors import InputError
from gyroquant.grids import IntegerGrid, code_entropy
from gyroquant.grids.bitpack import pack
from gyroquant.models.stores.huffman import DTYPES, HuffmanArray, decode, encode, restored
from gyroquant.rounding.solvers.rtn import RoundToNearest


@given(st.integers(0, 10**6), st.integers(0, 700), st.sampled_from(sorted(DTYPES)), st.integers(1, 8))
def test_every_array_comes_back(seed: int, count: int, dtype: str, bits: int) -> None:
    """Numbers that are mostly the same, so that there is something to gain."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, generator=generator).mul(3).round().clamp(-100, 100).to(DTYPES[dtype])
    coded = encode(numbers, bits)
    if coded is None:
        return
    stream, how = coded
    assert stream.dtype == torch.uint8
    assert stream.numel() < numbers.numel() * numbers.element_size()
    again = decode(stream, HuffmanArray(**how.describe()))
    assert again.dtype == numbers.dtype
    assert torch.equal(again.view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_of_every_width_come_back_from_a_bit_stream(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (1001,), generator=generator).minimum(torch.tensor(2)).to(torch.uint8)
    stream = pack(codes, bits)
    coded = encode(stream, bits)
    if coded is None:
        assert bits == 1
        return
    assert torch.equal(decode(*coded), stream)


@pytest.mark.parametrize(("bits", "within"), [(2, 0.01), (3, 0.01), (4, 0.01), (8, 0.01)])
def test_it_comes_within_a_hundredth_of_the_entropy(bits: int, within: float) -> None:
    """Codes of normal weights with a scale a row. zlib has no more overhead than this, and needs no other package."""
    weight = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    codes = RoundToNearest().solve(weight, IntegerGrid(bits=bits, group_size=-1)).codes
    entropy = code_entropy(codes)
    coded = encode(pack(codes, bits), bits)
    assert coded is not None
    size = 8 * coded[0].numel() / codes.numel()
    assert size < entropy * (1 + within)
    assert size < bits * 0.97


def test_random_bytes_stay_as_they_are() -> None:
    assert (
        encode(torch.randint(0, 256, (500,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), 3) is None
    )
    assert encode(torch.zeros(40, dtype=torch.int64), 8) is None
    assert encode(torch.zeros(0, dtype=torch.uint8), 4) is None


def test_only_described_arrays_are_decoded() -> None:
    zeros, ones = torch.zeros(100, dtype=torch.uint8), torch.ones(3)
    coded = encode(zeros, 3)
    assert coded is not None
    arrays = restored({"codes": coded[1].describe()}, {"codes": coded[0], "scales": ones})
    assert torch.equal(arrays["codes"], zeros)
    assert arrays["scales"] is ones
    with pytest.raises(KeyError, match="codes"):
        restored({"codes": coded[1].describe()}, {"scales": ones})


def test_damage_is_refused_by_name() -> None:
    coded = encode(torch.arange(64, dtype=torch.uint8).repeat(20) // 16, 8)
    assert coded is not None
    stream, how = coded
    for other, problem in (
        (HuffmanArray(8, "uint8", (1279,)), "do not hold 1279 bytes"),
        (HuffmanArray(8, "uint8", (1281,)), "do not hold 1281 bytes"),
        (HuffmanArray(8, "uint8", (10**15,)), "cannot hold an array of 1000000000000000 bytes"),
        (HuffmanArray(8, "float16", (640,)), "do not hold 640 bytes"),
    ):
        with pytest.raises(InputError, match=problem):
            decode(stream, other)
    with pytest.raises(InputError, match="3 bytes follow"):
        decode(torch.cat((stream, stream[:3])), how)
    with pytest.raises(InputError, match=r"cannot hold|do not hold|damaged"):
        decode(stream[:-9], how)
    with pytest.raises(InputError, match="damaged"):
        decode(torch.full((200,), 255, dtype=torch.uint8), how)
