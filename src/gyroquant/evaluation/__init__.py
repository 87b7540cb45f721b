"""Measures models: perplexity, divergence from the original, outliers, tasks, speed."""
