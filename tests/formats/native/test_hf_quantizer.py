"""Folders that gyroquant wrote, opened by transformers with gyroquant and without."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import saved_models
import tiny_models
import torch
from tiny_runs import run, streamed_logits
from transformers import AutoConfig

import gyroquant as gq
from gyroquant.formats.native.hf_quantizer import GyroquantHfQuantizer
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.stores.packed_description import IMPORT_FIRST
from gyroquant.models.stores.source import open_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as gyroquant writes it."""
    out = tmp_path_factory.mktemp("hf") / "packed"
    saved_models.rounded(tiny_models.build("llama_tied"), out)
    return out


def test_without_gyroquant_a_folder_is_refused_by_its_name_and_with_the_remedy(packed: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        saved_models.logits_without_us(packed, [1, 2, 3])
    last = caught.value.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ")
    assert last.endswith(": gyroquant packed these weights, run `import gyroquant` before you open them")


def test_a_sharded_folder_is_refused_too(packed: Path, tmp_path: Path) -> None:
    """The index would lead to the files just as well."""
    copy = shutil.copytree(packed, tmp_path / "sharded")
    (copy / "SHA256SUMS").unlink()
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(open_model(packed)._stored, "model-00001-of-00001.safetensors")  # type: ignore[attr-defined]
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(subprocess.CalledProcessError) as caught:
        saved_models.logits_without_us(copy, [1, 2, 3])
    assert IMPORT_FIRST in caught.value.stderr
    assert torch.equal(saved_models.logits(copy), saved_models.logits(packed))


def test_with_gyroquant_every_way_to_open_a_folder_gives_the_same_model(packed: Path) -> None:
    ids = [5, 6, 7, 8]
    store = open_model(packed)
    assert saved_models.logits(packed).isfinite().all()
    with torch.no_grad():
        automatic = saved_models.transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
        assert torch.equal(automatic(torch.tensor([ids])).logits[0], saved_models.our_logits(packed, ids))
    values = store.read(["model.layers.0.mlp.up_proj.weight"])["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(values, automatic.get_parameter("model.layers.0.mlp.up_proj.weight"))


def test_a_folder_that_was_written_without_the_refusal_opens(packed: Path, tmp_path: Path) -> None:
    """As gyroquant wrote folders before."""
    old = shutil.copytree(packed, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    assert config.pop("transformers_weights") == IMPORT_FIRST
    (old / "config.json").write_text(json.dumps(config))
    assert torch.equal(saved_models.logits(old), saved_models.logits(packed))
    assert torch.equal(saved_models.our_logits(old, [1, 2]), saved_models.our_logits(packed, [1, 2]))


def test_layers_that_transformers_left_at_random_numbers_stop_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As versions did that ask a quantizer for its conversions in another way: it was no more than a warning."""
    monkeypatch.setattr(GyroquantHfQuantizer, "get_weight_conversions", lambda self: [])
    with pytest.raises(gq.GyroquantError, match=r"left 14 of the rounded parameters at random numbers"):
        gq.load(packed)
    with pytest.raises(gq.GyroquantError, match=r"open the folder with a version that gyroquant is tested with"):
        saved_models.logits(packed)


def test_what_is_made_of_a_folder_does_not_keep_the_refusal(packed: Path, tmp_path: Path) -> None:
    """Neither exports nor what `save_pretrained` writes, which plain transformers opens."""
    loaded = gq.load(packed, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "saved")
    saved_models.written("dense", open_model(packed), tmp_path / "dense")  # type: ignore[arg-type]
    for folder in ("saved", "dense"):
        assert not hasattr(AutoConfig.from_pretrained(tmp_path / folder), "transformers_weights")
    ids = [3, 1, 4, 1, 5]
    torch.testing.assert_close(
        saved_models.logits_without_us(tmp_path / "saved", ids),
        saved_models.our_logits(packed, ids),
        rtol=1e-5,
        atol=1e-4,
    )
    assert open_model(tmp_path / "saved").shapes == open_model(packed).shapes


def test_names_that_a_renaming_would_change_are_read_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """transformers renames Laguna's `shared_expert` of older files by a pattern that also matches `shared_experts`."""
    model = tiny_model(default_config("laguna"))
    small = ("weights.group_size=-1", "calibration.seqlen=24", "proof.seqlen=24")
    run(model, tmp_path / "out", "rtn-w4", corpus, *small)
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    ids = tiny_tokens(model)
    with torch.no_grad():
        logits = loaded(input_ids=ids, use_cache=False).logits
    assert torch.allclose(logits, streamed_logits(tmp_path / "out", ids), atol=1e-3)
    assert not loaded.is_custom_code()


def test_buffers_that_no_file_holds_are_filled(corpus: Path, tmp_path: Path) -> None:
    """Those of Falcon-H1 are filled by a module that has no parameters of its own."""
    model = tiny_model(default_config("falcon_h1"))
    run(model, tmp_path / "out", "rtn-w4", corpus, "weights.group_size=-1", "calibration.seqlen=24", "proof.seqlen=24")
    filled = {name for name, buffer in model.named_buffers() if "mup_vector" in name and bool((buffer == 1).all())}
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    assert filled
    assert filled == {
        name for name, buffer in loaded.named_buffers() if "mup_vector" in name and bool((buffer == 1).all())
    }
