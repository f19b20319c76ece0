"""Sparse weight files: every bit comes back, and the size is the one worked out by hand."""

import json
import math
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, build_model, make_digests_fit, same_state, without_digests
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.models import load_model, save_model
from common.sparse import METADATA, load_sparse, save_sparse

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.uint8, torch.bool]
ODD = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, 1.0, -2.5]


def same_bits(left, right):
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8)
    )


def header_and_payload(path):
    """The two sizes of a safetensors file in bytes: its first 8 say how long the header after them is."""
    with open(path, "rb") as handle:
        (header,) = struct.unpack("<Q", handle.read(8))
    return 8 + header, path.stat().st_size - 8 - header


def payload_by_hand(tensors):
    """A bit an entry and the values that have a bit set, or all of the tensor if that is no more, in bytes."""
    total = 0
    for tensor in tensors.values():
        width = tensor.element_size()
        entries = tensor.contiguous().flatten().view(torch.uint8).view(-1, width)  # bytes of each
        nonzero = int(entries.any(dim=1).sum())
        total += min(len(entries) * width, -(-len(entries) // 8) + nonzero * width)
    return total


def make_tensor(dtype, shape, density, seed):
    """A random tensor, so dense, with some of ODD among its values."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    values = torch.randn(count, generator=generator) * 50
    if dtype.is_floating_point:
        odd = torch.rand(count, generator=generator) < 0.2
        values[odd] = torch.tensor(ODD)[torch.randint(len(ODD), (count,), generator=generator)][odd]
    else:
        values = values.abs().clamp(1, 100)
    return (values * 1.0).masked_fill(torch.rand(count, generator=generator) >= density, 0.0).to(dtype).view(shape)


# --- files ---------------------------------------------------------------------------------------------------------

TENSORS = st.builds(
    make_tensor,
    dtype=st.sampled_from(FLOATS + WHOLE),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.03, 0.3, 0.7, 0.95, 0.97, 1.0]),
    seed=st.integers(0, 999),
)


@settings(max_examples=100, deadline=None)
@given(tensors=st.dictionaries(st.sampled_from(["a", "b.weight", "c.bias", "ü"]), TENSORS))
def test_every_bit_comes_back_and_the_size_is_the_formulas(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("sparse") / "m.safetensors"
    save_sparse(path, tensors)
    found = load_sparse(path)
    assert found.keys() == tensors.keys()
    assert [name for name in tensors if not same_bits(found[name], tensors[name])] == []
    header, payload = header_and_payload(path)
    assert payload == payload_by_hand(tensors)
    assert header < 200 + 300 * len(tensors)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_with_a_sign_and_numbers_that_are_none_come_back(tmp_path, dtype):
    tensor = torch.tensor(ODD + [0.0] * 90).to(dtype)
    save_sparse(tmp_path / "m", {"w": tensor})
    found = load_sparse(tmp_path / "m")["w"]
    assert same_bits(found, tensor)
    assert math.copysign(1, found[1].item()) == -1 and found[2].isnan() and found[4] == math.inf
    assert header_and_payload(tmp_path / "m")[1] < tensor.nbytes / 2  # it was not stored as it is


def test_sizes_by_hand(tmp_path):
    """1000 entries: 125 bytes of bits. 100 non-zeros of 4 bytes make 525 of 4000; 969 no longer make it smaller."""
    for nonzeros, size in ((0, 125), (1, 129), (100, 525), (968, 125 + 3872), (969, 4000), (1000, 4000)):
        tensor = torch.zeros(1000)
        tensor[:nonzeros] = 1.0
        save_sparse(tmp_path / "m", {"w": tensor.view(8, 125)})
        assert header_and_payload(tmp_path / "m")[1] == size
        assert torch.equal(load_sparse(tmp_path / "m")["w"], tensor.view(8, 125))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.tensor(0.0),
        torch.tensor(-1.5),
        torch.tensor(0),
        torch.eye(6)[:, ::2],
        torch.eye(5, 9).T,
    ],
    ids=["empty", "empty too", "zero", "number", "whole", "strided", "turned"],
)
def test_odd_shapes_come_back(tmp_path, tensor):
    save_sparse(tmp_path / "m", {"w": tensor})
    assert same_bits(load_sparse(tmp_path / "m")["w"], tensor)


def test_saving_leaves_the_tensors_alone_and_takes_parameters(tmp_path):
    parameter = torch.nn.Parameter(torch.eye(4))
    save_sparse(tmp_path / "m", {"w": parameter})
    found = load_sparse(tmp_path / "m")["w"]
    assert torch.equal(found, torch.eye(4)) and not found.requires_grad
    assert torch.equal(parameter, torch.eye(4)) and parameter.requires_grad


def test_a_file_is_the_same_whatever_order_the_process_hashes_in(tmp_path):
    """safetensors writes several keys of metadata in an order that changes from process to process."""
    code = (
        "import sys, torch; from common.sparse import save_sparse; "
        "save_sparse(sys.argv[1], {name: torch.zeros(40) for name in 'abc'})"
    )
    for name in "123":
        subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT, check=True, timeout=120)
    assert len({(tmp_path / name).read_bytes() for name in "123"}) == 1


def test_a_file_of_the_older_layout_is_read(tmp_path):
    """By hand: 2 of 40 entries, the first and the last."""
    tensor, bits = torch.zeros(5, 8), torch.tensor([128, 0, 0, 0, 1], dtype=torch.uint8)
    tensor[0, 0], tensor[4, 7] = 2.0, -1.0
    metadata = {"format": "composable-pruning sparse 1", "shapes": '{"w": [5, 8]}'}
    stored = {"w.nonzero_bits": bits, "w.nonzero_values": torch.tensor([2.0, -1.0])}
    save_file(stored, tmp_path / "m", metadata=metadata)
    assert torch.equal(load_sparse(tmp_path / "m")["w"], tensor)


# --- models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory):
    """A folder: of the tiny T5, nine tenths of every matrix zero, in both forms."""
    folder, model = tmp_path_factory.mktemp("models"), build_model("t5")
    model.generation_config.max_new_tokens = 7
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[torch.rand(parameter.shape) < 0.9] = 0
    for name in ("dense", "sparse"):
        save_model(folder / name, model, {"key": "k"}, sparse=name == "sparse")
    return folder


def test_a_sparse_folder_holds_the_same_model_in_less(sparse_model):
    """Oracle: the dense folder, and the formula over its tensors; the tied embeddings are there once."""
    sparse, dense = load_model(sparse_model / "sparse"), load_model(sparse_model / "dense")
    assert same_state(sparse.model, dense.model) and type(sparse.model) is type(dense.model)
    assert without_digests(sparse.record) == {"key": "k"} and sparse.model.generation_config.max_new_tokens == 7
    assert sparse.model.lm_head.weight is sparse.model.shared.weight
    assert not any(module.training for module in sparse.model.modules())
    assert [path.name for path in (sparse_model / "sparse").glob("*.safetensors")] == ["sparse.safetensors"]
    tensors = load_file(sparse_model / "dense" / "model.safetensors")
    header, payload = header_and_payload(sparse_model / "sparse" / "sparse.safetensors")
    assert payload == payload_by_hand(tensors)
    # Of 33408 weights 12 · 32 are in norms and whole; the matrices' are a bit each, and a tenth of them 4 bytes.
    assert payload == pytest.approx(33024 / 8 + 4 * 0.1 * 33024 + 4 * 384, rel=0.03)
    assert header < 300 * len(tensors)
    assert (header + payload) < (sparse_model / "dense" / "model.safetensors").stat().st_size / 4


def test_a_classifier_has_no_generation_config(tmp_path):
    model = build_model("distilbert")
    save_model(tmp_path / "m", model, {}, sparse=True)
    assert same_state(load_model(tmp_path / "m").model, model)


def test_saving_in_the_other_form_leaves_no_weights_behind(tmp_path):
    """Or the next one to load would find the old ones."""
    for seed, sparse in enumerate((True, False, True)):
        model = build_model("t5")
        torch.nn.init.constant_(model.shared.weight, seed)
        save_model(tmp_path / "m", model, {}, sparse=sparse)
        assert torch.equal(load_model(tmp_path / "m").model.shared.weight, torch.full((64, 32), float(seed)))
        assert len(list((tmp_path / "m").glob("*.safetensors"))) == 1


# --- damage --------------------------------------------------------------------------------------------------------

WEIGHT = "encoder.block.0.layer.1.DenseReluDense.wi.weight"  # (48, 32)


def rewritten(change):
    """A function that changes the tensors and the metadata of a sparse file by `change(tensors, metadata)`."""

    def spoil(path):
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()[METADATA])
        tensors = load_file(path)
        change(tensors, metadata)
        save_file(tensors, path, metadata={METADATA: json.dumps(metadata)})

    return spoil


def with_shape(shape):
    """A function that gives WEIGHT another shape in the metadata."""
    return rewritten(lambda tensors, metadata: metadata["shapes"].update({WEIGHT: shape}))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "no header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "text": lambda path: path.write_text("weights"),
    "no metadata": lambda path: save_file(load_file(path), path),
    "other format": rewritten(lambda tensors, metadata: metadata.update(format="composable-pruning sparse 0")),
    "no shapes": rewritten(lambda tensors, metadata: metadata.pop("shapes")),
    "shapes no JSON": rewritten(lambda tensors, metadata: metadata.update(shapes="{")),
    "shapes a list": rewritten(lambda tensors, metadata: metadata.update(shapes=[])),
    "shape no list": with_shape(1536),
    "negative shape": with_shape([-48, 32]),
    "smaller shape": with_shape([48, 8]),
    "larger shape": with_shape([48, 64]),
    "no bits": rewritten(lambda tensors, metadata: tensors.pop(f"{WEIGHT}.nonzero_bits")),
    "no values": rewritten(lambda tensors, metadata: tensors.pop(f"{WEIGHT}.nonzero_values")),
    "too few values": rewritten(
        lambda tensors, metadata: tensors.update(
            {f"{WEIGHT}.nonzero_values": tensors[f"{WEIGHT}.nonzero_values"][:-1].clone()}
        )
    ),
    "too few bits": rewritten(
        lambda tensors, metadata: tensors.update(
            {f"{WEIGHT}.nonzero_bits": tensors[f"{WEIGHT}.nonzero_bits"][:-9].clone()}
        )
    ),
    "too many bits": rewritten(lambda tensors, metadata: tensors[f"{WEIGHT}.nonzero_bits"].fill_(255)),
    "bits of floats": rewritten(
        lambda tensors, metadata: tensors.update({f"{WEIGHT}.nonzero_bits": tensors[f"{WEIGHT}.nonzero_bits"].float()})
    ),
    "no tensor": rewritten(lambda tensors, metadata: (tensors.clear(), metadata.update(shapes={}))),
    "nine GiB": with_shape([48, 32 * 1500 * 1000]),
    "ten to the thirtieth": with_shape([48, 10**30]),
    "a foreign tensor": rewritten(lambda tensors, metadata: tensors.update(foreign=torch.zeros(3))),
    "whole numbers": rewritten(lambda tensors, metadata: tensors.update({"shared.weight": torch.ones(64, 32).int()})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(sparse_model, tmp_path, damage):
    folder = shutil.copytree(sparse_model / "sparse", tmp_path / "m")
    DAMAGE[damage](folder / "sparse.safetensors")
    make_digests_fit(folder)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [[48, 8], [48, 64], [49, 32], [12]], ids=str)
def test_a_shape_that_the_bits_do_not_fit_is_noticed(sparse_model, tmp_path, shape):
    """The 1536 entries of the weight have 192 bytes of bits; the same weights under another count are no weights."""
    path = shutil.copy(sparse_model / "sparse" / "sparse.safetensors", tmp_path)
    with_shape(shape)(path)
    with pytest.raises(ValueError, match="do not fit together"):
        load_sparse(path)


# --- the scripts ---------------------------------------------------------------------------------------------------


def library_flags(workshop, chain):
    return "-m", workshop / "model" / "t5", "-p", chain / "tuned", "-c", chain / "conf.json", "-n", 2


def test_a_composed_model_can_be_sparse(call, workshop, chain, tmp_path):
    """Oracles: the chain's own composed model, and the formula over its tensors."""
    arguments = ("compose_model.py", *library_flags(workshop, chain), "-o", tmp_path / "m", "--sparse")
    code, result, err = call(*arguments)
    assert code == 0, err
    path, dense = tmp_path / "m" / "sparse.safetensors", chain / "composed-2" / "model.safetensors"
    assert same_state(load_model(tmp_path / "m").model, load_model(chain / "composed-2").model)
    header, payload = header_and_payload(path)
    assert payload == payload_by_hand(load_file(dense))
    # By hand: bits and values of the weights, of which the norms and embeddings are stored whole.
    whole = 64 * 32 + 2 * 32 * 4 + 12 * 32
    nonzero = result["nonzero_parameters"] - whole
    assert payload == (result["parameters"] - whole) / 8 + 4 * nonzero + 4 * whole
    assert header + payload < dense.stat().st_size
    before = path.stat().st_mtime_ns
    assert call(*arguments)[1] == result and path.stat().st_mtime_ns == before
    evaluated = [call("evaluate-t5.py", "-m", model, "--limit", 4) for model in (tmp_path / "m", chain / "composed-2")]
    assert [code for code, _, _ in evaluated] == [0, 0]
    assert evaluated[0][1]["bleu"] == evaluated[1][1]["bleu"]


@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_a_pth_cannot_be_sparse(call, workshop, chain, tmp_path, script):
    extra = () if script.startswith("compose") else ("--stats", tmp_path / "stats.csv")
    code, result, err = call(script, *library_flags(workshop, chain), "-o", tmp_path / "m.pth", "--sparse", *extra)
    assert (code, result, err.count("\n")) == (2, None, 1)
    assert f"--sparse: {tmp_path / 'm.pth'} is a .pth" in err and "give -o a folder" in err
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuned_model_can_be_sparse(call, workshop, chain, tmp_path):
    """Oracle: the same run without --sparse."""
    results, models = [], []
    for name, flags in (("dense", []), ("sparse", ["--sparse"])):
        code, result, err = call(
            "model-level_finetuning.py",
            *library_flags(workshop, chain),
            "-o",
            tmp_path / name,
            "--stats",
            tmp_path / f"{name}.csv",
            "--epochs",
            1,
            "--batch-size",
            8,
            *flags,
        )
        assert code == 0, err
        results.append({key: result[key] for key in ("val_loss", "nonzero_parameters", "sparsity")})
        models.append(load_model(tmp_path / name).model)
    assert results[0] == results[1] and same_state(*models)
    assert (tmp_path / "sparse" / "sparse.safetensors").stat().st_size < (
        tmp_path / "dense" / "model.safetensors"
    ).stat().st_size
