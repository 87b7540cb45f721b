"""Learns rotations and scales at sites before rounding, and finetunes scales and gains after rounding."""

from gyroquant.finetuning.rotations import learn
from gyroquant.finetuning.scales import Finetune, finetune
from gyroquant.finetuning.settings import Learn

__all__ = ["Finetune", "Learn", "finetune", "learn"]
