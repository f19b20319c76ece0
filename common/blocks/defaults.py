"""What suits a model on a task: the studies' checkpoints and data sets, and settings for fine-tuning.

The settings of t5 and distilbert were measured (see docs/results.md), those of marian as far as is said
beside them. Those of `USUAL` were not: they are the usual ones for models of that kind, and every one of them has a
flag.
"""

from dataclasses import dataclass, replace

from common.blocks.families import FAMILIES, family_name

TYPICAL_STEPS = 200  # that the peak rates of tuned blocks are given for
LEAST, MOST = 0.5, 2.5  # what fewer or more steps make of them


@dataclass(frozen=True)
class Study:
    """Where to get a model and its data, and how to fine-tune it.

    Peak rates are those of a model of width 128; see `learning_rate`.
    """

    pruned_lr: float  # of a whole model whose blocks are as they were pruned
    tuned_lr: float  # of a library or a whole model whose blocks were solved or tuned, in TYPICAL_STEPS steps
    dropout: bool  # whether a short fine-tuning of a whole pruned model goes better with the model's own dropout
    block_lr: float  # of blocks apart
    calibration: int  # training examples that make a well-determined closed form
    method: str = "joint"  # of block-level fine-tuning
    pruned_shared_rate: float = 1.0  # the rest's learning rate beside pruned blocks, as a multiple of the blocks'
    tuned_shared_rate: float = 1.0  # and beside solved or tuned ones
    prefix: str = ""  # in front of every input text, as the model was trained
    checkpoint: str | None = None  # hub id of the model
    data: str | None = None  # hub id of the data set

    def learning_rate(self, start: str, width: int, steps: int) -> float:
        """The peak rate for a model of some width (d_model) in a run of some optimizer steps.

        It is in inverse proportion to the width (μP, arXiv 2203.03466). What was solved or tuned has something to lose:
        in few steps noise has no time to average out, so there the rate grows with their square root, within bounds.

        `start`: "pruned", "tuned" or "block", as the fields are named.
        """
        length = min(max((steps / TYPICAL_STEPS) ** 0.5, LEAST), MOST) if start == "tuned" else 1.0
        return getattr(self, f"{start}_lr") * 128 / width * length


STUDIES = {
    ("t5", "translation"): Study(
        pruned_lr=3e-3,
        tuned_lr=1e-3,
        pruned_shared_rate=4.0,
        tuned_shared_rate=3.0,
        dropout=False,
        block_lr=1e-2,
        calibration=2000,
        prefix="translate English to German: ",
        checkpoint="google-t5/t5-small",
        data="bentrevett/multi30k",
    ),
    ("distilbert", "classification"): Study(
        pruned_lr=6e-4,
        tuned_lr=4e-4,
        dropout=False,
        block_lr=3e-3,
        method="reconstruct",
        calibration=800,
        checkpoint="lvwerra/distilbert-imdb",
        data="stanfordnlp/imdb",
    ),
}
# Of T5's kin nothing was measured. They differ in their vocabulary, and were not trained on a task with a prefix.
for name in ("mt5", "umt5"):
    STUDIES[name, "translation"] = replace(STUDIES["t5", "translation"], prefix="", checkpoint=None, data=None)
USUAL = {
    "translation": Study(pruned_lr=1e-3, tuned_lr=6e-4, dropout=False, block_lr=3e-3, calibration=2000),
    "summarization": Study(pruned_lr=1e-3, tuned_lr=6e-4, dropout=False, block_lr=3e-3, calibration=500),
    "classification": Study(
        pruned_lr=6e-4, tuned_lr=4e-4, dropout=False, block_lr=3e-3, calibration=800, method="reconstruct"
    ),
}


def usual_task(model_type: str) -> str:
    """The task that a model type's models are for, unless their record says otherwise."""
    return next(iter(FAMILIES[family_name(model_type)].model_classes))


def study_of(model_type: str, task: str | None = None) -> Study:
    """The study of a model type on a task, or what is usual for the task; without a task, for its usual one."""
    task = task or usual_task(model_type)
    return STUDIES.get((family_name(model_type), task), USUAL[task])
