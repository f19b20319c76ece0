"""The small BERT and the small Marian of the studies, out of a DistilBERT and a T5.

- bert: a classifier out of a DistilBERT classifier. The layers of the two are the same, and their weights are carried
  over. BERT adds embeddings of token types, which are zero here, and has a tanh where DistilBERT has a ReLU, between
  the two Linears of the head.
- marian: a translator out of a T5 without gates and with tied embeddings. What differs is where the norms are, and the
  positions; see `marian_from`.

Both are then fine-tuned by the suite's own training loop; the best weights by validation loss are kept. The model's
folder holds the tokenizer. An interrupted run goes on where it last saved its state.
"""

import itertools
import sys

import torch
import transformers
from measure import cli

from common.checkpoints import Checkpoint
from common.data import load_examples
from common.devices import Runtime, resolve_device
from common.errors import UserError
from common.evaluation import parameter_counts, quality
from common.families import family_of
from common.files import check_writable
from common.inputs import recipe_from
from common.models import is_made, load_model, load_tokenizer, reference, save_model
from common.records import digest, make_record
from common.tasks import IGNORED
from common.training import Learner, ModelObjective, fit, steps_of

NAME = "small_models.py"  # in records
DEFAULTS = {  # epochs, batch size, peak rate, and whether with dropout: Marian's epochs are too few to overfit
    "bert": (1, 16, 2e-5, True),
    "marian": (2, 32, 1e-3, False),
}
HEAD_SHARE = 10.0  # the rate of BERT's head, as a multiple of the rest's
EMBEDDING = 2.0  # factor on T5's embeddings, so that Marian's sinusoids do not drown them
POSITIONS = 128  # that Marian has
MEASURED_ON = 256  # training examples that the sizes of T5's stream are measured on


def build_parser():
    parser = cli.build_parser(__doc__.partition("\n\n")[0], overwrite=True)
    parser.add_argument("family", choices=list(DEFAULTS))
    parser.add_argument("--start", metavar="MODEL", required=True, help="the DistilBERT or T5 to begin with, a folder")
    parser.add_argument("-o", "--output", required=True, help="folder of the model and its tokenizer")
    cli.add_data_flags(parser, batch_size=None)
    cli.add_training_flags(parser, epochs=None, early_stop=0, stats="none is written")
    return parser


def bert_from(distilbert):
    """A `BertForSequenceClassification` with the weights of a `DistilBertForSequenceClassification`.

    The token types' embeddings are zero, and the pooler's Linear is DistilBERT's `pre_classifier`.
    """
    old = distilbert.config
    config = transformers.BertConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.dim,
        num_hidden_layers=old.n_layers,
        num_attention_heads=old.n_heads,
        intermediate_size=old.hidden_dim,
        hidden_act=old.activation,
        hidden_dropout_prob=old.dropout,
        attention_probs_dropout_prob=old.attention_dropout,
        classifier_dropout=old.seq_classif_dropout,
        max_position_embeddings=old.max_position_embeddings,
        pad_token_id=old.pad_token_id,
        id2label=old.id2label,
        label2id=old.label2id,
    )
    model = transformers.BertForSequenceClassification(config)
    body, head = distilbert.distilbert, "bert.pooler.dense"
    modules = {"classifier": distilbert.classifier, head: distilbert.pre_classifier}
    for name in ("word_embeddings", "position_embeddings", "LayerNorm"):
        modules[f"bert.embeddings.{name}"] = body.embeddings.get_submodule(name)
    for i, layer in enumerate(body.transformer.layer):
        for name, place in {
            "attention.q_lin": "attention.self.query",
            "attention.k_lin": "attention.self.key",
            "attention.v_lin": "attention.self.value",
            "attention.out_lin": "attention.output.dense",
            "sa_layer_norm": "attention.output.LayerNorm",
            "ffn.lin1": "intermediate.dense",
            "ffn.lin2": "output.dense",
            "output_layer_norm": "output.LayerNorm",
        }.items():
            modules[f"bert.encoder.layer.{i}.{place}"] = layer.get_submodule(name)
    state = {
        f"{place}.{name}": tensor for place, module in modules.items() for name, tensor in module.state_dict().items()
    }
    state["bert.embeddings.token_type_embeddings.weight"] = model.bert.embeddings.token_type_embeddings.weight * 0
    model.load_state_dict(state)
    return model


