"""Calibration: text to tokens, tokens through the model block by block, and what is measured on the way."""
