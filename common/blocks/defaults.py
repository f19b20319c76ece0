"""What suits a model on a task: the studies' checkpoints and data sets, and settings for fine-tuning.

Those of t5, distilbert, bert and marian were measured (see docs/results.md), the others are by analogy. Each has a
flag, but for dropout.
"""

from dataclasses import dataclass, replace

from common.blocks.families import FAMILIES, family_name

TYPICAL_STEPS = 200  # that peak rates are given for
LEAST = 0.25  # what the shortest runs make of them
PRUNED = 2.0  # what weights as they were pruned make of them: they have less to lose
SHARED = 2.0  # multiple of the blocks' rate for the shared parameters, in as many
GROWTH = {"pruned": 0.5, "tuned": 0.75}  # the power of a run's length that they grow with


@dataclass(frozen=True)
class Study:
    """Where to get a model and its data, and how to fine-tune it. Peak rates are those of a model of width 128."""

    lr: float  # of a library or a whole model whose blocks were solved or tuned, in TYPICAL_STEPS steps
    block_lr: float  # of blocks apart
    dropout: bool  # whether fine-tuning goes better with the model's own dropout
    calibration: int  # training examples that make a well-determined closed form
    method: str = "joint"  # of block-level fine-tuning
    most: float = 1.0  # what the longest runs make of `lr`
    shared_rate: float = 1.0  # the largest multiple of the blocks' learning rate that the shared parameters have
    prefix: str = ""  # in front of every input text, as the model was trained
    checkpoint: str | None = None  # hub id of the model
    data: str | None = None  # hub id of the data set

    def rates(self, start: str, width: int, steps: int) -> tuple[float, float]:
        """(peak rate of the blocks, multiple of it for the shared parameters) for a model of some width (d_model).

        The rate is in inverse proportion to the width (μP, arXiv 2203.03466). Both grow with the optimizer steps of the
        run, within bounds: in few of them noise has no time to average out. For blocks apart they do not.

        `start`: what training begins with: "pruned" or "tuned" blocks of whole models, or a "block" apart.
        """
        if start == "block":
            return self.block_lr * 128 / width, 0.0
        length = min(max((steps / TYPICAL_STEPS) ** GROWTH[start], LEAST), self.most)
        rate = self.lr * (PRUNED if start == "pruned" else 1.0) * 128 / width * length
        return rate, min(max(SHARED * length, 1.0), self.shared_rate)


STUDIES = {
    ("t5", "translation"): Study(
        lr=1e-3,
        most=2.5,
        shared_rate=4.0,
        block_lr=1e-2,
        dropout=False,
        calibration=2000,
        prefix="translate English to German: ",
        checkpoint="google-t5/t5-small",
        data="bentrevett/multi30k",
    ),
    ("distilbert", "classification"): Study(
        lr=5e-4,
        block_lr=3e-3,
        dropout=True,
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
    "translation": Study(lr=1e-3, block_lr=3e-3, dropout=False, calibration=2000),
    "summarization": Study(lr=6e-4, block_lr=3e-3, dropout=False, calibration=500),
    "classification": Study(lr=5e-4, block_lr=3e-3, dropout=False, calibration=800, method="reconstruct"),
}
STUDIES["t5", "summarization"] = replace(USUAL["summarization"], prefix="summarize: ")


def usual_task(model_type: str) -> str:
    """The task that a model type's models are for, unless their record says otherwise."""
    return next(iter(FAMILIES[family_name(model_type)].model_classes))


def study_of(model_type: str, task: str | None = None) -> Study:
    """The study of a model type on a task, or what is usual for the task; without a task, for its usual one."""
    task = task or usual_task(model_type)
    return STUDIES.get((family_name(model_type), task), USUAL[task])
