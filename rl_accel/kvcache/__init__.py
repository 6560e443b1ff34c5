"""INT4 paged KV cache with block-diagonal Hadamard rotation."""
