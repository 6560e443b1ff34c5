"""Sizes of das_engine.py, which its test knows too."""

NUM_PROBLEMS, NUM_SAMPLES, NUM_EPOCHS, MAX_TOKENS = 6, 4, 3, 48
MAX_DRAFT = 8
