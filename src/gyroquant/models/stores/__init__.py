"""Stores of weights: folders, GGUF files, models in memory, packed folders and prequantized formats."""
