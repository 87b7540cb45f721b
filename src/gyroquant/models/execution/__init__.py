"""Runs a model block by block, attaches online operations, and compares a model with transformers."""
