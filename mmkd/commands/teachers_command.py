"""`mmkd teachers`: which teacher is worth it for a student."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command, CommandGroup, add_trust


def add_rank_flags(parser: ArgumentParser) -> None:
    """Of `mmkd teachers rank`."""
    add = parser.add_argument
    add("student", help="the student: a run's folder, another folder, or a Hub id")
    add(
        "teachers",
        nargs="+",
        metavar="TEACHER",
        help="teachers to rank, in the same forms, or server:URL of a vLLM server of hidden states",
    )
    add("--data", required=True, help="rows to rank on: a data recipe, or the rows themselves")
    add("--rows", type=int, default=256, help="rows to read, held-out ones where there are any (default: 256)")
    add("--answers", type=int, default=16, help="prompts that each teacher answers itself (default: 16)")
    add("--max_new_tokens", type=int, default=64, help="tokens of an answer that are read (default: 64)")
    add(
        "--measures",
        nargs="+",
        default=["fit"],
        help="fit (default): how teacher and student go together. acceptance: how many drafted tokens of the student "
        "a teacher keeps in speculative decoding",
    )
    add("--draft_tokens", type=int, default=4, help="for acceptance, tokens of a draft (default: 4)")
    add("--seed", type=int, default=0, help="of the answers that are drawn (default: 0)")
    add("--dtype", default="auto", help="type of the weights (default: as saved)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add_trust(parser)
    add("--output", type=Path, metavar="FILE.json", help="the results (default: teachers.json beside the student's)")


def rank(options: Namespace) -> int:
    """Ranks teachers and prints the order with its reasons."""
    from mmkd.eval.candidates import candidate
    from mmkd.eval.harness import Settings
    from mmkd.eval.model import find_model
    from mmkd.eval.teacher_ranking import Ranking, RankSettings, show_ranking
    from mmkd.results.tables import table_console

    names = ("rows", "answers", "max_new_tokens", "draft_tokens", "seed")
    settings = RankSettings(
        options.data, measures=tuple(options.measures), **{name: getattr(options, name) for name in names}
    )
    student = find_model(options.student, trust_remote_code=options.trust_remote_code)
    teachers = [candidate(name, options.trust_remote_code) for name in options.teachers]
    how = Settings(dtype=options.dtype, device=options.device)
    ranking = Ranking(student, settings, how, options.output)
    entries = ranking.run(teachers, lambda text: print(text, file=sys.stderr, flush=True))
    show_ranking(entries, table_console())
    print(ranking.path)
    return 0


COMMAND = CommandGroup(
    "teachers",
    "choose a teacher for a student",
    (
        Command(
            "rank",
            "measure candidate teachers beside a student, and order them",
            rank,
            add_rank_flags,
            "Reads the data's answers and the student's own with the student and each teacher, one teacher in memory "
            "at a time. What is measured is kept: the same command goes on where it was interrupted.",
        ),
    ),
)
