"""What `selfsup replay` prints: the findings of a replay in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN_IMAGES = 24
_INDENT = 11  # characters of a label


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report of `selfsup.replay.replay`, line by line."""
    machine = report["device"]
    if report["device"] != report["recorded_device"]:
        machine += f" (recorded on {report['recorded_device']})"
    count = report["accumulate"]
    out = [
        f"refused step {report['step']}, rank {report['rank']} of {report['world']}: {shown(report['method'])}, "
        f"{report['precision']} on {machine}, {count} micro-batch{'es' if count > 1 else ''}",
        _labelled("recorded", ", ".join(f"{shown(k)} {_number(v)}" for k, v in report["figures"].items()) or "nothing"),
        _labelled("weights", f"{_weights(report['weights'])}; {_since(report)}"),
    ]
    for attempt in report["attempts"]:
        out += _attempt(attempt)
    out.append(_labelled("verdict", _verdict(report)))
    if report["batch_statistics"] and report["world"] > 1:
        out.append(_labelled("", "batch norm saw this rank's images alone; in training it sees those of all ranks"))
    if report["others"]:
        out.append(_labelled("see also", ", ".join(report["others"])))
    out += _images(report["images"])
    out.append(_labelled("picture", report["picture"] or "batch.png cannot be written there"))
    return out


def shown(text: str) -> str:
    """Text from a file, on one line and without what a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:200])


def _labelled(label: str, text: str) -> str:
    return f"{label:<{_INDENT}}{text}"


def _weights(found: Mapping[str, Any]) -> str:
    return f"NOT FINITE in {_names(found)}" if found["count"] else "all finite"


def _since(report: Mapping[str, Any]) -> str:
    n = report["steps_since"]
    return f"{n} good step{'' if n == 1 else 's'} {'was' if n == 1 else 'were'} taken between the refusal and the copy"


def _attempt(attempt: Mapping[str, Any]) -> list[str]:
    scaled = f", loss scale {attempt['loss_scale']:g}" if attempt["loss_scale"] != 1 else ""
    parts = "".join(f", {shown(k)} {_number(v)}" for k, v in attempt["parts"].items() if k != "loss")
    state = "finite" if attempt["finite"] else "NOT FINITE"
    figures = f"loss {_number(attempt['loss'])}, grad_norm {_number(attempt['grad_norm'])}{parts}{scaled}"
    out = [_labelled(attempt["precision"], f"{state}: {figures}")]
    if len(attempt["micro"]) > 1:
        out.append(_labelled("", "loss by micro-batch: " + ", ".join(_number(m["loss"]) for m in attempt["micro"])))
    if (found := attempt["forward"]) is not None:
        out.append(_labelled("", f"first output that is not finite: {_module(found)}"))
        out.append(_labelled("", f"  {_span(found['output'])}; its input: {_span(found['input'])}"))
    elif (found := attempt["backward"]) is not None:
        out.append(_labelled("", f"first gradient that is not finite: that of the output of {_module(found)}"))
        last = f"; still finite at the output of {_named(found['finite'])}" if found["finite"] is not None else ""
        out.append(_labelled("", f"  {_span(found['gradient'])}{last}"))
    if attempt["gradients"]["count"]:
        out.append(_labelled("", f"gradients that are not finite: {_names(attempt['gradients'])}"))
    elif not attempt["finite"] and math.isfinite(attempt["loss"]):
        out.append(_labelled("", "every gradient is finite, but the norm over all of them is not"))
    return out


def _verdict(report: Mapping[str, Any]) -> str:
    first, last = report["attempts"][0], report["attempts"][-1]
    if first["finite"]:
        text = f"finite in replay: loss {_number(first['loss'])}; {_since(report)}"
        if report["world"] > 1:
            text += f"; the cause may be another of the {report['world']} ranks"
        return text
    if report["weights"]["count"]:
        return "the weights themselves are not finite: look at the steps before this one"
    if not last["finite"]:
        return f"not finite in {last['precision']} either: it is the loss or the method, not the precision"
    if last["precision"] == first["precision"]:
        return f"the loss scale of {first['loss_scale']:g} was too large for this batch; training halves it by itself"
    return (
        f"finite in {last['precision']}, not in {first['precision']}: precision={last['precision']} would train on it"
    )


def _images(images: Sequence[Mapping[str, Any]]) -> list[str]:
    constant = [i for i in images if i["constant"]]
    low, high = min(i["min"] for i in images), max(i["max"] for i in images)
    text = f"{len(images)}, values {low} to {high} of 255"
    if constant:
        text += f"; {len(constant)} with crops of one colour"
    out = [_labelled("images", text)]
    first = sorted(images, key=lambda i: i["constant"] == 0)[:_SHOWN_IMAGES]
    for i in first:
        note = f"   {i['constant']} of {i['views']} crops are of one colour" if i["constant"] else ""
        out.append(_labelled("", f"{i['position']:>5}  {i['min']:>3}..{i['max']:<3}  {shown(i['name'])}{note}"))
    if len(images) > len(first):
        out.append(_labelled("", f"and {len(images) - len(first)} more"))
    return out


def _module(found: Mapping[str, Any]) -> str:
    return f"{_named(found['module'])} ({found['kind']}), micro-batch {found['micro']}"


def _named(module: str) -> str:
    return module or "the method itself, behind its modules"


def _span(values: Mapping[str, Any]) -> str:
    if not values["of"]:
        return "no tensors"
    if values["min"] is None:
        return f"not one of {values['of']:,} values is finite"
    span = f"{_number(values['min'])} to {_number(values['max'])}"
    return f"{span}, {values['bad']:,} of {values['of']:,} not finite" if values["bad"] else f"{span}, all finite"


def _names(found: Mapping[str, Any]) -> str:
    more = ", ..." if found["count"] > len(found["first"]) else ""
    return f"{found['count']} of {found['of']}: {', '.join(shown(n) for n in found['first'])}{more}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else shown(str(value))
