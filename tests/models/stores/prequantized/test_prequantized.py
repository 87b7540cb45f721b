import json
import shutil
from pathlib import Path
from typing import Any

import foreign_folders as made
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config

import gyroquant as gq
from gyroquant.benchmark.shared_measurements import SharedMeasurements, plain_folder
from gyroquant.errors import InputError
from gyroquant.inspection.model import inspect_model
from gyroquant.models.stores.fingerprint import fingerprint
from gyroquant.models.stores.prequantized.base import PrequantizedStore
from gyroquant.models.stores.prequantized.bits import e2m1, e8m0, unpack, unpack_padded
from gyroquant.models.stores.source import open_model, open_original
from gyroquant.report import summaries

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}

# What config.json says, how a layer is stored, bits and group size.
FORMATS: dict[str, tuple[dict[str, Any], made.Encoder, int, Any]] = {
    **{f"gptq {bits}": (GPTQ, made.gptq(bits, 32, True), bits, 32) for bits in (2, 3, 4, 8)},
    **{f"gptq_v2 {bits}": (V2, made.gptq(bits, 32, False), bits, 32) for bits in (2, 3, 4, 8)},
    "gptq by activation": (GPTQ | {"desc_act": True}, made.gptq(4, 16, True, order=True), 4, 16),
    "gptq without an index": (GPTQ, made.gptq(4, 32, True, with_index=False), 4, 32),
    "awq": (AWQ, made.awq(4, 32), 4, 32),
    "fp8 in blocks": (FP8, made.fp8((32, 32)), 8, [32, 32]),
    "fp8 in blocks that are cut off": (FP8 | {"weight_block_size": [24, 40]}, made.fp8((24, 40)), 8, [24, 40]),
    "fp8 by matrix": (FP8 | {"weight_block_size": None}, made.fp8(None), 8, [-1, -1]),
    "fp8 of AutoFP8": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        made.fp8(None, "weight_scale", input_scale=torch.tensor(0.1)),
        8,
        [-1, -1],
    ),
    "nf4": (NF4, made.nf4(64, False), 4, 64),
    "nf4 with rounded maxima": (NF4, made.nf4(64, True), 4, 64),
    "nf4 in another storage": (NF4, made.nf4(64, False, torch.bfloat16), 4, 64),
    "nf4 in blocks past the row": (NF4, made.nf4(128, False), 4, 128),
    "int8 of bitsandbytes": (INT8, made.int8, 8, -1),
    "int8 without a method": ({"load_in_8bit": True}, made.int8, 8, -1),
    **{f"packed {bits}": (made.scheme(bits), made.packed(bits, 32, True), bits, 32) for bits in range(2, 9)},
    **{
        f"packed {bits}, padded": (made.scheme(bits), made.packed(bits, 32, True, padded=True), bits, 32)
        for bits in (3, 5, 6, 7)
    },
    "packed, asymmetric": (made.scheme(4, symmetric=False), made.packed(4, 32, False), 4, 32),
    "packed, asymmetric and padded": (made.scheme(3, symmetric=False), made.packed(3, 32, False, padded=True), 3, 32),
    "packed by activation": (made.scheme(4, symmetric=False), made.packed(4, 32, False, order=True), 4, 32),
    "auto-round": (AUTO | {"packing_format": "auto_round"}, made.gptq(4, 32, False, with_index=False), 4, 32),
    "auto-round, 5 bits": (AUTO | {"packing_format": "auto_round"}, made.gptq(5, 32, False, with_index=False), 5, 32),
    "auto-round as gptq": (AUTO | {"packing_format": "auto_round:auto_gptq"}, made.gptq(4, 32, True), 4, 32),
    "auto-round as awq": (AUTO | {"packing_format": "auto_round:auto_awq"}, made.awq(4, 32), 4, 32),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_others_are_decoded_as_they_are_defined(name: str, folders: Any, tmp_path: Path) -> None:
    settings, encode, bits, group = FORMATS[name]
    meant = made.folder(folders["llama"], tmp_path / "m", settings, encode)
    store = open_original(tmp_path / "m")
    read = store.read(store.shapes)
    for weight, wanted in meant.items():
        torch.testing.assert_close(read.pop(weight), wanted, rtol=1e-6, atol=0)
    original = load_file(folders["llama"] / "model.safetensors")
    assert all(torch.equal(tensor, original[other]) for other, tensor in read.items())
    assert store.source_quantization is not None
    assert store.source_quantization["bits"] == [bits]
    assert store.source_quantization["group_size"] == [group]
    assert store.source_quantization["weights"] == sum(weight.numel() for weight in meant.values())
    assert bits <= store.bits_per_weight() < bits + 3
    assert not hasattr(store.config, "quantization_config")


