"""The quantizer of ik_llama.cpp, a fork of llama.cpp: its own types of 2 to 4 bits, and those of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gyroquant.benchmark.external_tools.llama_cpp import SUPERBLOCK, LlamaCpp, type_settings


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp through the program `llama-quantize` of its prebuilt package, which needs a processor with AVX2.

    As `LlamaCpp`, with the fork's own codes, mixtures and types: non-linear ones (IQ2_K and others, with a scale per
    row KS and KSS) and trellises (KT). llama.cpp does not read the fork's types. `dense` is decoded by the fork.
    """

    name = "ik_llama.cpp"
    script = "ik_llama_cpp.py"
    home = "ikawrakow/ik_llama.cpp"
    requirements = ("ik-llama-cpp-python==0.1.5", "gguf==0.19.0", "transformers==5.23.0", "accelerate==1.15.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Q4_0": type_settings("Q4_0", 4, 32),
        "Q4_0 imatrix": type_settings("Q4_0", 4, 32, imatrix=True),
        "Q4_1": type_settings("Q4_1", 4, 32),
        "IQ4_NL imatrix": type_settings("IQ4_NL", 4, 32, imatrix=True),
        **{
            f"{kind} imatrix": type_settings(kind, int(kind.lstrip("I")[1]), SUPERBLOCK, imatrix=True)
            for kind in (
                *("Q2_K", "IQ2_XS", "IQ2_M", "IQ2_KS", "IQ2_K", "IQ2_KT"),
                *("Q3_K_M", "IQ3_S", "IQ3_KS", "IQ3_K", "IQ3_KT"),
                *("Q4_K_M", "IQ4_XS", "IQ4_KSS", "IQ4_KS", "IQ4_K", "IQ4_KT"),
            )
        },
    }
    fixed = frozenset(name for name, settings in variants.items() if not settings["imatrix"])
