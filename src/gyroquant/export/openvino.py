"""OpenVINO IR: the graph built from our codes by `decoder`, with tokenizer and settings, for the CPU plugin,
`openvino_genai.LLMPipeline` and `optimum.intel`.
"""

from __future__ import annotations

from typing import Any

from gyroquant.errors import InputError
from gyroquant.export.checkpoint import write_rest
from gyroquant.export.decoder import MODEL_TYPES, POINTS, Decoder, heads_of, unknown_settings
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType
from gyroquant.models.packed import PackedStore

MODEL = "openvino_model.xml"
_FEW_BITS = 3
_CAREFUL = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f16"}


class OpenVino(Format):
    """Codes of 1 or 2 bits as u2, of 3 or 4 as i4 or u4, wider ones as i8 or u8, all exact. Models that have layers of
    3 bits or fewer ask the runtime to round neither activations nor cache of its own accord, which its default does.
    """

    name = "openvino"
    title = "OpenVINO IR"
    packages = ("openvino", "openvino_tokenizers")
    extra = "openvino"
    carries = Carries(
        weights=(
            WeightType("u2", (1, 2), midrise=True),
            WeightType("i4 and u4", (3, 4), midrise=True),
            WeightType("i8 and u8", (5, 6, 7, 8), midrise=True),
        ),
        points=POINTS,
        model_types=MODEL_TYPES,
    )

    def problems(self, needs: Needs) -> list[str]:
        return [*super().problems(needs), *unknown_settings(self.title, needs.config)]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        import openvino as ov

        from gyroquant.export.openvino_decoder import OpenVinoDecoder

        model = Decoder(store, OpenVinoDecoder(heads_of(store))).model()
        settings = runtime_settings(store)
        for key, value in settings.items():
            model.set_rt_info(value, ["runtime_options", key])
        ov.save_model(model, str(folder.partial / MODEL), compress_to_fp16=False)
        write_rest(store, folder, store.dtype)
        return {"runtime_options": settings, "tokenizer": _tokenizers(store, folder)}


def runtime_settings(store: PackedStore) -> dict[str, str]:
    """What the file tells the runtime to do otherwise than by default."""
    few = any(spec.get("bits", 16) <= _FEW_BITS for spec in store.description["grids"])
    return dict(_CAREFUL) if few else {}


def _tokenizers(store: PackedStore, folder: OutputFolder) -> str:
    """Writes the tokenizer and detokenizer as graphs; says what came of it."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    try:
        tokenizer = store.tokenizer()
    except InputError:
        return "none: the model has no tokenizer"
    try:
        there, back = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # many kinds; the model is as good without, for programs that bring their own
        return f"not converted: {error}"
    ov.save_model(there, str(folder.partial / "openvino_tokenizer.xml"))
    ov.save_model(back, str(folder.partial / "openvino_detokenizer.xml"))
    return "converted"
