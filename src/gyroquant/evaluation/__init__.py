"""Measuring models: perplexity, divergence from the original, outliers."""
