"""OpenVINO IR: the graph built from our codes by `openvino_decoder`, with tokenizer and settings, for the CPU plugin,
`openvino_genai.LLMPipeline` and `optimum.intel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.errors import InputError
from gyroquant.export.checkpoint import write_rest
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType
from gyroquant.models.packed import PackedStore

MODEL = "openvino_model.xml"
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not change with the length of the text
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
        points=frozenset({"input", "output", "qk"}),
        model_types=(
            "llama",
            "mistral",
            "smollm3",
            "granite",
            "seed_oss",
            "qwen2",
            "qwen3",
            "gemma3_text",
        ),
    )

    def problems(self, needs: Needs) -> list[str]:
        return [*super().problems(needs), *_unknown_settings(needs.config)]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        import openvino as ov

        from gyroquant.export.openvino_decoder import Decoder

        model = Decoder(store).model()
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


def _unknown_settings(config: Any) -> Iterable[str]:
    """What a configuration asks for that the graph has no operation for."""
    if config is None:
        return
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if act not in _ACTIVATIONS:
        yield f"OpenVINO IR is written for the activations {' and '.join(_ACTIVATIONS)}, not {act}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield "OpenVINO IR is not written for attention whose scores are capped (attn_logit_softcapping)"
    if getattr(config, "use_bidirectional_attention", None):
        yield "OpenVINO IR is not written for attention in both directions (use_bidirectional_attention)"
    settings = getattr(config, "rope_parameters", None) or {}
    for one in [value for value in settings.values() if isinstance(value, Mapping)] or [settings]:
        kind = one.get("rope_type", "default")
        if kind not in _FIXED_ROPE:
            yield f"OpenVINO IR is written for RoPE of the kinds {', '.join(_FIXED_ROPE)}, not {kind}"
        if one.get("partial_rotary_factor") not in (None, 1.0):
            yield "OpenVINO IR is not written for RoPE that turns only a part of each head (partial_rotary_factor)"


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
