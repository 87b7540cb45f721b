from pathlib import Path

import pytest
import torch
from external_tool_tasks import LARGEST, error, interpreter, task
from safetensors.torch import save_file

from gyroquant.benchmark.external_tools import ExternalToolError, Size
from gyroquant.benchmark.external_tools.nncf import Nncf, constant_parts, wide_constants


def test_it_has_no_asymmetric_grids_of_few_bits() -> None:
    assert "INT2_SYM" in Nncf().problem("GPTQ", Size(2, 64))
    assert "INT3_SYM" in Nncf().problem("data-free", Size(3, 64))
    assert not Nncf().problem("symmetric GPTQ", Size(2, 64))
    assert not Nncf().problem("GPTQ", Size(2, 64, symmetric=True))
    assert not Nncf().problem("GPTQ", Size(4, 64))
    assert "not 5" in Nncf().problem("GPTQ", Size(5, 64))


@pytest.mark.parametrize(
    ("variant", "size", "expected"),
    [
        ("data-free", Size(4, 64), "--mode INT4_ASYM --group-size 64"),
        ("data-free", Size(4, -1, symmetric=True), "--mode INT4_SYM --group-size -1"),
        ("GPTQ", Size(4, 128), "--mode INT4_ASYM --group-size 128 --gptq"),
        ("symmetric AWQ + scale estimation", Size(2, 64), "--mode INT2_SYM --group-size 64 --awq --scale-estimation"),
    ],
)
def test_what_it_is_asked_for(variant: str, size: Size, expected: str) -> None:
    assert " ".join(Nncf().arguments(variant, size)) == expected


def test_a_size_that_it_has_not_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ExternalToolError, match="INT2_SYM"):
        Nncf().run("GPTQ", task(tmp_path, tmp_path / "out", Size(2, 64)), tmp_path / "python")
    assert not list((tmp_path / "out").iterdir())


CONSTANTS = [
    # name, type, offset, size, bytes beyond 16 bits an entry
    ("self.decoder.model.embed_tokens.weight", "f32", 0, 4000, 2000),
    ("Constant_9966", "f32", 4000, 256, 128),  # a norm
    ("Constant_9967", "f32", 4000, 256, 0),  # which has the same numbers as another
    ("Constant_9968", "f64", 4256, 80, 60),
    ("Constant_9969", "i64", 4336, 80, 0),
    ("Constant_9970", "f16", 4416, 80, 0),
    ("self.decoder.model.layers.0.self_attn.q_proj.weight", "u4", 4496, 2048, 0),
    ("self.decoder.model.layers.0.self_attn.q_proj.weight/scale", "f32", 6544, 64, 0),
    ("self.decoder.model.layers.0.self_attn.q_proj.bias", "f32", 6608, 64, 32),
]


def test_constants_that_are_not_of_rounded_layers_count_16_bits_an_entry(tmp_path: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    layers = "".join(
        f'<layer id="{i}" name="{name}" type="Const" version="opset1">'
        f'<data element_type="{kind}" shape="1" offset="{offset}" size="{size}" /></layer>'
        for i, (name, kind, offset, size, _) in enumerate(CONSTANTS)
    )
    others = (
        '<layer id="99" name="a" type="Convert"><data destination_type="f32" /></layer><layer name="b" type="Add" />'
    )
    path = tmp_path / "openvino_model.xml"
    path.write_text(f'<?xml version="1.0"?><net name="Model" version="11"><layers>{layers}{others}</layers></net>')
    assert wide_constants(path, tmp_path) == sum(wide for *_, wide in CONSTANTS)


def test_constants_are_counted_by_part(folders: dict[str, Path], tmp_path: Path) -> None:
    constants = [
        ("self.decoder.model.embed_tokens.weight", "u8", 0, 1000),
        ("self.decoder.model.embed_tokens.weight/scale", "f16", 1000, 20),
        ("self.decoder.lm_head.weight", "f32", 1020, 400),
        ("self.decoder.model.layers.0.mlp.up_proj.weight", "u4", 1420, 64),
        ("self.decoder.model.layers.0.mlp.up_proj.weight/zero_point", "u4", 1484, 8),
        ("Constant_1", "f32", 1492, 40),
        ("Constant_2", "f32", 1492, 40),  # the same bytes
    ]
    layers = "".join(
        f'<layer id="{i}" name="{name}" type="Const"><data element_type="{kind}" offset="{at}" size="{size}" /></layer>'
        for i, (name, kind, at, size) in enumerate(constants)
    )
    path = tmp_path / "openvino_model.xml"
    path.write_text(f"<net><layers>{layers}</layers></net>")
    parts = {"layers": 72, "embeddings": 1020, "head": 200, "rest": 20, "total": 1312}
    assert constant_parts(path, folders["llama"]) == parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "bits", "true_bits", "largest"),
    [
        ("AWQ + scale estimation", 4, 4 + (16 + 4) / 32, LARGEST),
        ("symmetric GPTQ", 2, 2 + 16 / 32 + 8 * 14 / 61440, 1.0),  # and one byte of zero point in each of 14 layers
    ],
)
def test_it_deploys_a_model_of_the_size_asked_for(
    variant: str, bits: int, true_bits: float, largest: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = folders["llama"]
    found = Nncf().run(variant, task(model, tmp_path / "out", Size(bits, 32)), interpreter(Nncf))
    assert found.true_bits == pytest.approx(true_bits, abs=1e-9)
    assert 0 < error(found, model) < largest
    assert found.bytes > 61440 * true_bits / 8
    assert found.weight_bytes["layers"] == pytest.approx(61440 * true_bits / 8, rel=0.01)
    for part in ("embeddings", "head"):  # 8 bits, a scale and a zero point in each row
        assert found.weight_bytes[part] == pytest.approx(96 * (64 + 3), rel=0.02)
