"""Tiny models as gyroquant saves them, their exports, and what others read from both: where tests of formats begin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fresh_process
import tiny_models
import torch
import transformers

import gyroquant as gq
from gyroquant.formats.base import check_fit, format_named, requirements_of
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

_ALONE = """
import json, sys
sys.modules["gyroquant"] = None  # so that importing it raises
import torch, transformers
options = json.loads(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **options)
with torch.no_grad():
    print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()))
"""


def recipe(transform: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Rounding to nearest at 4 bits in symmetric groups of 32, or what `weights` says instead, in fp32."""
    return {
        "name": "test",
        "transform": transform or {},
        "weights": {"bits": 4, "group_size": 32, "symmetric": True, "scale": "minmax", "solver": "rtn"} | weights,
        "calibration": {"nsamples": 2, "seqlen": 32, "dtype": "float32"},
        "proof": {"seqlen": 32},
    }


def rounded(
    source: Any,
    out: Path,
    transform: dict[str, Any] | None = None,
    *,
    save_dtype: str = "auto",
    more: dict[str, Any] | None = None,
    **weights: Any,
) -> PackedStore:
    """A folder as gyroquant writes it, opened: a tiny model, or the folder of one, by `recipe` with the sections of
    `more`.
    """
    tokenizer = None if isinstance(source, Path) else tiny_models.tokenizer()
    chosen = recipe(transform, **weights) | (more or {})
    text = [tiny_models.prose(3000)] if transform or more or "basis" in weights else None
    pipeline.run(prepare(source, out, chosen, text, tokenizer=tokenizer, save_dtype=save_dtype))
    store = open_model(out)
    assert isinstance(store, PackedStore)
    return store


def written(name: str, store: PackedStore, out: Path) -> dict[str, Any]:
    """Writes a model in a format; returns the facts."""
    format_ = format_named(name)
    check_fit(format_, requirements_of(store))
    with OutputFolder(out) as folder:
        facts = format_.write(store, folder)
        folder.commit()
    return facts


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    """What transformers makes of a folder, in fp32 if `options` do not say otherwise; (2, 24, words)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()
    return model(tiny_models.tokens(model)).logits


def logits_without_us(folder: Path, ids: list[int], **options: str) -> torch.Tensor:
    """The same in a process in which gyroquant cannot be imported; (length, words)."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    given = (folder, json.dumps(ids), json.dumps(options))
    done = fresh_process.run(_ALONE, *given, folder=folder, environment=environment)
    done.check_returncode()
    return torch.tensor(json.loads(done.stdout))


@torch.no_grad()
def our_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Our own of a folder that we saved, fp32; (length, words)."""
    return gq.load(folder, dtype="float32")(torch.tensor([ids])).logits[0]
