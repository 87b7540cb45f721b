"""Switches of the whole process for what runs with a model, as context managers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class Switch:
    """Settings of the whole process, changed by the context managers below."""

    rounding = True
    scaled_ste = False
    all_experts = False


@contextmanager
def _switched(name: str, value: bool) -> Iterator[None]:
    previous = getattr(Switch, name)
    setattr(Switch, name, value)
    try:
        yield
    finally:
        setattr(Switch, name, previous)


def no_fake_quant() -> AbstractContextManager[None]:
    """Lets a model run as the unrounded one for the duration of a with block: without rounding of activations and of
    the KV cache, and without low-rank branches.
    """
    return _switched("rounding", False)


def all_experts(on: bool) -> AbstractContextManager[None]:
    """Within a with block, chooses whether observers of stacked experts see every token, not only those routed there.

    The output of the experts does not change.
    """
    return _switched("all_experts", on)


def scaled_ste(on: bool) -> AbstractContextManager[None]:
    """Within a with block, chooses whether gradients treat rounding as noise that grows with the range; see `fake`."""
    return _switched("scaled_ste", on)
