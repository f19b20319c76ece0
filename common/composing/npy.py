"""Module files: tensors and masks as the fields of one numpy structured array, which plain numpy opens."""

import numpy as np

from common.runtime.errors import UserError, as_user_error

KEEP = ".keep"  # how the names of masks end
TENSOR_TYPE, MASK_TYPE = np.dtype("<f4"), np.dtype(bool)
LARGEST_DTYPE = 2**31 - 1  # numpy counts a dtype's bytes in a C int and overflows silently
LARGEST_HEADER = 10_000  # numpy.load refuses longer ones


def check_finite(where, arrays):
    """Raise a UserError that names the first field that holds an infinity or NaN."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{where}: its {name} holds values that are not finite; fine-tune with a smaller learning rate, or "
                "mend the model"
            )


def to_numpy(tensor):
    return tensor.detach().float().cpu().numpy()  # numpy has no bfloat16


def pack(arrays, file):
    """{field: array} as one structured array of shape (), fields aligned."""
    packed = np.zeros((), packed_dtype(arrays, file))
    for name, array in arrays.items():
        packed[name] = array
    return packed


def packed_dtype(arrays, file):
    """The numpy dtype of such an array; a UserError if it is too large, or its header longer than numpy would read."""
    if sum(array.nbytes + 64 for array in arrays.values()) > LARGEST_DTYPE:
        raise UserError(f"{file}: the block is larger than the 2 GiB that one numpy record can hold")
    dtype = np.dtype([(name, array.dtype, array.shape) for name, array in arrays.items()], align=True)
    if len(repr(np.lib.format.dtype_to_descr(dtype))) > LARGEST_HEADER - 100:
        raise UserError(f"{file}: has too many fields for a .npy header")
    return dtype


def unpack(path):
    """The fields of a module file, {field: array}; a UserError if it is none. Never unpickles."""
    with as_user_error(path, "is not a readable module file"):
        packed = np.load(path, mmap_mode="r", allow_pickle=False)
        if packed.dtype.names is None or packed.shape != () or packed.dtype.hasobject:
            raise UserError(f"{path}: is a plain array, not a module file with named fields")
        for name, (dtype, _) in packed.dtype.fields.items():
            wanted = MASK_TYPE if name.endswith(KEEP) else TENSOR_TYPE
            if dtype.base != wanted:
                raise UserError(f"{path}: its {name} is {dtype.base} where {wanted} belongs")
    return {name: np.array(packed[name]) for name in packed.dtype.names}  # copied out of the read-only map
