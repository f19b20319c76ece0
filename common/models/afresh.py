"""What runs in a process of its own, and knows nothing of this suite: it loads folders as their users will.

A line on stdin is a question, [the modules to import, the arguments of `answer`] as JSON, and a line on stdout its
answer, or {"error"}. A copy of the process answers, which has imported these and done nothing else.
"""

import contextlib
import importlib
import json
import os
import sys

import numpy as np
import torch
import transformers

TOKENS = 8  # that are generated


def answer(folder: str, text: str, engine: str | None, auto_class: str, has_code: bool) -> dict:
    """A text's tokens by the folder's tokenizer, and the model's logits, see `first_logits`.

    Args:
        engine: "ctranslate2" or "onnx"; None for transformers.
        auto_class: of transformers, to load the model by.
        has_code: whether the folder's own code is needed.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=has_code)
    batch = tokenizer(text, return_tensors="pt")
    tokens = batch["input_ids"][0].tolist()
    if engine == "onnx":
        return {"tokens": tokens, "logits": onnx_logits(folder, batch).flatten().tolist()}
    if engine == "ctranslate2":
        import ctranslate2

        lengths = {"min_decoding_length": 0, "max_decoding_length": TOKENS}
        source = tokenizer.convert_ids_to_tokens(tokens)
        engine = ctranslate2.Translator(folder)
        (result,) = engine.translate_batch([source], beam_size=1, return_logits_vocab=True, **lengths)
        return {"tokens": tokens, "logits": np.array(result.logits[0][0]).flatten().tolist()}
    of_class = getattr(transformers, auto_class)
    model = of_class.from_pretrained(folder, trust_remote_code=has_code, dtype=torch.float32).eval()
    if model.can_generate():
        model.generate(**batch, max_new_tokens=TOKENS)
    return {"tokens": tokens, "logits": first_logits(model, batch).tolist()}


def onnx_logits(folder: str, batch: dict) -> np.ndarray:
    """The same of a folder for ONNX Runtime: (1, classes), or (1, 1, tokens)."""
    import onnxruntime

    def run(name):
        session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx")
        shapes = {each.name: each.shape for each in session.get_inputs()}
        past = {name: np.zeros((1, shape[1], 0, shape[-1]), "float32") for name, shape in shapes.items() if "." in name}
        inputs = {name: (past | given)[name] for name in shapes}
        return dict(zip([each.name for each in session.get_outputs()], session.run(None, inputs)))

    given = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    given["token_type_ids"] = np.zeros_like(given["input_ids"])
    if os.path.isfile(f"{folder}/model.onnx"):
        return run("model")["logits"]
    start = transformers.AutoConfig.from_pretrained(folder).decoder_start_token_id
    given |= run("encoder") | {"decoder_input_ids": np.array([[start]])}
    return run("decoder")["logits"]


@torch.inference_mode()
def first_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """A model's logits for a text, float32: of its classes, or of the first token of its answer."""
    start = {}
    if model.can_generate():
        start["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]], device=model.device)
    return model(**batch, **start).logits.flatten().float()


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        modules, question = json.loads(line)
        for name in modules:
            with contextlib.suppress(ImportError):  # an old name
                importlib.import_module(name)
        child = os.fork()
        if child == 0:
            sys.stdin.close()  # the questions are not for it
            try:
                told = answer(**question)
            except Exception as error:
                told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            print(json.dumps(told), file=out, flush=True)
            os._exit(0)
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps({"error": f"it ended with status {status}"}), file=out, flush=True)
