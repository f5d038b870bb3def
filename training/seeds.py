"""A seed for each purpose: every random draw of a run follows from (seed, rank, step) alone."""

import numpy as np

WEIGHTS, ORDER, TRANSFORMS, STEP, VALIDATION, PICTURE, SAMPLING = range(1, 8)  # what a seed is for


def mixed_seed(purpose: int, *parts: int) -> int:
    """One seed of a purpose and the numbers that go with it; any difference in them gives an unrelated seed."""
    return int(np.random.SeedSequence((purpose, *parts)).generate_state(1, np.uint64)[0]) >> 1