@pytest.mark.parametrize("bits", range(1, 9))
@given(data=st.data())
def test_streams_of_bits_come_back(bits: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 80))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=2 * count, max_size=2 * count)))
    codes = codes.reshape(2, count)
    assert torch.equal(unpack(made.stream(codes, bits), bits, count), codes.to(torch.uint8))


def test_words_with_unused_bits_come_back() -> None:
    words = torch.tensor([[0b10_101_011_001, -1]], dtype=torch.int32)
    assert unpack_padded(words, 3, 11).tolist() == [[1, 3, 5, 2, 0, 0, 0, 0, 0, 0, 7]]
    with pytest.raises(InputError, match="cannot hold"):
        unpack_padded(words, 3, 21)


def test_elements_and_powers_are_those_of_microscaling() -> None:
    assert e2m1(torch.tensor([0x10, 0xF7], dtype=torch.uint8)).tolist() == [0.0, 0.5, 6.0, -6.0]
    exponents = e8m0(torch.tensor([0, 127, 254, 255], dtype=torch.uint8))
    assert exponents[:3].tolist() == [2.0**-127, 1.0, 2.0**127]
    assert exponents[3].isnan()


def test_fp8_agrees_with_transformers(folders: Any, tmp_path: Path) -> None:
    made.folder(folders["llama"], tmp_path / "m", FP8, made.fp8((32, 32)))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).state_dict()
    store = open_model(tmp_path / "m")
    for name, tensor in store.read(store.shapes).items():
        assert torch.equal(tensor, theirs[name])


