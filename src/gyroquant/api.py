"""The functions for Python users. The command line calls the same functions."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from gyroquant.calibration.text import load_text
from gyroquant.errors import GyroquantError, InputError
from gyroquant.evaluation.diagnosis.folder import check_destination, write_report
from gyroquant.evaluation.diagnosis.options import ReportOptions
from gyroquant.evaluation.in_tasks import in_tasks
from gyroquant.evaluation.on_text import prepare_text
from gyroquant.evaluation.perplexity import DTYPES, cut
from gyroquant.evaluation.tasks import TaskPlan, plan_tasks
from gyroquant.models.execution.runner import auto_class
from gyroquant.models.stores.base import CheckpointStore, ModuleStore, WeightStore
from gyroquant.models.stores.config_loading import load_config, read_json
from gyroquant.models.stores.gguf.store import GgufStore
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.packed_description import METHOD
from gyroquant.models.stores.safetensors_files import safetensors_index
from gyroquant.models.stores.source import open_model
from gyroquant.models.stores.weight_bytes import sizes
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.options import OutputOptions
from gyroquant.pipeline.stages.compare import compare_store
from gyroquant.recipes.schema import Recipe, load_recipe
from gyroquant.recipes.size import parse_size, with_size
from gyroquant.system.checksums import check_files, unchecked
from gyroquant.system.deprecation import renamed, warn_renamed
from gyroquant.system.environment import versions
from gyroquant.system.progress import Progress


@renamed(calibration="text")
def quantize(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | dict[str, Any] | Recipe,
    text: str | Path | Sequence[str | Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    add_bos: bool | None = None,
    size: int | str | None = None,
    options: OutputOptions | None = None,
    progress: Progress | None = None,
    **old_options: Any,
) -> PreTrainedModel:
    """Transforms, proves, rounds and saves a model, and returns it loaded back from what was saved.

    model: a name on the hub, a folder, a GGUF file or a transformers model.
    recipe: a name, a YAML file, its content as data, or a Recipe.
    text: the calibration text: a file, a list of strings or a dataset (see `calibration.text.load_text`). By default
        the recipe's `calibration.text`.
    out: a folder that does not exist yet. By default nothing is kept on disk.
    tokenizer: by default the model's own.
    add_bos: whether calibration windows begin with BOS. By default the recipe's `calibration.add_bos`.
    size: bits are chosen so that all weights take at most this, in bytes or as text such as "60MB". By default the
        recipe says the bits.
    options: settings of the run and of its output, see `OutputOptions`. Its fields are also accepted as keywords of
        this function, for one release and with a FutureWarning.

    The attribute `gyroquant_manifest` of the result is the manifest. If an earlier run into `out` was interrupted, this
    one continues it, unless `options.fresh`. Raises a GyroquantError before any work if the job cannot be done.
    """
    for name in old_options:
        if name in {field.name for field in fields(OutputOptions)}:
            warn_renamed(f"{name}= of quantize()", f"options=gyroquant.OutputOptions({name}=...)", stacklevel=3)
    options = (options or OutputOptions()).changed("quantize", old_options)
    reads = [recipe] if isinstance(recipe, (str, Path)) else []
    if add_bos is not None:
        recipe = load_recipe(recipe, [f"calibration.add_bos={str(add_bos).lower()}"])
    if size is not None:
        recipe = with_size(load_recipe(recipe), parse_size(size) if isinstance(size, str) else size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out) if out is not None else Path(scratch) / "model"
        job = prepare(
            model,
            folder,
            recipe,
            text,
            tokenizer=tokenizer,
            options=options,
            reads=reads,
        )
        manifest = pipeline.run(job, progress)
        loaded = load(folder, device=options.device)
        loaded.gyroquant_manifest = manifest
        return loaded


def load(
    folder: str | Path, dtype: str | torch.dtype = "auto", device: str = "cpu", *, check: bool = True
) -> PreTrainedModel:
    """Loads a saved model for transformers, online maps included, ready to generate.

    If the folder has checksums, the weights are compared with them, unless `check` is False. Raises InputError if the
    folder has no model, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a saved model: it has no config.json")
    with contextlib.nullcontext() if check else unchecked():
        check_files(folder, sorted(path.name for path in folder.glob("*.safetensors")))
        return _load(folder, dtype, device)


