"""Lists packages as a CycloneDX bill of materials (https://cyclonedx.org/docs/1.6/json)."""

from collections.abc import Iterable
from importlib.metadata import distributions
from typing import Any, NamedTuple

from jaxinfra import __version__
from jaxinfra.packages import import_optional


class Package(NamedTuple):
    """A package as package URLs name it (https://github.com/package-url/purl-spec)."""

    kind: str  # such as "pypi" or "deb"
    name: str
    version: str
    namespace: str | None = None  # such as "debian"


def installed(folders: Iterable[str] | None = None) -> list[Package]:
    """Returns the Python packages of these folders, or of this process."""
    found = distributions() if folders is None else distributions(path=[*folders])
    return sorted({Package("pypi", each.name.lower(), each.version) for each in found})


def bill_of_materials(what: str, packages: Iterable[Package]) -> bytes:
    """Returns packages as JSON of CycloneDX 1.6, as parts of `what`.

    Raises ConfigError without the packages of jaxinfra[sign].
    """
    needed: Any = {"needed_by": "a bill of materials", "install": "jaxinfra[sign]"}
    cyclonedx = import_optional("cyclonedx", "model.bom", "model.component", "output", "schema", **needed)
    purl, model, schema = import_optional("packageurl", **needed).PackageURL, cyclonedx.model, cyclonedx.schema
    component, kinds = model.component.Component, model.component.ComponentType
    bom, whole = model.bom.Bom(), component(name=what, version=__version__, type=kinds.APPLICATION)
    bom.metadata.component = whole
    for kind, name, version, namespace in packages:
        url = purl(kind, namespace, name, version)
        bom.components.add(component(name=name, version=version, type=kinds.LIBRARY, purl=url, bom_ref=str(url)))
    bom.register_dependency(whole, bom.components)
    written = cyclonedx.output.make_outputter(bom, schema.OutputFormat.JSON, schema.SchemaVersion.V1_6)
    return written.output_as_string(indent=2).encode() + b"\n"
