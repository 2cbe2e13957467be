"""``hpcgpt site list|show|script|flags|check``: clusters, from their site files.

    hpcgpt site list                                which there are, and how sure their facts are
    hpcgpt site show lumi                           the facts, each with its kind of source; --sources: the addresses
    hpcgpt site show lumi --shell -o lumi.sh        the shell file for HPCGPT_SITE
    hpcgpt site script lumi --nodes=4 --time=10:00:00 --account=project_465000000 > lumi.sbatch
    hpcgpt site flags lumi --nodes=4                the flags of that script alone
    hpcgpt site check                               what differs between the file and this Slurm

docs/sites.md has more, and how to write a file of one's own. No torch in here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.sites import catalog, compare, qos, request, shell
from hpcgpt.sites.schema import Site, facts
from hpcgpt.slurm import batch_scripts, partitions, sbatch_flags
from hpcgpt.storage import atomic


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.action in ("flags", "script"):
        return _request(options.name, rest, options.action == "script")
    if rest:
        raise UserError(f"unexpected argument {rest[0]}: see `hpcgpt site {options.action} --help`")
    if options.action == "list":
        return _list(options.json)
    if options.action == "check":
        return _check(options.name, options.json)
    return _show(options)


# --- list and show ---------------------------------------------------------------------------------


def sureness(site: Site) -> Counter[str]:
    """Count the facts of a site by the kind of their source; of several sources the best one counts.

    Which node a queue has, and whether it is taken only on request, is how the file is written, and not counted.
    """
    order = ("official", "copy", "staff", "community", "third party", "default")
    counted: Counter[str] = Counter()
    for _, table in site.tables():
        for key in (key for key, _ in facts(table) if key not in ("node", "on_request")):
            kinds = {site.sources[name].kind for name in table.named_sources(key)}
            counted[min(kinds, key=order.index)] += 1
    return counted


def _list(as_json: bool) -> int:
    sites = [catalog.find(name) for name in catalog.names()]
    if as_json:
        rows = [{"name": site.name, "title": site.title, "untried": site.untried, "facts": sureness(site)}
                for site in sites]  # fmt: skip
        print(json.dumps(rows))
        return 0
    for site in sites:
        gpus = ", ".join(dict.fromkeys(f"{node.gpus} x {node.gpu}" for node in site.node)) or "as sinfo says"
        sure = ", ".join(f"{count} {kind}" for kind, count in sureness(site).most_common())
        print(f"{site.name:15} {site.title}\n{'':15} a node: {gpus}\n{'':15} facts:  {sure}"
              f"{'; untried' if site.untried else ''}")  # fmt: skip
    return 0


def _show(options: argparse.Namespace) -> int:
    site = catalog.find(options.name)
    python = shell.Python(options.venv or "", options.conda or "", options.container or "")
    if options.shell:
        text = shell.text(site, python)
        if options.output:
            atomic.write(Path(options.output), text.encode())
            Path(options.output).chmod(0o755)  # with a container it is the job's Python, too
            print(f"HPCGPT_SITE={shlex.quote(str(Path(options.output).absolute()))}")
        else:
            sys.stdout.write(text)
        return 0
    if python != shell.Python() or options.output:
        raise UserError("--venv, --conda, --container and --output belong to --shell")
    if options.json:
        print(json.dumps(asdict(site), default=str))
    else:
        print("\n".join(_lines(site, options.sources)))
    return 0


def _lines(site: Site, with_addresses: bool) -> Iterator[str]:
    yield f"{site.title}{': untried' if site.untried else ''}"
    for name, table in site.tables():
        yield f"\n{name}"
        for key, value in facts(table):
            named = table.named_sources(key)
            shown = "; ".join(value) if isinstance(value, tuple) else value
            where = ", ".join(dict.fromkeys(
                _address(site, source) if with_addresses else site.sources[source].kind for source in named
            ))  # fmt: skip
            yield f"  {key:22} {shown}   [{where}]"
    unknown = [key for key in ("internet", "sbatch", "requeue") if getattr(site.compute_nodes, key) is None]
    if unknown:
        yield f"\nnot found in any source: of compute nodes, {', '.join(unknown)}"


def _address(site: Site, name: str) -> str:
    source = site.sources[name]
    return f"{source.kind}, {source.url or source.about}, {source.read}"


# --- script, flags and check -------------------------------------------------------------------------------


def _request(name: str, arguments: Sequence[str], as_script: bool) -> int:
    wanted, others = sbatch_flags.split(arguments)
    if others:
        raise UserError(f"{others[0].partition('=')[0]} is no flag of sbatch")
    filled = request.fill(catalog.find(name), wanted, os.environ)
    for note in filled.notes:
        print(note, file=sys.stderr)
    if as_script:
        sys.stdout.write(request.batch_script((batch_scripts.FOLDER / "pretrain.sbatch").read_text(), filled))
    else:
        print(shlex.join(request.as_arguments(filled.flags)))
    return 0


@streams.continue_without_reader()
def _check(name: str, as_json: bool) -> int:
    site = catalog.find(name)
    found, no_answer = partitions.ask()
    if no_answer:
        raise UserError(f"Slurm does not answer: {no_answer}. Run this on a login node of the cluster")
    findings = compare.compare(site, found, qos.ask())
    counted: Mapping[str, int] = Counter(finding.result for finding in findings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.result:8} {finding.queue}: {finding.text}")
        if not findings:
            print(f"the file of {site.name} has no queues to compare")
        else:
            print(", ".join(f"{count} {result}" for result, count in counted.items()))
    return 1 if counted.get("differs") else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpcgpt site", description="Show what hpcgpt has on clusters, and compare it with this one.",
        allow_abbrev=False,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|script|flags|check")
    listed = actions.add_parser("list", help="list the site files", allow_abbrev=False)
    listed.add_argument("--json", action="store_true", help="as JSON")
    show = actions.add_parser("show", help="show the facts of a site file, or the shell file that it makes",
                              allow_abbrev=False)  # fmt: skip
    show.add_argument("name", metavar="NAME", help="a site, auto, or the path of a .toml file")
    show.add_argument("--sources", action="store_true", help="with the address of each fact's source")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.add_argument("--shell", action="store_true", help="print the shell file for HPCGPT_SITE")
    show.add_argument("-o", "--output", type=paths.not_empty, metavar="FILE", help="write the shell file there")
    for flag, metavar, where in (
        ("--venv", "DIR", "the job's Python is in this virtual environment"),
        ("--conda", "NAME", "... in this conda environment"),
        ("--container", "IMAGE", "... in this image; Slurm's tools stay outside"),
    ):
        show.add_argument(flag, type=paths.not_empty, metavar=metavar, help=where)
    for action, about in (("script", "print the batch script with the flags for a job"),
                          ("flags", "print the flags of sbatch for a job")):  # fmt: skip
        flags = actions.add_parser(
            action, help=about, allow_abbrev=False, usage=f"hpcgpt site {action} NAME [flags of sbatch]"
        )
        flags.add_argument("name", metavar="NAME", help="a site, auto, or the path of a .toml file")
    check = actions.add_parser("check", help="compare a site file with this Slurm", allow_abbrev=False)
    check.add_argument("name", metavar="NAME", nargs="?", default="auto", help="default: auto")
    check.add_argument("--json", action="store_true", help="as JSON")
    return parser


if __name__ == "__main__":
    cli.run(main)
