"""What the trace shows of one block: its layers and norms, and the roles found so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gyroquant.models.deriving.facts import KEPT, listed
from gyroquant.models.deriving.trace import Product, Trace
from gyroquant.models.graph.spec import Norm


@dataclass
class Layer:
    """A parameter that multiplies vectors, all its products in one block together, and the roles found so far."""

    param: str
    name: str
    products: list[Product]
    reads: str = ""
    writes: str | tuple[str, ...] = ""
    per_head: bool = False
    alternating: bool = False
    sizes: tuple[str, ...] = ()
    reads_why: str = ""
    writes_why: str = ""

    @property
    def rows(self) -> Tensor:
        return torch.cat([product.rows for product in self.products])

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def grads(self) -> Tensor | None:
        grads = [product.grad for product in self.products]
        return None if any(grad is None for grad in grads) else torch.cat([g for g in grads if g is not None])

    @property
    def transposed(self) -> bool:
        return self.products[0].transposed

    @property
    def whole(self) -> bool:
        """Whether each product used the whole parameter, or the whole matrix of an expert."""
        return all(product.view.whole for product in self.products)

    @property
    def fact(self) -> str:
        """How its roles are known."""
        if not self.whole:
            return f"{KEPT}; only parts of it multiply vectors"
        return f"reads {self.reads}: {self.reads_why}; writes {listed(self.writes)}: {self.writes_why}"


class Block:
    """One block, or what lies around the blocks (an empty prefix).

    - params: the parameters of this block: name in the block by full name.
    - norm_entries: the norms with a role, by name.
    - facts: how the roles are known, by the name of the entry.
    """

    def __init__(self, model: Any, trace: Trace, prefix: str, params: Mapping[str, str], width: int):
        self.model, self.trace, self.prefix, self.params, self.width = model, trace, prefix, params, width
        self.norms = [norm for norm in trace.norms if prefix and norm.name.startswith(prefix)]
        self.layers = self._layers()
        self.norm_entries: dict[str, Norm] = {}
        self.facts: dict[str, str] = {}

    def _layers(self) -> list[Layer]:
        products: dict[str, list[Product]] = defaultdict(list)
        for product in self.trace.products:
            if product.view.param in self.params:
                products[product.view.param].append(product)
        return [Layer(param, self.params[param], found) for param, found in products.items()]
