"""Module files opened by plain numpy, their guards, and which variants a rerun makes again."""

import concurrent.futures
import functools
import json
import threading

import numpy as np
import pytest
import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant
from common.composing import library as library_module
from common.composing.library import FINE_TUNED, PRUNED, TOGETHER, Library
from common.composing.npy import pack, unpack
from common.composing.scheme import Pair
from common.runtime.errors import UserError
from common.runtime.records import digest, sealed

K, OTHER = {"epochs": 1}, {"epochs": 2}  # what variants are made from
MODEL = {"name": "tiny", "type": "t5", "fingerprint": "f00d"}
BLOCK = Block(
    "encoder.0.ff", "encoder.0.ff", "feed_forward", ("wi",), "wo", heads=0, neurons=5, side="encoder", has_bias=False
)
VARIANT = "wi-3"
PAIR = Pair(BLOCK.name, VARIANT)


def tensors_and_keeps():
    torch.manual_seed(0)
    tensors = {"wi.weight": torch.randn(5, 3), "wi.bias": torch.randn(5), "wo.weight": torch.randn(3, 5)}
    keeps = {"wi": torch.rand(5, 3) > 0.5, "wo": torch.rand(3, 5) > 0.5}
    for name, keep in keeps.items():
        tensors[f"{name}.weight"][~keep] = 0
    return tensors, keeps


def open_library(folder, **changes):
    return Library.open_or_create(folder, "prune.py", MODEL | changes, PRUNED)


@pytest.fixture
def library(tmp_path):
    """A library that holds one variant under the key "k"."""
    made = open_library(tmp_path / "lib")
    made.write({PAIR: Variant(BLOCK, *tensors_and_keeps())}, {PAIR: K}, {PAIR: {"sparsity": 0.5}})
    return made


# --- module files --------------------------------------------------------------------------------------------------


def test_plain_numpy_opens_a_module_file(library):
    tensors, keeps = tensors_and_keeps()
    content = np.load(library.folder / "encoder.0.ff.wi-3.npy")
    assert content.shape == () and content.dtype.names == (*tensors, "wi.keep", "wo.keep")
    for name, tensor in tensors.items():
        assert content[name].dtype == np.float32 and np.array_equal(content[name], tensor.numpy())
    for name, keep in keeps.items():
        assert content[f"{name}.keep"].dtype == np.bool_ and np.array_equal(content[f"{name}.keep"], keep.numpy())


def test_a_variant_survives_the_file_bit_for_bit(library):
    tensors, keeps = tensors_and_keeps()
    for made in (library, Library.open(library.folder, "f00d", PRUNED)):
        _, read_tensors, read_keeps = made.read(BLOCK, VARIANT)
        assert list(read_tensors) == list(tensors) and list(read_keeps) == list(keeps)
        assert all(torch.equal(read_tensors[name], tensors[name]) for name in tensors)
        assert all(torch.equal(read_keeps[name], keeps[name]) for name in keeps)


def test_a_block_of_2_gib_is_refused():
    """numpy's limit is a C int of bytes; the array is a broadcast view, nothing is allocated."""
    huge = np.broadcast_to(np.float32(0), (2**29,))
    assert huge.nbytes == 2**31
    with pytest.raises(UserError, match="big.npy: the block is larger than the 2 GiB"):
        pack({"a": huge}, "big.npy")
    half = np.broadcast_to(np.float32(0), (2**28,))
    with pytest.raises(UserError, match="2 GiB"):
        pack({"a": half, "b": half}, "big.npy")  # neither alone is too large


def test_whatever_header_is_written_numpy_reads_with_its_defaults(tmp_path):
    """Oracle: np.load, which refuses headers over 10,000 characters."""
    written, length = 0, 17
    for fields in range(9500 // (length + 13), 10500 // (length + 13)):  # a field takes length + 13 characters
        arrays = {f"{i:0{length}d}": np.ones((), np.float32) for i in range(fields)}
        try:
            packed = pack(arrays, "x.npy")
        except UserError as error:
            assert str(error) == "x.npy: has too many fields for a .npy header"
            break
        np.save(tmp_path / "x.npy", packed)
        assert len(np.load(tmp_path / "x.npy").dtype.names) == fields
        written += 1
    else:
        pytest.fail("no header was too long")
    assert written > 0


# --- the record ----------------------------------------------------------------------------------------------------


def test_an_entry_holds_the_key_the_shapes_and_what_was_measured(library):
    for made in (library, Library.open(library.folder, "f00d")):
        entry = made.entry(PAIR)
        assert (entry["key"], entry["made_from"]) == (digest(K), K)
        assert (entry["sparsity"], entry["file"]) == (0.5, "encoder.0.ff.wi-3.npy")
        assert entry["shapes"] == {
            "wi.weight": [5, 3],
            "wi.bias": [5],
            "wo.weight": [3, 5],
            "wi.keep": [5, 3],
            "wo.keep": [3, 5],
        }
        assert made.variants() == [(BLOCK.name, VARIANT)]


def test_an_absent_variant_is_named_with_the_remedy(library):
    with pytest.raises(UserError, match=r"has no variant wi-4 of encoder\.0\.ff; run prune\.py"):
        library.read(BLOCK, "wi-4")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = [
    (lambda path: path.unlink(), "no such file, though the record lists it"),
    (cut, "is not the file"),
    (flip_a_bit, "is not the file"),
]


@pytest.mark.parametrize("damage, words", DAMAGES, ids=["gone", "cut", "flipped"])
def test_a_damaged_file_is_never_used_and_is_made_again(library, damage, words):
    path = library.folder / "encoder.0.ff.wi-3.npy"
    damage(path)
    with pytest.raises(UserError) as error:
        library.read(BLOCK, VARIANT)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)
    assert library.has(PAIR, K, overwrite=False) is False


