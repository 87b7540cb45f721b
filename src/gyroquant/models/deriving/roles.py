"""Reads the trace of a tiny model: the basis that each layer reads and writes, block by block, then as one description.

The entries of all blocks are merged by name. A layer whose roles in two blocks contradict each other reads and writes
bases of its own, which no fold touches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gyroquant.models.deriving.attention import Heading, read_attention, shared_values
from gyroquant.models.deriving.block import Block, Layer
from gyroquant.models.deriving.directions import Space, among, centres, directions, norm_form
from gyroquant.models.deriving.facts import KEPT, joined, told
from gyroquant.models.deriving.feed_forward import read_feed_forward
from gyroquant.models.deriving.latents import read_latents
from gyroquant.models.deriving.names import expert_counts, numbered
from gyroquant.models.deriving.trace import NormCall, Trace
from gyroquant.models.graph.spec import Architecture, Attention, Bias, Embedding, Entry, Kept, Linear, Norm

_INPUTS = "its inputs are multiples of vectors of the residual stream"
_BETWEEN = "as they are, summed, or through a norm"
_GRADIENTS = "the gradients of its outputs are multiples of those of the residual stream"


class BlockReader(Block):
    """Reads one block, or what lies around the blocks."""

    def __init__(self, model: Any, trace: Trace, prefix: str, params: Mapping[str, str], width: int):
        super().__init__(model, trace, prefix, params, width)
        self.attention: list[Heading] = []
        self.biases: list[Bias] = []
        self.centred = False
        """Whether a norm without a gain takes the mean from the residual stream."""

    def stream(self, inputs: Tensor, output: Tensor, tokens: int) -> tuple[Space, Space]:
        """The residual stream in this block (its input, its output, the sums between them) and its gradients."""
        values, slopes = Space(tokens, self.width), Space(tokens, self.width)
        found = [inputs]
        values.add(inputs)
        for total, first, second in self.trace.sums:
            terms = [term for term in (first, second) if term is not total]
            known = any(term is tensor for term in terms for tensor in found)
            if known or any(
                term.shape == inputs.shape and values.contains(directions(term, self.width)) for term in terms
            ):
                found.append(total)
                values.add(total)
            if total is output:
                break
        values.add(output)
        for tensor in (*found, output):
            slopes.add(tensor.grad)
        return values, slopes

    def read(self, values: Space, slopes: Space, sums: list[Tensor]) -> None:
        """Finds the roles of all layers, norms and vectors of a block.

        - values, slopes: the residual stream in it, and its gradients.
        - sums: for each tensor of the stream, the sum of its gradients over tokens.
        """
        before, after = self._norms(values, slopes)
        self.attention = read_attention(self)
        outputs = [(norm.name, torch.cat([directions(n.y, self.width) for n in calls])) for norm, calls in before]
        inputs = [
            (norm.name, torch.cat([directions(n.x.grad, self.width) for n in calls if n.x.grad is not None]))
            for norm, calls in after
            if any(n.x.grad is not None for n in calls)
        ]
        for layer in self.layers:
            if not layer.reads:
                layer.reads = self._reads(layer, outputs, values)
            if not layer.writes:
                layer.writes = self._writes(layer, inputs, slopes)
        read_feed_forward(self)
        read_latents(self)
        for layer in self.layers:
            given = f"are outputs of a linear layer, {_BETWEEN}" if layer.reads else "match no basis that changes"
            taken = f"are inputs of a linear layer, {_BETWEEN}" if layer.writes else "match no basis that changes"
            layer.reads_why = layer.reads_why or f"its inputs {given}"
            layer.writes_why = layer.writes_why or f"its outputs {taken}"
            layer.reads = layer.reads or f"{layer.name}.in"
            layer.writes = layer.writes or "fixed"
        self.biases = self._biases(sums, inputs)

    def _biases(self, sums: list[Tensor], inputs: list[tuple[str, Tensor]]) -> list[Bias]:
        """Vectors that are added to the stream: their gradient is the sum of the stream's over tokens."""
        layers = {layer.param.rpartition(".")[0] for layer in self.layers} | {norm.name for norm in self.norms}
        found = []
        for param, name in self.params.items():
            grad = self.trace.vectors.get(param)
            own = param.rpartition(".")[0] not in layers
            if grad is not None and own and grad.shape == (self.width,) and bool(grad.any()):
                row = directions(grad, self.width)
                if any(among(row, directions(total, self.width)) for total in sums):
                    found.append(Bias(name))
                    self.facts[name] = "writes residual: its gradient is the sum over tokens of that of the stream"
        return found

    def _norms(
        self, values: Space, slopes: Space
    ) -> tuple[list[tuple[Norm, list[NormCall]]], list[tuple[Norm, list[NormCall]]]]:
        """The norms that read the residual stream, and those that write to it, with their calls."""
        calls: dict[str, list[NormCall]] = defaultdict(list)
        for norm in self.norms:
            if norm.x.shape[-1] == self.width:
                calls[norm.name].append(norm)
        before: list[tuple[Norm, list[NormCall]]] = []
        after: list[tuple[Norm, list[NormCall]]] = []
        for full, found in calls.items():
            module, name = found[0].module, full.removeprefix(self.prefix)
            gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            form = norm_form(found[0].x, found[0].y, gain, bias)
            reads = values.contains(torch.cat([directions(n.x, self.width) for n in found]))
            if form is None:
                self.centred |= reads and centres(found[0].x, found[0].y)
                if reads and self.centred:
                    values.add(found[0].y)
                continue
            kind, offset = form
            fits = f"kind {kind}, offset {offset:g}: its outputs fit"
            written = [directions(n.y.grad, self.width) for n in found if n.y.grad is not None]
            if reads:
                basis = self._norm_basis(len(before))
                before.append((Norm(name, "residual", basis, kind, offset), found))
                place = (
                    f"number {len(before)} of such norms in the block"
                    if self.prefix
                    else "such a norm outside the blocks"
                )
                self.facts[name] = f"reads residual: {_INPUTS}; writes {basis}: it is {place}; {fits}"
            elif written and slopes.contains(torch.cat(written)):
                after.append((Norm(name, f"post.{name}", "residual", kind, offset), found))
                self.facts[name] = f"reads post.{name}: a basis of its own; writes residual: {_GRADIENTS}; {fits}"
        for entry, _ in (*before, *after):
            self.norm_entries[entry.name] = entry
        return before, after

    def _norm_basis(self, number: int) -> str:
        if not self.prefix:
            return "final"
        return ("attn_in", "mlp_in")[number] if number < 2 else f"norm{number}_in"

    def _reads(self, layer: Layer, outputs: list[tuple[str, Tensor]], values: Space) -> str:
        rows = layer.rows
        if rows.shape[1] % self.width:
            return ""
        found = directions(rows, self.width)
        for name, given in outputs:
            if rows.shape[1] == self.width and among(found, given):
                layer.reads_why = f"its inputs are multiples of the outputs of {name}"
                return self.norm_entries[name].writes
        if not values.contains(found):
            return ""
        layer.reads_why = _INPUTS
        return "residual"

    def _writes(self, layer: Layer, inputs: list[tuple[str, Tensor]], slopes: Space) -> str:
        grads = layer.grads
        if grads is None or grads.shape[1] % self.width or not bool((grads != 0).any()):
            return ""
        found = directions(grads, self.width)
        for name, given in inputs:
            if among(found, given):
                layer.writes_why = f"the gradients of its outputs are multiples of those of the inputs of {name}"
                return self.norm_entries[name].reads
        if not slopes.contains(found):
            return ""
        layer.writes_why = _GRADIENTS
        return "residual"

    def entries(self) -> Iterable[Entry]:
        """The entries of the description, with names in the block."""
        experts = expert_counts(self.model.config.get_text_config(decoder=True))
        for norm in self.norm_entries.values():
            self.facts.setdefault(
                norm.name, f"reads {norm.reads}, writes {norm.writes}: it lies between two linear layers"
            )
            yield norm
        yield from self.biases
        for heading in self.attention:
            yield heading.entry
        for layer in self.layers:
            entry = self._linear(layer, experts)
            self.facts[entry.name] = layer.fact
            yield entry

    def _linear(self, layer: Layer, experts: set[int]) -> Entry:
        module = self.model.get_submodule(layer.param.rpartition(".")[0])
        is_module = layer.param.endswith(".weight") and isinstance(module, (nn.Linear, Conv1D))
        shape = layer.products[0].y.shape[-1]
        experts_in_one = self.model.get_parameter(layer.param).dim() == 3
        stacked = experts_in_one or not layer.param.endswith(".weight")
        called = layer.param.rpartition(".")[0] in self.trace.called
        intercepted = not called or (stacked and not hasattr(module, "_apply_gate"))
        if not layer.whole:
            return Kept(layer.name)
        router = shape == 1 or (shape in experts and layer.writes == "fixed")
        return Linear(
            layer.name if stacked else layer.name.removesuffix(".weight"),
            layer.reads,
            layer.writes,
            per_head=layer.per_head,
            alternating=layer.alternating,
            sizes=layer.sizes,
            transposed=layer.transposed,
            stacked=stacked,
            intercepted=intercepted,
            quantize=(is_module or experts_in_one) and not router,
        )


