"""`mmkd report`: a run on one page."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, add_trust


def add_flags(parser: ArgumentParser) -> None:
    """Which run, and where its pages go."""
    parser.add_argument("folder", metavar="RUN", help="output_dir of a training, or of `mmkd compare`")
    parser.add_argument("--output", type=Path, help="folder of the pages (default: the run's)")
    parser.add_argument("--comparison", type=Path, help="of `mmkd compare` (default: the run's, or one that names it)")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="held-out questions that student and teacher answer (default: a few of a finished run whose models are "
        "small; 0: none)",
    )
    add_trust(parser)


def run(options: Namespace) -> int:
    """Writes the pages of a run and prints their paths."""
    from mmkd.publish.report_page import write_report

    trust = options.trust_remote_code
    for path in write_report(Path(options.folder), options.output, options.comparison, options.samples, trust):
        print(path)
    return 0


COMMAND = Command(
    "report",
    "a run on one page: curves, comparison, samples, recipe",
    run,
    add_flags,
    "Writes report.html, which needs no other file, and report.md. Works while the run is going on. Samples are kept "
    "in RUN/samples.",
)
