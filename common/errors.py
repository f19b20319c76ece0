"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in the input, told in one line: what was found, what was expected, what to do.

    `common.cli.launch` prints it on stderr and exits with 2. Anything else that escapes a script is a bug.
    """
