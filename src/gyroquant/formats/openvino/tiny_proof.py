"""Proves on a tiny model that an architecture can be traced, before any work on the real one."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import UnsupportedModelError
from gyroquant.formats.openvino.runtime import exact_settings, infer
from gyroquant.formats.openvino.traceable import cached_sizes
from gyroquant.models.deriving.tiny import tiny_model, tiny_tokens
from gyroquant.models.execution.messages import quiet

_LIMIT = 1e-4  # the largest error of the logits, relative to the largest logit
_ENDS = (0, 13, 14, 15, 24)  # where the calls end in which a text is read
_PADDED = 9  # tokens of padding before the shorter text of a batch
_problems: dict[str, str] = {}


def tracing_problem(config: Any) -> str:
    """Why the graph that is traced of a configuration would be another model. Empty if a tiny model proves that it is
    the same one. Without OpenVINO, only the cache is checked. Each configuration is proved once in a process.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _problems:
        with torch.random.fork_rng(devices=[]), quiet():
            _problems[key] = _problem(config)
    return _problems[key]


def _problem(config: Any) -> str:
    try:
        model = tiny_model(config)
        cached_sizes(model)
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # caches without a layer of attention raise many kinds
        return f"{config.model_type} cannot run with a cache of keys and values ({_short(error)})"
    if importlib.util.find_spec("openvino") is None:
        return ""
    return _difference(model)


@torch.no_grad()
def _difference(model: Any) -> str:
    name, ids = model.config.model_type, tiny_tokens(model, length=_ENDS[-1])
    mask = torch.ones_like(ids)
    mask[1, :_PADDED] = 0
    whole = model(input_ids=ids[:1], use_cache=False).logits[0]
    try:
        if not _close(_in_pieces(model, ids[:1]), whole):
            return f"transformers gives other logits for {name} with its cache than without"
        found = _traced_logits(model, ids, mask)
    except Exception as error:  # OpenVINO raises RuntimeError for whatever it cannot do, traces raise many kinds
        return f"the code of {name} cannot be traced ({_short(error)})"
    start = _ENDS[1]
    wanted = {"a prompt in one call": whole[:start], "single tokens after it": whole[start:]}
    wanted["a padded batch"] = _padded(model, ids, mask)[mask.bool()]
    wrong = [part for part, logits in wanted.items() if not _close(found[part], logits)]
    return f"a traced tiny model of {name} gives other logits for {' and '.join(wrong)}" if wrong else ""


def _in_pieces(model: Any, ids: Tensor) -> Tensor:
    """The logits of a text, (length, words), that transformers reads in pieces through its cache."""
    past, rows = None, []
    for start, end in pairwise(_ENDS):
        out = model(input_ids=ids[:, start:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[0])
    return torch.cat(rows)


def _padded(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of a batch with padding by transformers, (batch, length, words)."""
    options: dict[str, Tensor] = {"attention_mask": mask}
    if "position_ids" in signature(model.forward).parameters:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits


def _traced_logits(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The logits of a tiny model by the graph that is traced of it, (tokens, words) for each part of the comparison."""
    import openvino as ov

    from gyroquant.formats.openvino.experts import run_all_experts
    from gyroquant.formats.openvino.traced import Replaced, traced

    model = deepcopy(model)
    run_all_experts(model)
    request = ov.Core().compile_model(traced(model, Replaced()), "CPU", exact_settings()).create_infer_request()
    ones = torch.ones_like(ids)
    pieces = [infer(request, ids[:1, a:b], ones[:1, :b])[0] for a, b in pairwise(_ENDS)]
    request.reset_state()
    batch = infer(request, ids, mask)
    return {
        "a prompt in one call": pieces[0],
        "single tokens after it": torch.cat(pieces[1:]),
        "a padded batch": batch[mask.bool()],
    }


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= _LIMIT * wanted.abs().max())


def _short(error: Exception) -> str:
    cause = error.__cause__ or error  # OpenVINO wraps the errors of a trace in a page of advice
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:160] if cause is not error else text[-160:]}"