@dataclass(frozen=True)
class _Block:
    """The entries of one block, and the names of its parameters."""

    entries: tuple[Entry, ...]
    params: frozenset[str]

    def has(self, entry: Entry) -> bool:
        """Whether the block has what an entry describes."""
        return any(name == entry.name or name.startswith(f"{entry.name}.") for name in self.params)


def _merged(blocks: Sequence[_Block]) -> list[Entry]:
    """The entries of all blocks. Those of one name that differ apply to blocks with a certain parameter only.

    If no parameter tells the blocks apart, the layer gets bases of its own.
    """
    found: dict[str, dict[Entry, list[_Block]]] = defaultdict(lambda: defaultdict(list))
    for block in blocks:
        for entry in block.entries:
            found[entry.name][entry].append(block)
    merged: list[Entry] = []
    for entries in found.values():
        known = dict(entries)
        if not all(isinstance(entry, Kept) for entry in known):
            known = {entry: having for entry, having in entries.items() if not isinstance(entry, Kept)}
        merged += _told_apart(known, blocks) or [_weakest(list(known))]
    return merged


def _told_apart(entries: Mapping[Entry, list[_Block]], blocks: Sequence[_Block]) -> list[Entry]:
    """The entries of one name, each with the parameter that blocks need for it. Empty if there is no such parameter."""
    apart: list[Entry] = []
    for entry, having in entries.items():
        others = [block for block in blocks if block not in having and block.has(entry)]
        if len(entries) == 1 and not (isinstance(entry, Attention) and others):
            return [entry]
        common = frozenset.intersection(*(block.params for block in having))
        left = sorted(common.difference(*(block.params for block in others)), key=lambda name: ("{e}" in name, name))
        if not left or "{e}" in left[0] or isinstance(entry, (Kept, Bias, Embedding)):
            return []
        apart.append(replace(entry, when=left[0]))
    return apart


