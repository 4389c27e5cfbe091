"""docs/options.md is what the code declares."""

from docs.options import PAGE, page


def test_the_page_of_options_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"