def _load(folder: Path, dtype: str | torch.dtype, device: str) -> PreTrainedModel:
    config = load_config(folder, [tensor.shape for tensor in safetensors_index(folder).values()])
    quantization = getattr(config, "quantization_config", None) or {}
    ours = open_model(folder) if quantization.get("quant_method") == METHOD else None
    safe: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    try:
        _ = None if ours is None else ours.online  # checks the online maps from the headers, before anything is decoded
        return auto_class(config).from_pretrained(folder, dtype=dtype, **safe).to(device).eval()
    except GyroquantError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if ours is not None:
            for name in ours.shapes:
                ours.read([name])  # raises an error with the name of a weight that cannot be decoded
        raise InputError(f"transformers cannot open {folder}: {error}") from error


@renamed(max_windows="windows")
def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Path | Sequence[str | Mapping[str, Any]] | None = None,
    against: str | Path | PreTrainedModel | None = None,
    *,
    preset: Literal["standard", "bbt"] = "standard",
    window: int | None = None,
    windows: int | None = None,
    tasks: Sequence[str] = (),
    task_items: int | None = None,
    task_seed: int = 0,
    task_text: str | Path | None = None,
    tokenizer: Any = None,
    add_bos: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress | None = None,
    report: str | Path | None = None,
    report_options: ReportOptions | None = None,
) -> dict[str, Any]:
    """Measures a model: perplexity on a text, accuracy in tasks and, with `against`, how it differs from the original.

    model: a name on the hub, a folder, a GGUF file or a transformers model.
    text: the text to measure on: a file, a list of strings or a dataset. Default "wikitext2"; with `tasks` none.
    against: the original, for divergence, agreement and paired tests. Default None.
    preset: "standard" (default; all windows of 2048 tokens) or "bbt" (8 windows of 1024).
    window: tokens in a window. By default the preset's.
    windows: at most this many windows. By default the preset's number.
    tasks: zero-shot tasks: "offline", some of its tasks, or tasks of lm-evaluation-harness. Default: none.
    task_items: items of each offline task (default 200), and at most as many questions of each other (default all).
    task_seed: the seed of the items. Default 0.
    task_text: the text to make items from. By default `text`, and without that Python's language reference.
    add_bos: whether every window and question begins with the tokenizer's BOS tokens. Default True. Predictions of
        these tokens do not count. `bos` of the result names them.
    dtype: "float32" (default), "bfloat16" or "float16".
    report: a folder for a diagnosis against the original (acceptance, blocks, tasks, ...) as JSON, Markdown and HTML.
        Default None. It needs `against`, and with `tasks` a `text`. The result then also has `diagnosis` and `report`.
    report_options: what the diagnosis measures. By default `ReportOptions()`.

    Windows do not overlap, and each is predicted from its second token on. If the text has fewer windows than
    requested, `windows` and `windows_asked` of the result differ. `true_bits_per_weight` are those of the rounded
    layers; `effective_bits_per_weight` have the entropy of the codes in place of their bits (None without codes of
    gyroquant). `whole_model_bits_per_weight` and `bytes` are of everything that is stored, by part of the model.
    `tasks` has the score of each task; the whole model is loaded for them. Raises InputError before any work if the
    text, the tokenizer or a task does not fit, or if a report cannot be made of these.
    """
    started = time.perf_counter()
    _check_evaluation(dtype, text, against, tasks, report, report_options)
    cutting, progress = cut(preset, window, windows), progress or Progress()
    plan = _plan(tasks, task_text, text, task_items, task_seed)
    store = open_model(model)
    other = None if against is None else open_model(against)
    stores = [store] if other is None else [store, other]
    _check_for_tasks(stores, plan)
    tokenizer, on_text = tokenizer or store.tokenizer(), None
    if text is not None or not tasks:
        source = load_text("wikitext2" if text is None else text, split="test")
        options = None if report is None else report_options or ReportOptions()
        on_text = prepare_text(store, other, source, cutting, tokenizer, add_bos, options)
    _check_read(stores, progress)
    measured = {} if on_text is None else on_text.run(dtype, device, progress)
    if tasks:
        measured |= in_tasks([partial(_whole, each, dtype, device) for each in stores], plan, tokenizer, add_bos)
    result = measured | {
        "model": store.label,
        "against": None if other is None else other.label,
        **{"add_bos": add_bos, "dtype": dtype},
        "true_bits_per_weight": store.bits_per_weight(),
        "effective_bits_per_weight": store.effective_bits_per_weight(),
        **sizes(store),
        "versions": versions(),
    }
    if report is not None:
        write_report(Path(report), result)
        result["report"] = str(report)
    return result | {"seconds": round(time.perf_counter() - started, 3)}


