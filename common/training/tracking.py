"""Trackers that accelerate knows, such as TensorBoard: told of the figures in the stats CSV, epoch by epoch."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from common.runtime.errors import UserError
from common.runtime.files import check_writable
from common.training.stats import read_stats

PROJECT = "composable-pruning"
PACKAGES = {"comet_ml": "comet-ml"}  # to install, where it has another name than the tracker


def check_trackers(names: list[str], folder: str | Path) -> None:
    """Make sure, before any work, that these trackers are installed and that their folder can be written to.

    Raises:
        UserError: one is not, or the folder cannot be.
    """
    from accelerate.tracking import get_available_trackers

    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise UserError(f"--track {name}: is not installed here; pip install {PACKAGES.get(name, name)}")
    check_writable(Path(folder) / PROJECT)


class Tracking:
    """The trackers of one run, in a folder that is named as the output, with digits of the run's key."""

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
        self.last, self.accelerator = -1, None  # the last epoch that was told of
        if not names:
            return
        from accelerate import Accelerator

        name = f"{Path(output).name.removesuffix('.pth')}.{run}"
        of_tracker = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
        of_tracker |= {"swanlab": {"experiment_name": name}, "clearml": {"task_name": name}}
        plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                (Path(folder) / name).mkdir(parents=True, exist_ok=True)
                self.accelerator = Accelerator(log_with=names, project_dir=Path(folder) / name)
                self.accelerator.init_trackers(PROJECT, plain, of_tracker)
        except Exception as error:  # each service has classes of its own
            raise UserError(f"--track {' '.join(names)}: cannot be started ({_one_line(error)})") from None

    def tell(self) -> None:
        """Tell of the epochs that are new in the stats. Once a tracker fails, none is told of anything more."""
        if self.accelerator is None:
            return
        first = None  # epoch that trains: not the one before, nor a closed form
        for row in read_stats(self.stats_file, self.run):
            epoch = int(row.pop("epoch"))
            figures = {name: float(cell) for name, cell in row.items() if name != "run" and cell}
            if first is None and "train_loss" in figures:
                first = epoch
            if first is not None:
                figures["learning_rate"] = self.learning_rate(epoch - first + 1)
            if epoch > self.last:
                self.last = epoch
                self._try(lambda figures=figures, epoch=epoch: self.accelerator.log(figures, step=epoch))

    def close(self) -> None:
        """Tell what is left, and let the trackers end."""
        self.tell()
        self._try(lambda: self.accelerator.end_training())

    def _try(self, function):
        if self.accelerator is not None:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    function()
            except Exception as error:  # of any service: the training is worth more
                self.talk.say(f"--track: tells of nothing more ({_one_line(error)})")
                self.accelerator = None


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())
