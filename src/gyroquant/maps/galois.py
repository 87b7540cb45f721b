"""Quadratic characters of finite fields, from which Paley's Hadamard matrices are built."""

from itertools import product

import numpy as np


def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q == p**k`` and ``p`` prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest, k = rest // p, k + 1
    return (p, k) if rest == 1 else None


def _digits(q: int, p: int, k: int) -> np.ndarray:
    """The elements of GF(p^k) as coefficient vectors, shape (q, k); element i has the base-p digits of i."""
    return (np.arange(q)[:, None] // p ** np.arange(k)) % p


def _times_x(element: np.ndarray, modulus: tuple[int, ...], p: int) -> np.ndarray:
    """``x * element`` in GF(p)[x] / (x^k + modulus)."""
    shifted = np.roll(element, 1, axis=-1)
    carry = shifted[..., :1].copy()
    shifted[..., :1] = 0
    return (shifted - carry * np.array(modulus)) % p


def _multiply(a: np.ndarray, b: np.ndarray, modulus: tuple[int, ...], p: int) -> np.ndarray:
    """Elementwise product of two arrays of field elements, shape (..., k)."""
    total, power = np.zeros_like(a), a
    for i in range(a.shape[-1]):
        total = (total + b[..., i : i + 1] * power) % p
        power = _times_x(power, modulus, p)
    return total


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Lower coefficients of a monic irreducible polynomial of degree k: the first whose quotient ring is a field.

    The squares decide: with a repeated factor, a nonzero element has the square zero, and with distinct factors, 1 has
    more than two square roots.
    """
    elements = _digits(p**k, p, k)
    for modulus in product(range(p), repeat=k):
        squares = _multiply(elements, elements, modulus, p) @ p ** np.arange(k)
        if np.all(squares[1:] != 0) and np.count_nonzero(squares == 1) == 2:
            return modulus
    raise AssertionError(f"no irreducible polynomial of degree {k} over GF({p})")  # pragma: no cover


def jacobsthal(q: int) -> np.ndarray:
    """The matrix ``chi(a_i - a_j)`` over GF(q), shape (q, q), int8, for an odd prime power q.

    ``chi`` is 0 at zero, 1 at nonzero squares and -1 elsewhere (R. E. A. C. Paley, 1933).
    """
    field = prime_power(q)
    if field is None or q % 2 == 0:
        raise ValueError(f"{q} is not an odd prime power")
    p, k = field
    weights = p ** np.arange(k)
    elements = _digits(q, p, k)
    modulus = _irreducible(p, k) if k > 1 else (0,)
    squares = _multiply(elements, elements, modulus, p) @ weights if k > 1 else np.arange(q) ** 2 % q
    chi = np.full(q, -1, dtype=np.int8)
    chi[squares] = 1
    chi[0] = 0
    difference = ((elements[:, None, :] - elements[None, :, :]) % p) @ weights
    return chi[difference]
