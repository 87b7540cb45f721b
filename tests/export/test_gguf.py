"""What a GGUF file holds, decoded here by the published block layouts, is every weight that was saved; transformers
reads the same model from it.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saving
import tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import gyroquant as gq
from gyroquant import maps
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Layer, Needs, check_fit
from gyroquant.export.gguf import Gguf
from gyroquant.grids import Fp4Grid, IntegerGrid
from gyroquant.models.online import OnlineMap
from gyroquant.models.packed import PackedStore
from gyroquant.models.sites import Insertion

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30, "Q2_0": 42}
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q2_0": 41}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
GGUF = Gguf()


def written(store: PackedStore, out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Writes a model; returns the facts, the file's metadata and its tensors as (type id, values)."""
    facts = saving.written("gguf", store, out)
    assert [path.name for path in out.iterdir()] == [facts["file"]] == ["model.gguf"]
    return facts, *read_back(out / "model.gguf")


class Bytes:
    """The bytes of a file, read one value after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, length = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(length)]
        return self.take("BbHhIif?__Qqd"[kind])


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, np.ndarray]]]:
    """A file's metadata and its tensors, by the specification: (type id, decoded fp32 values)."""
    file = Bytes(path.read_bytes())
    assert [file.take("I"), file.take("I")] == [0x46554747, 3]
    tensors, keys = file.take("Q"), file.take("Q")
    metadata = {}
    for _ in range(keys):
        key = file.string()
        metadata[key] = file.value(file.take("I"))
    table = []
    for _ in range(tensors):
        name = file.string()
        shape = [file.take("Q") for _ in range(file.take("I"))][::-1]
        table.append((name, shape, file.take("I"), file.take("Q")))
    start = -(-file.at // 32) * 32
    ends = [offset for *_, offset in table[1:]] + [len(file.data) - start]
    found = {}
    for (name, shape, kind, offset), end in zip(table, ends, strict=True):
        values, size = decoded(kind, file.data[start + offset :], shape)
        assert offset % 32 == 0
        assert end == offset + -(-size // 32) * 32, name
        found[name] = kind, values
    return metadata, found


def decoded(kind: int, data: bytes, shape: list[int]) -> tuple[np.ndarray, int]:
    """The values of a tensor and the bytes that it takes."""
    count = int(np.prod(shape))
    if kind in (0, 1, 30):
        stored = np.frombuffer(data, {0: "<f4", 1: "<f2", 30: "<u2"}[kind], count)
        plain = (stored.astype("<u4") << 16).view("<f4") if kind == 30 else stored.astype("<f4")
        return plain.reshape(shape), stored.nbytes
    block, size = {2: (32, 18), 3: (32, 20), 8: (32, 34), 42: (64, 18)}[kind]
    blocks = np.frombuffer(data, np.uint8, count // block * size).reshape(-1, size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    if kind == 8:
        values = scale * blocks[:, 2:].view(np.int8)
    elif kind == 42:
        values = scale * (np.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(-1, 64) - 1.0)
    else:
        codes = blocks[:, size - 16 :]
        codes = np.concatenate([codes & 15, codes >> 4], 1).astype(np.float32)
        offset = blocks[:, 2:4].copy().view("<f2").astype(np.float32) if kind == 3 else -8 * scale
        values = scale * codes + offset
    return values.astype(np.float32).reshape(shape), blocks.size


def original_order(values: np.ndarray, name: str, store: PackedStore) -> np.ndarray:
    """Rows of queries and keys as transformers has them: llama.cpp keeps the two of a pair of RoPE together."""
    if store.config.model_type not in ("llama", "mistral") or not any(part in name for part in ("q_proj", "k_proj")):
        return values
    heads = store.graph.heads if "q_proj" in name else store.graph.kv_heads
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(values.shape)


def target(name: str) -> str:
    """What a parameter is called in a GGUF file."""
    module, _, kind = name.rpartition(".")
    block = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        block = f"blk.{number}."
    return f"{block}{NAMES[module]}.{kind}"


def check(store: PackedStore, tensors: dict[str, Any], tolerance: float = 0.0) -> Counter[str]:
    """Everything in the file is what the store has, and there is nothing else. Returns the types of rounded weights."""
    assert tensors.keys() == {target(name) for name in store.shapes}
    types: Counter[str] = Counter()
    for name in store.shapes:
        kind, values = tensors[target(name)]
        wanted = store.read([name])[name].float().numpy()
        found = original_order(values, name, store)
        worst = float(np.abs(found - wanted).max())
        in_codes = name in store.description["tensors"]
        assert worst <= (tolerance * float(np.abs(wanted).max()) if in_codes else 0), name
        types[next(one for one, number in IDS.items() if number == kind)] += in_codes
        assert in_codes == (kind not in (0, 1, 30))
        assert wanted.ndim > 1 or kind == 0
    return +types


def same_logits(store: PackedStore, out: Path, tolerance: float = 1e-5) -> None:
    """transformers makes the same model of the file as of our own folder."""
    ours = gq.load(store.folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    ids = tiny.tokens(ours)
    with torch.no_grad():
        wanted, found = ours(ids).logits, theirs(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


MODELS = {
    "llama": {},
    "llama_tied": {},
    "llama_bias": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers does not read it from a file and takes this
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, kind) for name in MODELS for kind in ("Q4_0", "Q4_1")), ("llama", "Q8_0")]
)
def test_everything_comes_back(name: str, kind: str, tmp_path: Path) -> None:
    settings = {"Q4_0": {}, "Q4_1": {"symmetric": False}, "Q8_0": {"bits": 6, "symmetric": False}}[kind]
    store = saving.rounded(tiny.build(name, **MODELS[name]), tmp_path / "ours", **settings)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    exact = kind != "Q4_1"
    assert check(store, tensors, 0 if exact else 5e-4) == {kind: 14}
    around = 1 if name == "llama_tied" else 2
    assert facts["types"] == {kind: 14, "F16": around, "F32": len(tensors) - 14 - around}
    assert (facts["deviation"] == 0) == exact
    assert facts["deviation"] < 5e-4
    assert metadata["general.architecture"] == store.config.model_type.replace("mistral", "llama")
    assert metadata["general.file_type"] == FILE_TYPES[kind]
    if name != "llama_bias":  # transformers does not look for its biases
        same_logits(store, tmp_path / "gguf", 1e-5 if exact else 1e-3)


def test_the_metadata_describe_the_model(tmp_path: Path) -> None:
    store = saving.rounded(tiny.build("llama", **WIDE), tmp_path / "ours")
    facts, metadata, _ = written(store, tmp_path / "gguf")
    assert metadata == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "ours",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 128,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": 96,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "none",
    }
    (note,) = facts["notes"]
    assert "the file has no tokenizer" in note
    assert "WordLevel" in note


@pytest.mark.parametrize(
    ("bits", "settings", "group_size", "kind"),
    [
        (1, {}, 64, "Q2_0"),
        (1, {}, 32, "Q4_0"),
        (1, {"symmetric": False}, 128, "Q2_0"),
        (2, {}, 64, "Q2_0"),
        (2, {}, 128, "Q2_0"),
        (2, {}, -1, "Q2_0"),
        (2, {"symmetric": False}, 64, "Q4_0"),
        (2, {"midrise": True}, 128, "Q4_0"),
        (3, {}, 128, "Q4_0"),
        (3, {"symmetric": False}, -1, "Q4_0"),
        (3, {"midrise": True}, 64, "Q4_0"),
        (4, {}, -1, "Q4_0"),
        (4, {"symmetric": False}, 64, "Q4_1"),
        (4, {"symmetric": False}, -1, "Q4_1"),
        (4, {"midrise": True}, -1, "Q8_0"),
        (5, {}, 64, "Q8_0"),
        (7, {"symmetric": False}, 128, "Q8_0"),
        (7, {"midrise": True}, 64, "Q8_0"),
        (8, {}, 128, "Q8_0"),
    ],
)
def test_every_grid_comes_back(
    bits: int, settings: dict[str, Any], group_size: int, kind: str, wide: dict[str, Any], tmp_path: Path
) -> None:
    store = saving.rounded(wide["model"], tmp_path / "ours", bits=bits, group_size=group_size, **settings)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    assert check(store, tensors, 5e-4 if kind == "Q4_1" else 0) == {kind: 14}
    assert metadata["general.file_type"] == FILE_TYPES[kind]
    assert (facts["deviation"] > 0) == (kind == "Q4_1")
    scales = torch.cat([store.quantized(name).params.scale.flatten() for name in store.description["tensors"]])
    assert bool((scales < 0).any()) == (bits > 1 and settings.get("symmetric", True))
    codes = torch.cat([store.quantized(name).codes.flatten() for name in store.description["tensors"]])
    assert set(codes.unique().tolist()) >= {0, 2**bits - 1}  # both ends were there to go wrong


@pytest.fixture(scope="module")
def wide() -> dict[str, Any]:
    """A tiny Llama with rows of 128 and 256 weights."""
    return {"model": tiny.build("llama", **WIDE)}


def test_groups_too_small_for_the_smallest_type_take_the_next(tmp_path: Path) -> None:
    store = saving.rounded(tiny.build("llama"), tmp_path / "ours", bits=2)
    assert check(store, written(store, tmp_path / "gguf")[2]) == {"Q4_0": 14}
    same_logits(store, tmp_path / "gguf")


def test_layers_may_differ(wide: dict[str, Any], tmp_path: Path) -> None:
    overrides = [{"layers": ["down_proj"], "bits": 2}, {"layers": ["v_proj"], "bits": 4, "symmetric": False}]
    store = saving.rounded(wide["model"], tmp_path / "ours", overrides=overrides, bits=6, group_size=64)
    facts, metadata, tensors = written(store, tmp_path / "gguf")
    assert check(store, tensors, 5e-4) == {"Q8_0": 10, "Q2_0": 2, "Q4_1": 2}
    assert metadata["general.file_type"] == 7
    assert {key: facts["types"][key] for key in ("Q2_0", "Q8_0", "Q4_1")} == {"Q8_0": 10, "Q2_0": 2, "Q4_1": 2}


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16", "float16"])
def test_other_weights_are_held_exactly(save_dtype: str, tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 2.0**-30  # too small for fp16
        model.lm_head.weight.copy_(model.lm_head.weight.half())
    store = saving.rounded(model, tmp_path / "ours", save_dtype=save_dtype)
    _, _, tensors = written(store, tmp_path / "gguf")
    check(store, tensors)
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    assert tensors["token_embd.weight"][0] == IDS[kinds[save_dtype]]
    assert tensors["output.weight"][0] == IDS["F16"]
    same_logits(store, tmp_path / "gguf")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_scaled_rope(tmp_path: Path) -> None:
    store = saving.rounded(tiny.build("llama", rope_parameters=LLAMA3), tmp_path / "llama3")
    _, metadata, tensors = written(store, tmp_path / "a")
    kind, factors = tensors.pop("rope_freqs.weight")
    assert check(store, tensors) == {"Q4_0": 14}
    plain = 500.0 ** -(np.arange(0, 16, 2) / 16)
    wanted = tiny.build("llama", rope_parameters=LLAMA3).model.rotary_emb.inv_freq.numpy()
    assert kind == 0
    assert np.allclose(plain / factors, wanted, rtol=1e-6)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    assert metadata["llama.rope.freq_base"] == 500
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    _, metadata, _ = written(
        saving.rounded(tiny.build("qwen2", rope_parameters=linear), tmp_path / "linear"), tmp_path / "b"
    )
    assert (metadata["qwen2.rope.scaling.type"], metadata["qwen2.rope.scaling.factor"]) == ("linear", 4)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("qwen3", {"rope_parameters": LLAMA3}, "RoPE of type default, linear for qwen3, not of type llama3"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "for llama, not of type dynamic"),
        ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "turns whole heads of llama"),
        ("llama", {"hidden_act": "gelu"}, "with the activation silu, not gelu"),
        ("qwen3", {"attention_bias": True}, r"no place for the biases \(attention_bias\) of qwen3"),
    ],
)
def test_settings_that_llama_cpp_does_not_run_are_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    config = tiny.CONFIGS[name]()
    assert GGUF.problems(replace(needs(name), config=config)) == []
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(gq.InputError, match=reason):
        check_fit(GGUF, replace(needs(name), config=config))


