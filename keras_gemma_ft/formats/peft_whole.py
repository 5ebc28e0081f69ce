"""What a PEFT folder says beyond pairs A B -> `whole_change.WholeChange`.

PEFT's rules (version 0.21.2): DoRA's lengths are those of the rows of a
projection and of the columns of an embedding (peft/tuners/lora/dora.py);
`modules_to_save` replaces a module, and leaves one that was tied to it as it
was; `trainable_token_indices` puts rows in, also into a tied head
(peft/utils/other.py, `set_additional_trainable_modules`); the tables of the
model are saved along where they are adapted or were resized
(peft/utils/save_and_load.py), and are the base's then.
"""

import re

import numpy as np

from keras_gemma_ft.formats import names
from keras_gemma_ft.formats.whole_change import Change, WholeChange

_TABLE, _HEAD = "model.embed_tokens", "lm_head"
# module -> target of a LoRA pair.
_TARGETS = {module: target for target, module in names.MODULES.items()}


def target_of(module):
    """(layer, target) of a projection's module; None of other modules."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+\.\w+)", module)
    if match and match[2] in _TARGETS:
        return int(match[1]), _TARGETS[match[2]]
    return None


def is_plain(parts):
    """Whether there are pairs of projections and nothing else that counts.

    Args:
        parts: {module: {part: array}} of `peft_tensors.sort`.
    """
    return all(
        target_of(module)
        and {"A", "B"} <= set(own) <= {"A", "B", "bias"}
        and not np.any(own.get("bias", 0))
        for module, own in parts.items()
    )


def without_twin(config, parts):
    """`parts` without a head's copy of the words that the table was taught.

    A head that is tied to a table with `trainable_token_indices` has its rows,
    and where the table was resized PEFT saves both.
    """
    table, head = (parts.get(m, {}).get("rows") for m in (_TABLE, _HEAD))
    own = token_indices(config).get(_HEAD)
    if head is None or table is None or not np.array_equal(table, head):
        return parts
    if own is not None and own != token_indices(config).get(_TABLE):
        return parts
    return {m: own for m, own in parts.items() if m != _HEAD}


def contradictions(config, parts):
    """What `adapter_config.json` promises and the tensors lack, and back."""
    for part, setting, what, of in (
        ("magnitude", "use_dora", "lora_magnitude_vector", "embedding_A"),
        ("bias", "lora_bias", "lora_B.bias", "A"),
    ):
        wanted = bool(config.get(setting))
        for module, own in parts.items():
            paired = "A" in own or of in own
            if (paired or part in own) and (part in own) != wanted:
                state = "missing, but" if wanted else "there, but"
                yield f"{module}.{what}: {state} {setting}={wanted}"
    for name in config.get("modules_to_save") or ():
        known = {m for m in _modules() if m.endswith(name)}
        if known and not any(
            module.endswith(name) and "weight" in own
            for module, own in parts.items()
        ):
            yield f"modules_to_save names {name}: its weight is missing"
    wanted = token_indices(config)
    for module in sorted({*wanted} | {m for m in parts if "rows" in parts[m]}):
        count = len(wanted.get(module, ()))
        rows = parts.get(module, {}).get("rows")
        tied = module == _HEAD and wanted.get(_TABLE) == wanted.get(_HEAD)
        if rows is None and not tied:
            yield f"{module}.token_adapter: its rows of {count} words missing"
        elif rows is not None and (rows.ndim != 2 or len(rows) != count):
            yield (
                f"{module}.token_adapter: shape {rows.shape}, and "
                f"trainable_token_indices names {count} words"
            )


def _modules():
    """How modules end that have weights."""
    ends = [*names.MODULES.values(), *names.NORMS]
    return [_TABLE, _HEAD, "model.norm", *(f"model.layers.0.{e}" for e in ends)]


def token_indices(config):
    """{module: indices} of `trainable_token_indices`."""
    found = config.get("trainable_token_indices") or {}
    if not isinstance(found, dict):
        found = {"embed_tokens": found}
    return {
        _HEAD if name.endswith(_HEAD) else _TABLE: list(indices)
        for name, indices in found.items()
    }


def misfits(parts, config, backbone):
    """Complaints about shapes: what is not of this model, all of it.

    Args:
        parts: as of `is_plain`.
        config: `adapter_config.json`.
        backbone: dict as of `GemmaBackbone.get_config()`.
    """
    sizes = [_words(parts.get(module, {})) for module in (_TABLE, _HEAD)]
    sizes = {size for size in sizes if size}
    if len(sizes) > 1:
        yield f"the table and the head differ in words: {sorted(sizes)}"
    words = max(sizes, default=backbone["vocabulary_size"])
    if words != backbone["vocabulary_size"] and not _words(
        parts.get(_TABLE, {})
    ):
        yield f"{_TABLE}.weight: missing, and the head has {words} words"
    shapes = names.huggingface_shapes(backbone | {"vocabulary_size": words})
    shapes[f"{_HEAD}.weight"] = shapes[f"{_TABLE}.weight"]
    for module, own in parts.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            yield f"{module}: the model has {backbone['num_layers']} layers"
            continue
        for part in ("weight", "base", "original"):
            if part in own and own[part].shape != shape:
                yield (
                    f"{module}: {part} has shape {own[part].shape}, "
                    f"expected {shape}"
                )
        yield from _misfit_pairs(module, own, shape)
    for module, indices in token_indices(config).items():
        wrong = [i for i in indices if type(i) is not int or not 0 <= i < words]
        if wrong:
            yield f"{module}: trainable_token_indices {wrong} of {words} words"


def _words(own):
    """Rows of the table or head that a file carries, else None."""
    held = [own[p] for p in ("weight", "base", "original") if p in own]
    return len(held[0]) if held and held[0].ndim == 2 else None


def _misfit_pairs(module, own, shape):
    if ("A" in own or "embedding_A" in own) and len(shape) != 2:
        yield f"{module}: a LoRA pair on what is no matrix"
        return
    if "A" in own:
        size = own["A"].shape[1], len(own["B"])
        if size != shape[::-1]:
            yield (
                f"{module}: {size[0]} -> {size[1]}, expected "
                f"{shape[1]} -> {shape[0]}"
            )
    if "embedding_A" in own:
        size = own["embedding_A"].shape[1], len(own["embedding_B"])
        if size != shape or module != _TABLE:
            yield (
                f"{module}: {size[0]} -> {size[1]}, expected an embedding "
                f"{shape[0]} -> {shape[1]}"
            )
    if "rows" in own and own["rows"].shape[1:] != shape[1:]:
        yield f"{module}: rows of {own['rows'].shape[1:]}, not {shape[1:]}"
    axis = 1 if "embedding_A" in own else 0
    for part, length in (("magnitude", shape[axis % len(shape)]),
                         ("bias", shape[0])):  # fmt: skip
        if part in own and own[part].shape != (length,):
            yield (
                f"{module}: {part} of {own[part].shape}, expected ({length},)"
            )
    if module == _HEAD and np.any(own.get("bias", 0)):
        yield (
            f"{module}.lora_B.bias: a bias of the head cannot be followed; "
            f"train it again without lora_bias"
        )


def build(config, parts, scales, *, base="", doubts=(), tied_table=False):
    """The `WholeChange` of parts that have been found to fit.

    Args:
        config: `adapter_config.json`, for `modules_to_save` and the tokens.
        parts: as of `is_plain`.
        scales: {module: s of its pair}.
        base, doubts: of the result.
        tied_table: whether a change of the table is always one of a tied head
            (MLX).
    """
    indices = token_indices(config)
    trained = tuple(config.get("modules_to_save") or ())
    changes, lent, biases = {}, None, {}
    for module, own in parts.items():
        is_trained = "saved" in own or (trained and module.endswith(trained))
        whole = own.get("weight")
        begins = own.get("base", own.get("original"))
        if module == _TABLE:
            lent = begins if is_trained or whole is None else whole
        if whole is None:
            whole = begins
        change = Change(
            whole=whole,
            pair=_pair(own),
            scale=scales.get(module, 1.0),
            magnitude=own.get("magnitude"),
            axis=0 if "embedding_A" in own else 1,
            rows=(indices[module], own["rows"]) if "rows" in own else None,
        )
        if whole is not None or change.pair or change.rows:
            changes[names.keras_path(f"{module}.weight")] = change
        if np.any(own.get("bias", 0)):
            biases[target_of(module)] = scales[module] * own["bias"]
    return WholeChange(
        changes=changes,
        lent=lent,
        follows=_follows(changes, lent, tied_table),
        biases=biases,
        kinds=tuple(_kinds(parts, biases)),
        base=base,
        doubts=doubts,
    )


def _pair(own):
    """(down [r, in], up [out, r])."""
    if "A" in own:
        return own["A"], own["B"]
    if "embedding_A" in own:
        return own["embedding_B"].T, own["embedding_A"].T
    return None


def _follows(changes, lent, tied_table):
    """Whether a head that was the table is equal to it afterwards."""
    table, head = (changes.get(path) for path in (names.TABLE, names.HEAD))
    if head is not None:
        return table is not None and table.equals(head)
    if table is None or tied_table:
        return True
    # Of the base's own table or of single rows: these the head follows.
    return table.equals(Change(whole=lent, rows=table.rows))


def _kinds(parts, biases):
    """What is beyond pairs of projections, in words."""
    if any("magnitude" in own for own in parts.values()):
        yield "DoRA"
    if biases:
        yield "lora_bias"
    if any("rows" in own for own in parts.values()):
        yield "trained rows of the token table"
    for module, what in ((_TABLE, "the token table"), (_HEAD, "the head")):
        own = parts.get(module, {})
        if "weight" in own or _pair(own):
            yield f"a change of {what}"
    others = [m for m in parts if "weight" in parts[m]]
    others = [m for m in others if m not in (_TABLE, _HEAD)]
    if others:
        yield f"{len(others)} whole weights of other modules"
