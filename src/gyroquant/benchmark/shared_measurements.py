"""The measurements that all runs of a comparison share, made once: tokens, the original's scores, its outliers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gyroquant.benchmark.texts import token_digest
from gyroquant.calibration.stream import Stream
from gyroquant.calibration.text import TokenBatch, TokenStream
from gyroquant.evaluation.offline_tasks import ItemSet
from gyroquant.evaluation.outliers import measure_outliers
from gyroquant.evaluation.perplexity import DTYPES, last_hidden, score_windows, summary
from gyroquant.formats.config import write_config
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.files import put_json, put_tensors, save_tensors
from gyroquant.system.progress import Progress

_MASS_SIZES = (16, 32, 64, 128, 256, 512)
_RUN, _VALUES = 32, 16  # consecutive weights, and the most values that they have on a grid of 4 bits
_OUTLIER_WINDOWS = 8  # windows of calibration text for outliers


class SharedMeasurements:
    """A folder of files that runs share. A file that exists is not made again.

    The names of the files have the digest of their tokens. `facts` are the original's measurements: `tests` (one
    evaluation each), `outliers`, and `forward_seconds`, the time of one pass over the calibration tokens on this
    machine.
    """

    def __init__(self, folder: Path, store: WeightStore, dtype: str):
        self.folder, self.store, self.dtype = folder, store, dtype

    def calibration(self, text: TokenStream, nsamples: int, seqlen: int, seed: int) -> Path:
        """The file of the calibration tokens of a text, shape (samples, length). All runs calibrate on them.

        Raises InputError if the text is too short.
        """
        tokens = text.sample(nsamples, seqlen, seed).ids
        path = self.folder / f"calibration-{token_digest(tokens)}.safetensors"
        if not path.exists():
            about = {"name": text.name, "sha256": text.sha256, **_bos_metadata(text.bos)}
            put_tensors(path, {"tokens": tokens}, about)
        return path

    def test(self, batch: TokenBatch, progress: Progress) -> Path:
        """The file of a test's tokens, shape (windows, length), and of the output of the original's last block."""
        path = self.folder / f"test-{token_digest(batch.ids)}.safetensors"
        if not path.exists():
            hidden = last_hidden(self.store, batch.ids, DTYPES[self.dtype], progress=progress)
            put_tensors(path, {"ids": batch.ids, "hidden": hidden}, _bos_metadata(batch.bos))
        return path

    def items(self, sets: Sequence[ItemSet]) -> Path | None:
        """The file of the items of offline tasks. All runs answer the same. None without items."""
        if not sets:
            return None
        path = self.folder / f"items-{'-'.join(entry.sha256[:12] for entry in sets)}.json"
        if not path.exists():
            put_json(path, [entry.to_dict() for entry in sets])
        return path

    def facts(self, calibration: Path, tests: Mapping[str, Path], progress: Progress) -> dict[str, Any]:
        """The original's measurements."""
        path = self.folder / f"original-{calibration.stem}.json"
        if not path.exists():
            facts = {
                "tests": {key: measured(self.store, None, file, self.dtype, progress) for key, file in tests.items()},
                "outliers": outliers(self.store, calibration, progress),
                "forward_seconds": forward_seconds(self.store, read_tokens(calibration).ids),
            }
            put_json(path, facts)
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored


def read_tokens(path: Path) -> TokenBatch:
    """The calibration tokens of a comparison."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        return TokenBatch(about["name"], about["sha256"], file.get_tensor("tokens"), _bos(about))


def _bos_metadata(bos: Sequence[int]) -> dict[str, str]:
    """The metadata of a file of tokens about BOS tokens. Empty if there are none."""
    return {"bos": json.dumps(list(bos))} if bos else {}


def _bos(about: Mapping[str, str] | None) -> tuple[int, ...]:
    return tuple(json.loads((about or {}).get("bos", "[]")))


def outliers(store: WeightStore, calibration: Path, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The outliers in the layers' inputs of a model, with its maps, on _OUTLIER_WINDOWS calibration windows."""
    tokens = read_tokens(calibration).ids[:_OUTLIER_WINDOWS]
    return [brief(asdict(row)) for row in measure_outliers(store, tokens, progress=progress, sizes=_MASS_SIZES)]


def brief(data: Any) -> Any:
    """Plain data with six significant digits, to keep the files of results small."""
    if isinstance(data, float):
        return float(f"{data:.6g}")
    if isinstance(data, Mapping):
        return {key: brief(value) for key, value in data.items()}
    return [brief(item) for item in data] if isinstance(data, (list, tuple)) else data


def measured(
    store: WeightStore, original: WeightStore | None, test: Path, dtype: str, progress: Progress | None = None
) -> dict[str, Any]:
    """Perplexity and divergence of a model on a test, in total and per window. Paired tests use those per window."""
    with safe_open(test, framework="pt") as file:
        ids, bos = file.get_tensor("ids"), _bos(file.metadata())
        known = None if original is None else file.get_tensor("hidden")
    scores = score_windows(store, ids, original, DTYPES[dtype], progress=progress, known=known, bos=bos)
    result = summary(scores) | {"window_losses": _rounded((scores.loss / scores.predicted).tolist()), "window_kl": None}
    if scores.kl is not None:
        result["window_kl"] = _rounded((scores.kl / scores.predicted).tolist())
    return result


@torch.no_grad()
def forward_seconds(store: WeightStore, tokens: Tensor) -> float:
    """Seconds of one pass of the original in bfloat16, block by block, over tokens of shape (samples, length)."""
    model, started = store.skeleton(), time.perf_counter()
    with evaluating(model):
        outer = store.read(store.graph.outer_params())
        stream = Stream(BlockRunner(model, store.graph), tokens, outer, torch.bfloat16)
        stream.run_all(store)
        for _ in stream.logits(outer):
            pass
    return time.perf_counter() - started


def plain_folder(shared: SharedMeasurements) -> Path:
    """A Hugging Face folder of the original that external tools can open: its own folder, or a copy in fp32."""
    store = shared.store
    own = getattr(store, "folder", None)
    if own is not None and store.source_quantization is None:
        return Path(own)
    folder = shared.folder / "plain"
    if not folder.exists():
        partial = folder.with_name("plain.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config = type(store.config).from_dict(store.config.to_dict() | {"quantization_config": None})
        config.dtype = "float32"
        write_config(config, partial)
        store.tokenizer().save_pretrained(partial)
        weights = {name: tensor.float() for name, tensor in store.read(store.shapes).items()}
        save_tensors(weights, partial / "model.safetensors", {"format": "pt"})
        partial.replace(folder)
    return folder


def own_grid(store: WeightStore) -> list[str]:
    """A note if the original's weights are already on a coarse grid: rounding to that grid loses nothing. Else empty.

    They are on such a grid if any _RUN consecutive weights of the first block have at most _VALUES values.
    """
    group = store.graph.blocks[0]
    names = [op.weight for op in group.linears if op.entry.quantize and not op.entry.stacked]
    values = 0
    for tensor in store.read(names).values():
        if tensor.numel() % _RUN:
            return []
        runs = tensor.float().reshape(-1, _RUN).sort(1).values
        values = max(values, int((runs.diff(dim=1) != 0).sum(1).max()) + 1)
    if not names or values > _VALUES:
        return []
    bits = (values - 1).bit_length()
    return [
        f"The original's weights are already on a grid: any {_RUN} consecutive weights have at most {values} values. "
        f"Without a rotation, rounding to {bits} bits in groups of {_RUN} costs it nothing. Results at {bits} bits and "
        "more are therefore not typical of other models."
    ]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 9) for value in values]
