"""Hadamard matrices built on demand: Sylvester, Paley I and II, one Williamson order, and Kronecker products.

A Hadamard matrix of order n has entries +-1 and orthogonal rows. Orders are factored into *primitive* orders: 2, the
Paley orders, 172. All factorisations are searched. The one with the smallest largest factor is taken, because small
factors are quick to apply. The only stored data are 28 signs.
"""

from functools import cache, reduce

import numpy as np

from gyroquant.errors import MapError
from gyroquant.maps.galois import jacobsthal, prime_power

# Williamson's matrices of order 172: four symmetric circulants of order 43 whose first rows are constant on the cosets
# of the subgroup {+-1, +-6, +-7} of the multiplicative group. There is one row of signs per circulant, in the order of
# the coset representatives 1, 2, 3, 4, 5, 9, 10; the diagonal is +1. Found by matching power spectra that sum to 172.
_COSETS = (1, 2, 3, 4, 5, 9, 10)
_WILLIAMSON = (
    (1, 1, 1, 1, -1, -1, -1),
    (1, 1, -1, -1, -1, -1, 1),
    (1, -1, 1, -1, 1, -1, 1),
    (-1, 1, 1, -1, -1, 1, 1),
)
_SUBGROUP = (1, 6, 7, 36, 37, 42)


def _paley_one(q: int) -> np.ndarray:
    """Order q+1 for a prime power q = 3 mod 4: ``I + S`` where S is the bordered, skew Jacobsthal matrix."""
    h = np.ones((q + 1, q + 1), dtype=np.int8)
    h[1:, 1:] = jacobsthal(q)
    h[1:, 0] = -1
    h[np.arange(1, q + 1), np.arange(1, q + 1)] = 1
    return h


def _paley_two(q: int) -> np.ndarray:
    """Order 2(q+1) for a prime power q = 1 mod 4, from the symmetric conference matrix of order q+1."""
    c = np.ones((q + 1, q + 1), dtype=np.int8)
    c[1:, 1:] = jacobsthal(q)
    c[0, 0] = 0
    diagonal = np.eye(q + 1, dtype=np.int8)
    return np.block([[c + diagonal, c - diagonal], [c - diagonal, -c - diagonal]])


def _williamson_172() -> np.ndarray:
    difference = (np.arange(43)[None, :] - np.arange(43)[:, None]) % 43
    blocks = []
    for signs in _WILLIAMSON:
        row = np.ones(43, dtype=np.int8)
        for representative, sign in zip(_COSETS, signs, strict=True):
            row[[representative * h % 43 for h in _SUBGROUP]] = sign
        blocks.append(row[difference])
    a, b, c, d = blocks
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


@cache
def _is_primitive(n: int) -> bool:
    if n == 2 or n == 172:
        return True
    if n % 4 or n & (n - 1) == 0:  # powers of two are products of 2 (Sylvester)
        return False
    return (prime_power(n - 1) is not None) or (n // 2 % 4 == 2 and prime_power(n // 2 - 1) is not None)


@cache
def factors(n: int) -> tuple[int, ...] | None:
    """Primitive orders with product n, largest first, the largest as small as possible; None if there are none."""
    if n == 1:
        return ()
    best: tuple[int, ...] | None = None
    for p in (d for d in range(2, n + 1) if n % d == 0 and _is_primitive(d)):
        rest = factors(n // p) if p < n else ()
        if rest is None:
            continue
        orders = tuple(sorted((p, *rest), reverse=True))
        if best is None or (orders[0], sum(orders), orders) < (best[0], sum(best), best):
            best = orders
    return best


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def largest_constructible(n: int) -> int:
    """The largest divisor of n for which a Hadamard matrix can be built; at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and factors(d) is not None)


def require_factors(n: int) -> tuple[int, ...]:
    """The factors of n. Raises MapError, which names the largest block size that works, if there are none."""
    if n < 1:
        raise MapError(f"a Hadamard matrix needs a positive order, not {n}")
    orders = factors(n)
    if orders is None:
        block = largest_constructible(n)
        advice = (
            f"use a block-diagonal map with blocks of {block}, the largest divisor of {n} that works"
            if block > 1
            else f"no divisor of {n} above 1 works either: use a dense orthogonal map"
        )
        raise MapError(f"no Hadamard matrix of order {n} can be built; {advice}")
    return orders


@cache
def _primitive(n: int) -> np.ndarray:
    if n == 2:
        h = np.array([[1, 1], [1, -1]], dtype=np.int8)
    elif prime_power(n - 1) is not None and n % 4 == 0:
        h = _paley_one(n - 1)
    elif n == 172:
        h = _williamson_172()
    else:
        h = _paley_two(n // 2 - 1)
    h = h * h[:1]  # normalise: first row and first column all ones, so that the sequency is well defined
    return h * h[:, :1]


def kronecker(orders: tuple[int, ...]) -> np.ndarray:
    """The Kronecker product of the primitive Hadamard matrices of these orders, entries +-1, int8."""
    return reduce(np.kron, (_primitive(order) for order in orders), np.ones((1, 1), dtype=np.int8))


def split(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors of n in two groups whose products are as equal as possible, the larger product first.

    To apply ``A (x) B`` costs ``a + b`` multiply-adds per entry, so these two factors are the cheapest.
    """
    orders = require_factors(n)
    groups: dict[int, tuple[int, ...]] = {1: ()}
    for factor in orders:
        groups |= {size * factor: (*group, factor) for size, group in groups.items()}
    left = groups[min(size for size in groups if size * size >= n)]
    right = list(orders)
    for factor in left:
        right.remove(factor)
    return left, tuple(right)
