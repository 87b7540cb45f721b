"""OpenVINO IR: a graph that `decoder` builds from our codes, or that `traced` traces, with tokenizer and settings. It
is for the CPU plugin, `openvino_genai.LLMPipeline` and `optimum.intel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gyroquant.errors import InputError
from gyroquant.formats.base import (
    Format,
    FormatCapabilities,
    Layer,
    ModelRequirements,
    WeightType,
    kind_of,
    requirements_of,
)
from gyroquant.formats.checkpoint import write_rest
from gyroquant.formats.decoder import EXPERT_POINTS, MODEL_TYPES, POINTS, Decoder, impossible_settings, unknown_settings
from gyroquant.formats.openvino.layout import MODEL, held_group, stored_bits
from gyroquant.formats.openvino.runtime import OpenVinoRuntime
from gyroquant.formats.openvino.tiny_proof import tracing_problem
from gyroquant.formats.operations import wider_codes
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import EvenGrid
from gyroquant.models.graph.heads import heads_of
from gyroquant.models.stores.packed import PackedStore

# Architectures that are not built and whose trace is known to be exact: tests run every one. Others are proved on a
# tiny model before any work.
TRACED = (
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma2",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "helium",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi3",
    "qwen2_moe",
    "qwen3_moe",
    "starcoder2",
)
_FEW_BITS = 3
_CAREFUL = {"KV_CACHE_PRECISION": "f16"}


class OpenVino(Format):
    """Codes of 1 or 2 bits as u2, of 3 or 4 as i4 or u4, wider ones as i8 or u8, all exact. By default, the runtime
    rounds activations and cache. Files of models with layers of 3 bits or fewer turn that off.
    """

    name = "openvino"
    title = "OpenVINO IR"
    runtime = OpenVinoRuntime
    usage = """```python
import openvino_genai

openvino_genai.LLMPipeline("FOLDER", "CPU").generate("What is a map?", max_new_tokens=50)
```"""
    packages = ("openvino", "openvino_tokenizers")
    extra = "openvino"
    capabilities = FormatCapabilities(
        weights=(
            WeightType("u2", (1, 2), midrise=True, float_zero=True, block=4),
            WeightType("i4 and u4", (3, 4), midrise=True, float_zero=True, block=2),
            WeightType("i8 and u8", (5, 6, 7, 8), midrise=True, float_zero=True, block=4),
        ),
        points=POINTS | EXPERT_POINTS,
        basis=True,
        experts=True,
        tables=True,
    )

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        reasons = [*super().incompatibilities(needs), *impossible_settings(self.title, needs.config)]
        return reasons or list(self._unproved(needs.config))

    def _unproved(self, config: Any) -> Iterable[str]:
        """Why an architecture that is not known to be exact cannot be traced; one sentence if it cannot."""
        if config is None or config.model_type in (*MODEL_TYPES, *TRACED):
            return
        if problem := tracing_problem(config):
            yield f"{self.title} does not support {config.model_type}: {problem}"

    def _layers(self, layers: Iterable[Layer]) -> Iterable[tuple[str, str]]:
        for layer in layers:
            if layer.stacked and not layer.plain:
                yield "basis", f"{self.title} cannot hold the experts {layer.name}, which are rounded in a basis"
        yield from super()._layers(layers)

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        import openvino as ov

        source = graph_of(store.config)
        model = _build(store, source)
        settings = runtime_settings(store)
        for key, value in settings.items():
            model.set_rt_info(value, ["runtime_options", key])
        ov.save_model(model, str(folder.partial / MODEL), compress_to_fp16=False)
        write_rest(store, folder, store.dtype)
        facts = {"graph": source, "runtime_options": settings, "tokenizer": _tokenizers(store, folder)}
        wider = wider_codes(requirements_of(store).layers, lambda layer: stored_bits(int(layer.grid.bits)))
        return facts | wider | repeated_scales(store)


def graph_of(config: Any) -> str:
    """How the graph of a configuration is made: "built", or "traced" if `Decoder` does not support all its settings."""
    supported = config.model_type in MODEL_TYPES and not list(unknown_settings("", config))
    return "built" if supported else "traced"


def repeated_scales(store: PackedStore) -> dict[str, Any]:
    """The scales that are written more often than in the model, so that the plugin computes the groups correctly: the
    group sizes and the extra bytes. Empty if there are none.
    """
    sizes, extra = set[str](), 0
    for layer in requirements_of(store).layers:
        grid, columns = layer.grid, layer.columns
        assert isinstance(grid, EvenGrid)
        group = grid.group_of(columns, layer.name)
        held = held_group(group, columns)
        if held != group:
            sizes.add(f"{group} as {held}")
            zeros = {"asymmetric": max(4, stored_bits(grid.bits)), "float_zero": 16 if grid.bits <= 2 else 0}
            extra += layer.rows * (columns // held - columns // group) * (16 + zeros.get(kind_of(grid), 0)) // 8
    return {"repeated_scales": {"groups": sorted(sizes), "extra_bytes": extra}} if sizes else {}


def _build(store: PackedStore, source: str) -> Any:
    if source == "built":
        from gyroquant.formats.openvino.decoder import OpenVinoDecoder

        return Decoder(store, OpenVinoDecoder(heads_of(store.graph.config))).model()
    from gyroquant.formats.openvino.stored_model import traced_store

    return traced_store(store)


def runtime_settings(store: PackedStore) -> dict[str, str]:
    """The settings of the runtime in the file that differ from its defaults: those for products of few bits. A table
    of embeddings is a product only if the head is tied to it.
    """
    tied = store.graph.tied.values()
    products = (layer for layer in requirements_of(store).layers if not layer.table or layer.name in tied)
    return dict(_CAREFUL) if any(layer.grid.bits <= _FEW_BITS for layer in products) else {}


def _tokenizers(store: PackedStore, folder: OutputFolder) -> str:
    """Writes the tokenizer and detokenizer as graphs. Returns the outcome, for the manifest."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    try:
        tokenizer = store.tokenizer()
    except InputError:
        return "none: the model has no tokenizer"
    try:
        encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # errors of many types; the model is usable without, with another tokenizer
        return f"not converted: {error}"
    ov.save_model(encoder, str(folder.partial / "openvino_tokenizer.xml"))
    ov.save_model(decoder, str(folder.partial / "openvino_detokenizer.xml"))
    return "converted"