@pytest.mark.parametrize(
    "variant, made_from, overwrite, there",
    [(VARIANT, K, False, True), (VARIANT, K, True, True), (VARIANT, OTHER, True, False), ("wi-4", K, False, False)],
)
def test_a_variant_is_there_if_it_was_made_from_the_same(library, variant, made_from, overwrite, there):
    assert open_library(library.folder).has(Pair(BLOCK.name, variant), made_from, overwrite) is there


def test_a_kill_between_the_first_file_and_its_entry_does_not_lock_the_folder(tmp_path, monkeypatch):
    """Resume must work from the very first variant on."""
    made = open_library(tmp_path / "lib")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def kill(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(library_module, "write_json", kill)
        made.write({PAIR: Variant(BLOCK, *tensors_and_keeps())}, {PAIR: K})
    assert (tmp_path / "lib" / "encoder.0.ff.wi-3.npy").exists()
    again = open_library(tmp_path / "lib")
    assert again.has(PAIR, K, overwrite=False) is False
    again.write({PAIR: Variant(BLOCK, *tensors_and_keeps())}, {PAIR: K})
    assert again.has(PAIR, K, overwrite=False) is True


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fingerprint, stage, words",
    [
        ("beef", None, r"was made for another model \(tiny\)"),
        ("f00d", FINE_TUNED, "is a pruned library where a fine-tuned one belongs"),
    ],
)
def test_a_library_of_another_model_or_stage_is_refused(library, fingerprint, stage, words):
    with pytest.raises(UserError, match=words):
        Library.open(library.folder, fingerprint, stage)


@pytest.mark.parametrize(
    "record, words",
    [
        (None, "record.json: no such file; prune.py"),
        ("{", "malformed JSON"),
        ("{}", "not a library's record"),
        (
            json.dumps(sealed({"stage": PRUNED, "model": MODEL, "variants": {"a": {}}})),
            "'variants': 'a': 'block' is mis",
        ),
    ],
)
def test_a_folder_that_is_no_library_is_refused(tmp_path, record, words):
    if record is not None:
        (tmp_path / "record.json").write_text(record)
    with pytest.raises(UserError, match=words):
        Library.open(tmp_path, "f00d")


def test_a_folder_that_is_not_there_or_holds_something_else(tmp_path):
    with pytest.raises(UserError, match="no such library folder"):
        Library.open(tmp_path / "nowhere", "f00d")
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is neither empty nor a library"):
        open_library(tmp_path)


# --- several writers -----------------------------------------------------------------------------------------------


def test_many_writers_at_once_lose_nothing(tmp_path):
    writers, each = 8, 5
    start, variant = threading.Barrier(writers), Variant(BLOCK, *tensors_and_keeps())

    def write(writer):
        start.wait()
        library = open_library(tmp_path / "lib")
        for i in range(each):
            pair = Pair(BLOCK.name, f"{writer}-{i}")
            library.write({pair: variant}, {pair: {"writer": writer, "i": i}})
            library.write({Pair(BLOCK.name, "shared"): variant}, {Pair(BLOCK.name, "shared"): K})

    with concurrent.futures.ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    library = Library.open(tmp_path / "lib", "f00d", PRUNED)
    expected = {f"{writer}-{i}" for writer in range(writers) for i in range(each)} | {"shared"}
    assert {pair.variant for pair in library.variants()} == expected
    for pair in library.variants():
        assert torch.equal(library.read(BLOCK, pair.variant).tensors["wi.weight"], variant.tensors["wi.weight"])
    assert sorted(path.suffix for path in library.folder.iterdir() if path.suffix != ".npy") == ["", ".json"]


@pytest.mark.parametrize(
    "left", [[".record.json.abcd1234.pruning-part"], [".lock"], [".lock", ".a.npy.x.pruning-part"]]
)
def test_a_library_whose_first_writing_was_killed_is_begun_again(tmp_path, left):
    (tmp_path / "lib").mkdir()
    for name in left:
        (tmp_path / "lib" / name).write_bytes(b"{")
    open_library(tmp_path / "lib").write({PAIR: Variant(BLOCK, *tensors_and_keeps())}, {PAIR: K})
    assert {path.name for path in (tmp_path / "lib").iterdir()} == {".lock", "record.json", f"{PAIR}.npy"}


def test_a_rest_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    """Else the other's variants would be left with a shared that they were not tuned with."""
    first, second = (Library.open_or_create(tmp_path / "lib", "b.py", MODEL, TOGETHER) for _ in range(2))
    for library, name in ((first, "a"), (second, "b")):
        write = functools.partial(
            library.write,
            {Pair(BLOCK.name, name): Variant(BLOCK, *tensors_and_keeps())},
            {Pair(BLOCK.name, name): K},
            shared={"norm.weight": torch.ones(3)},
            beside_made_from={"of": name},
        )
        if library is first:
            write()
    with pytest.raises(UserError, match="another process tuned variants there meanwhile"):
        write()
    again = Library.open(tmp_path / "lib", "f00d", TOGETHER)
    assert [pair.variant for pair in again.variants()] == ["a"] and again.record["shared"]["made_from"] == {"of": "a"}


def test_a_field_of_another_type_is_refused(tmp_path):
    """A digest that was made to fit does not help: half precision would fail, or be taken for something else, later."""
    np.save(tmp_path / "x.npy", pack({"w": np.zeros((2, 3), np.float16)}, "x.npy"))
    with pytest.raises(UserError, match="its w is float16 where float32 belongs"):
        unpack(tmp_path / "x.npy")
