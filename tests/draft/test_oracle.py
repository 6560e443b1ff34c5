"""The live tier against the PyPI package `suffix-tree` (extra `oracle`; GPLv3, so never a dependency).

    pip install suffix-tree==0.1.2

The package knows no counts, no appending and no longest-suffix match, so it is asked the one question that it answers:
does this sequence occur? The longest suffix of a request that was continued is then found by trying all of them.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from rl_accel.kernels.suffix.api import SuffixIndex

suffix_tree = pytest.importorskip("suffix_tree", reason="optional extra `oracle` is not installed")


def longest_continued(tree, context: list[int], alphabet: range) -> int:
    for length in range(len(context), 0, -1):
        suffix = context[len(context) - length :]
        if any(tree.find([*suffix, token]) for token in alphabet):
            return length
    return 0


@pytest.mark.parametrize("seed", range(8))
def test_longest_match_is_the_oracles(seed) -> None:
    rng = random.Random(seed)
    alphabet = range(rng.choice((2, 3, 7)))
    index = SuffixIndex(cross_tokens=0)
    handles = [index.begin(1, [9]) for _ in range(3)]
    texts: list[list[int]] = [[9] for _ in handles]
    for _ in range(60):
        who = rng.randrange(3)
        new = [rng.choice(alphabet) for _ in range(rng.randint(1, 4))]
        texts[who] += new
        index.propose_batch(
            np.array([handles[who]], np.int64),
            np.array(new, np.int32),
            np.array([0, len(new)], np.uint32),
            np.zeros(1, np.uint32),
            np.ones(1, np.float32),
        )
        tree = suffix_tree.Tree({name: text for name, text in enumerate(texts)})
        assert index.inspect(handles[who])["live_len"] == longest_continued(tree, texts[who], alphabet)
