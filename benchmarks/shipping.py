"""Ways to run a compact classifier elsewhere: what each takes on disk and in time, and whether it computes the same.

The ways are those of docs/shipping.md. A JSON line for each: bytes on disk; the processor's milliseconds for a batch,
median, least and most of the rounds, all ways in turn, to be read with one thread; quality on examples of the test
split; on how many of these the answer is the same as that of the model as transformers runs it.

What translates is in `engine.py`.
"""

import copy
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measure import build_parser, emit, in_turn, machine
from torch.export import Dim

from common.cli.flags import DATA, add_settings
from common.cli.launch import launch
from common.cli.open import open_study
from common.cli.values import int_between
from common.data.batching import evaluation_batches
from common.models.load import load_model
from common.models.saving import save_for_engine
from common.runtime.errors import UserError
from common.runtime.settings import DataSettings

TWO = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # batch and length


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("-m", "--model", required=True, help="folder of a compact model")
    flags.add_argument("--original", help="folder of the original, for a row of its own")
    flags.add_argument("--examples", type=int_between(1), default=200, help="of the test split")
    add_settings(flags, DataSettings, DATA, batch_size=8)
    return flags


def quantized(model):
    """Linears' weights as int8, their inputs quantized as they come."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def weights_size(path):
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def state_size(model, folder):
    """Bytes of a model's state as torch saves it."""
    torch.save(model.state_dict(), folder / "state.pt")
    return (folder / "state.pt").stat().st_size


def classifying(models, sizes, example, tokenizer, folder):
    """{way: (function of a batch that gives classes, (batch,), bytes on disk)}"""
    inputs = {name: example[name] for name in ("input_ids", "attention_mask")}

    def of_model(model):
        return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits

    compact, int8 = models["transformers"], quantized(models["transformers"])
    program = torch.export.export(Logits(compact), (), inputs, dynamic_shapes=dict.fromkeys(inputs, TWO))
    torch.export.save(program, folder / "model.pt2")
    exported = torch.export.load(folder / "model.pt2").module()
    ways = {name: (of_model(model), sizes[name]) for name, model in models.items()}
    ways["torch.compile"] = of_model(torch.compile(compact, dynamic=True)), sizes["transformers"]
    ways["torch.export"] = (
        lambda ids, mask: exported(input_ids=ids, attention_mask=mask),
        (folder / "model.pt2").stat().st_size,
    )
    for name, quantization in (("ONNX Runtime", "float32"), ("ONNX Runtime, int8", "int8")):
        save_for_engine("onnx", folder / name, compact, {"task": "classification"}, tokenizer, quantization)
        loaded = load_model(folder / name, to_run=True)
        ways[name] = of_model(loaded.model), loaded.bytes_on_disk
    ways["torch, int8"] = of_model(int8), state_size(int8, folder)

    def classes(logits_of):
        return lambda batch: logits_of(batch["input_ids"], batch["attention_mask"]).argmax(-1).tolist()

    return {way: (classes(function), size) for way, (function, size) in ways.items()}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@torch.no_grad()
def run(args):
    opened = open_study(args)
    loaded, device = opened.loaded, opened.runtime.device
    examples = opened.split("test").sample(args.examples)
    order = evaluation_batches(examples, args.batch_size)
    batches = [examples.batch(positions, device) for positions in order]
    models, sizes = {"transformers": loaded.model}, {"transformers": weights_size(args.model)}
    if args.original:
        models["original"], sizes["original"] = load_model(args.original).model, weights_size(args.original)
    if loaded.model.can_generate():
        raise UserError(f"{args.model}: is for {loaded.task.name}; see engine.py")
    for model in models.values():
        model.eval()
    setting = {"model": str(args.model), "examples": len(examples), "batch": args.batch_size}
    emit(figure="setting", **setting, **machine(device))

    with tempfile.TemporaryDirectory() as folder:
        ways = classifying(models, sizes, batches[0], opened.tokenizer, Path(folder))
    middle = batches[len(batches) // 2]
    answering = {way: partial(answer, middle) for way, (answer, _) in ways.items()}
    seconds = in_turn(answering, args.rounds, device, lambda _: time.process_time())  # this process's alone
    of_transformers = None
    for way, (answer, size) in ways.items():
        answers = [row for batch in batches for row in answer(batch)]
        of_transformers = of_transformers or answers  # the first way
        milliseconds = sorted(1e3 * each for each in seconds[way])
        emit(
            way=way,
            megabytes=round(size / 1e6, 2),
            milliseconds=round(statistics.median(milliseconds), 1),
            least_and_most=[round(milliseconds[0], 1), round(milliseconds[-1], 1)],
            **quality(opened, examples, order, answers),
            same_answers=sum(a == b for a, b in zip(answers, of_transformers)),
        )
    return setting


def quality(opened, examples, order, answers):
    """{metric: score} of answers in the order of the batches."""
    positions = [position for batch in order for position in batch]
    texts, targets = ([each[position] for position in positions] for each in (examples.texts, examples.targets))
    task = opened.loaded.task
    return {task.metric: round(task.scored(answers, texts, targets).scores()[task.metric], 4)}


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
