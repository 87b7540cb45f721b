"""Calibration: converts text to tokens, runs them through the model block by block, and collects statistics."""
