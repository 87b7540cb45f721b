"""Inspects models, recipes and results without quantizing: sites, outliers, cost, damage, proof."""
