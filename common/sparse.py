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

FORMAT = "composable-pruning sparse 1"
SHAPES = "shapes"  # in the file's metadata: of the tensors that are stored by their non-zeros
BITS, VALUES = ".nonzero_bits", ".nonzero_values"


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
    save_file(stored, path, metadata={"format": FORMAT, SHAPES: json.dumps(shapes)})


def load_sparse(path):
    """Read what `save_sparse` wrote: {name: tensor}, bit for bit the same.

    Raises:
        ValueError: not such a file, or its parts do not fit together.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError("not a file of sparse weights")
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith((BITS, VALUES))}
    for name, shape in json.loads(metadata[SHAPES]).items():
        bits, values = stored[name + BITS], stored[name + VALUES]
        count = math.prod(shape)
        nonzero = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool()
        if len(bits) != math.ceil(count / 8) or int(nonzero.sum()) != len(values):
            raise ValueError(f"the parts of {name} do not fit together")
        tensor = values.new_zeros(count)
        tensor[nonzero] = values
        tensors[name] = tensor.view(shape)
    return tensors


def _integer(tensor):
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
