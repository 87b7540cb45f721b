"""Descriptions of architectures, derived from the model itself and proven on a tiny one of the same kind."""
