"""Finds the layers that write queries, keys and values, and the layer that reads the mixed values of the heads.

Values reach the attention function as they were written, so the rows that write them are found by equality. Queries and
keys pass RoPE, which keeps the length of a head, so their rows are found by the lengths of heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.models.deriving.block import Block, Layer
from gyroquant.models.deriving.directions import PARALLEL, columns_of
from gyroquant.models.deriving.trace import AttentionCall, Trace
from gyroquant.models.graph.heads import Heads, setting
from gyroquant.models.graph.spec import Attention, Norm

_QUERIES = ("num_attention_heads", "swa_num_attention_heads", "num_attention_heads_per_layer", "n_head", "num_heads")
_SHARED = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups", *_QUERIES)
_SIZES = (
    *("head_dim", "swa_head_dim", "attention_head_dim", "kv_channels", "qk_head_dim", "qk_rope_head_dim"),
    *("hidden_size/num_attention_heads", "d_model/num_heads", "n_embd/n_head"),
)
_VALUES = ("v_head_dim", "swa_v_head_dim", *_SIZES)


@dataclass(frozen=True)
class Heading:
    """The attention of one block: its entry, and its heads as the tiny model has them."""

    entry: Attention
    heads: Heads


def formula(config: Any, candidates: tuple[str, ...], number: int, block: int) -> str | None:
    """The first candidate that gives a number in a block. None if there is none."""
    for candidate in candidates:
        try:
            if setting(config, candidate, block) == number:
                return candidate
        except (ValueError, ZeroDivisionError):
            continue
    return None


def _entry(reader: Block, call: AttentionCall) -> Heading | None:
    queries, size = call.query.shape[1], call.query.shape[3]
    shared, values = call.value.shape[1], call.value.shape[3]
    config = reader.model.config.get_text_config(decoder=True)
    block = int(reader.prefix.rstrip(".").rpartition(".")[2])
    found = [
        formula(config, candidates, number, block)
        for candidates, number in ((_QUERIES, queries), (_SHARED, shared), (_SIZES, size), (_VALUES, values))
    ]
    if size == values:
        found[3] = found[2]
    if any(name is None for name in found):
        return None
    name = call.name.removeprefix(reader.prefix)
    settings = [str(text) for text in found]
    given = ", ".join(dict.fromkeys(settings))
    reader.facts[name] = f"heads: {given} give the shapes of the queries, keys and values that attention takes"
    return Heading(
        Attention(name, settings[0], settings[1], settings[2], settings[3]), Heads(queries, shared, size, values)
    )


def read_attention(reader: Block) -> list[Heading]:
    """Sets the roles of the layers around each call of attention in a block, and returns the calls' entries."""
    calls = [call for call in reader.trace.attention if reader.prefix and call.name.startswith(reader.prefix)]
    if len({call.name for call in calls}) != 1 or len(calls) > 1:
        return []
    call = calls[0]
    heading = _entry(reader, call)
    if heading is None:
        return []
    rows = [layer for layer in reader.layers if len(layer.products) == 1 and layer.whole]
    mixed = call.output.detach().reshape(-1, heading.heads.queries * heading.heads.values)
    for layer in rows:
        given = layer.rows
        if given.shape == mixed.shape and torch.allclose(given, mixed, rtol=1e-5, atol=1e-6):
            layer.reads = "attn_out"
            layer.reads_why = "its inputs are the mixed values that attention returns"
    for layer in rows:
        y = layer.products[0].y.detach().reshape(-1, layer.products[0].y.shape[-1])
        _values(layer, y, call, heading.heads)
        if not layer.writes and _normed_values(layer, y, call, heading.heads):
            heading = replace(heading, entry=replace(heading.entry, normed_values=True))
        if not layer.writes:
            _lengths(reader, layer, y, call, heading.heads)
    return [heading]


def _columns(tensor: Tensor) -> Tensor:
    """Heads (batch, heads, length, size) as rows of all heads."""
    return tensor.detach().transpose(1, 2).reshape(-1, tensor.shape[1] * tensor.shape[3])


