"""What all cells of a comparison need, made once: tokens, what the original makes of them, its outliers."""

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

from gyroquant.calibration.stream import Stream
from gyroquant.calibration.text import TokenBatch, TokenStream
from gyroquant.comparison.texts import token_digest
from gyroquant.evaluation.outliers import measure_outliers
from gyroquant.evaluation.perplexity import DTYPES, last_hidden, score_windows, summary
from gyroquant.export.config import write_config
from gyroquant.files import put_json, put_tensors, save_tensors
from gyroquant.models.runner import BlockRunner, evaluating
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages

_MASS_SIZES = (16, 32, 64, 128, 256, 512)
_RUN, _VALUES = 32, 16  # weights in a row, and values that they have at most on a grid of 4 bits
_LOOKED_AT = 8  # windows of calibration text that outliers are measured on


class Shared:
    """A folder of what cells share; what is there is not made again.

    Files of tokens are called by the digest of what is in them, `tests` by that of theirs. `facts` are the original's
    measurements: `tests` (an evaluation each), `outliers`, and `forward_seconds`, what one pass over the calibration
    tokens took here.
    """

    def __init__(self, folder: Path, store: WeightStore, dtype: str):
        self.folder, self.store, self.dtype = folder, store, dtype

    def calibration(self, text: TokenStream, nsamples: int, seqlen: int, seed: int) -> Path:
        """The file of the calibration tokens, shape (samples, length), of a text, which everybody calibrates on.

        Raises InputError for a text that is too short.
        """
        tokens = text.sample(nsamples, seqlen, seed).ids
        path = self.folder / f"calibration-{token_digest(tokens)}.safetensors"
        if not path.exists():
            about = {"name": text.name, "sha256": text.sha256, **_told(text.bos)}
            put_tensors(path, {"tokens": tokens}, about)
        return path

    def test(self, batch: TokenBatch, progress: Stages) -> Path:
        """The file of a test's tokens, shape (windows, length), and of what leaves the original's last block."""
        path = self.folder / f"test-{token_digest(batch.ids)}.safetensors"
        if not path.exists():
            hidden = last_hidden(self.store, batch.ids, DTYPES[self.dtype], progress=progress)
            put_tensors(path, {"ids": batch.ids, "hidden": hidden}, _told(batch.bos))
        return path

    def facts(self, calibration: Path, tests: Mapping[str, Path], progress: Stages) -> dict[str, Any]:
        """The original's measurements."""
        path = self.folder / f"original-{calibration.stem}.json"
        if not path.exists():
            facts = {
                "tests": {key: measured(self.store, None, file, self.dtype, progress) for key, file in tests.items()},
                "outliers": outliers(self.store, calibration, progress),
                "forward_seconds": forward_seconds(self.store, read_tokens(calibration).ids),
            }
            put_json(path, facts)
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def read_tokens(path: Path) -> TokenBatch:
    """The calibration tokens of a comparison."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        return TokenBatch(about["name"], about["sha256"], file.get_tensor("tokens"), _bos(about))


def _told(bos: Sequence[int]) -> dict[str, str]:
    """What a file of tokens says of those at the head of its windows: nothing where there are none."""
    return {"bos": json.dumps(list(bos))} if bos else {}


def _bos(about: Mapping[str, str] | None) -> tuple[int, ...]:
    return tuple(json.loads((about or {}).get("bos", "[]")))


def outliers(store: WeightStore, calibration: Path, progress: Stages | None = None) -> list[dict[str, Any]]:
    """What enters the layers of a model, whose maps are in place, on some of the calibration text."""
    tokens = read_tokens(calibration).ids[:_LOOKED_AT]
    return [brief(asdict(row)) for row in measure_outliers(store, tokens, progress=progress, sizes=_MASS_SIZES)]


def brief(data: Any) -> Any:
    """Plain data with numbers of six significant digits: for what is drawn, of which there is much."""
    if isinstance(data, float):
        return float(f"{data:.6g}")
    if isinstance(data, Mapping):
        return {key: brief(value) for key, value in data.items()}
    return [brief(one) for one in data] if isinstance(data, (list, tuple)) else data


def measured(
    store: WeightStore, original: WeightStore | None, test: Path, dtype: str, progress: Stages | None = None
) -> dict[str, Any]:
    """Perplexity and divergence of a model on a test, with each window's, which paired comparisons are made of."""
    with safe_open(test, framework="pt") as file:
        ids, bos = file.get_tensor("ids"), _bos(file.metadata())
        known = None if original is None else file.get_tensor("hidden")
    scores = score_windows(store, ids, original, DTYPES[dtype], progress=progress, known=known, bos=bos)
    found = summary(scores) | {"window_losses": _rounded((scores.loss / scores.predicted).tolist()), "window_kl": None}
    if scores.kl is not None:
        found["window_kl"] = _rounded((scores.kl / scores.predicted).tolist())
    return found


@torch.no_grad()
def forward_seconds(store: WeightStore, tokens: Tensor) -> float:
    """Seconds of one pass of the original, block by block, over tokens of shape (samples, length); in bfloat16."""
    model, started = store.skeleton(), time.perf_counter()
    with evaluating(model):
        outer = store.read(store.graph.outer_params())
        stream = Stream(BlockRunner(model, store.graph), tokens, outer, torch.bfloat16)
        stream.run_all(store)
        for _ in stream.logits(outer):
            pass
    return time.perf_counter() - started


def plain_folder(shared: Shared) -> Path:
    """A Hugging Face folder of the original that other programs open: its own, or one made of it, in fp32."""
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
    """What has to be said of a model whose weights lie on a coarse grid already: rounding to that grid is no loss.

    Weights do where every 32 of them in a row have at most 16 values; the first block's are looked at.
    """
    group = store.graph.blocks[0]
    names = [op.weight for op in group.linears if op.entry.quantize and not op.entry.stacked]
    found = 0
    for tensor in store.read(names).values():
        if tensor.numel() % _RUN:
            return []
        runs = tensor.float().reshape(-1, _RUN).sort(1).values
        found = max(found, int((runs.diff(dim=1) != 0).sum(1).max()) + 1)
    if not names or found > _VALUES:
        return []
    bits = (found - 1).bit_length()
    return [
        f"The original's weights lie on a grid already: no {_RUN} of them in a row have more than {found} values. "
        f"Without a rotation, rounding to {bits} bits in groups of {_RUN} costs it nothing, and results at {bits} bits "
        "and more say little about rounding of other models."
    ]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 9) for value in values]
