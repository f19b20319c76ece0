"""The engines that a model's folder can be written for in the place of transformers. Light to import."""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

from common.runtime.errors import UserError


@dataclass(frozen=True)
class Engine:
    """An engine, and the module with the code for it.

    That holds `VERSION`, part of every folder's key; `check_convertible(model)`; `write(folder, model, tokenizer,
    quantization)`, which returns the values for `SNIPPET`, the code of the card; and `opened(folder, config,
    generation, quantization, device)`: what answers, with the `precision` that it computes in.

    `requirements`: what pip installs; `quantizations`: types of weights; `weights`: a pattern of the files with them.
    """

    title: str
    address: str
    module: str
    requirements: tuple[str, ...]
    quantizations: tuple[str, ...]
    weights: str

    def check_installed(self) -> None:
        """Raise a UserError if a package that it requires is not installed."""
        if None in (importlib.util.find_spec(requirement.partition(">")[0]) for requirement in self.requirements):
            wanted = " ".join(f"'{requirement}'" for requirement in self.requirements)
            raise UserError(f"{self.title} is not installed; pip install {wanted}")

    @property
    def code(self) -> ModuleType:
        self.check_installed()
        return importlib.import_module(self.module)


TRANSFORMERS = "transformers"  # the format that is no engine's
ENGINES = {
    "ctranslate2": Engine(
        "CTranslate2",
        "https://github.com/OpenNMT/CTranslate2",
        "common.models.ctranslate",
        ("ctranslate2>=4.8,<5",),
        ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16"),
        "model.bin",
    ),
    "onnx": Engine(
        "ONNX Runtime",
        "https://onnxruntime.ai",
        "common.models.onnx",
        ("onnx>=1.22,<2", "onnxscript>=0.7,<1", "onnxruntime>=1.26,<2"),
        ("float32", "int8"),
        "*.onnx*",
    ),
}
