"""Formats in which models are written, one file or folder for each."""
