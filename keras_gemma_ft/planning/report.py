"""A plan: the options compared, one of them compiled, the result line."""

import math
import sys

from keras_gemma_ft import config, runtime
from keras_gemma_ft.planning import devices, program, search, shapes


def report(cfg, settings, device, backend):
    """Plans `cfg` on `device`; prints a table, returns the result line.

    Args:
        cfg: `config.Config`.
        settings: of `GemmaBackbone`.
        device: `devices.Device`.
        backend: Keras's, for whether there are meshes.

    Returns:
        dict: preset, device, devices, fits, certified, bytes_per_device,
        limit_bytes, tokens_per_step, flops_per_token, seconds_bound,
        seconds_expected, tokens_per_s_expected and hours_expected (None where
        nothing was measured or --train.steps is not said), expected_rests_on,
        mesh, flags, parameters, trained_parameters, bytes (by part,
        estimated), and over_bytes and nearest where it does not fit.
    """
    found = search.options(cfg, settings, device, backend=backend)
    _show(found if cfg.search else found[:12], device)
    if cfg.search:
        found = _larger(cfg, settings, device, backend) or found
    option = search.best(found, device)
    compiled = None
    if cfg.compile and (device.topology or device.kind == "cpu"):
        option, compiled = _compiled(found, settings, device, option)
    elif cfg.compile:
        runtime.say(f"--compile: no compiler for {device.name}; estimated")
    result = _result(cfg, settings, device, option, compiled)
    if not result["fits"]:
        _explain(result, cfg, settings, device, backend)
    _say(result)
    return result


def _compiled(found, settings, device, first):
    """(option, `program.Compiled`): the first of three that fits."""
    size = first.estimate.total
    # Then the fastest that is much smaller, then the smallest.
    much = [o for o in found if o.estimate.total < 0.75 * size][:1]
    least = min(found, key=lambda option: option.estimate.total)
    for option in {id(o): o for o in (first, *much, least)}.values():
        runtime.say(f"compiling for {device.name}: {option.name}")
        compiled = program.compile(
            option.cfg, settings, device, option.mesh,
            dtype=search.dtype_of(option.cfg, device),
        )  # fmt: skip
        if compiled.fits:
            return option, compiled
        runtime.say(
            f"refused: {compiled.temporaries / devices.GIB:.2f} GiB of "
            f"temporaries a device"
        )
    return option, compiled


def _result(cfg, settings, device, option, compiled):
    found = option.estimate
    total, limit = found.total, device.memory
    fits = total <= limit
    if compiled is not None:
        arguments = compiled.arguments or sum(
            found.bytes[kind] for kind in ("weights", "adapters", "optimizer")
        )
        # A refusal may name no size: then it is the estimate's.
        total = arguments + (compiled.temporaries or total - arguments)
        limit = compiled.limit or limit
        fits = compiled.fits and total <= limit
    count = sum(math.prod(shape) for _, shape in shapes.weights(settings))
    low = sum(math.prod(s) for _, s in shapes.adapters(settings, cfg.lora))
    result = {
        "preset": cfg.preset,
        "device": device.name,
        "devices": device.count,
        "fits": bool(fits),
        "certified": compiled is not None,
        "bytes_per_device": int(total),
        "limit_bytes": int(limit),
        "tokens_per_step": found.tokens,
        "flops_per_token": found.flops_per_token,
        "seconds_bound": found.bound,
        "bound_by": max(found.seconds, key=found.seconds.get),
        **_expected(cfg, found),
        "mesh": f"{option.mesh[0]}x{option.mesh[1]}",
        "flags": option.flags(cfg),
        "parameters": count,
        "trained_parameters": low or count,
        "bytes": {kind: int(size) for kind, size in found.bytes.items()},
    }
    if compiled is not None:
        result["compile_seconds"] = round(compiled.seconds, 1)
        result["host_bytes"] = runtime.peak_memory_bytes()
    return result


def _expected(cfg, found):
    """What of the result tells the speed to expect, and what that rests on."""
    seconds, steps = found.expected, cfg.train.steps
    return {
        "seconds_expected": seconds or None,
        "tokens_per_s_expected": found.tokens / seconds if seconds else None,
        "hours_expected": steps * seconds / 3600 or None,
        "expected_rests_on": found.rests_on or "bound only: nothing measured",
    }


def _explain(result, cfg, settings, device, backend):
    """Adds by how much it does not fit, and what would."""
    over = result["bytes_per_device"] - result["limit_bytes"]
    result["over_bytes"] = int(over)
    other = search.nearest(cfg, settings, device, backend=backend)
    if other is not None:
        result["nearest"] = {
            "flags": other.flags(cfg),
            "bytes_per_device": int(other.estimate.total),
            "certified": False,
        }


def _larger(cfg, settings, device, backend):
    """Options with the largest batch that fits, [] if `cfg` is that.

    Says the longest rows at the batch of `cfg`, too.
    """
    found = {}
    for path, most in (
        ("data.sequence_length", 8192),
        ("data.batch_size", 4096),
    ):
        value = config.flatten(cfg)[path]
        while 2 * value <= most:
            larger = config.replace(cfg, {path: 2 * value})
            options = search.options(larger, settings, device, backend=backend)
            fitting = [
                option
                for option in options
                # Larger by accumulation alone is no gain.
                if not option.cfg.data.micro_batch_size
                and option.estimate.total <= search.SURE * device.memory
            ]
            if not fitting:
                break
            found[path], value = fitting, 2 * value
        if path in found:
            runtime.say(f"largest {path} that fits, all else alike: {value}")
            _show(found[path][:6], device)
    return found.get("data.batch_size", [])


def _show(found, device):
    """The ladder, on stderr."""
    for option in found:
        estimate, gib = option.estimate, devices.GIB
        mark = " " if estimate.total <= device.memory else "x"
        print(
            f"  {mark} {option.name:<66} {estimate.total / gib:7.2f} GiB a "
            f"device, {option.speed}",
            file=sys.stderr,
        )


def _say(result):
    """The plan in a sentence or two."""
    gib = devices.GIB
    word = "compiled: " if result["certified"] else "estimated: "
    size = result["bytes_per_device"] / gib
    limit = result["limit_bytes"] / gib
    verdict = "fits" if result["fits"] else "does NOT fit"
    runtime.say(
        f"{word}{result['preset']} {verdict} on {result['device']}: "
        f"{size:.2f} of {limit:.2f} GiB a device, mesh {result['mesh']}"
    )
    if result["seconds_bound"]:
        speed = result["tokens_per_step"] / result["seconds_bound"]
        runtime.say(
            f"no step is faster than {result['seconds_bound']:.2f} s "
            f"({speed:,.0f} token/s; bound by {result['bound_by']})"
        )
    if result["seconds_expected"]:
        hours = result["hours_expected"]
        runtime.say(
            f"a step is expected to take {result['seconds_expected']:.2f} s "
            f"({result['tokens_per_s_expected']:,.0f} token/s"
            + (f"; {hours:.1f} hours in all" if hours else "")
            + f"), {result['expected_rests_on']}"
        )
    flags = (result if result["fits"] else result.get("nearest", {})).get(
        "flags", []
    )
    runtime.say(f"to type besides: {' '.join(flags) or 'nothing'}")
