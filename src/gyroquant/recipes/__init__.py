"""Recipes: the description of a quantization, as data."""
