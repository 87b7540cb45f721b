"""Other programs that quantize language models, through their own front doors, for comparisons. A file each."""

from gyroquant.opponents.base import Opponent, OpponentError, Outcome, Size, Task

__all__ = ["Opponent", "OpponentError", "Outcome", "Size", "Task"]
