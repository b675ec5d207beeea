"""`python -m launch model card RUN`: writes the model card of a run in the format of Hugging Face."""

import argparse

from jaxinfra.registry.card import UNKNOWN, model_card
from jaxinfra.storage import outputs
from jaxinfra.track.runs import local_files, record_of


def run(options: argparse.Namespace) -> None:
    """Prints the card, or writes it to a file or URL; says what nobody has stated."""
    record_of(options.run_dir)
    with local_files(options.run_dir) as folder:
        card = model_card(folder, license_name=options.license, data_licenses=options.data_licenses)
    if options.output is None:
        print(card, end="")
        return
    outputs.write_text(options.output, card)
    missing = [
        name
        for name, value in (("--license", options.license), ("--data-licenses", options.data_licenses))
        if not value
    ]
    print(f"{options.output}: written" + (f"; {' and '.join(missing)} {UNKNOWN}" if missing else ""))
