"""Trackers that accelerate knows, such as TensorBoard: told of the figures in the stats CSV, epoch by epoch."""

import contextlib
import sys
from pathlib import Path

from common.runtime.errors import UserError
from common.runtime.files import check_writable
from common.runtime.progress import Talk
from common.runtime.settings import TrainingSettings
from common.training.learner import schedule
from common.training.stats import read_stats

PROJECT = "composable-pruning"
PACKAGES = {"comet_ml": "comet-ml"}  # to install, where it has another name than the tracker


def folder_of(output: str | Path) -> Path:
    """Where trackers keep their files on the training of an output."""
    return Path(output).parent / "runs"


def check_trackers(names: list[str], output: str | Path) -> None:
    """Make sure, before any work, that these trackers are installed and that their folder can be written to."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise UserError(f"--track {name}: is not installed here; pip install {PACKAGES.get(name, name)}")
    check_writable(folder_of(output) / PROJECT)


class Tracking:
    """The trackers of one run, in a folder that is named as the output, with digits of the run's key."""

    def __init__(
        self,
        names: list[str],
        output: str | Path,
        run: str,
        stats_file: str | Path,
        recipe: TrainingSettings,
        steps: int,
        talk: Talk,
    ):
        """`names`: of trackers, perhaps []; `steps`: of the whole run. A `UserError` if a tracker cannot be started."""
        self.stats_file, self.run, self.recipe, self.steps, self.talk = stats_file, run, recipe, steps, talk
        self.last, self.accelerator = -1, None  # the last epoch that was told of
        if not names:
            return
        from accelerate import Accelerator

        name = f"{Path(output).name.removesuffix('.pth')}.{run}"
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(recipe).items()}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the result's
                (folder_of(output) / name).mkdir(parents=True, exist_ok=True)
                self.accelerator = Accelerator(log_with=names, project_dir=folder_of(output) / name)
                self.accelerator.init_trackers(
                    PROJECT, settings, {"wandb": {"name": name}, "mlflow": {"run_name": name}}
                )
        except Exception as error:  # each service has classes of its own
            raise UserError(f"--track {' '.join(names)}: cannot be started ({error})") from None

    def tell(self) -> None:
        """Tell of the epochs that are new in the stats. Once a tracker fails, none is told of anything more."""
        rows = read_stats(self.stats_file, self.run) if self.accelerator else []
        first = next((int(row["epoch"]) for row in rows if row["train_loss"]), float("inf"))  # that trains
        for row in rows:
            epoch = int(row["epoch"])
            figures = {name: float(cell) for name, cell in row.items() if cell and name not in ("epoch", "run")}
            if epoch >= first:
                figures["learning_rate"] = last_rate(self.recipe, self.steps, epoch - first + 1)
            if epoch > self.last:
                self.last = epoch
                self._try("log", figures, step=epoch)

    def close(self) -> None:
        """Tell what is left, and let the trackers end."""
        self.tell()
        self._try("end_training")

    def _try(self, method, *args, **kwargs):
        if self.accelerator:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    getattr(self.accelerator, method)(*args, **kwargs)
            except Exception as error:  # of any service: the training is worth more
                self.talk.say(f"--track: tells of nothing more ({error})")
                self.accelerator = None


def last_rate(recipe: TrainingSettings, steps: int, epoch: int) -> float:
    """The learning rate of the last step of an epoch, counted from 1 over those that train, of `steps` in the run."""
    return recipe.lr * schedule(epoch * steps // recipe.epochs - 1, steps, recipe.warmup)