def test_mxfp4_experts_agree_with_transformers(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rope_parameters": {"rope_theta": 1e4}}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**tiny_models.COMMON, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = made.drawn((*shape, 16), 8, generator).to(torch.uint8)
        tensors[f"{name}_scales"] = (110 + made.drawn(shape, 4, generator)).to(torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    made.describe(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    store = open_model(tmp_path)
    for name in store.shapes:
        assert torch.equal(store.read([name])[name].float(), theirs[name].float())
    assert store.source_quantization is not None
    assert store.source_quantization["group_size"] == [32]
    assert store.derivation is not None
    assert store.derivation.level == "fused"


def test_experts_that_are_listed_in_the_file_are_decoded_one_by_one(folders: Any, tmp_path: Path) -> None:
    meant = made.folder(folders["mixtral"], tmp_path / "m", GPTQ, made.gptq(4, 32, True))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert not any("experts" in name for name in meant)  # they are called w1 to w3
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if ".experts." in name]:
        stored, meant[name] = made.gptq(4, 32, True)(tensors.pop(name), generator)
        tensors |= {name.removesuffix("weight") + end: array.contiguous() for end, array in stored.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    store, wanted = open_model(tmp_path / "m"), open_model(made.plain(folders["mixtral"], tmp_path / "p", meant))
    assert store.shapes == wanted.shapes
    for name in store.shapes:
        torch.testing.assert_close(store.read([name])[name], wanted.read([name])[name], rtol=1e-6, atol=0)


def test_layers_that_lie_turned_round_are_turned(folders: Any, tmp_path: Path) -> None:
    def turned(weight: torch.Tensor, generator: torch.Generator) -> made.Encoded:
        stored, meant = made.gptq(4, 32, True)(weight.T, generator)
        return stored, meant.T.contiguous()

    source = Path(shutil.copytree(folders["gpt2"], tmp_path / "source"))
    tensors, generator, meant = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0), {}
    for name in [name for name in tensors if name.endswith(("c_attn.weight", "c_fc.weight"))]:
        stored, meant[name] = turned(tensors.pop(name), generator)
        tensors |= {name.removesuffix("weight") + end: array.contiguous() for end, array in stored.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made.describe(source, {"quantization_config": GPTQ})
    store = open_model(source)
    for name, wanted in meant.items():
        assert torch.allclose(store.read([name])[name], wanted, rtol=1e-6)


def test_what_only_rounds_activations_is_left_out_and_named(folders: Any, tmp_path: Path) -> None:
    encode = made.fp8(None, "weight_scale", input_scale=torch.tensor(0.1), k_scale=torch.tensor(1.0))
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    made.folder(folders["llama"], tmp_path / "m", settings, encode)
    source = open_model(tmp_path / "m").source_quantization
    assert source is not None
    told = " ".join(source["notes"])
    assert "rounds the inputs of these layers to fp8 (static)" in told
    assert "14 x input_scale" in told
    assert "14 x k_scale" in told
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    made.folder(folders["llama"], tmp_path / "c", made.scheme(4, kv_cache_scheme=cache), made.packed(4, 32, True))
    source = open_model(tmp_path / "c").source_quantization
    assert source is not None
    assert source["notes"] == ["its runtime rounds the KV cache to 8 bits (float); gyroquant does not"]


def test_biases_of_zeros_that_packers_add_are_let_go_of_and_others_are_not(folders: Any, tmp_path: Path) -> None:
    made.folder(folders["llama"], tmp_path / "m", GPTQ, made.gptq(4, 32, True))
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {bias: torch.zeros(64)}, path, metadata={"format": "pt"})
    assert bias not in open_model(tmp_path / "m").shapes
    save_file(tensors | {bias: torch.ones(64)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"q_proj\.bias is not zero, but its layer has no bias"):
        open_model(tmp_path / "m")


def test_layers_of_several_schemes_are_told_apart_by_name_pattern_and_kind(folders: Any, tmp_path: Path) -> None:
    calls = iter(range(100))

    def encode(weight: torch.Tensor, generator: torch.Generator) -> made.Encoded:
        return made.packed(8 if next(calls) < 7 else 4, 32, True)(weight, generator)  # the first block's come first

    def group(bits: int, target: str) -> dict[str, Any]:
        return made.scheme(bits)["config_groups"]["group_0"] | {"targets": [target]}

    groups = {"a": group(4, "Linear"), "b": group(8, r"re:.*layers\.0\..*")}
    meant = made.folder(folders["llama"], tmp_path / "m", made.scheme(4, config_groups=groups), encode)
    store = open_model(tmp_path / "m")
    for name, wanted in meant.items():
        assert torch.allclose(store.read([name])[name], wanted, rtol=1e-6)
    assert store.source_quantization is not None
    assert store.source_quantization["bits"] == [4, 8]


@pytest.mark.parametrize(
    ("file", "content", "encode"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, made.gptq(4, 32, True)),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, made.awq(4, 32)),
    ],
)
def test_settings_in_a_file_of_their_own_are_found(
    file: str, content: dict[str, Any], encode: made.Encoder, folders: Any, tmp_path: Path
) -> None:
    meant = made.folder(folders["llama"], tmp_path / "m", None, encode)
    (tmp_path / "m" / file).write_text(json.dumps(content))
    store = open_model(tmp_path / "m")
    assert isinstance(store, PrequantizedStore)
    name, wanted = next(iter(meant.items()))
    assert torch.allclose(store.read([name])[name], wanted, rtol=1e-6)


REFUSED = [
    *({"quant_method": name} for name in ("quanto", "hqq", "aqlm", "vptq", "torchao", "spqr", "higgs", "bitnet")),
    *({"quant_method": name} for name in ("eetq", "fbgemm_fp8", "quark", "modelopt", "nobody-knows-it", None)),
    GPTQ | {"checkpoint_format": "marlin"},
    GPTQ | {"is_marlin_format": True},
    AWQ | {"version": "gemv_fast"},
    made.scheme(4, transform_config={"config_groups": {"R4": {"type": "hadamard"}}}),
    made.scheme(4, sparsity_config={"format": "sparse-24-bitmask"}),
    made.scheme(4, format="marlin-24"),
    made.scheme(4, config_groups=["W4A16"]),
    made.scheme(99),
    AUTO | {"packing_format": "auto_round:mlx"},
    AUTO | {"data_type": "mx_int"},
    AUTO | {"rotation_config": {"hadamard": True}},
    FP8 | {"weight_block_size": [0, 128]},
    "gptq",
]


@pytest.mark.parametrize("settings", REFUSED, ids=lambda s: str(s)[:60])
def test_forms_that_are_not_decoded_are_refused_by_name(settings: Any, folders: Any, tmp_path: Path) -> None:
    made.folder(folders["llama"], tmp_path / "m", settings, made.gptq(4, 32, True))
    method = settings["quant_method"] if isinstance(settings, dict) else settings
    with pytest.raises(InputError, match=rf"already quantized \({method}\).*start from the model in full precision"):
        open_model(tmp_path / "m")


def test_online_rotations_are_named(folders: Any, tmp_path: Path) -> None:
    settings = made.scheme(4, transform_config={"config_groups": {"R4": {}}})
    made.folder(folders["llama"], tmp_path / "m", settings, made.packed(4, 32, True))
    with pytest.raises(InputError, match="transform_config: rotations that run with the model"):
        open_model(tmp_path / "m")


def test_eight_bit_floats_without_a_quantization_config_are_refused(folders: Any, tmp_path: Path) -> None:
    made.folder(folders["llama"], tmp_path / "m", None, lambda w, g: ({"weight": w.to(torch.float8_e4m3fn)}, w))
    with pytest.raises(InputError, match="is stored as F8_E4M3; start from the model in 16 or 32 bits"):
        open_model(tmp_path / "m")
    made.describe(tmp_path / "m", {"quantization_config": FP8})
    with pytest.raises(InputError, match="is stored as F8_E4M3 without a scale"):
        open_model(tmp_path / "m")


def cut(end: str, change: Any) -> Any:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith(end))
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


