"""Trackers that accelerate knows, such as TensorBoard: they are told of the figures in the stats CSV, epoch by epoch.

Which epochs a tracker was told of stands in a file beside its data, so that a run that goes on repeats none of them.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.files import check_writable, write_bytes
from common.records import json_text, read_json
from common.schema import MapOf, Number, check
from common.stats import read_stats

PROJECT = "composable-pruning"
STATE = "tracked.json"  # {tracker: the last epoch that it was told of}
TOLD = MapOf(Number(0, 2**40, whole=True))
PACKAGES = {"comet_ml": "comet-ml"}  # to install, where it has another name than the tracker


def check_trackers(names: list[str], folder: str | Path) -> None:
    """Make sure, before any work, that these trackers are installed and that their folder can be written to.

    Raises:
        UserError: one is not, or the folder cannot be.
    """
    from accelerate.tracking import get_available_trackers

    there = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in there:
            raise UserError(f"--track {name}: is not installed here; pip install {PACKAGES.get(name, name)}")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UserError(f"--track-dir {folder}: is a file where a folder belongs")
    check_writable(Path(folder) / STATE)


class Tracking:
    """The trackers of one run. Its name, and that of its folder, is the output's with digits of the run's key."""

    def __init__(
        self,
        names: list[str],
        folder: str | Path,
        output: str | Path,
        run: str,
        stats_file: str | Path,
        learning_rate: Callable[[int], float],
        settings: dict,
        talk,
    ):
        """
        Args:
            names: of trackers; [] tells nobody of anything.
            run: digits of the run's key, as in the stats.
            learning_rate: that of the last step of the n-th epoch that trains.
            settings: plain values that the run is told to have been made with.
        Raises:
            UserError: a tracker cannot be started.
        """
        self.stats_file, self.run, self.learning_rate, self.talk = stats_file, run, learning_rate, talk
        name = f"{Path(output).name.removesuffix('.pth')}.{run}"
        self.state, self.told, self.trackers = Path(folder) / name / STATE, {}, {}
        if names and self.state.exists():
            self.told = read_json(self.state, "fine-tuning")
            check(self.state, self.told, TOLD, "remove the folder, and the run is tracked anew")
        for tracker in names:
            self.trackers[tracker] = _start(tracker, folder, name, run, self.told.get(tracker), settings)

    def tell(self) -> None:
        """Tell the trackers of the epochs that are new in the stats. One that fails is told of nothing more."""
        if not self.trackers:
            return
        first, epochs = None, {}  # `first` that trains: not the one before, nor a closed form
        for row in read_stats(self.stats_file, self.run):
            epoch, figures = int(row.pop("epoch")), {name: _number(cell) for name, cell in row.items() if name != "run"}
            if first is None and figures["train_loss"] is not None:
                first = epoch
            if first is not None:
                figures["learning_rate"] = self.learning_rate(epoch - first + 1)
            epochs[epoch] = {name: figure for name, figure in figures.items() if figure is not None}
        for name in list(self.trackers):
            try:
                for epoch in [epoch for epoch in epochs if epoch > self.told.get(name, -1)]:
                    with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                        self.trackers[name].log(epochs[epoch], step=epoch)
                    self.told[name] = epoch
                    write_bytes(self.state, json_text(self.told).encode())
            except Exception as error:  # of any service: the training is worth more
                self.talk.say(f"{name}: is told of nothing more ({_one_line(error)})")
                del self.trackers[name]

    def close(self) -> None:
        """Tell what is left, and let the trackers end."""
        self.tell()
        for tracker in self.trackers.values():
            with contextlib.redirect_stdout(sys.stderr):
                tracker.finish()


def _start(tracker, folder, name, run, told, settings):
    """One of accelerate's trackers. TensorBoard keeps a run in a folder; the others know projects, and runs in them."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder = Path(folder)
    of_tracker = {
        "tensorboard": {} if told is None else {"purge_step": told + 1},
        "wandb": {"name": name, "id": run, "resume": "allow", "dir": str(folder / name)},
        "trackio": {"name": name, "resume": "allow"},
        "mlflow": {"run_name": name},
        "swanlab": {"experiment_name": name},
        "clearml": {"project_name": PROJECT, "task_name": name},
        "dvclive": {"dir": str(folder / name), "resume": True},
    }
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    PartialState()  # its trackers log with accelerate's logger, which asks for this
    try:
        (folder / name).mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            if kind.requires_logging_directory:
                started = kind(name, str(folder), **of_tracker.get(tracker, {}))
            else:
                started = kind(PROJECT, **of_tracker.get(tracker, {}))
            started.start()
            if told is None and tracker != "tensorboard":  # which would make a run of its own for them
                started.store_init_configuration(settings)
    except Exception as error:  # each service has classes of its own
        raise UserError(f"--track {tracker}: cannot be started ({_one_line(error)})") from None
    return started


def _number(cell):
    try:
        return float(cell)
    except (TypeError, ValueError):  # an empty cell: a loss that was never a number
        return None


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
