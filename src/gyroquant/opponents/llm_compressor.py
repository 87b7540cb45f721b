"""LLM Compressor of the vLLM project: GPTQ, alone and behind the rotations that it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gyroquant.opponents.scripted import Scripted


class LLMCompressor(Scripted):
    """Saved as compressed tensors: scales of 16 bits, zero points of as many bits as codes.

    SpinQuant's R1 and R2 are fused; they are random Hadamard matrices and not learned there. QuIP's rotates the input
    of every layer while the model runs; its matrices are in the files and count as bits, and are multiplied into the
    plain weights that are evaluated. It draws all of them from a fixed seed: another seed calibrates on other windows
    and rotates by the same matrices.
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
            "transform_type": "random-hadamard",  # the default takes powers of two only
        },
        "GPTQ + QuIP": {"transform": "QuIP"},
    }
    rotated = frozenset(("GPTQ + SpinQuant R1 R2", "GPTQ + QuIP"))


__all__ = ["LLMCompressor"]
