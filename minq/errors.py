"""What a person gets to see when an input is wrong: one line, exit code 2, no traceback."""
import functools
import re
import sys
import textwrap


class UserError(ValueError):
    """Wrong input. The message names the flag or file, its value, and what was expected."""


# What PyTorch says, in RuntimeErrors, of a tensor that no memory can hold.
TOO_LARGE = re.compile("allocate memory|out of memory|not enough memory|overflow|Stride calculation|invalid size", re.IGNORECASE)


def one_line_errors(main):
    """Decorate a script's main(): wrong input ends it with one line on stderr and exit code 2.

    Wrong input is a UserError; a file that cannot be read or written, wherever that came up; and sizes
    for which there is no memory. Any other exception is a mistake of ours, and keeps its traceback.
    """
    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            line = explained(error)
            if line is None:
                raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    return guarded


def explained(error):
    """What to tell a person of an exception, or None if it is no wrong input."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if "InvalidCxxCompiler" in str(error):
        return "--compile: no C++ compiler found, expected g++ (on a Mac clang++) or the one named in $CXX; without --compile all works, more slowly"
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and TOO_LARGE.search(str(error)):
        asked = re.search(r"allocate .*?(bytes|[KMGTP]iB)", str(error))
        return ("there is not enough memory" + (f" to {asked[0]}" if asked else "") + "; make a batch smaller "
                "(--batch-size, --seq-len, --image-size) or the model (--layers, --width, --ffn)")
    return None


def in_one_line(error):
    """The message of somebody else's exception: PyTorch's can be pages."""
    return textwrap.shorten(str(error), 500, placeholder=" ...")
