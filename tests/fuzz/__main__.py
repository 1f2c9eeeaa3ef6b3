"""Fuzz what reads outside input: python -m fuzz [TARGET…] [--seconds N | --runs N], one process a target.

A finding ends its target with a traceback, and leaves the input in FOLDER as crash-…; `--input FILE TARGET` repeats it.
Inputs that reach something new are kept in FOLDER/TARGET, and begun with the next time.
"""

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

TARGETS = {
    "topology": "fuzz.parsers:topology",
    "command_line": "fuzz.parsers:command_line",
    "names": "fuzz.parsers:names",
    "metrics_page": "fuzz.parsers:metrics_page",
    "state": "fuzz.state:target",
    "records": "fuzz.records:target",
    "requests": "fuzz.requests:target",
    "guest": "fuzz.guest:messages",
}
MAX_INPUT_BYTES = 4096
# No input may keep a parser busy for this long; a fleet is set up within it.
TIMEOUT_S = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--runs", type=int, help="inputs for each target, instead")
    parser.add_argument("--seed", type=int, default=0, help="0 for another one each time")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="of inputs (%(default)s)")
    parser.add_argument("--input", type=Path, help="give one target this input, once")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target: {', '.join(sorted(unknown))}")
    if options.here:
        return _fuzz(options)
    failed = []
    for target in options.targets or TARGETS:
        sys.stderr.write(f"--- {target}\n")
        arguments = [argument for argument in sys.argv[1:] if argument not in TARGETS]
        if subprocess.run([sys.executable, "-m", "fuzz", target, "--here", *arguments], check=False).returncode:
            failed.append(target)
    if failed:
        sys.stderr.write(f"found something: {', '.join(failed)}\n")
    return bool(failed)


def _fuzz(options: argparse.Namespace) -> int:
    import atheris

    (target,) = options.targets
    with atheris.instrument_imports(include=["coordinator", "hostd", "vfleet"]):
        module, _, name = TARGETS[target].partition(":")
        function = getattr(import_module(module), name)
    if options.input is not None:
        function(options.input.read_bytes())
        return 0
    corpus = options.folder / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(getattr(import_module(module), "SEEDS", {}).get(name, ())):
        (corpus / f"seed-{number}").write_bytes(seed)
    bound = f"-runs={options.runs}" if options.runs is not None else f"-max_total_time={options.seconds}"
    flags = [
        *(bound, f"-seed={options.seed}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={TIMEOUT_S}", "-rss_limit_mb=2048"),
        *(f"-artifact_prefix={options.folder}/", "-print_final_stats=1"),
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], function)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