def marian_from(t5, sizes):
    """A `MarianMTModel` with the weights of a `T5ForConditionalGeneration`, whose function is nearly T5's.

    T5 normalises what a block reads, and leaves the stream that blocks add to as it is. Marian normalises the stream
    after each block. With norms whose weights are the stream's usual size in T5, Marian's stream is about T5's; what
    T5's norms multiply with goes into the blocks' first Linears. Position biases have no counterpart: Marian's
    sinusoids are new to the weights.

    Args:
        sizes: see `stream_sizes`.
    Raises:
        UserError: a T5 of another kind.
    """
    old = t5.config
    if old.is_gated_act or not old.tie_word_embeddings or old.num_heads * old.d_kv != old.d_model:
        raise UserError("--start: needs a T5 without gates, with tied embeddings and heads that have d_model in all")
    config = transformers.MarianConfig(
        vocab_size=old.vocab_size,
        d_model=old.d_model,
        encoder_layers=old.num_layers,
        decoder_layers=old.num_decoder_layers,
        encoder_attention_heads=old.num_heads,
        decoder_attention_heads=old.num_heads,
        encoder_ffn_dim=old.d_ff,
        decoder_ffn_dim=old.d_ff,
        max_position_embeddings=POSITIONS,
        activation_function=old.dense_act_fn,
        scale_embedding=True,
        dropout=old.dropout_rate,
        pad_token_id=old.pad_token_id,
        eos_token_id=old.eos_token_id,
        decoder_start_token_id=old.decoder_start_token_id,
        forced_eos_token_id=None,
    )
    model = transformers.MarianMTModel(config)
    state = model.state_dict()  # biases are zero, and stay so
    for name in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        state[f"{name}.weight"] = t5.shared.weight * EMBEDDING / old.d_model**0.5  # Marian multiplies by the root
    for side in ("encoder", "decoder"):
        names = [name for name in sizes if name.startswith(side)]  # a stack's norms, the final one last
        for name, following in itertools.pairwise(names):
            layer = t5.get_submodule(name.rpartition(".")[0])
            block, path, norm = _counterpart(layer, f"model.{side}.layers.{name.split('.')[2]}")
            size = sizes[name] * (
                EMBEDDING if name == names[0] else 1.0
            )  # of Marian's stream where T5's is sizes[name]
            read, written = t5.get_submodule(name).weight / size, size / sizes[name]
            if hasattr(block, "wi"):
                own = {"fc1": block.wi.weight * read, "fc2": block.wo.weight * written}
            else:
                of_stream = 1.0 if hasattr(layer, "EncDecAttention") else read
                own = {
                    "q_proj": block.q.weight * read * old.d_kv**0.5,  # T5 does not divide its scores by the root
                    "k_proj": block.k.weight * of_stream,
                    "v_proj": block.v.weight * of_stream,
                    "out_proj": block.o.weight * written,
                }
            state |= {f"{path}.{linear}.weight": weight for linear, weight in own.items()}
            if following == names[-1]:  # logits: T5's are scaled down by the root, as Marian's embeddings are
                state[norm] = t5.get_submodule(following).weight / (EMBEDDING if side == "decoder" else 1.0)
            else:
                state[norm] = torch.full_like(state[norm], sizes[following])
    model.load_state_dict(state)
    return model


