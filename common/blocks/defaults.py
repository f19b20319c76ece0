"""What suits a model on a task: the studies' checkpoints and data sets, and settings for fine-tuning.

The settings of t5 and distilbert were measured (see docs/results.md), those of marian as far as is said
beside them. Those of `USUAL` were not: they are the usual ones for models of that kind, and every one of them has a
flag.
"""

from dataclasses import dataclass, replace

from common.blocks.families import FAMILIES, family_name


@dataclass(frozen=True)
class Study:
    """Where to get a model and its data, and how to fine-tune it."""

    model_lr: float  # peak learning rate of whole models; of width 128, if it `falls_with_width`
    dropout: bool  # whether a short fine-tuning of a whole pruned model goes better with the model's own dropout
    block_lr: float  # of blocks of width 128, in inverse proportion to the width (μP, arXiv 2203.03466)
    joint_lr: float  # of variants that are tuned together, likewise
    calibration: int  # training examples that make a well-determined closed form
    method: str = "joint"  # of block-level fine-tuning
    model_shared_rate: float = 1.0  # the rest's learning rate in model-level fine-tuning, as a multiple of the blocks'
    joint_shared_rate: float = 1.0  # and in joint fine-tuning
    falls_with_width: bool = False  # whether model_lr is in inverse proportion to the width too
    prefix: str = ""  # in front of every input text, as the model was trained
    checkpoint: str | None = None  # hub id of the model
    data: str | None = None  # hub id of the data set

    def learning_rate(self, level: str, width: int) -> float:
        """The peak rate of "model", "block" or "joint" fine-tuning for a model of some width (d_model)."""
        falls = level != "model" or self.falls_with_width
        return getattr(self, f"{level}_lr") * (128 / width if falls else 1)


STUDIES = {
    ("t5", "translation"): Study(
        model_lr=3e-3,
        falls_with_width=True,
        model_shared_rate=8.0,
        joint_shared_rate=24.0,
        dropout=False,
        block_lr=1e-2,
        joint_lr=1e-3,
        calibration=2000,
        prefix="translate English to German: ",
        checkpoint="google-t5/t5-small",
        data="bentrevett/multi30k",
    ),
    ("distilbert", "classification"): Study(
        model_lr=2e-5,
        dropout=True,
        block_lr=3e-3,
        joint_lr=3e-4,
        method="reconstruct",
        calibration=800,
        checkpoint="lvwerra/distilbert-imdb",
        data="stanfordnlp/imdb",
    ),
    # Of width 128, 3 + 3 layers: model_lr is the best of 5e-4, 1e-3 and 3e-3; the rest at the blocks' rate is better
    # than at three times that. joint_lr is the best of 2e-4, 5e-4 and 1e-3. Dropout and block_lr were not tried.
    ("marian", "translation"): Study(
        model_lr=1e-3, falls_with_width=True, dropout=False, block_lr=3e-3, joint_lr=5e-4, calibration=2000
    ),
}
# Of T5's kin nothing was measured. They differ in their vocabulary, and were not trained on a task with a prefix.
for name in ("mt5", "umt5"):
    STUDIES[name, "translation"] = replace(STUDIES["t5", "translation"], prefix="", checkpoint=None, data=None)
USUAL = {
    "translation": Study(model_lr=5e-5, dropout=True, block_lr=3e-3, joint_lr=3e-4, calibration=2000),
    "summarization": Study(model_lr=5e-5, dropout=True, block_lr=3e-3, joint_lr=3e-4, calibration=500),
    "classification": Study(
        model_lr=2e-5, dropout=True, block_lr=3e-3, joint_lr=3e-4, calibration=800, method="reconstruct"
    ),
}


def usual_task(model_type: str) -> str:
    """The task that a model type's models are for, unless their record says otherwise."""
    return next(iter(FAMILIES[family_name(model_type)].model_classes))


def study_of(model_type: str, task: str | None = None) -> Study:
    """The study of a model type on a task, or what is usual for the task; without a task, for its usual one."""
    task = task or usual_task(model_type)
    return STUDIES.get((family_name(model_type), task), USUAL[task])
