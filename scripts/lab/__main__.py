"""Claims of papers, tested at a size that a CPU carries.

    python -m scripts.lab prepare          # text, a tokenizer, small language models that are trained here
    python -m scripts.lab run CARD         # trains every line of a card; the same command goes on where it ended
    python -m scripts.lab page             # writes docs/lab.md from the results that are kept

A card is scripts/lab/cards/CARD.yaml; what comes of it is kept as scripts/lab/results/CARD.json.
"""

import argparse
import sys
from pathlib import Path

from mmkd.errors import UserError
from mmkd.files import write_file

from .card import Card
from .experiment import key_of_card, read_results, run_card
from .tables import page

LAB = Path(__file__).parent
PAGE = LAB.parents[1] / "docs" / "lab.md"
_HEAD = (LAB / "head.md").read_text(encoding="utf-8")


def written_page() -> str:
    """The page of all results. Raises UserError for results of a card that has changed since."""
    parts = [_HEAD]
    for path in sorted((LAB / "results").glob("*.json")):
        card, results = Card.read(LAB / "cards" / f"{path.stem}.yaml"), read_results(path)
        if results["key"] != key_of_card(card):
            raise UserError(f"{path} is of another card than {path.stem}.yaml is now: run it again.")
        parts.append(page(card, results))
    return "\n".join(parts)


def main() -> int:
    """Does what the first word says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "page"))
    parser.add_argument("card", nargs="?")
    options = parser.parse_args()
    from mmkd.commands.train import train

    if options.command == "prepare":
        from .prepare import prepare

        return prepare(train)
    if options.command == "run":
        if options.card is None:
            parser.error("which card? " + ", ".join(sorted(path.stem for path in (LAB / "cards").glob("*.yaml"))))
        card = Card.read(LAB / "cards" / f"{options.card}.yaml")
        print(page(card, run_card(card, Path("runs/lab") / card.name, LAB / "results" / f"{card.name}.json", train)))
    write_file(PAGE, written_page())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished trainings are kept: the same command goes on with the next one.")
