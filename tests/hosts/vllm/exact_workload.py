"""Requests of exact_engine.py, which its test knows too."""

NUM_REQUESTS = 48
MAX_TOKENS = 64


def prompts() -> list[list[int]]:
    return [[(7 * i + j * j) % 40 + 5 for j in range(20 + i % 9)] for i in range(NUM_REQUESTS)]
