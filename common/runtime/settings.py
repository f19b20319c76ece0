"""Settings: what the flags say, as frozen dataclasses.

A field says all that there is to say of its flag; `cli.flags` makes the flag from it. Nothing here imports torch, so
that `--help` and a mistyped flag answer at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")
MOST = 10**6  # of what is counted by hand


def setting(
    default: Any,
    help: str,
    *,
    flag: str = "",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
) -> Any:
    """A field that has a flag.

    Args:
        default: what holds without the flag; the help says in words what None means.
        flag: its names, if the field's own ("--batch-size" of `batch_size`) is not all: "-t --tokenizer".
        least, most: bounds of a number, themselves included; above: a bound that is not.
    """
    bounds = {"least": least, "most": most, "above": above}
    metadata = {"help": help, "flag": flag, "bounds": bounds, "choices": choices, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataSettings:
    """Which data a stage reads, and how many examples at once."""

    tokenizer: str | None = setting(
        None, "tokenizer folder; without it the one in the model's record", flag="-t --tokenizer"
    )
    data: str | None = setting(
        None, "hub id, folder or file in place of the data in the model's record, with the same columns and prefix"
    )
    max_length: int | None = setting(
        None,
        "longest input in tokens; without it the smaller of the tokenizer's limit and 128 (text to text) or 256 "
        "(classification)",
        least=1,
    )
    limit: int | None = setting(None, "use only N examples of each split, the same ones in every run", least=1)
    batch_size: int = setting(32, "examples a batch", least=1)


@dataclass(frozen=True)
class TrainingDataSettings(DataSettings):
    """Those of a stage that trains."""

    validation_limit: int | None = setting(
        None, "use only N validation examples, likewise; without it as many as --limit says", least=1
    )


@dataclass(frozen=True)
class ComputeSettings:
    """Where and how precisely to compute."""

    device: str = setting("auto", "where to compute: auto (cuda if there is one, else cpu) or any torch device string")
    precision: str = setting(
        "fp32",
        "bf16 runs the forward pass under autocast; tf32 rounds the factors of its products, on GPUs that can; "
        "weights, losses and what is solved stay fp32",
        choices=("fp32", "tf32", "bf16"),
    )
    accumulate: int = setting(
        1,
        "take each batch in so many pieces, one after another, for less memory; the step is that of the whole",
        least=1,
        metavar="PIECES",
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """What the closed form is solved on."""

    calibration: int | None = setting(
        None, "training examples that the closed form is solved on; without it what suits the model", least=1
    )
    held_out: int | None = setting(
        None,
        "validation examples that the error of every variant is measured on; without it as many as have 8192 tokens, "
        "256 at most",
        least=1,
    )
    ridge: tuple[float, ...] = setting(
        (1e-3,),
        "the closed form's pull towards the pruned weights, relative to the mean of diag H; of several, the one that "
        "each variant's held-out error is least with",
        least=0,
    )
    rounds: int = setting(
        0,
        "how often all variants are solved again where the others are pruned too, with --method reconstruct; 2 pays "
        "where much is removed and no training follows",
        least=0,
        most=MOST,
    )


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. Flags leave None for what suits the model, which `cli.open.training_settings` fills in.

    `clip`: largest norm of a gradient; `beta2`: of AdamW, where a trained model goes on; `dropout`: whether the model's
    own is used; `target_loss`: stop once the validation loss is no higher, None = never.
    """

    epochs: int | None = setting(None, "epochs, at most", least=0, most=MOST)
    epoch_size: int | None = setting(
        None, "examples an epoch, with a validation after each; without it the whole training split", least=1
    )
    lr: float | None = setting(
        None, "peak learning rate; without it what suits the model, its start and the length of the run", above=0
    )
    warmup: float = setting(
        0.1, "fraction of the steps in which the learning rate rises; it falls linearly afterwards", least=0, most=1
    )
    weight_decay: float = setting(0.01, "AdamW's decoupled decay", least=0)
    early_stop: int = setting(
        0,
        "stop after this many epochs without a better validation loss; 0 never stops early; without it 2 for blocks "
        "apart, else 0",
        least=0,
    )
    shared_rate: float | None = setting(
        None,
        "learning rate of the shared parameters (embeddings, norms, head), as a multiple of that of the blocks; 0 "
        "leaves them as they are; without it what suits the model",
        least=0,
        metavar="FACTOR",
    )
    distill: float | None = setting(
        None,
        "share of the original's predictions in the training loss; 0: the labels alone; without it 0.5 in joint "
        "fine-tuning, else 0",
        least=0,
        most=1,
    )
    batch_size: int = 32
    precision: str = "fp32"
    seed: int = 0
    clip: float = 1.0
    beta2: float = 0.995
    dropout: bool = False
    target_loss: float | None = None

    def to_json(self) -> dict:
        """As part of the key of what is trained."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TrackingSettings:
    """Where the figures of every epoch go."""

    stats: str | None = setting(None, "CSV for the losses of every epoch; without it the output's name and .csv")
    track: tuple[str, ...] = setting(
        (),
        f"services that log the figures of every epoch, through accelerate: {', '.join(TRACKERS)}; their files lie in "
        "runs/ beside the output",
        choices=TRACKERS,
        metavar="NAME",
    )


@dataclass(frozen=True)
class SearchSettings:
    """What a search for configurations looks for."""

    budget: tuple[float, ...] = setting(
        (),
        "what each wanted model may cost: up to 1 a fraction of the original's blocks, above it the whole model's "
        "parameters, multiply-adds, bytes or milliseconds",
        above=0,
        metavar="X",
    )
    budget_of: tuple[int, ...] = setting((), "as much as the N-th configuration in -c costs", least=0, metavar="N")
    measure: str = setting(
        "parameters",
        "what a budget is counted in; latency is measured on this device",
        choices=("parameters", "multiply-adds", "bytes", "latency"),
    )
    plain: bool = setting(False, "find only models that --compact writes as an ordinary class, without code")
    objective: str = setting(
        "kl",
        "what must rise least: the divergence from the original's predictions, or the task's loss, which takes many "
        "more examples to tell two variants apart",
        choices=("loss", "kl"),
    )
    score_examples: int = setting(
        128,
        "validation examples that variants and models are scored on; as many others are held back, to check what is "
        "found",
        least=1,
    )
    rounds: int = setting(
        1, "how often, at most, a choice is improved by scoring variants within the chosen model", least=0
    )
    report: str | None = setting(None, "JSON file for scores, costs and what was found", metavar="FILE")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of models."""

    split: str = setting("test", "of the data set", choices=("train", "validation", "test"))
    test_file: str | None = setting(None, "test examples in place of the data set's", metavar="FILE")
    bootstrap: int = setting(
        1000,
        "how many resamples of the examples the 95 % confidence intervals are from; 0: no intervals",
        least=0,
        most=MOST,
        metavar="N",
    )
    save_predictions: str | None = setting(
        None, "JSON lines of every example's input, reference and prediction; {name} as in --report", metavar="FILE"
    )
    report: str | None = setting(
        None,
        "JSON file for size, multiply-adds and seconds, measured beside the original's; {name} stands for the model's "
        "name, for which several models need it",
        metavar="FILE",
    )
    update_card: bool = setting(False, "write the scores into the card (README.md) of the model's folder")
    original: str | None = setting(
        None, "the model to report beside; without it the one that the model's record names", metavar="MODEL"
    )


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated."""

    beams: int | None = setting(
        None, "beams of the search; without it as the model's generation config says, or greedy", least=1, most=1000
    )
    max_new_tokens: int | None = setting(
        None,
        "longest answer, in tokens; without it as the model's generation config says, or 60 of a translation, 128 of a "
        "summary; no more than the model has positions for",
        least=1,
        most=MOST,
    )


@dataclass(frozen=True)
class ScratchSettings:
    """A model that is trained from scratch; None stands for what suits the data."""

    d_model: int | None = setting(None, "width of the model", least=1, most=MOST)
    layers: int | None = setting(None, "layers of the encoder, and as many of the decoder", least=1, most=1000)
    vocabulary: int | None = setting(None, "tokens of either language, at most", least=1, most=MOST, metavar="TOKENS")
    epochs: int | None = setting(None, "epochs", least=0, most=MOST)
    batch_size: int | None = setting(None, "examples a batch", least=1)
    lr: float | None = setting(None, "peak learning rate", above=0)
