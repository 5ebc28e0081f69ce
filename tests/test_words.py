"""What other tools call our settings: the hint that is given, and the page."""

import pathlib
import re
import shlex

import pytest

from keras_gemma_ft import command_line, config
from keras_gemma_ft.config import Config, UserError, elsewhere, hints, page

pytestmark = pytest.mark.once
PATHS = set(config.flatten(Config()))
# A value that the tools take, for rows that do not take a 2.
VALUES = {
    "save_method": "merged_16bit",
    "dtype": "bf16",
    "torch_dtype": "torch.bfloat16",
    "init_lora_weights": "pissa_niter_4",
    "target_modules": "['q_proj', 'v_proj']",
    "finetuning_type": "full",
    "val_set_size": "0.1",
    "optim": "paged_adamw_8bit",
    "lora_dropout": "0.1",
    "packing": "true",
    "template": "gemma2",
    "lr_scheduler_type": "constant_with_warmup",
    "report_to": "all",
    "evals_per_epoch": "4",
    "resume_from_checkpoint": "true",
    "model_name": "unsloth/gemma-2-2b-it-bnb-4bit",
    "eval_strategy": "epoch",
    "bnb_4bit_quant_type": "fp4",
    "quantization_bit": "4",
    "dataset_text_field": "body",
}


def answer(*argv):
    """(the message, the words that it says to type)."""
    with pytest.raises(UserError) as caught:
        command_line.from_flags(list(argv))
    return str(caught.value), to_type(str(caught.value))


def to_type(text):
    typed = re.search("^Type: (.+)\\Z", text, re.M)
    return shlex.split(typed[1]) if typed else []


@pytest.mark.parametrize(
    "there, here",
    [
        ("--optim=adamw_8bit", "--train.optimizer=adamw8bit"),
        ("--optim=adamw_torch", "--train.optimizer=adamw"),
        (
            "--per_device_train_batch_size=2 --gradient_accumulation_steps=8",
            "--data.micro_batch_size=2 --data.batch_size=16",
        ),
        (
            "--gradient_accumulation_steps=4 --micro_batch_size=3 --seed=1",
            "--data.micro_batch_size=3 --data.batch_size=12 --seed=1",
        ),
        (
            "--gradient_accumulation_steps=4 --data.micro_batch_size=1",
            "--data.micro_batch_size=1 --data.batch_size=4",
        ),
        ("--per_device_train_batch_size=2", "--data.batch_size=2"),
        (
            "--per_device_train_batch_size=2 --data.batch_size=16",
            "--data.micro_batch_size=2 --data.batch_size=16",
        ),
        (
            "--gradient_accumulation_steps=8 --data.batch_size=32",
            "--data.micro_batch_size=4 --data.batch_size=32",
        ),
        ("--no_gradient_checkpointing", "--model.remat=none"),
        ("--no-packing --noflash_attention", "--data.pack=false"),
        ("--keep_checkpoint", ""),
        ("--load_in_4bit", "--model.quantize=nf4"),
        ("--load_in_4bit True --fp16=False", "--model.quantize=nf4"),
        ("--fp16", "--model.dtype=float16"),
        ("--lr_scheduler_type=linear", "--train.schedule=linear"),
        ("--target_modules=q_proj,v_proj", "--lora.targets=q_proj,v_proj"),
        ("--train.lr=1e-4", "--train.learning_rate=1e-4"),
        ("--lora_r 16 --lora.alpha 16", "--lora.rank=16 --lora.alpha=16"),
        ("--lora-r=16", "--lora.rank=16"),
        ("--max_steps=10", "--train.steps=10"),
        ("--num_train_epochs=3", "--train.epochs=3"),
        ("--max_seq_length=1024", "--data.sequence_length=1024"),
        ("--warmup_steps=2", "--train.warmup=2"),
        ("--warmup_ratio=0.03", "--train.warmup=3%"),
        ("--use_gradient_checkpointing=unsloth", "--model.remat=block"),
        ("--gradient_checkpointing=false", "--model.remat=none"),
        (
            "--model_name=unsloth/gemma-2-2b-it-bnb-4bit",
            "--preset=hf://unsloth/gemma-2-2b-it --model.quantize=nf4",
        ),
        (
            "--preset=google/gemma-2-2b-it --r=4 --backend=jax",
            "--preset=hf://google/gemma-2-2b-it --lora.rank=4 --backend=jax",
        ),
        ("--preset=gemma2_2b_en --r=4", "--preset=gemma2_2b_en --lora.rank=4"),
        ("--dataset=tatsu-lab/alpaca", "--data.train=hf://tatsu-lab/alpaca"),
        ("--dataset=mine/own.jsonl", "--data.train=mine/own.jsonl"),
        ("--evals_per_epoch=4", "'--train.eval_every=0.25 epochs'"),
        ("--template=gemma2", "--data.template=gemma"),
        ("--training_arguments.max_steps=3", "--train.steps=3"),
        ("--save_strategy=no", "--train.checkpoint_every=0"),
        ("--packing --nodata.pack", "--data.pack --nodata.pack"),
        ("--max_steps=-1 --report_to=none", ""),
        ("--data.nopack --lora_rank=4", "--data.pack=false --lora.rank=4"),
    ],
)
def test_what_is_typed_elsewhere_is_answered_with_what_to_type(there, here):
    _, typed = answer(*shlex.split(there))
    assert typed == shlex.split(here)


