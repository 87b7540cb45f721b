"""OpenVINO IR: the graph built from our codes by `decoder`, or traced by `openvino_traced`, with tokenizer and
settings, for the CPU plugin, `openvino_genai.LLMPipeline` and `optimum.intel`.
"""

from __future__ import annotations

from typing import Any

from gyroquant.errors import InputError
from gyroquant.export.checkpoint import write_rest
from gyroquant.export.decoder import MODEL_TYPES, POINTS, Decoder, heads_of, impossible_settings, unknown_settings
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType, needs_of
from gyroquant.grids import IntegerGrid
from gyroquant.models.packed import PackedStore

MODEL = "openvino_model.xml"
# What is known to trace exactly beside what is built: tests run every one of these.
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
    "nemotron",
    "olmo2",
    "olmo3",
    "opt",
    "phi3",
    "starcoder2",
)
# The CPU plugin of OpenVINO 2026.4.1 takes one group's scale for other groups' weights where groups do not fit the
# blocks in which it walks through a row. In calls of one to four rows a group that is larger than such a block must
# be a multiple of it: of 32 weights of 4 bits (64 where products run in bfloat16), 64 (128) of 2 bits, 4 (8) of 8
# bits. Longer rows are cut into larger blocks besides, in calls of any length: in rows of 3,072, groups of 24, 48 and
# 192 are wrong at every width in bfloat16. Powers of two fit all of these blocks, and one group a row needs none.
# Rows of codes that do not fill whole bytes are wrong too, at 8 bits those of odd length. Seen in products alone, in
# 1 to 64 rows, beside exact ones.
_LARGEST_GROUP = 256
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
            WeightType("u2", (1, 2), midrise=True, block=4),
            WeightType("i4 and u4", (3, 4), midrise=True, block=2),
            WeightType("i8 and u8", (5, 6, 7, 8), midrise=True, block=4),
        ),
        points=POINTS,
        basis=True,
        model_types=tuple(sorted((*MODEL_TYPES, *TRACED))),
    )

    def problems(self, needs: Needs) -> list[str]:
        return [*super().problems(needs), *impossible_settings(self.title, needs.config)]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        import openvino as ov

        way = graph_of(store.config)
        model = _made(store, way)
        settings = runtime_settings(store)
        for key, value in settings.items():
            model.set_rt_info(value, ["runtime_options", key])
        ov.save_model(model, str(folder.partial / MODEL), compress_to_fp16=False)
        write_rest(store, folder, store.dtype)
        facts = {"graph": way, "runtime_options": settings, "tokenizer": _tokenizers(store, folder)}
        return facts | repeated_scales(store)


def graph_of(config: Any) -> str:
    """How the graph of a configuration comes to be: "built", or "traced" where the builder does not know everything."""
    known = config.model_type in MODEL_TYPES and not list(unknown_settings("", config))
    return "built" if known else "traced"


def held_group(group: int, columns: int) -> int:
    """How many weights of a row of `columns` share a scale in the file, where `group` of them do in the model: the
    largest power of two that divides the group, unless it is the row. The plugin computes others wrongly.
    """
    return group if group == columns else min(group & -group, _LARGEST_GROUP)


def repeated_scales(store: PackedStore) -> dict[str, Any]:
    """What is written more often than the model has it, for the sake of groups that the plugin computes rightly."""
    sizes, extra = set[str](), 0
    for layer in needs_of(store).layers:
        grid, columns = layer.grid, layer.columns
        assert isinstance(grid, IntegerGrid)
        group = grid.group_of(columns, layer.name)
        held = held_group(group, columns)
        if held != group:
            sizes.add(f"{group} as {held}")
            zero = 0 if grid.symmetric else stored_bits(grid.bits)
            extra += layer.rows * (columns // held - columns // group) * (16 + zero) // 8
    return {"repeated_scales": {"groups": sorted(sizes), "extra_bytes": extra}} if sizes else {}


def stored_bits(bits: int) -> int:
    """How many bits hold a code or zero point."""
    return next(width for width in (2, 4, 8) if bits <= width)


def _made(store: PackedStore, way: str) -> Any:
    if way == "built":
        from gyroquant.export.openvino_decoder import OpenVinoDecoder

        return Decoder(store, OpenVinoDecoder(heads_of(store))).model()
    from gyroquant.export.openvino_traced import traced

    return traced(store)


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
