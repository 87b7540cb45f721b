"""Public checks that hold a class of anybody's to the contract of its kind."""

from gyroquant.testing.methods import CONTEXT, check_method, choose_on_random

__all__ = ["CONTEXT", "check_method", "choose_on_random"]
