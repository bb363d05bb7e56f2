"""`bdtool inspect`: what a MODEL or a BUNDLE is, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from bdtool.cli.command import Command
from bdtool.cli.options import MODEL_OR_BUNDLE, json_option
from bdtool.cli.output import emit, mega, print_table
from bdtool.words import counted, percent

_LABEL_WIDTH = 16
# of earlier MODELs in a provenance
_ORIGINS = {"teacher": "  teacher", "policy_trunk": "  policy trunk", "start": "  from"}
_N_SHOWN = 10  # of a long list


@click.command("inspect", cls=Command)
@click.argument("model_or_bundle", type=MODEL_OR_BUNDLE)
@json_option
def inspect_cmd(model_or_bundle: Path, json_file: str | None) -> None:
    """Show what a MODEL or BUNDLE is, part by part; --json has all that is known of how it was made.

    \b
    Example:
      bdtool inspect bundle
    """
    from bdtool.inspection import describe_bundle, describe_model

    is_bundle = model_or_bundle.is_dir()
    facts = describe_bundle(model_or_bundle) if is_bundle else describe_model(model_or_bundle)
    emit(facts, json_file, lambda: _print_facts(facts))


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if name not in ("parts", "built", "kept"):
            for label, line in _LINES.get(name, _plain_lines)(name, value, facts):
                click.echo(f"{label:<{_LABEL_WIDTH}}{line}".rstrip())
    parts = facts["parts"]
    columns = list(parts[0])
    print_table(columns, [[_cell(name, part[name]) for name in columns] for part in parts], title="Parts")


def _plain_lines(name: str, value: Any, facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"{name}:", _fact(value)


def _precision_lines(name: str, value: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for each precision that was calibrated, with what its gates measured."""
    yield f"{name}:", ", ".join(facts.get("kept") or ["fp32", *value])
    for precision, calibration in value.items():
        gates = _dict_at(calibration, "gates")
        line = f"policy {calibration.get('policy', '-')}"
        if gates.get("accuracy") is not None:
            line += f", accuracy {_share(gates, 'accuracy')}, fp32 {_share(gates, 'accuracy_fp32')}"
            line += f", on {gates.get('n_images')} images of {gates.get('input_source')}"
            line += ", calibration images among them" if calibration.get("evaluated_on_calibration_images") else ""
        yield f"  {precision}:", line


def _left_out_line(name: str, value: list[str], facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"{name}:", f"{counted(len(value), 'file')}, by `bdtool pack`: {_fact(value)}"


def _engine_lines(name: str, value: list[str], facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for each directory of engines, with what was built and noted there."""
    yield f"{name}:", "" if value else "none; `bdtool build` makes them"
    for directory in value:
        built = facts["built"][directory]
        line = f"{built['n_parts']} of {len(facts['parts'])} parts"
        if masks := built["masks"]:
            line += f", {len(masks)} frequent masks ({percent(sum(mask['share'] for mask in masks))} of the images)"
        for best in built["recommendations"]:
            line += f", auto is {best['strategy']} (threads {best['threads']}, batch {best['batch']})"
        yield f"  {directory}", ""
        yield "", "; ".join([line, *built["problems"]])


def _provenance_lines(name: str, value: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the steps that a MODEL came from, the last one first: what was run on what, its result, its options."""
    yield from _origin_lines(f"{name}:", value)


def _origin_lines(label: str, step: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield label, _step(step)
    options = {option: given for option, given in _dict_at(step, "options").items() if given is not None}
    if options:
        yield "", "options " + ", ".join(f"{option} {_fact(given)}" for option, given in options.items())
    for origin, origin_label in _ORIGINS.items():
        if origin in step:
            yield from _origin_lines(f"{origin_label}:", _dict_at(step, origin))


def _step(step: dict[str, Any]) -> str:
    told = {"options", "figures", "data", "val", "versions", "seed", "created_by", *_ORIGINS}
    line = str(step.get("created_by", "unknown"))
    if data := _dict_at(step, "data"):
        line += f" on {data.get('n_images')} images of {data.get('name')}"
    if figures := _dict_at(step, "figures"):
        line += f": accuracy {_share(figures, 'accuracy')} with {_fact(figures.get('blocks_mean'))} blocks"
        line += f" on {figures.get('n_images')} images of {step.get('val')}"
    rest = {key: value for key, value in step.items() if key not in told}
    return ", ".join([line, *([_fact(rest)] if rest else [])])


def _dict_at(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what is under that name, where it is a dict: other versions may have written something else."""
    value = facts.get(name)
    return value if isinstance(value, dict) else {}


def _share(facts: dict[str, Any], name: str) -> str:
    value = facts.get(name)
    return percent(value, 2) if isinstance(value, int | float) else _fact(value)


_LINES: dict[str, Callable[[str, Any, dict[str, Any]], Iterator[tuple[str, str]]]] = {
    "left_out": _left_out_line,
    "precisions": _precision_lines,
    "engines": _engine_lines,
    "provenance": _provenance_lines,
}


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: int(item[0])) if _are_numbers(value) else value.items()
        facts = ((k, f"({_fact(v)})" if isinstance(v, dict) else _fact(v)) for k, v in items)
        return ", ".join(f"{k} {text}" for k, text in facts) or "-"
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:_N_SHOWN]))
        return shown + (f", ... ({len(value)})" if len(value) > _N_SHOWN else "") if value else "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _are_numbers(keys: Iterable[str]) -> bool:
    """Say whether these are numbers of blocks, as of masks: JSON has only texts as keys, and a MODEL sorts those."""
    return all(key.isdecimal() for key in keys)


def _cell(column: str, value: Any) -> str:
    if column == "flops":
        return mega(value)
    if column == "error":
        return f"{value:.1e}"
    if column == "sha256":
        return str(value)[:12]
    if isinstance(value, list):
        return "x".join(map(str, value))
    return str(value)
