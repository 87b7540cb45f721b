"""The contract of maps."""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.errors import MapError
from gyroquant.maps import Householder, Map, dump, load, product
from gyroquant.testing.contract import Contract, refuses, require


def _named(m: Map) -> str:
    kind = " ".join([m.kind, *(word for word in ("orthogonal", "diagonal", "transposed") if getattr(m, word, False))])
    return f"{kind}, order {m.n}"


MAP: Contract[Map] = Contract("map", Map, _named)


def _eye(m: Map) -> Tensor:
    return torch.eye(m.n, dtype=torch.float64)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-9)


def _vectors(m: Map, *shape: int) -> Tensor:
    return torch.randn(*shape, m.n, dtype=torch.float64, generator=torch.Generator().manual_seed(m.n))


@MAP.check()
def check_apply_multiplies_by_the_matrix(m: Map) -> None:
    """`apply` is the product with the matrix, along any dimension."""
    x = _vectors(m, 2, 3)
    require(_close(m.apply(x), x @ m.dense()), "apply is not linear: it differs from the product with dense()")
    moved = x.movedim(-1, 0).contiguous()
    same = _close(m.apply(moved, 0), (x @ m.dense()).movedim(-1, 0))
    require(same, "apply along dimension 0 differs from apply along the last dimension")


@MAP.check()
def check_inverse_and_transpose(m: Map) -> None:
    """`inverse`, `transpose` and `contragredient` return the maps of these names."""
    dense = m.dense()
    require(_close(m.inverse().dense() @ dense, _eye(m)), "inverse() is not the inverse")
    require(_close(m.transpose().dense(), dense.T), "transpose() is not the transpose")
    require(_close(m.contragredient().dense() @ dense.T, _eye(m)), "contragredient() is not the transposed inverse")
    require(_close(product(m, m.inverse()).dense(), _eye(m)), "the product with inverse() is not the identity")


@MAP.check()
def check_a_changed_basis_leaves_a_linear_layer_the_same(m: Map) -> None:
    """The map on the input and its contragredient on the weights do not change the output."""
    x, w = _vectors(m, 7), _vectors(m, 5)
    same = _close(m.apply(x) @ m.contragredient().apply(w, 1).T, x @ w.T)
    require(same, "the output of a linear layer changes with the basis")


@MAP.check()
def check_properties_are_true(m: Map) -> None:
    """`orthogonal`, `diagonal` and `is_permutation` are correct for the matrix, and the cost is not negative."""
    dense = m.dense()
    require(
        m.orthogonal == _close(dense @ dense.T, _eye(m)), f"orthogonal is {m.orthogonal}, which is wrong for its matrix"
    )
    if m.diagonal:
        require(_close(dense, torch.diag(dense.diagonal())), "diagonal is True, but the matrix is not diagonal")
    if m.is_permutation:
        permutes = bool((dense.sum(0) == 1).all() and (dense.sum(1) == 1).all() and ((dense == 0) | (dense == 1)).all())
        require(permutes, "is_permutation is True, but the matrix is not a permutation")
    require(m.cost >= 0, f"cost is negative: {m.cost}")


@MAP.check()
def check_products_are_products(m: Map) -> None:
    """``a @ b`` first applies a, then b."""
    other = Householder(torch.arange(1.0, m.n + 1))
    require(_close((m @ other).dense(), m.dense() @ other.dense()), "m @ other is another matrix")
    require(_close((other @ m).dense(), other.dense() @ m.dense()), "other @ m is another matrix")


@MAP.check()
def check_saving_and_loading(m: Map) -> None:
    """`dump` and `load` give the same map, and `storage_bits` is positive exactly if arrays are stored."""
    arrays: dict[str, Tensor] = {}
    again = load(dump(m, arrays), arrays)
    require(torch.equal(again.dense(), m.dense()), "the loaded map is another map: keep its data in fields")
    require((m.storage_bits() > 0) == bool(arrays), f"storage_bits is {m.storage_bits()} for {len(arrays)} arrays")


@MAP.check()
def check_fp32_does_the_same(m: Map) -> None:
    """`in_fp32` does the same to fp32 vectors and does not store fp64."""
    x, single = _vectors(m, 5).float(), m.in_fp32()
    require(torch.allclose(single.apply(x), m.apply(x), rtol=1e-5, atol=1e-5), "in_fp32() is another map")
    require(single.orthogonal == m.orthogonal, "in_fp32() has another value of orthogonal")
    arrays: dict[str, Tensor] = {}
    dump(single, arrays)
    require(all(array.dtype != torch.float64 for array in arrays.values()), "in_fp32() stores fp64")


@MAP.check()
def check_dtype_and_shape_are_kept(m: Map) -> None:
    """`apply` keeps dtype and shape, also of an empty tensor."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        result = m.apply(torch.zeros(2, m.n, dtype=dtype)).dtype
        require(result == dtype, f"apply returns {result} for {dtype}. Convert the data of the map with .to(x)")
    require(m.apply(torch.zeros(0, m.n)).shape == (0, m.n), "apply changes the shape of an empty tensor")


@MAP.check()
def check_a_wrong_size_is_refused(m: Map) -> None:
    """Vectors of another size raise MapError."""
    refuses(lambda: m.apply(torch.zeros(2, m.n + 1)), MapError, "apply accepts vectors that are too long.")


def check_map(m: Map | type[Map]) -> None:
    """Runs all checks of a map, or of every example of a class of maps.

    Raises AssertionError, which names the class, what is wrong and what to do.
    """
    MAP.run(m)
