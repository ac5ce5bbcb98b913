import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_curr.units import (
    format_bytes,
    format_count,
    format_duration,
    parse_count,
    parse_length,
)

COUNTS = st.integers(min_value=0, max_value=10**18)


@given(COUNTS)
def test_exact_count_reads_back(count: int) -> None:
    assert parse_count(format_count(count, exact=True)) == count


@given(COUNTS)
def test_short_count_is_within_half_a_percent_and_short(count: int) -> None:
    text = format_count(count)
    assert abs(parse_count(text) - count) <= 0.005 * count
    assert len(text) <= 5 or count >= 10**15


@given(COUNTS)
def test_plain_integers_are_counts_in_every_spelling(count: int) -> None:
    assert parse_count(count) == parse_count(str(count)) == parse_count(f"{count:_}") == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("400k", 400_000),
        ("400K", 400_000),
        ("2.5M", 2_500_000),
        ("1.5T", 1_500_000_000_000),
        (" 7 B ", 7_000_000_000),
        ("1_000", 1000),
        ("1e6", 1_000_000),
        (2e3, 2000),
        ("0.1k", 100),
        ("-3k", -3000),
    ],
)
def test_count_is_read_exactly(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "4OOk", "1.5", "0.0001k", "1 000", "1kk", "1P", "_1", "1e999", None, True, []]
)
def test_what_is_no_count_says_what_is(text: object) -> None:
    with pytest.raises(ValueError, match=r"write a whole number such as 4096, 1_000, 400k"):
        parse_count(text)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.5])
def test_number_that_is_not_whole_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="write a whole number"):
        parse_count(number)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1_230_000, "1.23M"), (999_999, "1M"), (1_500_000_000_000, "1.5T")],
)
def test_count_is_printed_short(count: int, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (31 * 2**30, "31 GiB"), (5000 * 2**40, "5000 TiB")],
)
def test_bytes_are_printed_in_powers_of_1024(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0 ms"),
        (0.25, "250 ms"),
        (0.9999, "1 s"),
        (3.2, "3.2 s"),
        (59.96, "1 m"),
        (125, "2 m 5 s"),
        (15_000, "4 h 10 m"),
        (3600, "1 h"),
        (266_400, "3 d 2 h"),
        (-90, "-1 m 30 s"),
    ],
)
def test_duration_is_printed_in_its_two_largest_units(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(
    ("text", "length"),
    [("4k", 4096), ("128K", 131_072), ("1M", 1_048_576), ("4096", 4096), (4096, 4096), (8e3, 8000)],
)
def test_k_of_a_sequence_length_is_1024(text: object, length: int) -> None:
    assert parse_length(text) == length


@pytest.mark.parametrize("text", ["4T", "4.0001k", "k", "", "4kk", True, None])
def test_what_is_no_sequence_length_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="such as 4096 or 4k"):
        parse_length(text)