@pytest.mark.parametrize(
    ("name", "end", "change", "message"),
    [
        ("gptq 4", "qweight", lambda t: t[:-1], r"has shape \(64, 88\)"),
        ("gptq 4", "scales", lambda t: t[:, :-1], "not packed as GPTQ packs layers"),
        ("gptq 4", "qzeros", lambda t: t.float(), "not packed as GPTQ packs layers"),
        ("gptq 4", "g_idx", lambda t: t + 9, "g_idx is not 96 numbers of groups"),
        ("gptq 4", "scales", lambda t: t * torch.nan, "not finite"),
        ("awq", "qzeros", lambda t: t[:, :-1], "not packed as AutoAWQ packs layers"),
        ("fp8 in blocks", "weight_scale_inv", lambda t: t[:1], "does not fit"),
        ("nf4", "absmax", lambda t: t[:-1], "maxima are not those"),
        ("nf4", "quant_state.bitsandbytes__nf4", lambda t: t[:-3], "does not describe a tensor"),
        ("packed 4", "weight_packed", lambda t: t[:, :-1], "do not hold"),
        ("packed 4", "weight_packed", lambda t: t.float(), "not 4 bits of its scheme"),
        ("int8 of bitsandbytes", "weight_format", lambda t: t + 1, "order of a GPU's tiles"),
    ],
)
def test_damaged_layers_are_refused_by_name(
    name: str, end: str, change: Any, message: str, folders: Any, tmp_path: Path
) -> None:
    settings, encode, _, _ = FORMATS[name]
    made.folder(folders["llama"], tmp_path / "m", settings, encode)
    cut(end, change)(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        store = open_model(tmp_path / "m")
        store.read(store.shapes)


def test_missing_parts_and_plain_tensors_under_a_name_are_refused(folders: Any, tmp_path: Path) -> None:
    made.folder(folders["llama"], tmp_path / "m", GPTQ, made.gptq(4, 32, True))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.qzeros")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.qzeros"):
        open_model(tmp_path / "m")
    shutil.copytree(folders["llama"], tmp_path / "p")
    made.describe(tmp_path / "p", {"quantization_config": GPTQ})
    with pytest.raises(
        InputError, match=r"already quantized \(gptq\), as its config.json states, but none of its tensors"
    ):
        open_model(tmp_path / "p")
    frozen = made.scheme(8, config_groups={"a": made.scheme(8)["config_groups"]["group_0"]}, format="int-quantized")
    made.folder(folders["llama"], tmp_path / "f", frozen, lambda w, g: ({"weight": w, "weight_scale": w[:, :1]}, w))
    with pytest.raises(InputError, match=r"its weight is plain numbers.*not saved compressed"):
        open_model(tmp_path / "f")


