"""llama.cpp makes of a GGUF file the model that was saved, and rounds it again as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from selection import some
from tiny_tokenizers import ROWS, TEXTS, byte_level, pieces
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import gyroquant as gq
from gyroquant.cli.chat_session import Chat
from gyroquant.errors import InputError, ProofError
from gyroquant.formats.export import relative_error
from gyroquant.formats.gguf import header as gguf_header
from gyroquant.formats.gguf import llama_cpp_runtime as llama_cpp
from gyroquant.formats.gguf import tensors
from gyroquant.formats.gguf.llama_cpp_runtime import LlamaCppRuntime, LlamaModel, LlamaTokenizer
from gyroquant.models.stores.packed import PackedStore
from gyroquant.report import console, summaries

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
HUGE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # rows of K-quants' blocks
GRIDS: dict[str, dict[str, Any]] = {
    "Q4_0": {},
    "Q4_1": {"symmetric": False},
    "Q8_0": {"bits": 8},
    "Q2_0": {"bits": 2, "group_size": 64},
    "midrise": {"bits": 2, "group_size": 64, "midrise": True},
}
IDS = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1))


def exported(name: str, out: Path, changes: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """A tiny model, rounded into OUT/ours and written into OUT/gguf; returns the manifest of that."""
    store = saved_models.rounded(tiny_models.build(name, **(changes or WIDE)), out / "ours", **weights)
    return gq.export(store.folder, "gguf", out / "gguf")


@torch.no_grad()
def as_llama_cpp_rounds(folder: Path, ids: Tensor) -> Tensor:
    """Our logits with what the rounded layers read rounded to 8 bits in blocks of 32, by the layout of Q8_0."""
    model = gq.load(folder, dtype="float32")

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        blocks = inputs[0].unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return ((blocks / scale.clamp_min(1e-30)).round() * scale.half().float()).flatten(-2)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(look)
    return model(ids[None]).logits[0]


@pytest.mark.parametrize(
    "name", some(["llama", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen3"], ["llama_tied", "qwen2", "qwen3"])
)
@pytest.mark.parametrize("kind", GRIDS)
def test_llama_cpp_runs_what_was_saved(name: str, kind: str, tmp_path: Path) -> None:
    check = exported(name, tmp_path, **GRIDS[kind])["check"]
    assert check["runtime"] == "llama.cpp"
    assert check["relative_logit_error"] < (1e-3 if kind == "Q4_1" else 1e-5)
    ours = saved_models.our_logits(tmp_path / "ours", IDS.tolist())
    rounded = as_llama_cpp_rounds(tmp_path / "ours", IDS)
    found = LlamaCppRuntime(tmp_path / "gguf", exact=False).logits(IDS)
    assert relative_error(found, ours) < 2 * relative_error(rounded, ours)  # there is nothing else that it rounds


@pytest.mark.parametrize("exact", [True, False])
def test_step_by_step(exact: bool, tmp_path: Path) -> None:
    exported("llama", tmp_path)
    runtime = LlamaCppRuntime(tmp_path / "gguf", exact)
    whole = runtime.logits(IDS)
    runtime.start()
    steps = torch.cat([runtime.feed(part[None]) for part in (IDS[:5], *IDS[5:].split(1))])
    assert relative_error(steps, whole) < (1e-5 if exact else 3e-2)
    assert runtime.greedy(IDS[:5], 1) == [int(whole[4].argmax())]
    assert torch.equal(runtime.logits(IDS), whole)  # what was read before is forgotten


def test_longer_texts_get_more_room(tmp_path: Path) -> None:
    exported("llama", tmp_path, WIDE | {"max_position_embeddings": 4096})
    runtime = LlamaCppRuntime(tmp_path / "gguf", exact=True)
    ids = torch.randint(3, 96, (1200,), generator=torch.Generator().manual_seed(2))
    whole = runtime.logits(ids)
    wanted = saved_models.our_logits(tmp_path / "ours", ids.tolist())
    assert relative_error(whole, wanted) < 1e-4
    other = LlamaCppRuntime(tmp_path / "gguf", exact=True)
    parts = torch.cat([other.feed(part[None]) for part in ids.split(300)])
    assert relative_error(parts, whole) < 1e-5


def test_a_file_with_rows_out_of_order_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors._Plan, "_order", lambda self, part: slice(None))
    with pytest.raises(ProofError, match=r"another model .* when llama.cpp runs it in fp32: .* No export was written"):
        exported("llama", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_broken_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exported("llama", tmp_path)
    path = tmp_path / "gguf" / "model.gguf"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"llama.cpp cannot open .*model.gguf: .+"):
        LlamaModel(path)
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    """A model whose groups are too small for any type that holds codes."""
    out = tmp_path_factory.mktemp("wide") / "ours"
    return saved_models.rounded(tiny_models.build("llama", **HUGE), out, bits=5, group_size=16, symmetric=False)


@pytest.mark.parametrize(
    ("kind", "main", "bits"),
    [
        ("Q8_0", "Q8_0", 8.5),
        ("q6_k", "Q6_K", 6.5625),
        ("Q4_K_M", "Q4_K", 4.5),
        ("Q3_K_S", "Q3_K", 3.4375),
    ],
)
def test_rounded_again(kind: str, main: str, bits: float, wide: PackedStore, tmp_path: Path) -> None:
    manifest = gq.export(wide.folder, "gguf", tmp_path / "x", requantize=kind)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "gyroquant_export.json",
        "model.gguf",
    ]
    facts, check = manifest["facts"], manifest["check"]
    assert facts["types_of_rounded"][main] >= 8
    assert sum(facts["types_of_rounded"].values()) == 14
    assert sum(facts["types"].values()) == len(wide.shapes)
    assert facts["bits_per_rounded_weight"] == pytest.approx(bits, abs=0.8)
    ids = tiny_models.tokens(tiny_models.build("llama", **HUGE))[0]
    read = saved_models.logits(tmp_path / "x", gguf_file=gguf_header.GGUF_FILE)[0]
    assert relative_error(LlamaCppRuntime(tmp_path / "x", exact=True).logits(ids), read) < 1e-5
    assert 1e-3 < check["relative_logit_error"] < 2
    assert check["kl"] > 0


@pytest.mark.usefixtures("unmeasured")
def test_no_tolerance_applies_to_what_is_rounded_again(wide: PackedStore, tmp_path: Path) -> None:
    gq.export(wide.folder, "gguf", tmp_path / "x", requantize="Q3_K_S")
    result = gq.verify_export(tmp_path / "x", wide.folder, tokens=2, window=32)
    assert result["passed"]
    assert result["tolerance"] is None
    assert result["ways"]["exact"]["relative_logit_error"] > 0.1
    console.show(*summaries.verified(result))


def test_rows_that_do_not_fit_fall_back(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama", **WIDE), tmp_path / "ours", bits=3, group_size=16)
    facts = gq.export(store.folder, "gguf", tmp_path / "x", requantize="Q4_K_S")["facts"]
    assert facts["types_of_rounded"] == {"Q5_0": 10, "Q5_1": 2, "Q4_K": 2}  # rows of 128 weights, and of 256


def test_what_llama_cpp_refuses_leaves_nothing(wide: PackedStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama.cpp cannot write IQ2_XS: .*importance matrix.*choose another type"):
        gq.export(wide.folder, "gguf", tmp_path / "x", requantize="IQ2_XS")
    with pytest.raises(InputError, match=r"llama.cpp has no type 'Q9_K'; use one of .*Q4_K_M"):
        gq.export(wide.folder, "gguf", tmp_path / "x", requantize="Q9_K")
    assert list(tmp_path.iterdir()) == []


def test_maps_online_are_refused_as_well(tmp_path: Path) -> None:
    transform = {"R4": {"method": "hadamard", "block": 32}}
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "ours", transform)
    with pytest.raises(InputError, match="cannot run the online map before"):
        gq.export(store.folder, "gguf", tmp_path / "x", requantize="Q8_0")


def talking(tokenizer: PreTrainedTokenizerFast, out: Path) -> Path:
    """A model with this tokenizer, exported."""
    store = saved_models.rounded(tiny_models.build("llama", vocab_size=ROWS), out / "ours")
    tokenizer.save_pretrained(store.folder)
    gq.export(store.folder, "gguf", out / "gguf", check=False)
    return out / "gguf"


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "sentencepiece"])
def test_tokenizers_give_the_same_ids_and_texts(cut: str, tmp_path: Path) -> None:
    wanted = pieces() if cut == "sentencepiece" else byte_level(cut)
    found = LlamaTokenizer(LlamaModel(talking(wanted, tmp_path) / gguf_header.GGUF_FILE))
    texts = TEXTS if cut != "sentencepiece" else [text for text in TEXTS if "<" not in text]
    for text in texts:
        ids = wanted(text)["input_ids"]
        assert found(text)["input_ids"] == ids, text
        assert found(text, add_special_tokens=False)["input_ids"] == ids[1:]
        read = wanted.decode(ids[1:], skip_special_tokens=True)
        assert found.decode(ids[1:], skip_special_tokens=True) == (read[1:] if cut == "sentencepiece" else read)
    assert wanted.eos_token_id in found.ends


def test_chat_is_through_llama_cpp(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    talk = Chat(talking(byte_level("smollm"), tmp_path))
    assert isinstance(talk.runtime, LlamaCppRuntime)
    assert isinstance(talk.tokenizer, LlamaTokenizer)
    assert talk.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "Hello"
    said = "".join(talk.ask("Hello world", 8))
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    assert capfd.readouterr().err == ""
    exported("llama", tmp_path / "silent")
    with pytest.raises(InputError, match="no usable tokenizer: the GGUF file has none"):
        Chat(tmp_path / "silent" / "gguf")


def test_the_room_for_decoding_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported("llama", tmp_path)
    path = tmp_path / "gguf" / "model.gguf"
    numbers = sum(one.numbers for one in gguf_header.stored_tensors(path).values())
    asked: list[int] = []
    monkeypatch.setattr(llama_cpp, "check_room", lambda place, needed: asked.append(needed))
    llama_cpp.open_exactly(path)
    assert asked == [4 * numbers]
