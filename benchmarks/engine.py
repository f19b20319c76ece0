"""What CTranslate2 and ONNX Runtime gain over transformers, at T5-small's size with random weights, halved, in int8.

A JSON line for each way: bytes of the weights; the processor's milliseconds for a step, which generates a token of each
of 32 sentences: median, least and most of the rounds, all ways in turn, to be read with one thread. Nothing depends on
what the weights are.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from measure import build_parser, emit, in_turn, machine

from common.blocks.find import find_blocks
from common.cli.launch import launch
from common.cli.values import int_between
from common.models.compact import make_compact
from common.models.engines import ENGINES
from common.models.load import load_model
from common.models.saving import save_for_engine, save_model

SENTENCES, WORDS, TOKENS = 32, 20, 24


class Names:
    """As a tokenizer, what is asked of it to write a model."""

    unk_token = pad_token = "0"

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {str(number): number for number in range(self.size)}

    def save_pretrained(self, folder):
        pass


@torch.no_grad()
def halved(model):
    """The first half of the heads and neurons of every block."""
    for block in find_blocks(model).values():
        columns = model.get_submodule(f"{block.root}.{block.output}").weight
        columns[:, columns.shape[1] // 2 :] = 0
    return make_compact(model, {})[0]


def run(args):
    ids = torch.randint(3, min(args.vocabulary), (SENTENCES, WORDS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    search = {"num_beams": 1, "do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for vocabulary in args.vocabulary:
            loaded |= write(Path(folder), vocabulary, args.seed)
        ways = {name: (lambda each=each: each.model.generate(**batch, **search)) for name, each in loaded.items()}
        seconds = in_turn(ways, args.rounds, "cpu", clock=lambda device: time.process_time())
        emit(**machine("cpu"), vocabulary=args.vocabulary)
        for name, times in seconds.items():
            each = [1000 * value / TOKENS for value in times]
            figures = {"median": statistics.median(each), "min": min(each), "max": max(each)}
            figures = {key: round(value, 2) for key, value in figures.items()}
            emit(way=name, bytes=loaded[name].bytes_on_disk, milliseconds_per_step=figures)
    return {"ways": len(ways)}


def write(folder, vocabulary, seed):
    """Write the model of so many tokens in each way; {what it is: the model as loaded}."""
    torch.manual_seed(seed)
    settings = {"d_ff": 2048, "num_layers": 6, "vocab_size": vocabulary, "decoder_start_token_id": 0}
    dense = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()
    loaded, record, names = {}, {"task": "translation"}, Names(vocabulary)
    for size, model in (("dense", dense), ("half", halved(dense))):
        path = folder / f"{size}, {vocabulary} tokens, transformers"
        save_model(path, model, record)
        loaded[path.name] = load_model(path)
        for name, quantization in itertools.product(ENGINES, ("float32", "int8")):
            path = folder / f"{size}, {vocabulary} tokens, {ENGINES[name].title} {quantization}"
            save_for_engine(name, path, model, record, names, quantization)
            loaded[path.name] = load_model(path, to_run=True)
    return loaded


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    sizes = {"type": int_between(100), "nargs": "+", "default": [32128, 8000]}
    flags.add_argument("--vocabulary", **sizes, help="how many tokens the models know")
    return flags


def main(argv=None):
    return launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
