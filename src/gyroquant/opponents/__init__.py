"""Other programs that quantize language models, through their own front doors, for comparisons. A file each."""

from gyroquant.opponents import auto_round, brevitas, gptqmodel, llama_cpp, llm_compressor, nncf
from gyroquant.opponents.base import Opponent, OpponentError, Outcome, Size, Task

__all__ = [
    "Opponent",
    "OpponentError",
    "Outcome",
    "Size",
    "Task",
    "auto_round",
    "brevitas",
    "gptqmodel",
    "llama_cpp",
    "llm_compressor",
    "nncf",
]
