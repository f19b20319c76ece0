"""What `evaluation.translate` gains over the plain loop.

The plain loop takes the examples in the order of the data set and calls `model.generate` on each batch. Both ways are
timed in turn, with decoding to text. The first `--batch-size` is translate's too; the plain loop is timed with the
others as well. Without -m the weights are random: such a model hardly ever ends a translation, so that none can be
dropped early, and the ratio shows the overhead alone.
"""

import statistics
import sys

import torch
from measure import build_parser, cli, emit, in_turn, machine, random_examples, random_model, ratio

from common.data import load_examples
from common.devices import Runtime, resolve_device
from common.errors import UserError
from common.evaluation import translate
from common.metrics import Translations
from common.models import data_source, load_model, load_tokenizer

RANDOM_EXAMPLES, RANDOM_LENGTH = 256, 20  # how many, and their mean length in tokens


def parser():
    flags = build_parser(__doc__)
    flags.add_argument("-m", "--model", help="folder or .pth; without it one of T5-small's size, with random weights")
    cli.add_data_flags(flags, batch_size=None)
    flags.add_argument("--beams", type=cli.positive, default=1, help="beams of the search; 1 is greedy")
    flags.add_argument("--max-new-tokens", type=cli.positive, default=60, help="longest translation, in tokens")
    flags.add_argument(
        "--plain-batch-sizes", type=cli.positive, nargs="*", default=[], help="time the plain loop with these as well"
    )
    flags.set_defaults(batch_size=64)
    return flags


class Ids:
    """In the place of a tokenizer where tokens are random: their numbers are the text."""

    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row if token > 1 or not skip_special_tokens) for row in rows]


@torch.inference_mode()
def plain(model, tokenizer, examples, *, batch_size, beams, max_new_tokens, device):
    """The translations of all examples, in batches as they come."""
    translations = []
    for start in range(0, len(examples), batch_size):
        batch = examples.batch(range(start, min(start + batch_size, len(examples))), device)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        translations += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return translations


def run(args):
    device = resolve_device(args.device)
    loaded = load_model(args.model, device) if args.model else random_model("t5", args.seed, device)
    if loaded.task.name != "translation":
        raise UserError(f"{args.model}: is a {loaded.task.name} model; decoding is for translation models")
    if args.model:
        data, tokenizer = data_source(args.data, loaded), load_tokenizer(args.tokenizer, loaded)
        prefix, lengths = loaded.prefix(data), {"max_length": args.max_length, "limit": args.limit}
        examples = load_examples(data, "test", tokenizer, loaded.task, prefix=prefix, **lengths)
    else:
        data, tokenizer = "random tokens", Ids()
        examples = random_examples(loaded, args.limit or RANDOM_EXAMPLES, RANDOM_LENGTH, args.seed)
    setting = {
        "model": str(loaded.path),
        "data": str(data),
        "examples": len(examples),
        "beams": args.beams,
        "max_new_tokens": args.max_new_tokens,
    }
    emit(**setting, **machine(device))

    model, runtime = loaded.model.eval(), Runtime(device, args.batch_size, cli.Talk(quiet=True))
    search = {"beams": args.beams, "max_new_tokens": args.max_new_tokens}
    sizes = list(dict.fromkeys([args.batch_size, *args.plain_batch_sizes]))
    translations = {}

    def way(name, translated):
        def call():
            translations[name] = translated()

        return call

    ways = {"translate": way("translate", lambda: translate(model, tokenizer, examples, runtime, **search)[0])}
    for size in sizes:
        ways[size] = way(
            size, lambda size=size: plain(model, tokenizer, examples, batch_size=size, device=device, **search)
        )
    seconds = in_turn(ways, args.rounds, device)

    for size in reversed(sizes):  # the one of equal batch size comes last: it is the result
        figures = {
            **setting,
            "batch_size": args.batch_size,
            "plain_batch_size": size,
            "rounds": args.rounds,
            "translate_seconds": round(statistics.median(seconds["translate"]), 4),
            "plain_seconds": round(statistics.median(seconds[size]), 4),
            "translate_examples_per_second": round(len(examples) / statistics.median(seconds["translate"]), 2),
            "plain_examples_per_second": round(len(examples) / statistics.median(seconds[size]), 2),
            "throughput_ratio": ratio(seconds[size], seconds["translate"]),
            "identical": sum(a == b for a, b in zip(translations["translate"], translations[size])),
        }
        if args.model:
            references = [german for _, german in examples.texts]
            figures |= {
                "translate_bleu": round(Translations(translations["translate"], references).scores()["bleu"], 4),
                "plain_bleu": round(Translations(translations[size], references).scores()["bleu"], 4),
            }
        if size != args.batch_size:
            emit(**figures)
    return figures


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
