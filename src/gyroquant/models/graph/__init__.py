"""A model as a graph of linear layers, norms and bases, and the sites where a basis may change."""