def _check_evaluation(
    dtype: str,
    text: Any,
    against: Any,
    tasks: Sequence[str],
    report: str | Path | None,
    report_options: ReportOptions | None,
) -> None:
    """Raises InputError for arguments of `evaluate` that cannot be used, without opening a model."""
    if dtype not in DTYPES:
        names = list(DTYPES)
        usable = f"{', '.join(names[:-1])} or {names[-1]}"
        raise InputError(f"dtype {dtype!r} is not supported for evaluation; use {usable}")
    if report is None:
        if report_options is not None:
            raise InputError("options of a report are given without a report: add --report DEST, or leave them out")
        return
    if against is None:
        raise InputError("a report compares a model with its original: add --against MODEL")
    if tasks and text is None:
        raise InputError("a report is made on a text, which --tasks leave out: add --text FILE, or leave out --report")
    (report_options or ReportOptions()).check()
    check_destination(Path(report))


def _plan(tasks: Sequence[str], task_text: str | Path | None, text: Any, items: int | None, seed: int) -> TaskPlan:
    """What to ask. Items come from `task_text`, else from `text`, else from Python's language reference."""
    if not tasks:
        if task_text is not None or items is not None:
            raise InputError("--task-text and --task-items are for --tasks; add --tasks offline, or leave them out")
        return TaskPlan()
    return plan_tasks(tasks, task_text if task_text is not None else text, items, seed)


def _check_for_tasks(stores: Sequence[WeightStore], plan: TaskPlan) -> None:
    """Raises InputError for a model that was calibrated on the text of the items, or that cannot be loaded whole."""
    if not (plan.harness or plan.items):
        return
    for store in stores:
        plan.check_held_out(_calibration_text(store), store.label)
        if not isinstance(store, (ModuleStore, GgufStore, CheckpointStore)):
            raise InputError(f"{store.label} cannot be loaded whole, which tasks need: give a folder or a GGUF file")


def _calibration_text(store: WeightStore) -> Mapping[str, Any] | None:
    """The name and sha256 of the text that a model was calibrated on, if gyroquant wrote it and there was one."""
    manifest = store.folder / "gyroquant.json" if isinstance(store, PackedStore) else None
    return read_json(manifest).get("text") if manifest is not None and manifest.exists() else None


def _check_read(stores: Sequence[WeightStore], progress: Progress) -> None:
    """Compares models as we read them with transformers, and passes on the notes on how they were read."""
    for store in stores:
        compare_store(store, progress)
        for note in store.notes:
            progress.warn(note)


def _whole(store: WeightStore, dtype: str, device: str) -> PreTrainedModel:
    """The whole model as transformers runs it. `_check_for_tasks` says which models there are."""
    if isinstance(store, ModuleStore):
        return store.model
    if isinstance(store, GgufStore):
        return store.load().to(DTYPES[dtype]).to(device)
    assert isinstance(store, CheckpointStore)
    return load(store.folder, dtype, device)


__all__ = ["evaluate", "load", "quantize"]