def _values(layer: Layer, y: Tensor, call: AttentionCall, heads: Heads) -> None:
    """Whether a layer's rows are the values, all or some of them."""
    value = _columns(call.value)
    if value.shape[0] != y.shape[0]:
        return
    index = columns_of(value, y)
    if index is None:
        return
    count, out = len(index), y.shape[1]
    each = torch.arange(count)
    if out == count and bool((index == each).all()):
        layer.writes, layer.writes_why = "v", "its outputs are the values that attention takes"
    elif out == (heads.queries + heads.shared) * heads.size + count and bool((index == each + out - count).all()):
        layer.writes = ("q", "k", "v")
        layer.writes_why = "the last of its outputs are the values that attention takes"
    elif out % heads.shared == 0:
        chunk = out // heads.shared
        expected = torch.arange(out).view(heads.shared, chunk)[:, chunk - heads.values :].reshape(-1)
        if bool((index == expected).all()):
            layer.per_head = True
            layer.writes_why = "head by head, the last of its outputs are the values that attention takes"
            full = heads.queries == heads.shared and chunk == 2 * heads.size + heads.values
            layer.writes = ("q", "k", "v") if full else ("heads", "v")


def _normed_values(layer: Layer, y: Tensor, call: AttentionCall, heads: Heads) -> bool:
    """Whether a layer's rows are the values before a norm without a gain: multiples of them, head by head."""
    value = _columns(call.value)
    if value.shape != y.shape:
        return False
    first, second = (t.double().reshape(-1, heads.values) for t in (value, y))
    along = (first * second).sum(1, keepdim=True) / (second * second).sum(1, keepdim=True).clamp_min(1e-30)
    if float((first - along * second).norm(dim=1).max()) > PARALLEL * float(first.norm(dim=1).max()):
        return False
    layer.writes = "v"
    layer.writes_why = "its outputs are multiples of the values that attention takes, head by head"
    return True


def shared_values(trace: Trace, config: Any, path: str) -> str:
    """The setting that tells which blocks take the values of a block before them; see `Architecture.shares_values`.

    Empty if no blocks share values, or if no setting tells.
    """
    calls = {int(call.name.removeprefix(f"{path}.").partition(".")[0]): call.value for call in trace.attention}
    source: dict[int, int] = {}
    for block in sorted(calls):
        value = calls[block]
        equal = [o for o in sorted(calls) if o < block and o not in source and calls[o].shape == value.shape]
        found = next((other for other in equal if torch.equal(calls[other], value)), None)
        if found is not None:
            source[block] = found
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if source and isinstance(kinds, (list, tuple)) and len(kinds) == len(trace.inputs):
            own = [block for block in calls if block not in source]
            last = {b: max((o for o in own if o < b and kinds[o] == kinds[b]), default=-1) for b in source}
            if last == source:
                return name
    return ""


def _head_lengths(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(rows.shape[0], heads, -1).norm(dim=-1)


def _proportional(lengths: Tensor, others: Tensor) -> bool:
    if lengths.shape != others.shape:
        return False
    ratio = lengths / others.clamp_min(1e-12)
    return bool((ratio - ratio.mean()).abs().max() <= 1e-4 * ratio.mean().abs())


def _lengths(reader: Block, layer: Layer, y: Tensor, call: AttentionCall, heads: Heads) -> None:
    """Whether a layer's rows are the queries or the keys, perhaps before a norm."""
    taken = {"q": "the queries that attention takes", "k": "the keys that attention takes"}
    for basis, tensor, count in (("q", call.query, heads.queries), ("k", call.key, heads.shared)):
        target = _columns(tensor)
        if tensor.shape[1] != count or y.shape != target.shape:
            continue
        expected = _head_lengths(target, count)
        if float(expected.std()) < 1e-3 * float(expected.mean()):
            continue  # a norm has made all lengths equal, so they tell nothing
        if _proportional(_head_lengths(y, count), expected):
            layer.writes = basis
            layer.writes_why = f"the lengths of its heads are proportional to those of {taken[basis]}"
            return
        for norm in reader.norms:
            x, out = norm.x.detach(), norm.y.detach()
            if x.numel() != y.numel() or not _same(x, y, count):
                continue
            if _proportional(_by_head(out, y, count), expected):
                layer.writes = basis
                name = norm.name.removeprefix(reader.prefix)
                reader.norm_entries[name] = Norm(name, basis, basis)
                layer.writes_why = f"after {name}, the lengths of its heads are proportional to those of {taken[basis]}"
                reader.facts[name] = f"reads {basis}, writes {basis}: its inputs are the outputs of {layer.module}"
                return


def _same(x: Tensor, y: Tensor, heads: int) -> bool:
    """Whether a norm's input holds a layer's output, heads before or after positions."""
    return bool(torch.allclose(_by_head(x, y, heads).sort(0)[0], _head_lengths(y, heads).sort(0)[0], rtol=1e-4))


def _by_head(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """The lengths of heads in a norm's input or output, as rows of positions."""
    if x.dim() == 4 and x.shape[1] == heads and x.shape[2] != heads:
        x = x.transpose(1, 2)
    return _head_lengths(x.reshape(y.shape[0], -1), heads)
