"""The model card of a run, in the format of Hugging Face: what it computed, on what, at what cost, and how well."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxinfra.interop.folder import PREFIX
from jaxinfra.packages import import_optional
from jaxinfra.track.formatting import format_duration, format_energy, format_metric, format_number
from jaxinfra.track.goodput import GOODPUT_FILE, account, read_ledger
from jaxinfra.track.report import RunFiles, read_run

UNKNOWN = "not stated"


def model_card(folder: Path, *, license_name: str | None, data_licenses: str | None) -> str:
    """Returns the card, which `huggingface_hub` has parsed; raises ConfigError without a run.json.

    Args:
        folder: the directory of the run, or a copy of its small files.
        license_name: the identifier of the model's license, such as apache-2.0.
        data_licenses: what is to be said about the licenses of the data.
    """
    hub: Any = import_optional("huggingface_hub", needed_by="model card", install="jaxinfra[huggingface]")
    run = read_run(folder, is_running=False)
    base = str((run.record.get("init") or {}).get("run") or "")
    data: list[str] = [*(run.record.get("data_versions") or ())]
    results = [
        hub.EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name="validation",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in _evaluation(run).items()
        for name in data[:1]
    ]
    header = hub.ModelCardData(
        license=license_name,
        base_model=base.removeprefix(PREFIX)
        if base.startswith(PREFIX) and not Path(base.removeprefix(PREFIX)).exists()
        else None,
        library_name="transformers",
        model_name=run.name,
        eval_results=results or None,
    )
    body = "\n".join(_body(run, folder, base, data, license_name or UNKNOWN, data_licenses or UNKNOWN))
    return str(hub.ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n"))


def _evaluation(run: RunFiles) -> Mapping[str, float]:
    """Returns the metrics of the last evaluation."""
    return {name: value for name, value in (run.summary.get("validation") or {}).items() if isinstance(value, float)}


def _body(
    run: RunFiles, folder: Path, base: str, data: list[str], license_name: str, data_licenses: str
) -> Iterator[str]:
    record, spent = run.record, account(read_ledger(folder / GOODPUT_FILE))
    derived = {name: value for name, (value, _) in record.get("derived", {}).items()}
    yield f"# {run.name}\n"
    yield f"Trained by jaxinfra; the run {run.state} after {run.summary.get('steps') or 0:,} steps.\n"
    yield "## Computation\n"
    for name in ("parameters", "tokens", "FLOPs"):
        if name in derived:
            yield f"- {name}: {format_number(derived[name])}"
    devices = record.get("devices", {})
    yield f"- devices: {devices.get('count')} x {devices.get('kind')}"
    yield f"- time: {format_duration(spent.wall_s)} in {spent.attempts} starts, goodput {spent.fraction:.0%}"
    yield f"- energy: {format_energy(spent.joules, spent.planned_joules) or 'not measured'}\n"
    yield "## Data\n"
    yield from (f"- store version {version}" for version in data)
    yield f"- weights at the start: {base or 'random'}"
    yield f"- licenses of the data: {data_licenses}\n"
    yield "## Evaluation\n"
    found = _evaluation(run)
    yield from (f"- {name} on the validation samples: {format_metric(value)}" for name, value in found.items())
    if not found:
        yield "- none"
    yield f"\n## License\n\n{license_name}\n"
    yield "## Reproduce\n"
    git = record.get("git") or {}
    commit = f"{git.get('commit')}{' with changes' * bool(git.get('dirty'))}"
    yield f"- config fingerprint {record.get('fingerprint')}, commit {commit}"
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    yield f"- {versions}"
