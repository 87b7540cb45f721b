"""Models: their sites and ports as data, folding, the proof, and their weights one block at a time."""