def test_a_quantized_original_is_quantized_as_the_plain_model_that_it_stands_for(folders: Any, tmp_path: Path) -> None:
    meant = made.folder(folders["llama"], tmp_path / "m", FP8, made.fp8((32, 32)))
    made.plain(folders["llama"], tmp_path / "p", meant)
    for name in ("m", "p"):
        gq.quantize(tmp_path / name, "rtn-w4g16", None, tmp_path / f"{name}-out")
    one, other = (open_model(tmp_path / f"{name}-out") for name in ("m", "p"))
    assert all(torch.equal(one.read([name])[name], other.read([name])[name]) for name in one.shapes)
    config = json.loads((tmp_path / "m-out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gyroquant"
    manifest = json.loads((tmp_path / "m-out" / "gyroquant.json").read_text())
    assert manifest["source_quantization"] == open_model(tmp_path / "m").source_quantization
    assert manifest["source_quantization"]["method"] == "fp8"
    assert "quantized already (fp8, 8 bits" in manifest["warnings"][0]
    plain = json.loads((tmp_path / "p-out" / "gyroquant.json").read_text())
    assert plain["source_quantization"] is None
    assert plain["model_sha256"] == manifest["model_sha256"]
    gq.quantize(tmp_path / "m", "rtn-w4g16", None, tmp_path / "dense", options=gq.OutputOptions(dense=True))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with pytest.raises(InputError, match="is already quantized; start from the model in full precision"):
        open_original(tmp_path / "m-out")


def test_a_quantized_original_is_evaluated_inspected_and_compared(folders: Any, corpus: Path, tmp_path: Path) -> None:
    meant = made.folder(folders["llama"], tmp_path / "m", GPTQ, made.gptq(4, 32, True))
    plain = made.plain(folders["llama"], tmp_path / "p", meant)
    same = gq.evaluate(tmp_path / "m", corpus, plain, window=32, windows=4)
    assert same["kl"] < 1e-9
    assert same["true_bits_per_weight"] == open_model(tmp_path / "m").bits_per_weight()
    about = summaries.inspected(inspect_model(tmp_path / "m"))[0]
    assert "gptq, 4 bits (5.12 stored), decoded to fp32" in list(about.columns[1].cells)
    shared = SharedMeasurements(tmp_path / "shared", open_model(tmp_path / "m"), "float32")
    folder = plain_folder(shared)  # what other programs are given
    assert folder != tmp_path / "m"
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None
    assert fingerprint(open_model(folder)) == fingerprint(shared.store) == fingerprint(open_model(plain))