def _weakest(entries: list[Entry]) -> Entry:
    """What is safe to say of a layer whose blocks contradict each other."""
    first = entries[0]
    if isinstance(first, Norm):
        return Kept(f"{first.name}.weight")
    linears = [entry for entry in entries if isinstance(entry, Linear)]
    if not isinstance(first, Linear) or len(linears) < len(entries):
        return first
    reads, written = (
        {entry.reads for entry in linears},
        {(e.writes, e.per_head, e.alternating, e.sizes) for e in linears},
    )
    weak = replace(first, quantize=all(entry.quantize for entry in linears))
    if len(reads) > 1:
        weak = replace(weak, reads=f"{first.name}.in")
    return weak if len(written) == 1 else replace(weak, writes="fixed", per_head=False, alternating=False, sizes=())


def read_roles(model: Any, path: str, trace: Trace, width: int, tokens: int) -> Architecture:
    """The description of a model from its trace.

    `path` is that of its blocks, `width` that of the residual stream, `tokens` the number of tokens of the pass.
    """
    names = dict(model.named_parameters())
    count = len(trace.inputs)
    blocks: list[_Block] = []
    said: list[tuple[Entry, str]] = []
    centred = False
    for i in range(count):
        prefix = f"{path}.{i}."
        params = {name: numbered(model, prefix, name) for name in names if name.startswith(prefix)}
        reader = BlockReader(model, trace, prefix, params, width)
        values, slopes = reader.stream(trace.inputs[i], trace.outputs[i], tokens)
        reader.read(values, slopes, slopes.sums)
        centred |= reader.centred
        found = list(reader.entries())
        entries = [replace(entry, name=numbered(model, prefix, prefix + entry.name)) for entry in found]
        said += [(entry, reader.facts.get(old.name, "")) for entry, old in zip(entries, found, strict=True)]
        blocks.append(_Block(tuple(_with_kept(entries, params.values())), frozenset(params.values())))
    block = tuple(_tidy(_merged(blocks)))
    more: dict[str, str] = {}
    outer = tuple(_outer(model, path, trace, width, tokens, more))
    facts = joined(told(block, said), told(outer, [(entry, more.get(entry.name, KEPT)) for entry in outer]))
    centring = [e.name for e in (*block, *outer) if isinstance(e, Norm) and e.kind == "layer" and e.reads == "residual"]
    if centring or centred:
        what = ", ".join(centring) or "a norm without a gain"
        facts = joined(facts, {"R1": f"maps preserve the mean of the residual stream, which is subtracted in {what}"})
    return Architecture(
        name=f"{model.config.model_type} (derived)",
        model_types=(model.config.model_type,),
        blocks=path,
        block=block,
        outer=outer,
        rope="unknown",
        derived=True,
        returns=trace.returns,
        passed=tuple(trace.passed.items()),
        shares_values=shared_values(trace, model.config.get_text_config(decoder=True), path),
        batch_axis=_batch_axis(trace, tokens),
        keeps_mean=centred or bool(centring),
        facts=facts,
    )


