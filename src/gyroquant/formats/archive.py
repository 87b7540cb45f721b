"""The archive: a folder of gyroquant with its codes and scales entropy-coded, to store and to send.

WaterSIC (arXiv 2603.04956) stores the codes of a layer in about as many bits as their entropy, which is less than the
size of the grid's codes. Here they are stored as Huffman codes (`gyroquant.models.stores.huffman`). Opening the archive
decodes them to the very bytes of the folder that was archived.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor

from gyroquant.formats.base import Format, FormatCapabilities
from gyroquant.formats.checkpoint import write_companions
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import grid_from, stored_bits
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.config_loading import read_json
from gyroquant.models.stores.huffman import encode
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.packed_description import ARCHIVE_VERSION, CODED

_MANIFEST = "gyroquant.json"
_POINTS = frozenset({"input", "output", "qk", "experts_in", "experts_act", "parameter"})


class Archive(Format):
    """The arrays of a folder that gyroquant wrote, with Huffman codes for those of rounded parameters.

    gyroquant opens it like the folder itself, and nothing is lost. Other programs do not open it.
    """

    name = "archive"
    title = "gyroquant and transformers"
    runtime = TransformersRuntime
    library = "gyroquant"
    ours = True
    usage = """```python
import gyroquant as gq

model = gq.load("FOLDER")
```"""
    capabilities = FormatCapabilities(
        points=_POINTS,
        any_grid=True,
        basis=True,
        experts=True,
        tables=True,
        wrappers=True,
        wide_scales=True,
        low_rank=True,
    )

    def _online(self, online: Iterable[OnlineOp], ties: Collection[HookPoint] = ()) -> Iterable[tuple[str, str]]:
        return ()  # gyroquant runs all of them

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        description, saved, weights = deepcopy(store.description), 0, 0
        for name, arrays in store.stored_arrays():
            if name not in description["tensors"]:
                folder.add(arrays)
                continue
            entry = description["tensors"][name]
            entry.pop(CODED, None)
            coded, how = _coded(arrays, int(grid_from(description["grids"][entry["grid"]]).bits))
            if how:
                entry[CODED] = how
            folder.add({f"{name}_{part}": array for part, array in coded.items()})
            if name in store.counted:
                saved += store.bits_in_file(name) - stored_bits(coded)
                weights += store.graph.op(name).numel
        folder.merge()
        description["format_version"] = ARCHIVE_VERSION
        folder.json("config.json", read_json(store.folder / "config.json") | {"quantization_config": description})
        write_companions(store, folder)
        if (store.folder / _MANIFEST).is_file():
            shutil.copyfile(store.folder / _MANIFEST, folder.partial / _MANIFEST)
        before = store.bits_per_weight()
        return {"true_bits_per_weight": before - saved / weights, "true_bits_per_weight_of_the_folder": before}


def _coded(arrays: dict[str, Tensor], bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of a parameter to store, and how to read those that are coded, both by part.

    Factors of low-rank branches stay as they are: they are read with the online operations.
    """
    found = {part: encode(array, bits) for part, array in arrays.items() if part not in ("left", "right")}
    coded = {part: pair for part, pair in found.items() if pair is not None}
    streams = {part: stream for part, (stream, _) in coded.items()}
    return arrays | streams, {part: how.describe() for part, (_, how) in coded.items()}
