"""Prints, at the end, how much of the allowed difference to the golden data is used up."""

from .golden import worst_margins


def pytest_terminal_summary(terminalreporter):
    for number, (margin, name) in sorted(worst_margins.items()):
        terminalreporter.write_line(f"golden {number}: at most {margin:.2f} of the allowed difference ({name})")
