"""What a person gets to see when an input is wrong: one line, exit code 2, no traceback."""
import functools
import sys


class UserError(ValueError):
    """Wrong input. The message names the flag or file, its value, and what was expected."""


def one_line_errors(main):
    """Decorate a script's main(): a UserError ends it with one line on stderr and exit code 2."""
    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    return guarded
