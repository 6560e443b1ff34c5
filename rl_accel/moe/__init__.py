"""Low-bit experts with low-rank compensators (MiLo), made anew from every set of weights that arrives."""
