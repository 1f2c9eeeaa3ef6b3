"""The table of docs/limits.md, from the code: `PYTHONPATH=.:tests python -m support.limit_table` writes it anew."""

from importlib import import_module
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "limits.md"
BEGIN, END = "<!-- limits: begin -->\n", "<!-- limits: end -->\n"

# Module, constant, what it bounds, what comes of more.
LIMITS = [
    ("vfleet.rpc", "MAX_CONNECTIONS", "connections of one daemon", "closed at once"),
    ("vfleet.rpc", "HANDSHAKE_TIMEOUT_MS", "ms until a connection speaks TLS and HTTP/2", "closed"),
    ("vfleet.rpc", "KEEPALIVE_TIME_MS", "ms after which a silent connection is asked for a sign of life", ""),
    ("vfleet.rpc", "KEEPALIVE_TIMEOUT_MS", "ms that it has to give one", "closed"),
    ("vfleet.rpc", "IDLE_TIMEOUT_MS", "ms without a call on a connection", "closed; a client connects again by itself"),
    ("vfleet.rpc", "MAX_STREAMS", "calls at once on one connection", "refused by HTTP/2; a client waits by itself"),
    ("vfleet.rpc", "MAX_CALLS", "calls at once of one daemon", "RESOURCE_EXHAUSTED; vfleet's own clients try again"),
    ("vfleet.rpc", "MAX_METADATA_BYTES", "bytes of a call's metadata", "RESOURCE_EXHAUSTED"),
    (
        "vfleet.rpc",
        "MAX_REQUEST_BYTES",
        "bytes of a request, or of one of a stream",
        "RESOURCE_EXHAUSTED",
    ),
    ("vfleet.rpc", "MAX_MESSAGE_BYTES", "bytes of a response", "RESOURCE_EXHAUSTED"),
    ("vfleet.edge", "MAX_ERROR_CHARS", "characters of an error's text", "the rest is left out"),
    ("vfleet.guard", "MAX_CALLS_PER_CLIENT", "calls at once of a viewer or operator*", "RESOURCE_EXHAUSTED, RetryInfo"),
    ("vfleet.guard", "MAX_CALLS_OF_CLIENTS", "calls at once of all of them*", "RESOURCE_EXHAUSTED, RetryInfo"),
    ("vfleet.guard", "CALLS_PER_S", "calls a second of one of them, in the long run*", "RESOURCE_EXHAUSTED, RetryInfo"),
    ("vfleet.guard", "BURST_CALLS", "calls of one of them at once, after a pause*", "RESOURCE_EXHAUSTED, RetryInfo"),
    (
        "vfleet.guard",
        "MAX_CALLS_PER_DAEMON",
        "calls at once of a coordinator or host*",
        "RESOURCE_EXHAUSTED, RetryInfo",
    ),
    ("vfleet.guard", "REQUEST_TIMEOUT_S", "seconds until the one request of a call is there*", "RESOURCE_EXHAUSTED"),
    ("vfleet.names", "MAX_NAME_LENGTH", "characters of a name", "INVALID_ARGUMENT"),
    ("vfleet.etcd.client", "MAX_OPERATIONS", "operations of a transaction: so large is a group", "INVALID_ARGUMENT"),
    ("coordinator.queueing", "MAX_QUEUED", "migrations that wait", "RESOURCE_EXHAUSTED"),
    ("coordinator.requests", "MAX_PAGE_SIZE", "records on a page of a list", "INVALID_ARGUMENT"),
    ("coordinator.events", "MAX_EVENTS", "changes that a watcher may be behind", "the oldest are left out"),
    ("vfleet.limits", "WINDOW", "accesses of a driver to a function on their way", "they wait in the driver's host"),
    ("hostd.access_queue", "MAX_WAITING", "accesses that wait, of a driver to a function", "RESOURCE_EXHAUSTED"),
    ("hostd.client_access", "MAX_NOTIFICATIONS", "notifications that a driver may be behind", "RESOURCE_EXHAUSTED"),
    ("hostd.drivers", "MAX_ENTRIES_A_REQUEST", "entries in a request", "INVALID_ARGUMENT"),
    ("vfleet.limits", "MAX_DRIVERS", "drivers of a function", "RESOURCE_EXHAUSTED"),
    ("vfleet.limits", "MAX_MAIN_MEMORY_BYTES", "bytes of a driver's main memory", "INVALID_ARGUMENT"),
    ("vfleet.daemon", "MAX_FILES", "files that a daemon may have open, if the system lets it", ""),
]


def text() -> str:
    """Return the table in Markdown."""
    rows = ["| bound | of | past it | constant |", "| --- | --- | --- | --- |"]
    for module, name, what, past in LIMITS:
        value = getattr(import_module(module), name)
        rows.append(f"| {value:,.10g} | {what} | {past} | `{module}.{name}` |".replace("|  |", "| |"))
    return "\n".join(rows) + "\n"


def documented() -> str:
    """Return the table that the document has."""
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text() + END + rest.partition(END)[2], encoding="utf-8")
