"""Paths that flags name, looked at before torch is imported, which takes seconds."""

from pathlib import Path

from common.cli.flags import FINE_TUNED, MODELS
from common.runtime.errors import UserError
from common.runtime.files import A_MODEL, no_such


def the_model(given: str | Path | None) -> Path:
    """The model of a flag -m: a model, or a folder that holds one alone. Without the flag that is ./model.

    Raises:
        UserError: there is none, or several.
    """
    path = the_one(given or MODELS, "config.json", "model", "-m")
    if not path.exists():
        raise no_such(path, "model", f"download_model.py saves one to ./{MODELS}/", *A_MODEL, f"{MODELS}/*/config.json")
    return path


def the_library(path: str) -> Path:
    """The library of a flag -p.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_dir():
        raise no_such(path, "library folder", "prune.py or block-level_finetuning.py makes one", "*/*.npy")
    return Path(path)


def check_inputs(args) -> None:
    """Make sure that what -m, and -p and -c unless they are None, name is there.

    Raises:
        UserError: something is not.
    """
    the_model(args.model)
    if args.library is not None:
        the_library(args.library)
    if args.configurations is not None:
        the_file(args.configurations, "config_generator.py")


def the_file(path: str, made_by: str) -> Path:
    """A file that another stage makes.

    Raises:
        UserError: it is not there.
    """
    if not Path(path).is_file():
        raise no_such(path, "file", f"{made_by} makes it", f"*{Path(path).suffix}")
    return Path(path)


def models_to_evaluate(given: list[str] | None) -> list[Path]:
    """The models of a flag -m that takes several; without it the fine-tuned ones, or else the only one there is."""
    if given:
        return [the_model(path) for path in given]
    candidates = Path(FINE_TUNED).glob("*")
    models = [path for path in candidates if path.suffix == ".pth" or (path / "config.json").is_file()]
    return sorted(models, key=lambda path: (len(path.stem), path.name)) or [the_model(None)]  # 2 before 10


def the_one(path: str | Path, mark: str, what: str, flag: str) -> Path:
    """`path` itself, unless it is a folder without the file `mark` that holds one folder alone that has it.

    Raises:
        UserError: it holds several.
    """
    path = Path(path)
    if not path.is_dir() or (path / mark).is_file():
        return path
    inside = sorted(child for child in path.iterdir() if (child / mark).is_file())
    if len(inside) > 1:
        names = ", ".join(map(str, inside))
        raise UserError(f"{path}: holds several {what}s; say which one with {flag} ({names})")
    return inside[0] if inside else path
