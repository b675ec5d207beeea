"""Tables in Markdown pages: what a command writes stands between two comments, `<!-- NAME: begin -->` and `end`."""

from pathlib import Path

from jaxinfra.errors import ConfigError
from jaxinfra.storage import outputs


def insert_table(page: Path, name: str, table: str) -> str:
    """Returns the page with the table in its place; ConfigError if it has none, StorageError if unreadable."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = outputs.read_text(page).partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ConfigError(f"{page}: has no place for the table; put {begin} and {end} on lines of their own")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"
