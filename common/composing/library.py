"""A folder of `.npy` module files, one per variant of a block, and the record of how each came to be.

A module file is a numpy structured array of shape () whose fields are the block's tensors and masks: "q.weight"
(float32) and "q.keep" (bool, True = kept). Plain numpy opens it: `np.load(file)["wo.weight"]`. A library whose variants
were tuned together has more: one of the shared parameters, those outside of blocks, and one for each block, of the
update that its variants share, which is part of their weights and what later variants begin with.

The record is written after every finished file, or after all of those that were tuned together. Several processes may
write to one library: whoever does locks the folder, and adds to the record as it is then.
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path

import filelock
import numpy as np
import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant, parameter_masks
from common.composing.configurations import MODEL
from common.composing.npy import KEEP, check_finite, pack, packed_dtype, to_numpy, unpack
from common.composing.scheme import Pair
from common.runtime import plan
from common.runtime.errors import UserError
from common.runtime.files import (
    atomic_file,
    check_writable,
    damage_in,
    is_temporary,
    no_such,
    real,
    remove_leftovers_in,
)
from common.runtime.processes import Processes
from common.runtime.records import (
    RECORD_NAME,
    check_file,
    differences,
    digest,
    file_digest,
    is_lost,
    make_record,
    read_record,
    sealed,
    write_json,
)
from common.runtime.schema import check
from common.runtime.signals import deferred

PRUNED, FINE_TUNED = "pruned", "fine-tuned"  # what a library holds; never both
TOGETHER = "tuned-together"  # fine-tuned jointly, perhaps with the shared parameters
SHARED = "shared"  # in the record, and the name of its file
UPDATES = "updates"  # in the record; BLOCK.update.npy are the files
FILE = {"file": str, "key": str, "made_from": {str: object}, "sha256": str, str: object}
RECORD = {
    "digest": str,
    "stage": {PRUNED, FINE_TUNED, TOGETHER},
    "model": MODEL,
    "variants": {str: {"block": str, "variant": str, **FILE}},
    f"{SHARED}?": FILE,
    f"{UPDATES}?": {str: FILE},
    str: object,
}
LOCK_NAME = ".lock"
REMEDY = "delete the file and run the script that made the library again"


class Library:
    """The library in a folder. Reading needs the record; writing keeps it, with the `flags` of whoever writes."""

    def __init__(self, folder: str | Path, record: dict):
        self.folder = Path(folder)
        self.record, self.flags = record, {}

    @classmethod
    def open(cls, folder: str | Path, model_fingerprint: str, stage: str | None = None) -> "Library":
        """Open the library that an earlier stage made; `stage`: if only one will do.

        Raises:
            UserError: there is none, or it was made for another model, or it is of another stage.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise no_such(folder, "library folder", "prune.py or block-level_finetuning.py makes one", "*/*.npy")
        record = _read_library_record(folder)
        if record["model"]["fingerprint"] != model_fingerprint:
            raise UserError(
                f"{folder}: was made for another model ({record['model']['name']}); "
                "give the model it was made for, or another library"
            )
        if stage not in (None, record["stage"]):
            raise UserError(f"{folder}: is a {record['stage']} library where a {stage} one belongs")
        return cls(folder, record)

    @classmethod
    def open_or_create(
        cls, folder: str | Path, script: str, model: dict, stage: str, overwrite: bool = False
    ) -> "Library":
        """Open a library of the `model` {name, type, fingerprint} to write to, or start one.

        `overwrite`: whether one whose record is lost, see `files.damage_in`, is started anew.

        Raises:
            UserError: the folder cannot be written, or holds something else, or its record is lost.
        """
        folder = Path(folder)
        check_writable(folder)
        check_writable(folder / RECORD_NAME, is_file=True)
        remove_leftovers_in(folder)
        files = list(folder.iterdir()) if folder.is_dir() else []  # first: another process may be beginning the library
        record_path = folder / RECORD_NAME
        is_damaged = is_lost(damage_in(record_path), overwrite)
        if is_damaged or not record_path.exists():
            ours = (RECORD_NAME, ".npy") if is_damaged else ()
            if not all(path.name == LOCK_NAME or is_temporary(path.name) or path.name.endswith(ours) for path in files):
                raise UserError(f"{folder}: is neither empty nor a library; choose another folder")
            made_from = {"model": model["fingerprint"], "stage": stage}
            library = cls(folder, make_record(script, made_from, stage=stage, model=model, variants={}))
            if plan.current():
                return library
            real(folder).mkdir(parents=True, exist_ok=True)  # a link may lead to a place that is not there yet
            with library._lock():
                if damage_in(record_path) or not record_path.exists():  # another process may have been faster
                    library._write_record(library.record)  # at once: an interrupted run must know its folder again
        return cls.open(folder, model["fingerprint"], stage)

    @classmethod
    def open_shared(
        cls, folder: str | Path, script: str, model: dict, stage: str, processes: Processes, overwrite: bool
    ) -> "Library":
        """The same by several processes: the first starts it, the others wait for that."""
        library = cls.open_or_create(folder, script, model, stage, overwrite) if processes.number == 0 else None
        processes.agree(None)
        return library or cls.open(folder, model["fingerprint"], stage)

    def _lock(self):
        return filelock.FileLock(self.folder / LOCK_NAME)

    def _write_record(self, record):
        write_json(self.folder / RECORD_NAME, sealed(record))
        self.record = record

    def variants(self) -> list[Pair]:
        """All pairs that the library holds."""
        return [Pair(entry["block"], entry["variant"]) for entry in self.record["variants"].values()]

    def entry(self, pair: Pair) -> dict:
        """The record of a variant; a UserError if there is none."""
        if pair not in self:
            raise UserError(
                f"{self.folder}: has no variant {pair.variant} of {pair.block}; run prune.py (and "
                "block-level_finetuning.py) again with the scheme of this conf.json"
            )
        return self.record["variants"][str(pair)]

    def __contains__(self, pair: Pair) -> bool:
        return str(pair) in self.record["variants"]

    def has(self, pair: Pair, made_from: dict, overwrite: bool) -> bool:
        """Whether the variant is there already, made from the same things (see `records.make_record`).

        Raises:
            UserError: it was made from other things, and `overwrite` is off.
        """
        entry = self.record["variants"].get(str(pair))
        if entry is None:
            state = plan.MISSING
        elif entry["key"] == digest(made_from):
            state = plan.THERE if self._is_intact(entry) else plan.DAMAGED
        else:
            state = f"made with other settings{differences(entry, made_from)}"
            if not overwrite:
                raise UserError(
                    f"{self.folder}: {pair} is there already, {state}; choose another library or pass --overwrite"
                )
        plan.note(f"{self.folder}/{pair}", state)
        return state == plan.THERE

    def expect(self, blocks: dict[str, Block], pairs: Iterable[Pair], beside: Iterable[torch.Tensor] = ()) -> None:
        """Tell the plan, if there is one, how many bytes the files of variants take, and the tensors beside them."""
        if planned := plan.current():
            entries = [prod(shape) for pair in pairs for _, shape in blocks[pair.block].shapes]
            masked = 4 + 1  # bytes of an entry, with its mask's
            planned.disk[str(self.folder)] = masked * sum(entries) + sum(tensor.nbytes for tensor in beside)

    def _is_intact(self, entry):
        path = self.folder / entry["file"]
        return path.exists() and file_digest(path) == entry["sha256"]

    @deferred()
    def write(
        self,
        variants: dict[Pair, Variant],
        made_from: dict[Pair, dict],
        measured: dict[Pair, dict] | None = None,
        shared: dict[str, torch.Tensor] | None = None,
        updates: dict[str, dict[str, torch.Tensor]] | None = None,
        beside_made_from: dict | None = None,
    ) -> None:
        """Write the module files of variants, of shared parameters {parameter: tensor} and of updates {block: tensors};
        then the record, once.

        Args:
            made_from: everything that determined the tensors, see `records.make_record`.
            measured: further JSON values for the record.
        Raises:
            UserError: another process wrote shared parameters since this library was opened; see also
                `npy.check_finite` and `npy.pack`.
        """
        if plan.current():
            return
        with self._lock():
            record = _read_library_record(self.folder)
            if record.get(SHARED) != self.record.get(SHARED):
                raise UserError(f"{self.folder}: another process tuned variants there meanwhile; run this again")
            entries = {
                str(pair): self._write_variant(pair.variant, variant, made_from[pair], (measured or {}).get(pair, {}))
                for pair, variant in variants.items()
            }
            others = {}
            if shared:
                others[SHARED] = self._write_tensors(f"{SHARED}.npy", shared, beside_made_from)
            if updates:
                written = {
                    block: self._write_tensors(f"{block}.update.npy", tensors, beside_made_from)
                    for block, tensors in updates.items()
                }
                others[UPDATES] = record.get(UPDATES, {}) | written
            self._write_record({**record, "variants": {**record["variants"], **entries}, **others, "flags": self.flags})

    def _write_variant(self, name, variant, made_from, measured):
        """Write a variant's module file; returns its entry for the record."""
        block, tensors, keeps = variant
        pair = Pair(block.name, name)
        arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
        arrays |= {f"{name}{KEEP}": keep.cpu().numpy() for name, keep in keeps.items()}
        path = self.folder / f"{pair}.npy"
        check_finite(path, arrays)
        for name, mask in parameter_masks(block, keeps).items():
            if name in tensors and bool(tensors[name][~mask].any()):
                raise ValueError(f"{path}: {name} is not zero everywhere that its mask removes")
        written = self._write_file(path.name, arrays, made_from)
        return {"block": pair.block, "variant": pair.variant, **written, **measured}

    def _write_tensors(self, file, tensors, made_from):
        """Write a file of tensors that are none of a variant; returns its entry for the record."""
        arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
        check_finite(self.folder / file, arrays)
        return self._write_file(file, arrays, made_from)

    def _write_file(self, file, arrays, made_from):
        """Write a module file; returns its entry for the record."""
        with atomic_file(self.folder / file) as handle:
            np.save(handle, pack(arrays, file), allow_pickle=False)
        return {
            "file": file,
            "key": digest(made_from),
            "made_from": made_from,
            "sha256": file_digest(self.folder / file),
            "shapes": {name: list(array.shape) for name, array in arrays.items()},
        }

    def run(self, pair: Pair) -> str | None:
        """What identifies the run that a variant was tuned together with others in; None if it is not there."""
        return self.record["variants"].get(str(pair), {}).get("made_from", {}).get("run")

    def check_shared(self, shared: dict[str, torch.Tensor]) -> None:
        """Make sure, before any long work, that shared parameters fit into a module file, see `npy.packed_dtype`."""
        packed_dtype(
            {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in shared.items()}, f"{SHARED}.npy"
        )

    def is_intact_beside(self) -> bool:
        """Whether the files beside the variants', those of shared parameters and updates, are what was written."""
        shared = [self.record[SHARED]] if SHARED in self.record else []
        return all(map(self._is_intact, [*shared, *self.record.get(UPDATES, {}).values()]))

    def shared_key(self) -> str | None:
        """What the shared parameters were made from, as a digest; None if there are none."""
        return self.record[SHARED]["key"] if SHARED in self.record else None

    def read_shared(self) -> dict[str, torch.Tensor] | None:
        """The shared parameters that the variants were tuned with, {parameter: tensor}; None if there are none."""
        return self._read_file(self.record[SHARED]) if SHARED in self.record else None

    def read_updates(self) -> dict[str, dict[str, torch.Tensor]]:
        """The update of each block whose variants were tuned together, {block: {"q.weight": tensor}}."""
        return {block: self._read_file(entry) for block, entry in self.record.get(UPDATES, {}).items()}

    @deferred()
    def annotate(self, block: str, scores: dict) -> None:
        """Add a "score" to the entries of some of a block's variants: {variant's name: JSON value}."""
        with self._lock():
            record = _read_library_record(self.folder)
            entries = dict(record["variants"])
            for variant, score in scores.items():
                pair = str(Pair(block, variant))
                if pair in entries:
                    entries[pair] = {**entries[pair], "score": score}
            self._write_record({**record, "variants": entries})

    @deferred()
    def note(self, name: str, value: object) -> None:
        """Keep a JSON value in the record, under a name of its own."""
        with self._lock():
            self._write_record(_read_library_record(self.folder) | {name: value})

    def read(self, block: Block, name: str) -> Variant:
        """One variant as torch tensors (float32, masks bool), checked against its digest.

        Raises:
            UserError: the variant is missing, or its file is not what was written.
        """
        entry = self.entry(Pair(block.name, name))
        fields = self._read_file(entry)
        tensors = {field: tensor for field, tensor in fields.items() if not field.endswith(KEEP)}
        keeps = {field.removesuffix(KEEP): keep for field, keep in fields.items() if field.endswith(KEEP)}
        weights = {linear: tensors.get(f"{linear}.weight") for linear in block.linears}
        if keeps.keys() != weights.keys() or any(
            weights[linear] is None or keep.shape != weights[linear].shape for linear, keep in keeps.items()
        ):
            raise UserError(f"{self.folder / entry['file']}: its masks are not of its weights; {REMEDY}")
        return Variant(block, tensors, keeps)

    def _read_file(self, entry):
        """The fields of a module file as torch tensors."""
        path = self.folder / entry["file"]
        check_file(path, entry["sha256"], REMEDY)
        arrays = unpack(path)
        if {field: list(array.shape) for field, array in arrays.items()} != entry["shapes"]:
            raise UserError(f"{path}: does not hold the tensors that its record lists; {REMEDY}")
        return {field: torch.from_numpy(array) for field, array in arrays.items()}


def _read_library_record(folder):
    path = folder / RECORD_NAME
    record = read_record(path, "prune.py or block-level_finetuning.py")
    check(path, record, RECORD, "it is not a library's record; make the library again")
    return record
