"""Which maps commute with RoPE is what transformers' own functions say."""

import pytest
import tiny_models
import torch
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from gyroquant import maps
from gyroquant.models.graph.rope import Rope, rope_of
from gyroquant.models.stores.source import open_model

ANGLES = torch.tensor([0.4, 2.0, -1.1, 3.0], dtype=torch.float64)
HALF, NEIGHBOURS, PARTIAL = Rope(4), Rope(4, interleaved=True), Rope(2)
SWAP = {  # of two whole pairs
    HALF: maps.Permutation(torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])),
    NEIGHBOURS: maps.Permutation(torch.tensor([2, 3, 0, 1, 4, 5, 6, 7])),
    PARTIAL: maps.Permutation(torch.tensor([1, 0, 3, 2, 4, 5, 6, 7])),
}


def turned(rope: Rope, x: torch.Tensor) -> torch.Tensor:
    """Vectors of 8 coordinates at position 3, shape (tokens, 8), as transformers turns them."""
    frequencies = torch.tensor([1.0, 0.31, 0.1, 0.03], dtype=torch.float64)[: rope.pairs] * 3
    angles = frequencies.repeat_interleave(2) if rope.interleaved else frequencies.repeat(2)
    module = modeling_cohere2 if rope.interleaved else modeling_llama if rope.pairs == 4 else modeling_gpt_neox
    x, cos, sin = x[None, None], angles.cos()[None, None], angles.sin()[None, None]
    return module.apply_rotary_pos_emb(x, x, cos, sin)[0][0, 0].double()


@pytest.mark.parametrize("rope", [HALF, NEIGHBOURS, PARTIAL], ids=["half", "interleaved", "partial"])
def test_it_says_what_commutes(rope: Rope) -> None:
    turn = maps.PairRotation(8, ANGLES[: rope.pairs], rope.interleaved)
    first, second = turn.split(torch.arange(8))
    one_flipped, rescale = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    one_flipped[second[1]] = -1
    rescale[first[1]] = rescale[second[1]] = 3.0
    slightly = rescale.clone()
    slightly[first[0]] = 1 + 1e-7
    cases = [
        (turn, True),
        (turn @ maps.Diagonal(rescale), True),
        (turn @ maps.Diagonal(one_flipped), False),
        (maps.Diagonal(slightly), False),
        (SWAP[rope], False),
        (maps.hadamard(8), False),
        (maps.PairRotation(8, ANGLES[: rope.pairs], not rope.interleaved), False),
        (maps.BlockDiagonal((maps.Identity(4), maps.hadamard(4))), rope is PARTIAL),
    ]
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for m, commutes in cases:
        assert rope.commutes(m) == commutes, m
        if m is not cases[3][0]:  # a fault that fp32 does not see
            assert torch.allclose(m.apply(turned(rope, x)), turned(rope, m.apply(x)), atol=1e-5) == commutes, m


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", Rope(8)),
        ("gemma3", Rope(16)),
        ("gpt_neox", Rope(2)),
        ("cohere2", Rope(8, interleaved=True)),
        ("opt", None),
        ("gpt2", None),
    ],
)
def test_it_comes_from_the_description_and_the_configuration(name: str, wanted: Rope | None) -> None:
    assert rope_of(open_model(tiny_models.build(name)).graph) == wanted


def test_a_part_of_each_head_as_the_configuration_has_it() -> None:
    model = tiny_models.build("phi3")
    model.config.rope_parameters["partial_rotary_factor"] = 0.75
    assert rope_of(open_model(model).graph) == Rope(6)