def _batch_axis(trace: Trace, tokens: int) -> int:
    """The axis of hidden states that counts sequences: the first of two neighbours that hold all tokens."""
    shape = trace.inputs[0].shape
    return next((axis for axis in range(len(shape) - 2) if shape[axis] * shape[axis + 1] == tokens), 0)


def _claims(entries: Iterable[Entry]) -> set[str]:
    """The parameters that entries claim, without biases that may be missing."""
    claimed: set[str] = set()
    for entry in entries:
        if isinstance(entry, (Kept, Bias)) or (isinstance(entry, Linear) and entry.stacked):
            claimed |= {entry.name, f"{entry.name}_bias"}
        elif not isinstance(entry, Attention):
            claimed |= {f"{entry.name}.weight", f"{entry.name}.bias"}
    return claimed


def _with_kept(entries: list[Entry], params: Iterable[str]) -> list[Entry]:
    claimed = _claims(entries)
    return entries + [Kept(name) for name in dict.fromkeys(params) if name not in claimed]


def _tidy(entries: Iterable[Entry]) -> list[Entry]:
    """Without the `Kept` entries of parameters that other entries claim."""
    entries = list(entries)
    claimed = _claims(entry for entry in entries if not isinstance(entry, Kept))
    return [entry for entry in entries if not (isinstance(entry, Kept) and entry.name in claimed)]


def _outer(model: Any, path: str, trace: Trace, width: int, tokens: int, facts: dict[str, str]) -> Iterable[Entry]:
    """The entries around the blocks: tables, the last norm, the head, and what else reads or writes the stream.

    `facts` receives how each is known, by its name.
    """
    inside = f"{path}."
    params = {name: name for name in dict(model.named_parameters()) if not name.startswith(inside)}
    reader = BlockReader(model, trace, "", params, width)
    reader.norms = [norm for norm in trace.norms if not norm.name.startswith(inside)]
    stored = dict(model.named_parameters())
    everything = dict(model.named_parameters(remove_duplicate=False))
    tables = {param for param, _ in trace.tables}
    first, last = trace.inputs[0], trace.outputs[-1]
    values, slopes = Space(tokens, width), Space(tokens, width)
    for tensor in (first, last):
        values.add(tensor)
        slopes.add(tensor.grad)
    reader.read(values, slopes, slopes.sums)
    grad = torch.zeros(1, width, dtype=torch.float64) if first.grad is None else first.grad
    # Positions are often looked up once for the whole batch: their gradient is the sum over it.
    batch = directions(grad.sum(0), width)
    looked_up = Space(tokens, width)
    looked_up.add(first)
    entries: list[Entry] = []
    for layer in reader.layers:
        if layer.reads == "final":
            layer.writes, layer.writes_why = "logits", "it is the layer after the last norm"
    for entry in reader.entries():
        fact = reader.facts.get(entry.name, "")
        param = entry.name if isinstance(entry, Kept) or entry.name in stored else f"{entry.name}.weight"
        if isinstance(entry, Linear) and param in tables:  # a tied head
            alias = next((n for n, p in everything.items() if p is everything[param] and n not in stored), "")
            if not alias:
                continue
            entry = replace(entry, name=alias.removesuffix(".weight"))
        if isinstance(entry, Linear) and entry.reads == "final":
            entry = replace(entry, writes="logits", quantize=True)
        elif isinstance(entry, Linear):
            entry = replace(entry, quantize=False)
        entries.append(entry)
        facts[entry.name] = fact
    for param in dict.fromkeys(param for param, _ in trace.tables if param in params):
        found = [out for name, out in trace.tables if name == param and out.shape[-1] == width]
        grads = [directions(out.grad, width) for out in found if out.grad is not None]
        flows = all(slopes.contains(g) or among(g, batch) for g in grads)
        if grads and (flows or all(looked_up.contains(directions(out, width)) for out in found)):
            entries.append(Embedding(param.removesuffix(".weight")))
            why = _GRADIENTS if flows else "its outputs are multiples of the inputs of the first block"
            facts[entries[-1].name] = f"writes residual: {why}"
    return _tidy(_with_kept(entries, [name for name in stored if name in params]))
