"""`grace data ...`: the small world, and what real annotation files need before a run."""

import argparse
import json
import sys
from pathlib import Path

from grace.arguments import add, add_json, add_recipe, integer, split_sizes
from grace.errors import Parser, UserError
from grace.progress import progress


def add_data(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds `data` and its sub-commands."""
    group = commands.add_parser("data", help="Prepare and check data.", description="Prepare and check data.")
    subcommands = group.add_subparsers(metavar="COMMAND", required=True)
    for one in (_add_audit, _add_stats, _add_download, _add_small_world):
        one(subcommands)


def _add_audit(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Check every record and picture of a recipe before training."
    parser = add(commands, "audit", summary, _audit, rest="overrides")
    add_recipe(parser)
    parser.add_argument(
        "--out",
        metavar="FILE|DIR",
        help="where the list of faults goes; default: data.audit, or beside data.path",
    )
    parser.add_argument(
        "--workers", type=integer(1), metavar="N", help="processes; default: as many as it is worth"
    )
    parser.add_argument(
        "--deep", action="store_true", help="decode every picture, not only headers and tails"
    )
    add_json(parser)


def _add_stats(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Show lengths, sources and turns of a recipe's records."
    parser = add(commands, "stats", summary, _stats, rest="overrides")
    add_recipe(parser)
    parser.add_argument(
        "--workers", type=integer(1), metavar="N", help="processes; default: as many as it is worth"
    )
    add_json(parser)


def _add_download(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Fetch annotations and pictures that a manifest lists."
    parser = add(commands, "download", summary, _download)
    parser.add_argument(
        "--manifest", default="sharegpt4v.yaml", metavar="FILE", help="a YAML manifest; default: %(default)s"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="NAME", help="these items; default: all of the manifest"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the data directory")
    parser.add_argument("--keep-archives", action="store_true", help="keep archives after unpacking them")
    parser.add_argument("--list", action="store_true", help="show what the manifest holds and fetch nothing")
    add_json(parser)


def _add_small_world(commands: "argparse._SubParsersAction[Parser]") -> None:
    summary = "Draw the small world's pictures and records."
    parser = add(commands, "small-world", summary, _small_world, "demo")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_argument("--seed", type=integer(0), default=0, help="default: %(default)s")
    parser.add_argument(
        "--splits", type=split_sizes, metavar="NAME=SIZE,...", help="default: every split at full size"
    )


# ---------------------------------------------------------------- implementations, imported when used


def _audit(args: argparse.Namespace) -> int:
    from grace.cli_audit import run_audit

    return run_audit(args)


def _stats(args: argparse.Namespace) -> int:
    from grace.cli_audit import run_stats

    return run_stats(args)


def _download(args: argparse.Namespace) -> int:
    from grace.data.download import download
    from grace.data.manifest import chosen_items, format_items, load_manifest

    items = chosen_items(load_manifest(args.manifest), args.only)
    if args.list:
        print(json.dumps([item.as_dict() for item in items]) if args.json else format_items(items))
        return 0
    if args.out is None:
        raise UserError("data download needs --out DIR, or --list to see what there is")
    with progress("downloading", "MB", 1e6) as advance:
        report = download(
            items, args.out, args.keep_archives, advance, lambda line: print(line, file=sys.stderr)
        )
    if args.json:
        print(json.dumps(report))
    return 0


def _small_world(args: argparse.Namespace) -> int:
    from grace.data.small_world import write_small_world

    print(f"wrote {write_small_world(args.out, args.seed, args.splits)}", file=sys.stderr)
    return 0
