"""The one exception that means "the user can fix this", and how what libraries raise becomes one."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has left in the place of another


class UserError(Exception):
    """A mistake in the input, told in one line: what was found, what was expected, what to do.

    `common.cli.launch.launch` prints it on stderr and exits with 2. Anything else that escapes a script is a bug.
    """


def lacks_memory(error: Exception) -> bool:
    """Whether an error of Python, or of torch on any device, says that there is not enough memory."""
    return isinstance(error, MemoryError) or any(
        words in f"{type(error).__name__}: {error}" for words in ("OutOfMemoryError", "can't allocate memory")
    )


@contextmanager
def as_user_error(where: object, what: str) -> Iterator[None]:
    """Turn whatever a library raises over damaged or foreign files into a `UserError` of one line.

    It ends with the first two lines of what was raised, or with the file of that place that Git LFS has not fetched. A
    `UserError` that does not name the place gets its name. For a lack of memory no file
    is to blame.
    `where`: the file or folder; `what`: what is wrong then, such as "cannot be loaded as a model".
    """
    try:
        yield
    except UserError as error:
        is_named = str(error).startswith((f"{where}:", f"{where}/"))
        raise UserError(str(error) if is_named else f"{where}: {error}") from None
    except Exception as error:  # of safetensors, transformers, tokenizers, datasets, torch, the hub: many classes
        if lacks_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = not_fetched(where) or " ".join(lines[:2])[:300] or type(error).__name__
        raise UserError(f"{where}: {what}: {reason}") from None


def not_fetched(where: object) -> str | None:
    """What Git LFS has not fetched, and what to do: `where` itself, or a file in that folder; None if there is none."""
    path = Path(str(where))
    with suppress(OSError):  # `where` may be no path at all
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                with open(file, "rb") as handle:
                    if handle.read(len(POINTER)) == POINTER:
                        return f"{file.name} is a pointer of Git LFS, not the file; run `git lfs pull` where it lies"
    return None