def test_half_a_scale_that_fp16_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 0
    store = saving.rounded(model, tmp_path / "ours", bits=2, midrise=True)
    reason = r"layers.1.mlp.up_proj.weight has a group with so small a scale .* leave midrise out"
    with pytest.raises(gq.InputError, match=reason), OutputFolder(tmp_path / "gguf") as folder:
        GGUF.write(store, folder)
    assert not (tmp_path / "gguf").exists()


def test_a_window_is_noted(tmp_path: Path) -> None:
    store = saving.rounded(tiny.build("mistral", sliding_window=32), tmp_path / "ours")
    notes = written(store, tmp_path / "gguf")[0]["notes"]
    assert any("not to the last 32" in note for note in notes)


DOWN = "model.layers.0.mlp.down_proj"


def needs(model_type: str = "llama", online: tuple[Any, ...] = (), **settings: Any) -> Needs:
    grid = IntegerGrid(**{"bits": 4, "group_size": 32, "symmetric": True} | settings)
    return Needs(model_type, (Layer(f"{DOWN}.weight", grid, 96),), online)


def test_what_fits_has_no_problems() -> None:
    for fine in (needs(), needs(bits=2, symmetric=False), needs("qwen3", group_size=-1), needs(bits=6, midrise=True)):
        assert GGUF.problems(fine) == []


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (needs("gemma3_text"), "is written for llama, mistral, qwen2, qwen3, not for gemma3_text"),
        (
            needs(group_size=16),
            r"has no type for 4-bit symmetric weights in groups of 16 .*; it has Q4_0 \(4 bits, symmetric, groups of "
            r"32 or multiples of it\) and Q4_1",
        ),
        (needs(bits=8, symmetric=False), "has no type for 8-bit asymmetric weights"),
        (needs(bits=8, midrise=True), "has no type for 8-bit midrise weights"),
        (
            Needs("llama", (Layer(f"{DOWN}.weight", Fp4Grid(group_size=32), 96),)),
            "has no type for the grid fp4",
        ),
        (
            needs(online=(OnlineMap(Insertion("input", DOWN), maps.hadamard(32)),)),
            f"has no place for the map that runs in front of {DOWN}; leave that site out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(wanted: Needs, reason: str) -> None:
    with pytest.raises(gq.InputError, match=rf"GGUF \(llama.cpp\) {reason}"):
        check_fit(GGUF, wanted)


# Tokenizers

TEXTS = ["Hello world, it's 2026!", "  two  spaces\n\nand 1234567 digits", "ünïcödé <|end|>and x == y;\t", "<tool>a b"]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROWS = 400


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


CUTS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (words(), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words()]), False),
    "qwen2": (split(QWEN2), False),
    "llama-bpe": (split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), True),
    "smaug-bpe": (split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), False),
    "unknown": (split(r"\p{N}+|\p{L}+"), False),
    "prefixed": (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
}


