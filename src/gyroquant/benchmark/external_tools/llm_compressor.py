"""LLM Compressor of the vLLM project: GPTQ, alone and after its rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gyroquant.benchmark.external_tools.scripted import ScriptedTool


class LLMCompressor(ScriptedTool):
    """Saves compressed-tensors: 16-bit scales, zero points of as many bits as codes.

    Its SpinQuant R1 and R2 are fused random Hadamard matrices, which it does not learn. Its QuIP rotates the input of
    every layer while the model runs. These matrices are in the files and count as bits. They are multiplied into the
    plain weights for evaluation. It draws all matrices from a fixed seed, so another seed has other calibration windows
    and the same matrices.
    """

    name = "llm-compressor"
    home = "vllm-project/llm-compressor"
    requirements = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0")
    script = "llm_compressor.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "GPTQ": {},
        "GPTQ + SpinQuant R1 R2": {
            "transform": "SpinQuant",
            "rotations": ["R1", "R2"],
            "transform_type": "random-hadamard",  # the default supports powers of two only
        },
        "GPTQ + QuIP": {"transform": "QuIP"},
    }
    rotated = frozenset(("GPTQ + SpinQuant R1 R2", "GPTQ + QuIP"))


__all__ = ["LLMCompressor"]
