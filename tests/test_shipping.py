"""The snippets of docs/shipping.md, run as they stand on tiny compact models: every way has the model's own answers."""

from functools import partial

import pytest
import torch
import transformers
from helpers import section, snippets
from tiny import build_tokenizer, distilbert_config, t5_config

from common.blocks.find import find_blocks, prunable_modules
from common.blocks.tensors import block_tensors, parameter_masks, set_block
from common.composing.configurations import uniform_configurations
from common.composing.scheme import make_scheme
from common.models.compact import make_compact
from common.pruning.prune_block import prune_block

ONE_LAYER = {
    "t5": lambda: transformers.T5ForConditionalGeneration(t5_config(num_layers=1, num_decoder_layers=1)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        distilbert_config(n_layers=1, initializer_range=0.3)
    ),
}


def compact_folder(kind, path):
    """A tiny model of one layer, with half its heads and neurons gone."""
    torch.manual_seed(0)
    model, masks = ONE_LAYER[kind]().eval(), {}
    rates = {"attention": 0.5, "linear": 0, "feed_forward": 0.5}
    scheme = make_scheme(uniform_configurations({}, prunable_modules(model, neurons=True), [rates]))
    for pair in scheme.variants():
        block = find_blocks(model)[pair.block]
        variant, _ = prune_block(block, block_tensors(model, block), scheme.blocks[pair.block][pair.variant])
        set_block(model, block, variant.tensors)
        masks |= {f"{block.root}.{key}": mask for key, mask in parameter_masks(block, variant.keeps).items()}
    compact = make_compact(model, masks)[0]
    (compact if kind == "t5" else compact.half()).save_pretrained(path)
    build_tokenizer(kind).save_pretrained(path)


@pytest.fixture
def run_snippets(tmp_path, monkeypatch):
    """run_snippets(title, kind, folder): the names that a section's snippets leave."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # no C++ compiler is needed

    def run(title, kind, folder):
        compact_folder(kind, folder)
        names = {}
        for code in snippets(section("docs/shipping.md", title)):
            exec(code, names)
        return names

    return run


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_the_classifiers_snippets_run_as_they_stand(run_snippets):
    names = run_snippets("A classifier", "distilbert", "reviews")
    logits = names["logits"]
    found = {name: torch.as_tensor(each) for name, each in names.items() if name.endswith("_logits")}
    assert len(found) == 3
    for name, each in found.items():
        spread = 0.1 * (logits.max() - logits.min()) if name == "small_logits" else 1e-4
        assert torch.allclose(each, logits, rtol=0, atol=float(spread)), name
    more, mask = torch.randint(5, 60, (5, 13)), torch.ones(5, 13, dtype=torch.int64)
    with torch.no_grad():
        expected = names["model"](input_ids=more, attention_mask=mask).logits
    assert torch.allclose(names["loaded"](input_ids=more, attention_mask=mask), expected, atol=1e-4)  # of other sizes
    label = names["model"].config.id2label[int(logits[0].argmax())]
    assert names["answers"][0]["label"] == label


def test_the_translation_models_snippets_run_as_they_stand(run_snippets):
    """Oracle: greedy search by hand, over all tokens so far."""
    names = run_snippets("A translation model", "t5", "device-model")
    model, inputs, generated = names["model"], names["inputs"], names["generated"]
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=generated[:, :-1]).logits
    answer, is_end = generated[:, 1:], generated[:, 1:] == model.config.eos_token_id
    is_own = is_end.cumsum(1) - is_end.long() == 0  # what follows the end is padding
    assert torch.equal(logits.argmax(-1)[is_own], answer[is_own]) and generated.shape[1] > 3
    assert len(names["translations"]) == 2
