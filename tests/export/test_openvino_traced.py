"""A traced OpenVINO graph is the model that we saved: every architecture that it is said of, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import gyroquant as gq
from gyroquant.deploy import export, open_saved
from gyroquant.errors import InputError
from gyroquant.export.formats import Needs, format_named
from gyroquant.export.openvino import BUILT, MODEL, TRACED, graph_of
from gyroquant.runtimes import OpenVinoRuntime

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")
NAMES = [name for name in tiny.CONFIGS if name not in EXPERTS and tiny.CONFIGS[name]().model_type not in BUILT]


def saved(model: Any, folder: Path, transform: dict[str, Any] | None = None, **weights: Any) -> Path:
    """The folder of a tiny model rounded to nearest."""
    recipe = {
        "transform": transform or {},
        "weights": {"bits": 4, "group_size": 32, "solver": "rtn"} | weights,
        "calibration": {"nsamples": 2, "seqlen": 32},
        "proof": {"seqlen": 32},
    }
    gq.quantize(model, recipe, [tiny.prose(3000)], out=folder, tokenizer=tiny.tokenizer())
    return folder


@torch.no_grad()
def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return gq.load(folder, dtype="float32")(input_ids=ids).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def in_pieces(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a text read in pieces, one of them a single token and the last beyond every tiny window."""
    runtime = OpenVinoRuntime(folder, exact=True)
    ends = (0, 5, 6, len(ids))
    return torch.cat([runtime.feed(ids[None, a:b]) for a, b in zip(ends, ends[1:], strict=False)])


def in_a_padded_batch(folder: Path, ids: torch.Tensor, missing: int) -> torch.Tensor:
    """The logits of two texts of which the second lacks its first tokens, (2, length, words)."""
    from gyroquant.export.openvino_decoder import exact_settings

    mask = np.ones(ids.shape, np.int64)
    mask[1, :missing] = 0
    positions = (mask.cumsum(1) - 1).clip(0)
    request = ov.Core().compile_model(str(folder / MODEL), "CPU", exact_settings()).create_infer_request()
    feed = {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions}
    return torch.from_numpy(request.infer(feed | {"beam_idx": np.arange(2, dtype=np.int32)})[0].copy())


def constants(folder: Path) -> dict[str, int]:
    """How many numbers of each type the constants of a graph hold."""
    found: dict[str, int] = {}
    for op in ov.Core().read_model(str(folder / MODEL)).get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            found[kind] = found.get(kind, 0) + int(np.prod(op.get_output_shape(0)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_saved_model(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    out = saved(model, tmp_path / "out")
    manifest = export(out, "openvino", tmp_path / "ir")
    assert manifest["facts"]["graph"] == "traced"
    assert manifest["check"]["relative_logit_error"] < 1e-5
    ids = tiny.tokens(model, 2)
    assert close(in_pieces(tmp_path / "ir", ids[0]), ours(out, ids[:1])[0])
    batch = in_a_padded_batch(tmp_path / "ir", ids, 3)
    assert close(batch[0], ours(out, ids[:1])[0])
    assert close(batch[1, 3:], ours(out, ids[1:, 3:])[0])
    rounded = sum(np.prod(store_shape) for store_shape in rounded_shapes(out))
    assert constants(tmp_path / "ir")["u4"] >= rounded


def rounded_shapes(out: Path) -> list[tuple[int, ...]]:
    store = open_saved(out)
    return [store.shapes[name] for name in store.description["tensors"]]
