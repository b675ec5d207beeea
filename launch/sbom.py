"""Writes what the file system of an image holds as CycloneDX: python launch/sbom.py FOLDER OUTPUT NAME."""

import subprocess
import sys
from pathlib import Path

from jaxinfra.registry.sbom import Package, bill_of_materials, installed


def debian(folder: Path) -> list[Package]:
    """Returns the Debian packages that are installed in a root folder."""
    command = ["dpkg-query", f"--admindir={folder}/var/lib/dpkg", "--show", "--showformat=${Package} ${Version}\\n"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Package("deb", *line.split(), namespace="debian") for line in listed.splitlines()]


if __name__ == "__main__":
    folder, output, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    python = installed(map(str, folder.glob("opt/jaxinfra/lib/python*/site-packages")))
    system = debian(folder)
    output.write_bytes(bill_of_materials(name, [*python, *system]))
    size = subprocess.run(["du", "--summarize", "--block-size=1M", folder], check=True, capture_output=True, text=True)
    print(f"{name}: {size.stdout.split()[0]} MiB; {len(python)} Python and {len(system)} Debian packages, in {output}")
