"""Whether an export's tokenizer and end tokens are those of the training."""

import pathlib

from keras_gemma_ft.checking import witnesses
from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import gguf_file
from keras_gemma_ft.formats.huggingface import read_json

_TEXTS = ("Hello, world!", " two  spaces\n\nand naïve 😊 1234567890", "")
_CHAT = [{"role": "user", "content": "Hello"}]


def check(what, folder, tokenizer):
    """Refuses an export whose words are not those that were taught.

    Args:
        what: the format.
        folder: where it was written.
        tokenizer: `data.tokens.Tokenizer` of the training.

    Raises:
        UserError: it tokenises otherwise, has no end tokens, or begins with
            another number of `<bos>` than one.
    """
    wrong = []
    if what == "merged_hf":
        wrong = [*_huggingface(pathlib.Path(folder), tokenizer)]
    elif what in ("gguf", "ollama"):
        [path] = pathlib.Path(folder).glob("*.gguf")
        wrong = [*_gguf(gguf_file.read(path).metadata, tokenizer)]
    if wrong:
        raise UserError(
            f"the export as {what} did not verify and was removed:\n  "
            + "\n  ".join(wrong)
            + "\n--noverify writes it all the same."
        )


def _huggingface(folder, tokenizer):
    ends = read_json(folder / "generation_config.json")["eos_token_id"]
    if missing := tokenizer.stops - set(ends):
        yield f"generation would not end at the ids {sorted(missing)}"
    transformers = witnesses.quiet()
    if transformers is None:
        return
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in _TEXTS:
        got = theirs(text, add_special_tokens=False)["input_ids"]
        if list(got) != list(tokenizer.encode(text)):
            yield f"its tokenizer reads {text!r} as {got}"
    asked = theirs.apply_chat_template(
        _CHAT, add_generation_prompt=True, return_dict=False
    )
    if list(asked).count(tokenizer.bos) > 1:
        yield "its chat template writes <bos> more than once"


def _gguf(told, tokenizer):
    name = "tokenizer.ggml."
    for key, want in (
        ("bos_token_id", tokenizer.bos),
        ("eos_token_id", tokenizer.eos),
        ("add_bos_token", True),
        ("add_space_prefix", False),
    ):
        if told.get(name + key) != want:
            yield f"{name}{key} is {told.get(name + key)!r}, expected {want}"
    eot = told.get(f"{name}eot_token_id", tokenizer.eos)
    if eot not in tokenizer.stops:
        yield f"{name}eot_token_id is {eot}, which is no end of an answer"
