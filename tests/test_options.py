"""What is read from the text of an option."""

import pytest

from varcli.commands.options import parse_approximations, parse_numbers
from varcli.errors import UsageError


def test_a_list_of_numbers():
    assert parse_numbers("sides", "1,2, 3") == (1, 2, 3)


@pytest.mark.parametrize("text", ["", "1,", "1,two", "1.5", "1;2"])
def test_what_is_no_list_of_numbers(text):
    with pytest.raises(UsageError, match=f"^sides: {text}; whole numbers with commas between, such as 1,2,3$"):
        parse_numbers("sides", text)


@pytest.mark.parametrize(
    ("text", "approximations"),
    [
        (None, None),
        ("", ""),
        ("all", "guidance,tokens,cache"),
        ("cache, guidance", "guidance,cache"),
        ("cache,cache", "cache"),
        ("cash,cache", "cache,cash"),  # for the configuration to refuse
    ],
)
def test_approximations_have_one_order(text, approximations):
    assert parse_approximations(text) == approximations