def test_all_unknown_flags_are_told_at_once():
    text, typed = answer(
        "--bogus=3",
        "--seed=1",
        "--train.lr=1",
        "--use_dora",
        "--neat_pakking",
        "--rnak=4",
    )
    lines = text.splitlines()
    assert [line.split(".")[0] for line in lines[:2]] == [
        "unknown flag --bogus",
        "unknown flag --train",
    ]
    assert "Nothing like it is known" in lines[0]
    assert "There is no DoRA" in lines[2]
    assert "Did you mean: neat_packing" in lines[3]
    assert typed == ["--seed=1", "--train.learning_rate=1", "--lora.rank=4"]


def test_a_value_that_has_no_like_here_is_told_what_there_is():
    text, typed = answer("--lr_scheduler_type=inverse_sqrt", "--seed=1")
    assert "--train.schedule=constant, --train.schedule=linear" in text
    assert typed == ["--seed=1"]


@pytest.mark.parametrize(
    "preset, near",
    [
        ("google/gemma-2-2b-it", "hf://google/gemma-2-2b-it"),
        ("gemma-2-9b", "hf://google/gemma-2-9b or --preset=gemma2_9b_en"),
        ("unsloth/gemma-2-2b-bnb-4bit", "gemma-2-2b --model.quantize=nf4"),
    ],
)
def test_a_model_by_its_name_on_hugging_face(preset, near):
    text, _ = answer(f"--preset={preset}")
    assert f"--preset={preset}" in text and near in text
    command_line.from_flags([f"--preset=hf://{preset}"])


@pytest.mark.parametrize("name", elsewhere.WORDS)
def test_each_row_leads_to_a_setting_that_takes_it(name):
    """What is to be typed is a command line that we take."""
    word = elsewhere.WORDS[name]
    path = word.here.partition("=")[0]
    assert not path or path in PATHS
    if name in PATHS:  # Axolotl's seed is ours.
        return
    values = [VALUES[n] for n in word.names.split() if n in VALUES]
    value = VALUES.get(name) or (values or ["2"])[0]
    text = hints.unknown_flags([f"--{name}={value}"])
    assert f"unknown flag --{name}." in text
    typed = to_type(text)
    if not typed:
        refused = f"Here it is one of --{path}=" in text
        assert not path or word.off == "" and word.values or refused
        return
    typed = [w for w in typed if "hf://" not in w]
    command_line.from_flags([*typed, "--preset=any"])


def test_the_page_is_written_from_the_table():
    root = pathlib.Path(elsewhere.__file__).parents[2]
    written = (root / "configs/ELSEWHERE.md").read_text("utf-8")
    assert written == page.page(), page.__doc__
