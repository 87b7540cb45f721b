"""The layers of a manifest, also under the names of the release before."""

import json
from pathlib import Path
from typing import Any

import pytest

from gyroquant.errors import InputError
from gyroquant.inspection.model import read_layers

BOUND = {"bits": 3.0, "output_error": 0.1, "decibels": 4.5, "excess_bits": 0.7}
PLAIN = {"name": "model.layers.0.mlp.up_proj", "weight_error": 0.2, "output_error": 0.3}


def manifest(folder: Path, *layers: Any) -> Path:
    path = folder / "gyroquant.json"
    path.write_text(json.dumps({"layers": list(layers)}))
    return path


@pytest.mark.parametrize("key", ["limit", "rate_distortion"])
def test_manifests_of_the_last_release_are_read(key: str, tmp_path: Path) -> None:
    assert read_layers(manifest(tmp_path, PLAIN | {key: BOUND})) == [PLAIN | {"rate_distortion": BOUND}]
    assert read_layers(manifest(tmp_path, PLAIN | {key: None})) == [PLAIN | {"rate_distortion": None}]


@pytest.mark.parametrize("key", ["limit", "rate_distortion"])
@pytest.mark.parametrize("bound", [5, {"bits": 3.0}, BOUND | {"decibels": "much"}])
def test_damaged_bounds_are_refused(key: str, bound: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its layers are damaged"):
        read_layers(manifest(tmp_path, PLAIN | {key: bound}))
