"""Position-keyed exact sampling and the statistics that prove speculation lossless. Torch and numpy only."""
