"""Which images are wanted."""

import pytest
from varcli.commands.series import candidates


@pytest.mark.parametrize(("kept", "fraction", "drawn"), [(10, 1, 10), (10, 0.5, 20), (9, 0.9, 10), (1, 0.3, 4)])
def test_of_how_many_some_are_the_best(kept, fraction, drawn):
    assert candidates(kept, fraction) == drawn
