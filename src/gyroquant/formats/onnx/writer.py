"""ONNX: a graph that `decoder` builds from our codes, with the kernels of ONNX Runtime and the settings of
`onnxruntime_genai`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gyroquant.formats.base import Format, FormatCapabilities, Layer, ModelRequirements, requirements_of
from gyroquant.formats.checkpoint import write_rest
from gyroquant.formats.decoder import MODEL_TYPES, POINTS, Decoder, unknown_settings
from gyroquant.formats.onnx.layout import ACCURACY, DATA, MODEL, TYPES, held_bits
from gyroquant.formats.onnx.runtime import OnnxRuntime
from gyroquant.formats.operations import wider_codes
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import EvenGrid
from gyroquant.models.graph.heads import heads_of
from gyroquant.models.stores.packed import PackedStore

SETTINGS = "genai_config.json"
_LONGEST = 4096  # default length of a conversation in tokens; the program allocates memory for it at once
_HEADS = 8  # the size of a head must be a multiple of this
_CHOICES = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


class Onnx(Format):
    """Codes as `com.microsoft.MatMulNBits`, which ONNX Runtime runs at 2, 4 and 8 bits. Other widths are stored in the
    next larger one. Online maps are small products in the graph.
    """

    name = "onnx"
    title = "ONNX"
    runtime = OnnxRuntime
    usage = """```python
import onnxruntime_genai

model = onnxruntime_genai.Model("FOLDER")
tokenizer = onnxruntime_genai.Tokenizer(model)
```"""
    packages = ("onnx",)
    extra = "onnx"
    capabilities = FormatCapabilities(
        weights=tuple(TYPES.values()), points=POINTS, basis=True, tables=True, model_types=MODEL_TYPES, wide_scales=True
    )

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        return [
            *super().incompatibilities(needs),
            *unknown_settings(self.title, needs.config),
            *_head_size(needs.config),
        ]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        from gyroquant.formats.onnx.decoder import OnnxDecoder

        with (folder.partial / DATA).open("wb") as data:
            model = Decoder(store, OnnxDecoder(heads_of(store.graph.config), data)).model()
        (folder.partial / MODEL).write_bytes(model.SerializeToString())
        write_rest(store, folder, store.dtype)
        folder.json(SETTINGS, _settings(store))
        return {"accuracy_level": ACCURACY} | wider_codes(requirements_of(store).layers, _bits_in_file)


def _bits_in_file(layer: Layer) -> int:
    assert isinstance(layer.grid, EvenGrid)
    return held_bits(layer.grid, layer.columns)


def _head_size(config: Any) -> Iterable[str]:
    """Whether ONNX Runtime's attention supports the size of the heads; one sentence if it does not."""
    if config is not None:
        size = heads_of(config).size
        if size % _HEADS:
            yield f"ONNX Runtime's attention needs heads whose size is a multiple of {_HEADS}; here it is {size}"


def _settings(store: PackedStore) -> dict[str, Any]:
    """The settings with which `onnxruntime_genai` runs the graph."""
    longest = store.graph.max_positions or _LONGEST
    chosen = store.generation_config()
    search = {name: value for name in _CHOICES if (value := getattr(chosen, name, None)) is not None}
    tokens = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := _first(name, chosen, store.config)) is not None
    }
    # onnxruntime_genai selects code by the type of a model, and runs all types that map text to text in the same way.
    model = {"type": "llama", "context_length": longest, "vocab_size": store.text_config.vocab_size}
    shared = {"max_length": min(longest, _LONGEST), "past_present_share_buffer": True}
    return {"model": model | tokens | {"decoder": _decoder(store)}, "search": search | shared}


def _decoder(store: PackedStore) -> dict[str, Any]:
    """The names and sizes of the graph. `%d` stands for the number of a layer."""
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
    """A setting from the first object that has it, or None."""
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)
