"""What Python users call; the command line calls the same functions."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from gyroquant import pipeline
from gyroquant.calibration.text import bos_text, load_text
from gyroquant.environment import versions
from gyroquant.errors import GyroquantError, InputError
from gyroquant.evaluation.perplexity import DTYPES, cut, score_windows, summary, text_windows
from gyroquant.integrity import check_files, unchecked
from gyroquant.job import prepare
from gyroquant.models.outside import load_config
from gyroquant.models.packed import METHOD
from gyroquant.models.runner import auto_class
from gyroquant.models.safetensors_files import safetensors_index
from gyroquant.models.source import open_model
from gyroquant.pool import Workers
from gyroquant.progress import Stages
from gyroquant.recipe import Recipe, load_recipe


def quantize(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | dict[str, Any] | Recipe,
    calibration: str | Path | Sequence[str | Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    add_bos: bool | None = None,
    dense: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    save_dtype: str = "auto",
    offload: str | Path | None = None,
    fresh: bool = False,
    workers: Workers | None = None,
    progress: Stages | None = None,
) -> PreTrainedModel:
    """Transforms, proves, rounds and saves a model, and returns it loaded back from what was saved.

    `model` is a name on the hub, a folder, a GGUF file or a transformers model; `calibration` a text file, a list of
    strings or a dataset (see `calibration.text.load_text`), `add_bos` the recipe's `calibration.add_bos` if it is to be
    another; `out` a folder that does not exist yet (left out: nothing is kept on disk). The manifest is
    the attribute `gyroquant_manifest` of the result. A run into `out` that was stopped is gone on with, unless it is to
    be `fresh`. With `workers`, blocks are rounded side by side. Raises a GyroquantError before any work for whatever
    cannot be done.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(out) if out is not None else Path(scratch) / "model"
        job = prepare(
            model,
            place,
            recipe if add_bos is None else load_recipe(recipe, [f"calibration.add_bos={str(add_bos).lower()}"]),
            calibration,
            tokenizer=tokenizer,
            dense=dense,
            overwrite=overwrite,
            device=device,
            save_dtype=save_dtype,
            offload=offload,
            fresh=fresh,
            workers=workers,
            reads=[recipe] if isinstance(recipe, (str, Path)) else (),
        )
        manifest = pipeline.run(job, progress)
        loaded = load(place, device=device)
        loaded.gyroquant_manifest = manifest
        return loaded


def load(
    folder: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu", *, check: bool = True
) -> PreTrainedModel:
    """Loads a saved model for transformers, online maps included, ready to generate.

    The weights are compared with the folder's checksums, if it has any, unless `check` is False. Raises InputError when
    the folder holds no model, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no saved model (it has no config.json)")
    with contextlib.nullcontext() if check else unchecked():
        check_files(folder, sorted(path.name for path in folder.glob("*.safetensors")))
        return _load(folder, dtype, device)


def _load(folder: Path, dtype: str | torch.dtype, device: str) -> PreTrainedModel:
    config = load_config(folder, [tensor.shape for tensor in safetensors_index(folder).values()])
    described = getattr(config, "quantization_config", None) or {}
    ours = open_model(folder) if described.get("quant_method") == METHOD else None
    safe: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    try:
        _ = None if ours is None else ours.online  # checked from the headers, before anything is decoded
        return auto_class(config).from_pretrained(folder, dtype=dtype, **safe).to(device).eval()
    except GyroquantError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if ours is not None:
            for name in ours.shapes:
                ours.read([name])  # names the one that cannot be decoded
        raise InputError(f"transformers does not open {folder}: {error}") from error


def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Path | Sequence[str | Mapping[str, Any]] = "wikitext2",
    against: str | Path | PreTrainedModel | None = None,
    *,
    preset: Literal["standard", "bbt"] = "standard",
    window: int | None = None,
    max_windows: int | None = None,
    tokenizer: Any = None,
    add_bos: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Perplexity of a model on a text and, with `against`, its KL divergence from and agreement with another.

    Windows do not overlap and each is predicted from its second token on. With `add_bos` each begins with what the
    tokenizer puts in front of a text, if anything, which no prediction is counted of; `bos` of the result says what.
    `window` and `max_windows` override the preset; where the text has fewer windows than asked for, `windows` and
    `windows_asked` of the result differ. Raises InputError for texts and tokenizers that do not fit.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype {dtype!r} to evaluate in; there are {', '.join(DTYPES)}")
    length, count = cut(preset, window, max_windows)
    store = open_model(model)
    other = None if against is None else open_model(against)
    progress = progress or Stages()
    for one in (store, other):
        if one is not None:
            pipeline.compare(one, progress)
            for note in one.notes:
                progress.warn(note)
    source = load_text(text, split="test")
    tokenizer = tokenizer or store.tokenizer()
    batch = text_windows(source, store, length, count, tokenizer, add_bos)
    scores = score_windows(store, batch.ids, other, DTYPES[dtype], device, progress, bos=batch.bos)
    return summary(scores) | {
        "model": store.label,
        "against": None if other is None else other.label,
        "text": source.about() | {"tokens": batch.text_tokens},
        "add_bos": add_bos,
        "bos": bos_text(batch.bos, tokenizer),
        "tokens": batch.tokens,
        "windows": len(batch.ids),
        "windows_asked": count,
        "window": length,
        "dtype": dtype,
        "true_bits_per_weight": store.bits_per_weight(),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
    }


__all__ = ["evaluate", "load", "quantize"]
