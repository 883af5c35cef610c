"""What is read from the text of an option."""

import re

import pytest

from varcli.commands.options import parse_numbers
from varcli.errors import UsageError


def test_a_list_of_numbers():
    assert parse_numbers("--sides", "1,2, 3") == (1, 2, 3)


@pytest.mark.parametrize("text", ["", "1,", "1,two", "1.5", "1;2"])
def test_what_is_no_list_of_numbers(text):
    with pytest.raises(UsageError, match=re.escape("--sides must be whole numbers separated by commas")):
        parse_numbers("--sides", text)
