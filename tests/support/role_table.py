"""The table of docs/security.md, from the code: `PYTHONPATH=.:tests python -m support.role_table` writes it anew."""

from pathlib import Path

from vfleet.roles import Role, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- roles: begin -->\n", "<!-- roles: end -->\n"


def text() -> str:
    """Return the table in Markdown."""
    head = [f"| RPC | {' | '.join(Role)} |", f"| --- |{' --- |' * len(Role)}"]
    rows = [f"| {name} | {' | '.join('yes' if role in roles else '' for role in Role)} |" for name, roles in table()]
    return "\n".join([*head, *rows]).replace("|  |", "| |").replace("|  |", "| |") + "\n"


def documented() -> str:
    """Return the table that the document has."""
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text() + END + rest.partition(END)[2], encoding="utf-8")
