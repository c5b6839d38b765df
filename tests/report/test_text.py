"""What is printed of a run beside its table."""

from spunge.report.text import short_text
from spunge.results import parse_results


def test_a_run_in_short_says_what_was_forgotten_what_certain_means_and_what_it_took(results):
    lines = short_text(parse_results(results() | {"peak_memory": 2**31})).splitlines()
    assert lines[0].startswith("The merged model forgot both parts for certain (Europe, Asia);")
    assert lines[1].startswith("For certain means that the 95% interval")
    assert lines[2] == "All stages together took 3 min 22 s and held at most 2.0 GiB of memory on cpu."


def test_what_stands_in_a_name_is_shown_and_not_obeyed(results):
    text = short_text(parse_results(results(parts=("\x1b[31mred\u202e", "Asia"))))
    assert not {"\x1b", "\u202e", "\u2068"} & set(text)
