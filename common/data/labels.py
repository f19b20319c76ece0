"""Labels of a data set as a model's classes, by one rule for every kind of file.

A label is a name of the model's, in upper or lower case; or a number of its classes, if none is called by a number.
1, 1.0 and "1" are one label; a boolean is the name true or false.
"""

import re
from collections.abc import Mapping, Sequence

from common.runtime.errors import UserError
from common.runtime.schema import shown

WHOLE = re.compile(r"(-?[0-9]+)(\.0*)?")
SHOWN = 10  # labels in a message


class WithoutLabels(UserError):
    """A split has no labels, as competitions' test splits have none."""


def class_numbers(where: object, labels: Sequence, classes: Sequence[str], label2id: Mapping[str, int]) -> list[int]:
    """The model's class of every label.

    Args:
        labels: as the file has them.
        classes: the names that the data set gives its numbers, [] for none.
        label2id: the numbers of the model's classes by their names.
    Raises:
        UserError: a label that is none of the model's; so are all that the two sides call differently.
        WithoutLabels: -1 or nothing throughout.
    """
    names = sorted(label2id, key=label2id.get)
    if not (_say_more_than_numbers(classes) and _say_more_than_numbers(names)):
        classes = []
    known = {_key(name): number for name, number in label2id.items()}
    if not any(map(WHOLE.fullmatch, names)):
        known |= {str(number): number for number in label2id.values()}
    labels = [classes[label] if type(label) is int and 0 <= label < len(classes) else label for label in labels]
    keys = [_key(label) for label in labels]
    unknown = set(keys) - known.keys()
    if unknown and set(keys) <= {None, "-1"}:
        raise WithoutLabels(f"{where}: has no labels, but -1 or nothing throughout; choose --label-column")
    if unknown:
        row = next(row for row, key in enumerate(keys) if key in unknown)
        if keys[row] in (None, "-1"):
            raise UserError(f"{where}: row {row + 1} has no label, but {shown(labels[row])}; take such rows out")
        raise UserError(
            f"{where}: row {row + 1} has label {shown(labels[row])}, which the model does not know; the data's labels "
            f"are {_listed(classes or sorted(set(map(str, labels))))}, the model's {_listed(names)}; call them alike "
            "(id2label and label2id in the model's config.json), or choose --label-column"
        )
    return [known[key] for key in keys]


def _key(label):
    """What a label is looked up as; None for nothing."""
    if label is None or label == "" or label != label:  # the last is "not a number"
        return None
    whole = WHOLE.fullmatch(str(label))
    return whole[1] if whole else str(label).casefold()


def _say_more_than_numbers(names):
    return any(name.casefold() not in (f"label_{number}", str(number)) for number, name in enumerate(names))


def _listed(names):
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