def _counterpart(layer, path):
    """Of a sublayer of T5: its block; in Marian the path of its Linears' module, and its norm's weight."""
    if hasattr(layer, "DenseReluDense"):
        return layer.DenseReluDense, path, f"{path}.final_layer_norm.weight"
    is_cross = hasattr(layer, "EncDecAttention")
    path = f"{path}.{'encoder_attn' if is_cross else 'self_attn'}"
    return layer.EncDecAttention if is_cross else layer.SelfAttention, path, f"{path}_layer_norm.weight"


@torch.no_grad()
def stream_sizes(t5, batch):
    """The root mean square of what enters each norm of a T5 on a batch: {name of the norm: float}, in their order."""
    norms = {name: module for name, module in t5.named_modules() if name.endswith("layer_norm")}
    sizes = dict.fromkeys(norms)

    real = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != IGNORED}  # (batch, length)

    def note(name):
        def hook(module, args):
            sizes[name] = args[0][real[name.partition(".")[0]]].pow(2).mean().sqrt().item()

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in norms.items()]
    family_of(t5.config).run(t5, batch)
    for handle in handles:
        handle.remove()
    return sizes


def run(args):
    if args.data is None:
        raise UserError("--data is needed")
    check_writable(args.output)
    epochs, batch_size, lr, dropout = DEFAULTS[args.family]
    args.epochs = epochs if args.epochs is None else args.epochs
    args.batch_size = args.batch_size or batch_size
    talk, device = cli.Talk(args.quiet), resolve_device(args.device)
    start = load_model(args.start)
    expected = {"bert": "distilbert", "marian": "t5"}[args.family]
    if start.model.config.model_type != expected:
        raise UserError(
            f"--start {args.start}: is a {start.model.config.model_type} model; {args.family} needs a {expected}"
        )
    task, tokenizer = start.task, load_tokenizer(args.tokenizer, start)
    positions = start.positions or POSITIONS
    train, validation = (
        load_examples(
            args.data, split, tokenizer, task, positions=positions, max_length=args.max_length, limit=args.limit
        )
        for split in ("train", "validation")
    )
    torch.manual_seed(args.seed)
    if args.family == "bert":
        model = bert_from(start.model)
    else:
        sample = train.sample(MEASURED_ON)
        model = marian_from(start.model, stream_sizes(start.model, sample.batch(range(len(sample)))))
    model.to(device)
    shares = {
        name: HEAD_SHARE for name, _ in model.named_parameters() if name.startswith(("bert.pooler", "classifier"))
    }
    recipe = recipe_from(args, lr, dropout=dropout)
    made_from = {
        "family": args.family,
        "start": start.identity,
        "data": [train.fingerprint(), validation.fingerprint()],
        "recipe": recipe.to_json(),
    }
    if is_made(args.output, made_from, args.overwrite, NAME):
        talk.say(f"{args.output}: is there already")
        return {"model": args.output, "skipped": True}
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    learner = Learner(parameters, {}, recipe, steps_of(train, recipe), shares)
    key = digest(made_from)
    checkpoint = Checkpoint(args.output, key, {"model": key}, 60 * args.save_every, talk)
    runtime = Runtime(device, args.batch_size, talk)
    progress = fit({"model": learner}, ModelObjective(model, recipe), train, validation, recipe, runtime, checkpoint)
    measured = {
        "val_loss": learner.best_loss,
        "best_epoch": learner.best_epoch,
        f"validation_{task.metric}": quality(model.eval(), tokenizer, validation, runtime, max_new_tokens=60),
        "train_seconds": round(sum(row.train for row in progress.rows), 1),
        "threads": torch.get_num_threads(),
    }
    record = make_record(
        NAME,
        made_from,
        model_type=args.family,
        task=task.name,
        measured=measured,
        data=reference(args.data, args.output),
    )
    save_model(args.output, model, record, tokenizer=tokenizer)
    checkpoint.remove()
    return {"model": args.output, "skipped": False, **measured, **parameter_counts(model)}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
