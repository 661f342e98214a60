"""How a page is printed."""

from distmoe.doctor.findings import Section, fail, ok, size, summary, table, warn


def test_lines_begin_with_their_level_and_are_aligned():
    findings = [ok("CPUs", "2"), fail("open files", "at most 1024", "ulimit -n 4096")]
    assert Section("machine vm", findings).text.splitlines() == [
        "machine vm",
        "ok    CPUs              2",
        "fail  open files        at most 1024",
        "                        -> ulimit -n 4096",
    ]


def test_long_texts_go_on_below_themselves_and_commands_stay_whole():
    option = "--" + "-".join(["word"] * 12)  # would be cut at its hyphens
    section = Section("x", [warn("a" * 30, "found " * 20, f"{'do ' * 20}{option}")])
    lines = section.text.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line[:38].strip() for line in lines[1:]] == ["warn  " + "a" * 30, "", "", ""]
    assert " ".join(line[38:].strip() for line in lines[1:3]) == ("found " * 20).strip()
    assert " ".join(line[38:].strip() for line in lines[3:]) == f"-> {'do ' * 20}{option}"
    assert lines[-1].strip() == option


def test_text_below_the_findings():
    assert Section(
        "layout", [ok("layout", "fits")], ["", *table([("rank", "host"), ("0", "vm")])]
    ).text.splitlines() == [
        "layout",
        "ok    layout            fits",
        "",
        "rank  host",
        "0     vm",
    ]


def test_summary_counts_levels():
    assert summary([ok("", ""), fail("", "", ""), ok("", ""), warn("", "", "")]) == "2 ok, 1 warn, 1 fail"


def test_sizes():
    sizes = {100: "0 KiB", 2**20 - 1: "1024 KiB", 2**26: "64 MiB", 3 * 2**29: "1.5 GiB", 252 * 2**30: "252.0 GiB"}
    assert {num_bytes: size(num_bytes) for num_bytes in sizes} == sizes
