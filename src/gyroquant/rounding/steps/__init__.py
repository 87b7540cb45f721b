"""Steps around a solver: the target that it rounds to, refinement and tuning of its codes, bias correction."""
