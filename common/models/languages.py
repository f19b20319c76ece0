"""Models for many languages: the tokenizer's codes for those of the data, and the token that answers begin with.

The tokenizers of mBART, NLLB and M2M100 add a token for the language to inputs and to targets. One that nobody told
takes the same for both, without a word.
"""

import re

from common.data.sources import DataSource
from common.runtime.errors import UserError

CODE = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")  # de_DE, deu_Latn
# ISO 639: two letters, then three as NLLB has them. Of what may be several (no, ku, az) none is here.
ISO_639 = (
    "afafr akaka amamh ararb asasm ayayr babak bebel bgbul bmbam bnben bobod bsbos cacat csces cycym dadan dedeu "
    "dzdzo eeewe elell eneng eoepo esspa etest eueus fapes fffuv fifin fjfij fofao frfra gagle gdgla glglg gngrn "
    "guguj hahau heheb hihin hrhrv hthat huhun hyhye idind igibo isisl itita jajpn jvjav kakat kgkon kikik kkkaz "
    "kmkhm knkan kokor krknc kskas kykir lbltz lglug lilim lnlin lolao ltlit lvlvs mgplt mimri mkmkd mlmal mnkhk "
    "mrmar mszsm mtmlt mymya nbnob nenpi nlnld nnnno nynya ococi omgaz orory papan plpol pspbt ptpor ququy rnrun "
    "roron rurus rwkin sasan scsrd sdsnd sgsag sisin skslk slslv smsmo snsna sosom sqals srsrp ssssw stsot susun "
    "svswe swswh tatam tetel tgtgk ththa titir tktuk tltgl tntsn trtur tstso tttat twtwi uguig ukukr ururd uzuzn "
    "vivie wowol xhxho yiydd yoyor zhzho zuzul"
)
TWO_LETTERS = {pair[2:]: pair[:2] for pair in ISO_639.split()}


def language(code: str) -> str:
    """The language of a code without its script and region, in two letters where it has them: "de" of deu_Latn."""
    name = re.split("[-_]", code.lower())[0]
    return TWO_LETTERS.get(name, name)


def codes_of(tokenizer) -> dict[str, int]:
    """The languages that a tokenizer can be told, by its own codes, with their tokens; {} if it can be told none."""
    if not (hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")):
        return {}
    special = [token for token in tokenizer.all_special_tokens if CODE.fullmatch(token)]
    codes = getattr(tokenizer, "lang_code_to_id", {}) | dict(zip(special, tokenizer.convert_tokens_to_ids(special)))
    return {code: token for code, token in codes.items() if token != tokenizer.unk_token_id}


def set_languages(tokenizer, model, source: DataSource, task) -> tuple[str, str] | None:
    """Tell a tokenizer for many languages those of the data, and the model the token that its answers begin with.

    Returns:
        the tokenizer's codes for the language of the inputs and that of the targets; None if it needs none.
    Raises:
        UserError: a language is none of the tokenizer's, or may be several; or the model answers in another one.
    """
    codes = {} if task.has_labels else codes_of(tokenizer)
    if not codes:
        marks = getattr(tokenizer, "supported_language_codes", None)  # of a Marian with several targets
        if marks and source.prefix is None:
            raise UserError(f"--prefix: must begin with the language to translate into ({_few(marks)}), or be ''")
        return None
    if getattr(tokenizer, "legacy_behaviour", False):
        raise UserError(
            "tokenizer_config.json: 'legacy_behaviour': true puts languages where NLLB has none; make it false"
        )
    generation, names = model.generation_config, {token: code for code, token in codes.items()}
    own = [tokenizer.init_kwargs.get(name) for name in ("src_lang", "tgt_lang")]
    own = own if own[1] else [None, None]  # the first alone is a default that nobody chose
    if source.source_lang or (task.name == "translation" and not source.source_column):
        answered = names.get(generation.forced_bos_token_id) or own[1]
        said = zip(("--source-lang", "--target-lang"), source.languages(task), (own[0], answered))
        source_code, target_code = (_code(*each, codes) for each in said)
    elif own[1]:
        source_code, target_code = own
    else:
        raise UserError(
            f"--source-lang and --target-lang: say which of the tokenizer's languages, {_few(codes)}, they are"
        )
    tokenizer.src_lang, tokenizer.tgt_lang, target = source_code, target_code, codes[target_code]
    is_first = tokenizer(text_target="a")["input_ids"][0] == target
    name = "forced_bos_token_id" if is_first else "decoder_start_token_id"  # mBART's, but not mBART-50's, has it last
    given = getattr(generation, name)
    given = getattr(model.config, name, None) if given is None else given
    if given not in (None, target):
        meant = names.get(given) or tokenizer.convert_ids_to_tokens(given)
        raise UserError(
            f"--target-lang: is {target_code} ({target}), but the model's answers begin with {meant}, by its {name!r} "
            f"({given}); give the language that it translates into, or mend its generation_config.json"
        )
    setattr(generation, name, target)
    if not is_first:
        model.config.decoder_start_token_id = target
    return source_code, target_code


def _code(flag, said, usual, codes):
    """The tokenizer's code for a language; `usual`: the one to take among several."""
    found = [code for code in codes if code.lower() == said.lower().replace("-", "_")]
    found = found or [code for code in codes if said.isalpha() and language(code) == language(said)]
    found = [usual] if usual in found else found
    if len(found) != 1:
        near = found or [code for code in codes if code[0] == said[0].lower()] or codes
        fault = "may be several" if found else "is none"
        raise UserError(f"{flag} {said}: {fault} of the tokenizer's languages; say which, such as {_few(near)}")
    return found[0]


def _few(names):
    names = list(names)
    return ", ".join(names[:12]) + ", …" * (len(names) > 12)
