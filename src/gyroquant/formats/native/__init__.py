"""The format of gyroquant itself: packed codes in a Hugging Face folder, and how transformers opens it."""

from gyroquant.formats.native import runtime

__all__ = ["runtime"]
