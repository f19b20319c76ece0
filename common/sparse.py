"""Weights in a file whose size follows the non-zeros.

A tensor of n entries, nnz of them not zero, is stored as one bit an entry that says which, and the values of these: in
float32 n / 8 + 4 · nnz bytes, against 4 · n. Four-byte indices would take more wherever over 3 % of the entries are
left. A tensor that would not get smaller is stored as it is. The file is a safetensors file.
"""

import json
import math

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.schema import ListOf, MapOf, Number, Object, Text

FORMAT = "composable-pruning sparse 1"
METADATA = "composable-pruning"  # the one key: safetensors writes several in an order that changes from run to run
SHAPES = "shapes"  # in the metadata: of the tensors that are stored by their non-zeros
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors names them
BITS, VALUES = ".nonzero_bits", ".nonzero_values"
SCHEMA = Object({"format": Text((FORMAT,)), SHAPES: MapOf(ListOf(Number(0, 2**40, whole=True)))})


def save_sparse(path, tensors):
    """Write {name: tensor}, on any device."""
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # By bits, so that -0.0 comes back as it was.
        nonzero = tensor.flatten().view(_integer(tensor)) != 0 if tensor.is_floating_point() else tensor.flatten() != 0
        if math.ceil(tensor.numel() / 8) + int(nonzero.sum()) * tensor.element_size() < tensor.nbytes:
            shapes[name] = list(tensor.shape)
            stored[name + BITS] = torch.from_numpy(np.packbits(nonzero.numpy()))
            stored[name + VALUES] = tensor.flatten()[nonzero]
        else:
            stored[name] = tensor
    metadata = json.dumps({"format": FORMAT, SHAPES: shapes}, sort_keys=True)
    save_file(stored, path, metadata={METADATA: metadata})


def sparse_shapes(path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, {name: shape}, by its header alone, which is checked.

    Raises:
        ValueError: not such a file, or its parts do not fit together.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        check_dtypes(file)
        return {name: tuple(shape) for name, shape in _checked_shapes(file).items()}


def check_dtypes(file) -> None:
    """Make sure that an open safetensors file holds weights.

    Raises:
        ValueError: naming the first tensor of whole numbers or something else.
    """
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        kind = file.get_slice(name).get_dtype()
        if kind not in FLOATS and not name.endswith((BITS, ".position_ids")):  # the latter once saved, and unused
            raise ValueError(f"{name} is of {kind}, not one of {', '.join(FLOATS)}")


def load_sparse(path):
    """Read what `save_sparse` wrote: {name: tensor}, bit for bit the same.

    Raises:
        ValueError: not such a file, or its parts do not fit together.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {}
        for name, shape in _checked_shapes(file).items():
            if name in file.keys():  # noqa: SIM118 (it is no dict)
                tensors[name] = file.get_tensor(name)
                continue
            bits, values = file.get_tensor(name + BITS).numpy(), file.get_tensor(name + VALUES)
            count = math.prod(shape)
            nonzero = torch.from_numpy(np.unpackbits(bits, count=count)).bool()
            if int(nonzero.sum()) != len(values) or np.unpackbits(bits)[count:].any():
                raise ValueError(f"the parts of {name} do not fit together")
            tensor = values.new_zeros(count)
            tensor[nonzero] = values
            tensors[name] = tensor.view(shape)
        return tensors


def _checked_shapes(file):
    """{name: shape} of all tensors, once it is sure that the file has the parts for them, and no others."""
    metadata = file.metadata() or {}
    try:
        # In older files each part of the metadata has a key.
        found = metadata.get(METADATA)
        found = json.loads(found) if found else {"format": metadata["format"], SHAPES: json.loads(metadata[SHAPES])}
    except (ValueError, KeyError, RecursionError):
        raise ValueError("not a file of sparse weights") from None
    fault = SCHEMA.find(found)
    if fault:
        raise ValueError(f"not a file of sparse weights: {fault}")
    stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    parts = {name + end for name in found[SHAPES] for end in (BITS, VALUES)}
    shapes = {name: part.get_shape() for name, part in stored.items() if name not in parts}
    for name, shape in found[SHAPES].items():
        bits, values = stored.get(name + BITS), stored.get(name + VALUES)
        fits = (
            name not in stored
            and bits is not None
            and values is not None
            and bits.get_dtype() == "U8"
            and bits.get_shape() == [math.ceil(math.prod(shape) / 8)]
            and len(values.get_shape()) == 1
            and values.get_shape()[0] <= math.prod(shape)
        )
        if not fits:
            raise ValueError(f"the parts of {name} do not fit together")
        shapes[name] = shape
    return shapes


def _integer(tensor):
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