def byte_level(cut: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the texts above, that puts <|start|> in front of a text."""
    pre_tokenizer, whole = CUTS[cut]
    raw = Tokenizer(models.BPE(ignore_merges=whole))
    raw.pre_tokenizer, raw.decoder = pre_tokenizer, decoders.ByteLevel()
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    raw.add_tokens(["<tool>"])
    raw.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    if cut == "qwen2":
        raw.normalizer = normalizers.NFC()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|start|>", eos_token="<|end|>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as sentencepiece makes them: every way to make a piece is a merge, in the order of the pieces."""
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "\u2581")} - {"ü", "\n", "\t"})
    made = [
        "\u2581a",
        "an",
        "nd",
        "in",
        "wo",
        "it",
        "\u2581\u2581",
        "and",
        "\u2581and",
        "wor",
        "\u2581wor",
        "it'",
        "12",
        "34",
        "1234",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *made, *letters]
    known = set(tokens)
    merges = [
        (piece[:k], piece[k:])
        for piece in made
        for k in range(1, len(piece))
        if piece[:k] in known and piece[k:] in known
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    """A rounded model with rows enough for the tokenizers above."""
    return saving.rounded(tiny.build("llama", vocab_size=ROWS), tmp_path_factory.mktemp("talking") / "ours")


def with_tokenizer(store: PackedStore, tokenizer: Any, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts and the metadata of a file of this model with another tokenizer."""
    tokenizer.save_pretrained(store.folder)
    facts, metadata, _ = written(store, out)
    return facts, {key.removeprefix("tokenizer."): value for key, value in metadata.items() if "tokenizer." in key}


def same_ids(tokenizer: Any, out: Path, texts: list[str]) -> None:
    read = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    for text in texts:
        wanted = tokenizer.encode(text, add_special_tokens=False)
        assert read.encode(text, add_special_tokens=False) == wanted, text


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
def test_byte_level_tokenizers(cut: str, talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = byte_level(cut)
    facts, found = with_tokenizer(talking, tokenizer, tmp_path / "gguf")
    assert [" NFC " in note for note in facts["notes"]] == [True] * (cut == "qwen2")
    tokens, types = found.pop("ggml.tokens"), found.pop("ggml.token_type")
    merges = found.pop("ggml.merges")
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": cut,
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_eos_token": False,
        "ggml.add_space_prefix": False,
        "chat_template": tokenizer.chat_template,
    }
    assert len(tokens) == len(types) == len(set(tokens)) == ROWS
    size = len(tokenizer)
    assert tokens[:size] == tokenizer.convert_ids_to_tokens(list(range(size)))
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, ROWS)]
    assert types == [3, 3, *[1] * (size - 3), 4, *[5] * (ROWS - size)]
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [tuple(merge.split(" ")) for merge in merges] == [tuple(pair) for pair in spec["model"]["merges"]]
    if cut not in ("smollm", "llama-bpe"):  # transformers knows neither the first nor whole words
        same_ids(tokenizer, tmp_path / "gguf", TEXTS)


@pytest.mark.parametrize("cut", ["unknown", "prefixed"])
def test_tokenizers_that_llama_cpp_has_not_are_left_out(cut: str, talking: PackedStore, tmp_path: Path) -> None:
    facts, found = with_tokenizer(talking, byte_level(cut), tmp_path / "gguf")
    assert found == {"ggml.model": "none"}
    (note,) = facts["notes"]
    assert "llama.cpp does not cut out words as its tokenizer does" in note


def test_tokenizers_of_sentencepiece(talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = pieces()
    facts, found = with_tokenizer(talking, tokenizer, tmp_path / "gguf")
    assert facts["notes"] == []
    scores, types = found["ggml.scores"], found["ggml.token_type"]
    assert (found["ggml.model"], found["ggml.add_space_prefix"], found["ggml.add_bos_token"]) == ("llama", True, True)
    assert "ggml.merges" not in found
    assert types[:4] == [2, 3, 3, 6]
    assert types.count(6) == 256
    assert scores[259:274] == [-i for i in range(15)]
    assert all(score < -14 for score in (*scores[:259], *scores[274:]))
    same_ids(tokenizer, tmp_path / "gguf", [text for text in TEXTS if "<" not in text and not text.startswith(" ")])
    for scheme in ("never", "first"):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        facts, found = with_tokenizer(talking, tokenizer, tmp_path / scheme)
        assert found["ggml.add_space_prefix"] == bool(facts["notes"]) == (scheme == "first")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["merges"] = spec["model"]["merges"][::2] + spec["model"]["merges"][1::2]
    mixed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>")
    facts, found = with_tokenizer(talking, mixed, tmp_path / "mixed")
    assert found == {"ggml.model": "none"}
    assert "not sorted by the pieces" in facts["notes"][0]


def test_tokens_without_a_row_are_left_out(talking: PackedStore, tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(100)])
    tokenizer.pad_token = "<extra99>"
    facts, found = with_tokenizer(talking, tokenizer, tmp_path / "gguf")
    assert found["ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(ROWS)))
    assert "ggml.padding_token_id" not in found
    assert facts["notes"] == ["tokens from 400 on have no row in the embedding and were left out"]


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    store = saving.rounded(tiny.build("qwen2"), tmp_path / "ours")
    for path in store.folder.glob("tokenizer*"):
        path.unlink()
    facts, metadata, _ = written(store, tmp_path / "gguf")
    assert metadata["tokenizer.ggml.model"] == "none"
    assert "the file has no tokenizer" in facts["notes"][-1]
