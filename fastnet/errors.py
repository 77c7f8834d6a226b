"""What goes wrong outside the kernels: data, files and settings."""


class FastnetError(Exception):
    """One sentence for the user: what is wrong, with the value, and what to do about it."""


class NoDataError(FastnetError):
    """A data set's files are not there."""


def in_one_line(error: BaseException) -> str:
    """An error of anybody's: its kind, and the first line of what it says, if it says anything."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
