"""What other tools call our settings: one table, for hints and for a page.

`hints` answers flags that are unknown here; `page` writes configs/ELSEWHERE.md.
"""

from typing import Any, NamedTuple

from keras_gemma_ft.config import conversions


class Word(NamedTuple):
    """What is typed elsewhere, and what is typed here.

    Args:
        names: spellings, with blanks between.
        here: a setting that takes the value; or setting=value, for a switch
            that is on; or "", where there is nothing to type.
        note: a sentence for people.
        values: {value there: value here}, or a function of the value there
            that returns the value here, settings with values (a list), or
            None if that value needs no flag here. Others stay as they are.
        off: setting=value for a switch that is off; "" is nothing to type.
    """

    names: str
    here: str
    note: str = ""
    values: Any = None
    off: str = ""


# Rows of the page, by what they are about.
TABLE = {
    "The model": (
        Word(
            "model_name_or_path base_model model_name model_id model "
            "pretrained_model_name_or_path from_preset",
            "preset",
            "`google/gemma-2-2b-it` is `hf://google/gemma-2-2b-it`, or "
            "`gemma2_instruct_2b_en` of KerasHub.",
            conversions.model,
        ),
        Word("load_in_4bit", "model.quantize=nf4"),
        Word("load_in_8bit", "model.quantize=int8"),
        Word(
            "quantization_bit",
            "model.quantize",
            values={"4": "nf4", "8": "int8"},
        ),
        Word("bnb_4bit_quant_type", "model.quantize", values={"fp4": "nf4"}),
        Word(
            "bnb_4bit_use_double_quant double_quantization",
            "",
            "nf4 is always doubly quantised.",
        ),
        Word("fp16", "model.dtype=float16"),
        Word("bf16", "model.dtype=bfloat16"),
        Word(
            "dtype torch_dtype bnb_4bit_compute_dtype mixed_precision floatx",
            "model.dtype",
            values=conversions.dtype,
        ),
        Word(
            "gradient_checkpointing use_gradient_checkpointing",
            "model.remat=block",
            off="model.remat=none",
        ),
        Word("torch_compile", "model.compile=on", off="model.compile=off"),
        Word(
            "flash_attention flash_attn attn_implementation sdp_attention "
            "use_flash_attention_2 xformers_attention",
            "",
            "The fastest attention of the device is chosen by itself.",
        ),
    ),
    "LoRA": (
        Word("lora_r r lora_rank", "lora.rank"),
        Word(
            "lora_alpha", "lora.alpha", "Without it alpha equals the rank here."
        ),
        Word("lora_dropout", "lora.dropout"),
        Word(
            "target_modules lora_target_modules lora_target",
            "lora.targets",
            "PEFT's names of the layers are taken as they are.",
            conversions.targets,
        ),
        Word("lora_target_linear", "lora.targets=all-linear"),
        Word("use_rslora peft_use_rslora", "lora.rslora=true"),
        Word("init_lora_weights", "lora.init", values=conversions.start),
        Word("pissa_init", "lora.init=pissa"),
        Word(
            "use_dora peft_use_dora",
            "",
            "There is no DoRA. Plain LoRA with --lora.rslora or "
            "--lora.init=pissa is nearest.",
        ),
        Word("bias lora_bias", "", "Gemma 2 has no biases to train."),
        Word(
            "modules_to_save lora_modules_to_save additional_target",
            "",
            "Beside the adapters nothing is trained; --lora.rank=0 trains "
            "every weight.",
        ),
        Word(
            "finetuning_type",
            "lora.rank",
            "LoRA is the default; `full` is a rank of 0.",
            lambda value: "0" if value == "full" else None,
        ),
        Word("task_type", "", "It is always a causal language model."),
        Word("adapter_name_or_path lora_model_dir peft_model_id", "adapter"),
    ),
    "Data": (
        Word(
            "dataset dataset_name datasets train_dataset train_file data_path",
            "data.train",
            "Files, or `hf://owner/name` for a data set of Hugging Face.",
            conversions.dataset,
        ),
        Word(
            "eval_dataset validation_file eval_file test_datasets",
            "data.eval",
            values=conversions.dataset,
        ),
        Word(
            "val_set_size val_size test_size validation_split",
            "data.eval",
            "A share of the training records, as in `--data.eval=5%`; a "
            "number of records cannot be asked for.",
            conversions.held_out,
        ),
        Word(
            "dataset_text_field",
            "data.format=text",
            "A field of another name: `--data.response_field=NAME` besides.",
            conversions.text_field,
        ),
        Word(
            "max_seq_length max_length cutoff_len sequence_len max_seq_len "
            "model_max_length",
            "data.sequence_length",
        ),
        Word("packing sample_packing neat_packing", "data.pack"),
        Word(
            "group_by_length",
            "data.pack=false",
            "Rows that are not packed come in batches of like length.",
        ),
        Word(
            "chat_template template chat_template_path",
            "data.template",
            "`gemma` (the default), a Python format string, or a .jinja file.",
            conversions.template,
        ),
        Word("default_system system_prompt", "data.system"),
        Word(
            "train_on_inputs train_on_prompt completion_only_loss "
            "assistant_only_loss train_on_responses_only",
            "",
            "Only answers are learned, in every format but `text`.",
        ),
        Word(
            "dataset_num_proc preprocessing_num_workers dataloader_num_workers",
            "",
            "Data is prepared once and kept (--data.cache).",
        ),
    ),
    "Batches": (
        Word(
            "per_device_train_batch_size",
            "data.batch_size",
            "It counts the rows of all devices. With accumulation it is "
            "`--data.micro_batch_size`.",
        ),
        Word(
            "gradient_accumulation_steps",
            "data.batch_size",
            "The product is typed: `--data.micro_batch_size=2 "
            "--data.batch_size=16` accumulates 8 times 2 rows.",
        ),
        Word(
            "micro_batch_size",
            "data.micro_batch_size",
            "Rows in memory at once, of all devices together.",
        ),
        Word(
            "per_device_eval_batch_size eval_batch_size",
            "",
            "Evaluation takes as many rows at once as training.",
        ),
    ),
    "Training": (
        Word(
            "max_steps",
            "train.steps",
            "-1 is 0 here, the default: epochs count.",
            conversions.steps,
        ),
        Word("num_train_epochs num_epochs", "train.epochs"),
        Word("learning_rate lr", "train.learning_rate"),
        Word(
            "lr_scheduler_type lr_scheduler",
            "train.schedule",
            values=conversions.SCHEDULES,
        ),
        Word("warmup_steps", "train.warmup", values=conversions.steps_or_never),
        Word(
            "warmup_ratio",
            "train.warmup",
            "A share of the run is written in per cent: `3 %` is 0.03.",
            conversions.percent,
        ),
        Word(
            "optim optimizer",
            "train.optimizer",
            "`adamw_8bit`, `adamw_bnb_8bit` and `paged_adamw_8bit` are "
            "`adamw8bit`; `adamw_torch` is `adamw`.",
            conversions.optimizer,
        ),
        Word("weight_decay", "train.weight_decay"),
        Word(
            "max_grad_norm gradient_clipping global_clipnorm", "train.clip_norm"
        ),
        Word(
            "adam_beta1 adam_beta2 adam_epsilon",
            "",
            "Keras's own values are used, 0.9 and 0.999 for the betas.",
        ),
        Word(
            "neftune_noise_alpha noisy_embedding_alpha",
            "",
            "There is no NEFTune.",
        ),
        Word("seed random_state data_seed", "seed"),
    ),
    "What is written, and when": (
        Word("output_dir", "run_dir"),
        Word("logging_steps", "train.log_every", values=conversions.steps),
        Word("eval_steps", "train.eval_every", values=conversions.steps),
        Word(
            "evals_per_epoch",
            "train.eval_every",
            "4 in an epoch is `0.25 epochs`.",
            conversions.part_of_epoch,
        ),
        Word(
            "eval_strategy evaluation_strategy",
            "train.eval_every",
            values=conversions.EACH,
        ),
        Word("save_steps", "train.checkpoint_every", values=conversions.steps),
        Word(
            "saves_per_epoch",
            "train.checkpoint_every",
            values=conversions.part_of_epoch,
        ),
        Word(
            "save_strategy", "train.checkpoint_every", values=conversions.EACH
        ),
        Word("save_total_limit", "train.keep_checkpoints"),
        Word("early_stopping_patience", "train.patience"),
        Word(
            "load_best_model_at_end",
            "",
            "The adapter with the best held-out loss is exported anyway.",
        ),
        Word("report_to", "train.trackers", values=conversions.trackers),
        Word(
            "resume_from_checkpoint",
            "resume",
            "The command of an interrupted run, given again, goes on by "
            "itself; its folder is --run_dir.",
            conversions.resume,
        ),
        Word("overwrite_output_dir", "resume=false"),
    ),
    "Machines": (
        Word("nproc_per_node num_processes", "hosts.local"),
        Word("nnodes num_machines", "hosts.count"),
        Word("node_rank machine_rank", "hosts.index"),
        Word(
            "deepspeed fsdp fsdp_config",
            "",
            "--mesh splits weights and rows over devices (JAX).",
        ),
    ),
    "Asking the model": (
        Word(
            "do_sample",
            "generate.sampler=top_p",
            off="generate.sampler=greedy",
        ),
    ),
    "Taking it elsewhere (`export`)": (
        Word("export_dir", "export.to"),
        Word(
            "export_size",
            "export.max_shard_size",
            values=lambda value: f"{value}GB" if value.isdecimal() else value,
        ),
        Word("export_device", "", "Weights are merged on the host."),
        Word(
            "hub_model_id export_hub_model_id",
            "export.push_to",
            values=lambda value: f"hf://{value.removeprefix('hf://')}",
        ),
        Word(
            "quantization_method outtype",
            "export.quantize",
            "Of a GGUF. K-quants are made of an f16 by llama-quantize.",
        ),
        Word(
            "save_method",
            "export.format",
            values={
                "lora": "peft",
                "merged_16bit": "merged_hf",
                "merged_4bit": "gguf",
            },
        ),
    ),
}
WORDS = {
    name: word
    for words in TABLE.values()
    for word in words
    for name in word.names.split()
}
