"""What SECURITY.md promises: files of others are read, never executed."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.models.stores.source import open_model

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_code_beside_a_model_is_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """Neither for a type that transformers does not know nor for one that it knows, nor for a tokenizer."""
    for model_type in ("mine", "llama"):
        copy = shutil.copytree(folders["llama"], tmp_path / model_type)
        mark = tmp_path / f"{model_type}.was-run"
        (copy / "code.py").write_text(CODE.format(mark=str(mark)))
        config = json.loads((copy / "config.json").read_text())
        config |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Config"}}
        (copy / "config.json").write_text(json.dumps(config))
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
        (copy / "tokenizer_config.json").write_text(json.dumps(settings))
        with contextlib.suppress(gq.InputError):
            open_model(copy).tokenizer()
        assert not mark.exists()


def test_pickles_are_not_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["llama"], tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    torch.save(tiny_models.build("llama").state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(gq.InputError, match="only safetensors and GGUF"):
        open_model(copy)
