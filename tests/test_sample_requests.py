"""Which images are wanted."""

import pytest

from varcli.pipelines.requests import candidate_count


@pytest.mark.parametrize(
    ("kept", "best_of", "sampled"), [(10, 1, 10), (10, 2, 20), (9, 1 / 0.9, 10), (1, 3.3, 4), (4, 1.25, 5)]
)
def test_candidates_are_a_whole_number(kept, best_of, sampled):
    assert candidate_count(kept, best_of) == sampled
