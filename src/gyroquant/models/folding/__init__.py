"""Folds maps into parameters, and proves that the folded model is the same function."""
