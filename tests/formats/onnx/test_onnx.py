"""What ONNX alone has: codes held in 2, 4 and 8 bits, the kernels of ONNX Runtime, the settings of its GenAI runner.
For the rest see `test_decoders`.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_models
import tiny_models
import torch
from graph_formats import saved

import gyroquant as gq
from gyroquant.formats.base import Layer, ModelRequirements, format_named
from gyroquant.formats.export import export
from gyroquant.formats.onnx.layout import block_of, held_bits
from gyroquant.formats.onnx.runtime import OnnxRuntime
from gyroquant.grids import IntegerGrid

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")


def attributes(node: Any) -> dict[str, Any]:
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


@pytest.mark.parametrize(
    ("bits", "group", "held"), [(1, 32, 2), (2, 96, 2), (2, 16, 4), (3, 64, 4), (5, 48, 8), (7, -1, 8)]
)
def test_widths_are_held_in_those_that_kernels_have(bits: int, group: int, held: int) -> None:
    assert held_bits(IntegerGrid(bits=bits, group_size=group), 192) == held


def test_blocks_are_powers_of_two_that_divide_a_group() -> None:
    assert [block_of(group) for group in (16, 96, 128, 576, 1536)] == [16, 32, 128, 64, 128]


def test_groups_that_no_block_divides_are_refused() -> None:
    layer = Layer("a.weight", IntegerGrid(bits=4, group_size=24), 96)
    assert (
        "groups of 24 (a.weight); it has MatMulNBits of 4"
        in format_named("onnx").incompatibilities(ModelRequirements("llama", (layer,)))[0]
    )


@pytest.mark.parametrize("kind", [{"grid": "float_zero"}, {"symmetric": True, "midrise": True}])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_and_zero_points_take_16_bits_each(bits: int, kind: dict[str, Any], tmp_path: Path) -> None:
    """Also where the graph uses scales twice: in the product and in what is added to it. Kernels stay the fast ones."""
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256)
    sizes = {}
    for group in (32, 64):
        weights = {"bits": bits, "group_size": group, "solver": "rtn"} | kind
        store = saved_models.rounded(model, tmp_path / f"out{group}", more={"weights": weights})
        export(tmp_path / f"out{group}", "onnx", tmp_path / f"x{group}")
        sizes[group] = (tmp_path / f"x{group}" / "model.onnx.data").stat().st_size
    graph = onnx.load(tmp_path / "x64" / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {(attributes(node)["bits"], attributes(node)["accuracy_level"]) for node in products} == {(bits, 4)}
    assert all(len(node.input) == 3 for node in products)  # no zero points
    numbers = sum(prod(store.shapes[name]) for name in store.description["tensors"])
    more = numbers // 64 * (4 if "grid" in kind else 2)  # bytes of one more group in 64 weights
    assert sizes[32] - sizes[64] == pytest.approx(more, rel=0.1)  # constants are aligned


def test_heads_of_odd_sizes_are_refused() -> None:
    config = tiny_models.CONFIGS["llama"]()
    config.head_dim = 12
    needs = ModelRequirements("llama", (), (), config)
    assert "multiple of 8; here it is 12" in format_named("onnx").incompatibilities(needs)[0]


def test_kernels_of_the_runtime_are_used(tmp_path: Path) -> None:
    """One node for q, k and v, for gate and up, and for each other rounded matrix, for a norm with the sum before it,
    for RoPE and attention; windows are the attention's own.
    """
    out = saved(tiny_models.build("gemma3"), tmp_path / "out", {"R3": {"method": "hadamard"}})
    export(out, "onnx", tmp_path / "x")
    graph = onnx.load(tmp_path / "x" / "model.onnx", load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    wanted = {"MatMulNBits": 8, "GroupQueryAttention": 2, "RotaryEmbedding": 4, "RMSNormalization": 9, "Gelu": 2}
    wanted["SkipSimplifiedLayerNormalization"] = 4
    assert {kind: counts[kind] for kind in wanted} == wanted
    assert "Softmax" not in counts
    attentions = [attributes(node) for node in graph.node if node.op_type == "GroupQueryAttention"]
    config = gq.load(out).config
    windows = [config.sliding_window if kind == "sliding_attention" else -1 for kind in config.layer_types]
    assert [one.get("local_window_size", -1) for one in attentions] == windows
    levels = {attributes(node)["accuracy_level"] for node in graph.node if node.op_type == "MatMulNBits"}
    assert levels == {4}
    ids = tiny_models.tokens(gq.load(out), 1)[0]
    exact, default = (OnnxRuntime(tmp_path / "x", exact).logits(ids) for exact in (True, False))
    assert 1e-4 < (exact - default).abs().max() / exact.abs().max() < 0.1  # activations of 8 bits


def test_scales_are_stored_once_a_group(tmp_path: Path) -> None:
    """Codes of 2 bits in blocks of 64 and 128, scales of one group a row, in fp16, large ones beside the graph."""
    model = tiny_models.build("llama", hidden_size=64, intermediate_size=384)
    out = saved(model, tmp_path / "out", {}, bits=2, symmetric=True, midrise=True, group_size=-1)
    export(out, "onnx", tmp_path / "x")
    graph = onnx.load(tmp_path / "x" / "model.onnx", load_external_data=False).graph
    stored = {one.name: one for one in graph.initializer}
    blocks = {64: 64, 384: 128}
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        found, codes = attributes(node), stored[node.input[1]]
        block = blocks[found["K"]]
        assert list(codes.dims) == [found["N"], found["K"] // block, block // 4]
        assert (codes.data_location == onnx.TensorProto.EXTERNAL) == (np.prod(codes.dims) >= 1024)
        assert len(node.input) == 3  # no zero points
    scales = [one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT16 and len(one.dims) == 3]
    assert {tuple(one.dims) for one in scales} == {(64, 1, 1)}  # of the rows of 384; others have one block
    largest = max(one.ByteSize() for one in graph.initializer)
    assert largest < 1200


def test_large_constants_lie_one_behind_the_other(tmp_path: Path) -> None:
    export(saved(tiny_models.build("llama"), tmp_path / "out", {}), "onnx", tmp_path / "x", check=False)
    graph = onnx.load(tmp_path / "x" / "model.onnx", load_external_data=False).graph
    places = [{one.key: one.value for one in found.external_data} for found in graph.initializer]
    spans = [(int(one["offset"]), int(one["length"])) for one in places if one]
    assert all(offset % 64 == 0 for offset, _ in spans)
    assert all(a + length <= b for (a, length), (b, _) in pairwise(spans))
    assert sum(spans[-1]) == (tmp_path / "x" / "model.onnx.data").stat().st_size


@cache
def byte_tokenizer() -> Any:
    """A tokenizer of a kind that the GenAI runner reads, of at most 96 words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    raw.train_from_iterator(
        [tiny_models.prose(500)], trainers.BpeTrainer(vocab_size=96, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_the_genai_runner_writes_text(name: str, tmp_path: Path) -> None:
    """The tokens that ONNX Runtime alone gives, step by step in a cache that is one buffer, for each of a batch."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = tiny_models.build(name)
    model.generation_config.update(do_sample=True, top_k=7)
    recipe = {"weights": {"bits": 4, "group_size": 32, "solver": "rtn"}, "proof": {"seqlen": 32}}
    recipe |= {"calibration": {"nsamples": 2, "seqlen": 32}, "transform": {"R3": {"method": "hadamard"}}}
    gq.quantize(model, recipe, [tiny_models.prose(3000)], out=tmp_path / "out", tokenizer=byte_tokenizer())
    export(tmp_path / "out", "onnx", tmp_path / "x")
    search = json.loads((tmp_path / "x" / "genai_config.json").read_text())["search"]
    assert {
        "do_sample": True,
        "top_k": 7,
        "max_length": 128,
        "past_present_share_buffer": True,
    }.items() <= search.items()
    opened = genai.Model(str(tmp_path / "x"))
    tokenizer = genai.Tokenizer(opened)
    prompts = np.stack([tokenizer.encode("w5 w9 w2"), tokenizer.encode("w7 w1 w8")])
    assert prompts[0].tolist() == byte_tokenizer()("w5 w9 w2")["input_ids"]
    length = prompts.shape[1] + 16
    settings = genai.GeneratorParams(opened)
    settings.set_search_options(max_length=length, min_length=length, batch_size=2, do_sample=False)
    writer = genai.Generator(opened, settings)
    writer.append_tokens(prompts)
    while not writer.is_done():
        writer.generate_next_token()
    runtime = OnnxRuntime(tmp_path / "x", exact=False)
    for place, prompt in enumerate(prompts):
        written = writer.get_sequence(place).tolist()
        assert written[-16:] == unended(runtime, torch.from_numpy(prompt).long(), 16)
        assert tokenizer.decode(written) == byte_tokenizer().decode(written, skip_special_tokens=True)


def test_text_outgrows_the_first_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values move to larger buffers; a new text does not see those of the last one."""
    model = tiny_models.build("llama")
    export(saved(model, tmp_path / "out", {}), "onnx", tmp_path / "x", check=False)
    ids = tiny_models.tokens(model, 1)[0][:12]
    whole = OnnxRuntime(tmp_path / "x", exact=True).logits(ids)
    monkeypatch.setattr("gyroquant.formats.onnx.runtime._ROOM", 3)
    runtime = OnnxRuntime(tmp_path / "x", exact=True)
    runtime.logits(ids.flip(0))
    runtime.start()
    pieces = [runtime.feed(piece[None]) for piece in (ids[:2], ids[2:3], ids[3:9], *ids[9:, None])]
    assert torch.allclose(torch.cat(pieces), whole, atol=1e-5)


def unended(runtime: OnnxRuntime, ids: torch.Tensor, count: int) -> list[int]:
    """The likeliest tokens, but never the one that ends a text."""
    found: list[int] = []
    logits = runtime.logits(ids)[-1]
    while len(found) < count:
        logits[2] = -torch.inf
        found.append(int(logits.argmax()))
        logits = runtime.feed(torch.tensor([found[-1:]]))[-1]
    return found
