"""External tools: other programs that quantize language models, through their own interfaces. One file per tool."""

from gyroquant.benchmark.external_tools import (
    auto_round,
    brevitas,
    gptqmodel,
    ik_llama_cpp,
    llama_cpp,
    llm_compressor,
    nncf,
)
from gyroquant.benchmark.external_tools.base import ExternalTool, ExternalToolError, Size, Task, ToolResult

__all__ = [
    "ExternalTool",
    "ExternalToolError",
    "Size",
    "Task",
    "ToolResult",
    "auto_round",
    "brevitas",
    "gptqmodel",
    "ik_llama_cpp",
    "llama_cpp",
    "llm_compressor",
    "nncf",
]
