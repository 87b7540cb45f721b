"""ONNX: the graph built from our codes by `decoder` on the kernels of ONNX Runtime, with the settings of
`onnxruntime_genai`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gyroquant.export.checkpoint import write_rest
from gyroquant.export.decoder import MODEL_TYPES, POINTS, Decoder, heads_of, unknown_settings
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Layer, Needs, WeightType
from gyroquant.grids import IntegerGrid
from gyroquant.models.packed import PackedStore

MODEL = "model.onnx"
DATA = "model.onnx.data"
SETTINGS = "genai_config.json"
ACCURACY = 4  # activations as 8-bit integers, block by block: what runners choose, and 50 times faster at 2 bits
_LARGEST_BLOCK = 128  # beyond it 2 bits are slow
_LONGEST = 4096  # tokens of a conversation, where a program does not say it: room for them is taken at once
_TYPES = {  # by the bits in which codes are held; 2 bits are slow in blocks of 16
    2: WeightType("MatMulNBits of 2 bits", (1, 2), midrise=True, block=32),
    4: WeightType("MatMulNBits of 4 bits", (1, 2, 3, 4), midrise=True, block=16),
    8: WeightType("MatMulNBits of 8 bits", (5, 6, 7, 8), midrise=True, block=16),
}
_HEADS = 8  # what the size of a head has to be a multiple of
_CHOICES = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


class Onnx(Format):
    """Codes as `com.microsoft.MatMulNBits`, which ONNX Runtime runs at 2, 4 and 8 bits; other widths are held in the
    next of these. Online maps are small products in the graph.
    """

    name = "onnx"
    title = "ONNX"
    packages = ("onnx",)
    extra = "onnx"
    carries = Carries(
        weights=tuple(_TYPES.values()), points=POINTS, basis=True, model_types=MODEL_TYPES, wide_scales=True
    )

    def problems(self, needs: Needs) -> list[str]:
        return [*super().problems(needs), *unknown_settings(self.title, needs.config), *_refusals(needs.config)]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        from gyroquant.export.onnx_decoder import OnnxDecoder

        with (folder.partial / DATA).open("wb") as data:
            model = Decoder(store, OnnxDecoder(heads_of(store), data)).model()
        (folder.partial / MODEL).write_bytes(model.SerializeToString())
        write_rest(store, folder, store.dtype)
        folder.json(SETTINGS, _settings(store))
        return {"accuracy_level": ACCURACY}


def held_bits(grid: IntegerGrid, columns: int) -> int:
    """In how many bits the codes of a matrix are held."""
    return next(bits for bits, kind in _TYPES.items() if kind.holds(Layer("", grid, columns)))


def block_of(group: int) -> int:
    """The largest block that divides a group, of those that kernels are fast with."""
    return min(group & -group, _LARGEST_BLOCK)


def _refusals(config: Any) -> Iterable[str]:
    """What ONNX Runtime's attention does not take."""
    if config is not None:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if size % _HEADS:
            yield f"ONNX Runtime's attention takes heads whose size is a multiple of {_HEADS}, here it is {size}"


def _settings(store: PackedStore) -> dict[str, Any]:
    """The description by which `onnxruntime_genai` runs the graph."""
    longest = getattr(store.text_config, "max_position_embeddings", _LONGEST)
    chosen = store.generation_config()
    search = {name: value for name in _CHOICES if (value := getattr(chosen, name, None)) is not None}
    tokens = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := _first(name, chosen, store.config)) is not None
    }
    # The runner knows a model by its type, and runs all that write text from text alike.
    model = {"type": "llama", "context_length": longest, "vocab_size": store.text_config.vocab_size}
    shared = {"max_length": min(longest, _LONGEST), "past_present_share_buffer": True}
    return {"model": model | tokens | {"decoder": _decoder(store)}, "search": search | shared}


def _decoder(store: PackedStore) -> dict[str, Any]:
    """The graph's names and sizes; `%d` stands for the number of a layer."""
    kinds, graph = ("key", "value"), store.graph
    return {
        "session_options": {"provider_options": []},
        "filename": MODEL,
        "head_size": graph.head_dim,
        "hidden_size": graph.hidden,
        "num_attention_heads": graph.heads,
        "num_hidden_layers": len(graph.blocks),
        "num_key_value_heads": graph.kv_heads,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in kinds},
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds},
    }


def _first(name: str, *places: Any) -> Any:
    """A setting by the first place that has it."""
    return next((value for one in places if (value := getattr(one, name, None)) is not None), None)
