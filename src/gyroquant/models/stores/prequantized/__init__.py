"""Checkpoints that other programs quantized. They are decoded as they are read. Every format has one module here."""
