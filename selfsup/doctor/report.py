"""What `selfsup doctor` prints."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from selfsup.doctor.advice import Proposal, learning_rate
from selfsup.doctor.machine import Machine
from selfsup.doctor.survey import Survey
from selfsup.wording import one_line

_QUANTILES = (0, 5, 50, 95, 100)
_GB = 1e9


def machine_lines(machine: Machine) -> list[str]:
    """Of the machine."""
    has = "bf16 in hardware" if machine.bf16 else "no bf16"
    out = [f"CPU      {machine.cpus} x {machine.cpu}, {has}"]
    out.append(f"memory   {machine.free / _GB:.1f} of {machine.memory / _GB:.1f} GB free")
    for i, gpu in enumerate(machine.gpus):
        has = "bf16" if gpu.bf16 else "no bf16"
        out.append(f"GPU {i}    {gpu.name}, {gpu.free / _GB:.1f} of {gpu.memory / _GB:.1f} GB free, {has}")
    if not machine.gpus:
        out.append("GPU      none that torch sees")
    shared = f"; /dev/shm {machine.shared_free / _GB:.1f} GB free" if machine.shared_free is not None else ""
    out.append(
        f"disk     {machine.disk}: {machine.disk_free / _GB:.1f} of {machine.disk_size / _GB:.1f} GB free{shared}"
    )
    return out


def data_lines(seen: Survey) -> list[str]:
    """Of the images."""
    size = f", {_bytes(seen.total_bytes)}" if seen.total_bytes is not None else ""
    if seen.total_bytes is not None and seen.sizes_seen < seen.count:
        size += f" (from {seen.sizes_seen:,} of them)"
    out = [
        f"images   {seen.count:,}{size}; {seen.decoded:,} decoded"
        + (", a seeded choice" if seen.decoded < seen.count else "")
    ]
    if seen.readable:
        out.append(f"formats  {_counts(seen.formats)}; modes {_counts(seen.modes)}")
        grey = f"; {seen.grey} of {seen.readable} have no colour" if seen.grey and seen.channels != 1 else ""
        out.append(f"channels {seen.channels}{grey}; mean {_numbers(seen.mean)}, std {_numbers(seen.std)}")
        q = [f"{name} {_quantiles(values)}" for name, values in (("width", seen.width), ("height", seen.height))]
        out.append(f"pixels   {', '.join(q)} (least, 5 %, half, 95 %, most)")
        out.append(f"shape    width / height {_quantiles(seen.width / np.maximum(seen.height, 1), '{:.2f}')}")
        out.append(f"reading  {seen.decode_ms:.2g} ms an image on one core")
    if seen.missing_count:
        out.append(f"empty    {seen.missing_count:,} of {seen.sizes_seen:,} files have 0 bytes or are not there")
        out += [f"           {one_line(name)}" for name in seen.missing]
    share = f" ({seen.bad_count / seen.decoded:.1%})" if seen.bad_count else ""
    out.append(f"broken   {seen.bad_count:,} of {seen.decoded:,} decoded cannot be read{share}")
    out += [f"           {one_line(name)}: {one_line(reason, 100)}" for name, reason in seen.bad]
    out.append(f"equal    {_duplicates(seen)}")
    out += [f"           {one_line(b)} = {one_line(a)}" for a, b in seen.duplicates.examples[:5]]
    out.append(f"classes  {_classes(seen)}")
    return out


def _duplicates(seen: Survey) -> str:
    d = seen.duplicates
    if not seen.sizes_seen:
        return f"{d.found:,} duplicates among the {d.looked_at:,} {d.what}"
    all_seen = d.hashed == d.same_size and d.looked_at == seen.count
    found = (
        f"{d.found:,} duplicates"
        if all_seen
        else (f"at least {d.found:,} duplicates" if d.found else "no duplicate found")
    )
    among = "" if d.looked_at == seen.count else f" of {d.looked_at:,} files looked at,"
    return f"{found};{among} {d.same_size:,} share their size with another, {d.hashed:,} of these were compared"


def _classes(seen: Survey) -> str:
    c = seen.classes
    if c is None:
        return "none: no labels"
    of = "" if c.looked_at == seen.count else f" (of {c.looked_at:,} images looked at)"
    without = f"; {c.unlabelled:,} images have no label" if c.unlabelled else ""
    small, large = f"{one_line(c.smallest[0], 40)} {c.smallest[1]:,}", f"{one_line(c.largest[0], 40)} {c.largest[1]:,}"
    return f"{c.count:,}, images in each: fewest {small}, median {c.median:,.0f}, most {large}{without}{of}"


def lines(machine: Machine, seen: Survey, proposal: Proposal | None) -> list[str]:
    """The whole report; the last lines can be pasted."""
    out = [*data_lines(seen), "", *machine_lines(machine)]
    if proposal is None:
        return out
    width = max(len(choice.what) for choice in proposal.choices)
    out += ["", *(f"{choice.what:{width}}  {choice.value}: {choice.why}" for choice in proposal.choices)]
    out += ["", *(f"note: {warning}" for warning in proposal.warnings), *([""] if proposal.warnings else [])]
    for each in proposal.alternatives:
        out += [f"or {each.recipe} ({each.method}): {each.why}", f"   {each.command}"]
    out += [f"not here: {proposal.passed_over}"] if proposal.passed_over else []
    out += [""] if proposal.alternatives else []
    return [*out, proposal.command, *([proposal.then] if proposal.then else [])]


def of_machine(machine: Machine) -> dict[str, Any]:
    """As JSON."""
    return dataclasses.asdict(machine)


def as_json(machine: Machine, seen: Survey, proposal: Proposal | None) -> dict[str, Any]:
    """{"machine", "data", "proposal"}; the last is null if nothing can be proposed."""
    data = {f.name: getattr(seen, f.name) for f in dataclasses.fields(seen) if f.name not in ("width", "height")}
    data["formats"], data["modes"] = dict(seen.formats), dict(seen.modes)
    data["bad"] = [{"file": name, "reason": reason} for name, reason in seen.bad]
    data["duplicates"] = dataclasses.asdict(seen.duplicates)
    data["classes"] = dataclasses.asdict(seen.classes) if seen.classes is not None else None
    if seen.readable:
        ratio = seen.width / np.maximum(seen.height, 1)
        shapes = {"width": seen.width, "height": seen.height, "short_side": seen.short_side, "aspect": ratio}
        data["quantiles"] = {"percent": list(_QUANTILES)} | {
            name: np.round(np.percentile(values, _QUANTILES), 3).tolist() for name, values in shapes.items()
        }
    found: dict[str, Any] = {"machine": of_machine(machine), "data": data, "proposal": None}
    if proposal is not None:
        found["proposal"] = {
            "recipe": proposal.recipe,
            "overrides": proposal.overrides,
            "global_batch": proposal.config.global_batch,
            "learning_rate": learning_rate(proposal),
            "choices": [dataclasses.asdict(choice) for choice in proposal.choices],
            "warnings": proposal.warnings,
            "alternatives": [
                {"method": a.method, "recipe": a.recipe, "why": a.why, "overrides": a.overrides, "command": a.command}
                for a in proposal.alternatives
            ],
            "passed_over": proposal.passed_over,
            "command": proposal.command,
            "then": proposal.then,
        }
    return found


def _counts(counter: Counter[str]) -> str:
    shown = [f"{name} {count:,}" for name, count in counter.most_common(6)]
    return ", ".join(shown) + (f" and {len(counter) - 6} more" if len(counter) > 6 else "")


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.3f}" for v in values[:4]) + (" ..." if len(values) > 4 else "")


def _quantiles(values: np.ndarray, form: str = "{:.0f}") -> str:
    return " ".join(form.format(v) for v in np.percentile(values, _QUANTILES))


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
