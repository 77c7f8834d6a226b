"""What goes wrong outside the kernels: data, files and settings."""


class FastnetError(Exception):
    """One sentence for the user: what is wrong, with the value, and what to do about it."""
