"""A decoder inside a model that also takes images is quantized where it stands, and the rest is carried unchanged."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open

import gyroquant as gq
from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.execution.compare_with_transformers import compare_with_transformers
from gyroquant.models.graph import spec
from gyroquant.models.stores.source import open_model
from gyroquant.recipes.schema import load_recipe

TEXT = [" ".join(f"w{(i * 7) % 80}" for i in range(600))]
SETTINGS = ["weights.bits=8", "weights.group_size=16", "calibration.nsamples=4", "calibration.seqlen=32"]


def with_an_image(name: str, config: Any) -> dict[str, Any]:
    """Token ids with places for an image, and the image."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 80, (1, 24), generator=generator)
    if name in ("llava", "mistral3"):
        side = 28 if name == "llava" else 56
        ids[0, 2:6] = config.image_token_index
        sizes = {} if name == "llava" else {"image_sizes": torch.tensor([[side, side]])}
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, generator=generator)} | sizes
    vision = config.vision_config
    ids[0, 2], ids[0, 7] = config.vision_start_token_id, config.vision_end_token_id
    ids[0, 3:7] = config.image_token_id
    width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    image = {"pixel_values": torch.randn(16, width, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).long()} | image


def away(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_models.build(request.param).save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 28}')
    return tmp_path / "model"


@pytest.mark.parametrize("folder", tiny_models.WRAPPERS, indirect=True)
def test_the_decoder_is_found_and_read_as_transformers_reads_it(folder: Path) -> None:
    store = open_model(folder)
    found = compare_with_transformers(store)
    assert max(found.error, found.logit_error) < 1e-6
    assert store.graph.architecture.blocks.startswith("model.language_model.")
    assert all("language_model" not in name for name in store.graph.carried)
    assert any("vis" in name for name in store.graph.carried)


@pytest.mark.parametrize("name", [name for name in tiny_models.WRAPPERS if name != "gemma3_wrapper"])
def test_a_rotated_residual_stream_turns_what_images_write_into_it(name: str) -> None:
    model = tiny_models.build(name)
    ids, image = tiny_models.tokens(model) % 80 + 3, with_an_image(name, model.config)
    with torch.no_grad():
        text, seen, blind = model(input_ids=ids).logits, model(**image).logits, model(image["input_ids"]).logits
        gq.transform(model, load_recipe("gsr", ["proof.nsamples=2", "proof.seqlen=24"]), ids)
        assert away(model(input_ids=ids).logits, text) < 1e-5
        assert away(model(**image).logits, seen) < 1e-5
    assert away(blind, seen) > 0.1


def test_a_projection_of_images_that_was_forgotten_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from gyroquant.models.graph.model_graph import Group, Port

    writers = Group.writers

    def forgetful(self: Group, basis: str) -> tuple[Port, ...]:
        return tuple(port for port in writers(self, basis) if "projector" not in port.param)

    monkeypatch.setattr(Group, "writers", forgetful)
    model = tiny_models.build("llava")
    with pytest.raises(UnsupportedModelError, match="the layers that write images to the residual stream"):
        gq.transform(
            model, load_recipe("gsr", ["proof.nsamples=2", "proof.seqlen=24"]), tiny_models.tokens(model) % 80 + 3
        )


@pytest.mark.parametrize("folder", ["llava", "qwen2_vl"], indirect=True)
@pytest.mark.parametrize("dense", [False, True])
def test_the_result_opens_under_its_own_class_with_its_images(folder: Path, dense: bool, tmp_path: Path) -> None:
    out, name = tmp_path / "out", folder.name
    model = open_model(folder).skeleton()
    name = {"llava": "llava"}.get(model.config.model_type, "qwen2_vl")
    original = tiny_models.build(name)
    made = gq.quantize(folder, load_recipe("gsr", SETTINGS), TEXT, out, options=gq.OutputOptions(dense=dense))
    assert type(made) is type(original)
    image = with_an_image(name, original.config)
    with torch.no_grad():
        wanted = original(**image).logits
        image["pixel_values"] = image["pixel_values"].to(made.dtype)
        assert away(made(**image).logits, wanted) < 0.03
    assert (out / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert compare_with_transformers(open_model(out)).error < 1e-6 or not dense
    carried = open_model(out).read(open_model(out).graph.carried)
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in carried.items())
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert any("vis" in key for key in file.keys())


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_a_wrapper_whose_writers_are_not_described_keeps_its_residual_stream(folder: Path, tmp_path: Path) -> None:
    with spec.WRAPPERS.restored():
        spec.WRAPPERS.discard("llava")
        with pytest.raises(UnsupportedModelError, match="the parts of llava that write into the residual stream"):
            gq.quantize(folder, load_recipe("gsr", SETTINGS), TEXT, tmp_path / "no")
        made = gq.quantize(folder, load_recipe("gptq", SETTINGS), TEXT, tmp_path / "out")
    original = tiny_models.build("llava")
    ids = tiny_models.tokens(original) % 80 + 3
    with torch.no_grad():
        assert away(made(input_ids=ids).logits, original(input_ids=ids).logits) < 0.03


@pytest.mark.parametrize("folder", ["mistral3"], indirect=True)
def test_a_decoder_inside_another_model_is_evaluated(folder: Path) -> None:
    found = gq.evaluate(folder, TEXT, window=32, windows=4)
    assert found["perplexity"] > 1


@pytest.mark.parametrize("folder", ["qwen2_vl"], indirect=True)
def test_formats_without_a_place_for_images_name_those_that_have_one(folder: Path, tmp_path: Path) -> None:
    settings = ["weights.bits=4", "weights.symmetric=true", *SETTINGS[1:]]
    gq.quantize(folder, load_recipe("rtn", settings), TEXT, tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot hold the parts of qwen2_vl outside its decoder.*compressed-tensors"):
        gq.export(tmp_path / "out", "openvino", tmp_path / "ov")
    gq.export(tmp_path / "out", "compressed-tensors", tmp_path / "ct")
