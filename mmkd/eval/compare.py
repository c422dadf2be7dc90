"""Was distillation worth it? Teacher, baseline and students over seeds, in one table."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import plan
from mmkd.results.compared import ComparedModel, Metric
from mmkd.results.tables import markdown
from mmkd.training.comparison import Control
from mmkd.training.method import METHODS, Train
from mmkd.units import readable_time

from .asked_questions import Questions
from .baselines import (
    BASELINE,
    comparison_of,
    distils,
    has_view,
    label,
    make_baseline,
    steps_of,
    teacher_of,
    trains_several_times,
    with_keys,
)
from .compare_checks import check_reading, check_recipe, check_together
from .compare_progress import ComparisonProgress, quiet
from .comparison_summary import Row, first_of, summary
from .equal_time import check_equal_time, longer, step_factors
from .evaluation import evaluate
from .harness import Settings
from .model import find_model
from .own_answers import OwnAnswers
from .results import to_json
from .schedules import scheduled
from .suites import SuiteTask
from .trainings import Trainings

NAME, PAGE = "comparison.json", "comparison.md"


@dataclass(frozen=True)
class Asked:
    """What is compared beside the recipes, and how."""

    judge: Recipe | None = None
    """The recipe whose trainer evaluates all students, by default each one's own."""
    baseline: Recipe | Literal["none"] | None = None
    """By default the one among the recipes that distils nothing, else one made of the first; "none" trains none."""
    controls: Sequence[str] = ()
    schedules: Sequence[str] = ()
    """Of the first recipe, which is one in stages, in the place of its own."""
    test: Path | None = None
    """A file of questions; by default those that train several times are asked the held-out rows."""
    max_questions: int | None = None
    equal: Literal["steps", "time"] = "steps"
    """What all trainings have as much of: the steps of their recipes, or the time of the one that takes most."""
    own_answers: int | None = None
    """How many held-out prompts all answer, for their teacher to read what they say."""
    tasks: Sequence[SuiteTask] = ()
    include: Sequence[str] = ()
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Candidate:
    """A row of the comparison to be: the recipes that are trained for each seed."""

    name: str
    role: str
    recipe: Recipe
    of_seed: Callable[[int], list[Recipe]]
    """Several where one is chosen by validation; what depends on a student asks for it to be trained."""
    usual: int = 0


def compare(
    recipes: Sequence[Recipe], seeds: Sequence[int], output: Path, train: Train, asked: Asked | None = None
) -> dict[str, Any]:
    """The comparison as it is written to comparison.json; eval/README.md says what each field is.

    `train` trains a recipe as `mmkd-train` does. Raises UserError for recipes that cannot be compared.
    """
    asked = asked or Asked()
    return Comparing(recipes, seeds, output, train, asked).run()


class Comparing:
    """A comparison under way."""

    def __init__(
        self, recipes: Sequence[Recipe], seeds: Sequence[int], output: Path, train: Train, asked: Asked
    ) -> None:
        self.seeds, self.output, self.asked = list(dict.fromkeys(seeds)), output, asked
        self.first, judge = recipes[0], asked.judge
        for recipe in (*recipes, *([judge] if judge else [])):
            check_recipe(recipe)
        given = scheduled(self.first, asked.schedules, output) if asked.schedules else {}
        trained = given or labelled(recipes)
        self.method = comparison_of(next((recipe for recipe in trained.values() if distils(recipe)), recipes[0]))
        several = [recipe for recipe in trained.values() if trains_several_times(recipe)]
        check_together(list(trained.values()), asked, self.method)
        if asked.equal == "time":
            check_equal_time(list(trained.values()), self.method)
        if judge is None and not several and self.method.measure is None:
            judge = None if METHODS[recipes[0].method].one_vocabulary else recipes[0]
        questions = None
        if asked.test is not None:
            questions = Questions.in_file(asked.test, asked.max_questions)
        elif several:
            questions = Questions.held_out(several[0], asked.max_questions)
        self.judge = judge
        own = self._own_answers(list(trained.values()))
        self.trainings = Trainings(output, judge, questions, bool(asked.tasks), train, own)
        self.candidates = self._candidates(trained)
        if judge is None and self.method.measure is None:
            check_reading([each.recipe for each in self.candidates if not trains_several_times(each.recipe)])
        self.progress = ComparisonProgress(output)

    def run(self) -> dict[str, Any]:
        """Trains, measures and writes."""
        rows = self._untrained_rows()
        factors = self._train_equally_long() if self.asked.equal == "time" else {}
        jobs = [(candidate, seed) for candidate in self.candidates for seed in self.seeds]
        self._begin(jobs)
        runs = [self._trained(candidate, seed) for candidate, seed in jobs]
        trained = []
        for number, candidate in enumerate(self.candidates):
            own = runs[number * len(self.seeds) :][: len(self.seeds)]
            trained.append(
                Row(candidate.name, candidate.role, candidate.recipe.name, own, [*map(self._tasks_of, own)])
            )
        order = ("baseline", "control", "student")
        rows += sorted(trained, key=lambda row: order.index(row.role))
        judge = self.judge.name if self.judge else None
        comparison = summary(rows, self.seeds, self.first.flags(), judge, self.method)
        if factors:
            comparison["steps_times"] = factors
        picture = self._plot(rows)
        if picture is not None:
            comparison["picture"] = picture.name
        write_file(self.output / NAME, to_json(comparison, indent=1) + "\n")
        write_file(self.output / PAGE, markdown(comparison))
        return comparison

    # Who is compared

    def _own_answers(self, recipes: Sequence[Recipe]) -> OwnAnswers | None:
        """Those that the judge's teacher reads, or that of the first recipe that distils."""
        if self.asked.own_answers is None:
            return None
        reader = self.judge or next(filter(distils, recipes), self.first)
        return OwnAnswers.of(reader, self.asked.own_answers, self.asked.settings)

    def _candidates(self, trained: Mapping[str, Recipe]) -> list[Candidate]:
        """Students first: what they are compared with may depend on what came of them."""
        baseline, candidates = self.asked.baseline, []
        roles = {name: "student" if distils(recipe) else "control" for name, recipe in trained.items()}
        if self.method.baseline_method is not None and not isinstance(baseline, Recipe):
            plain = next((name for name, role in roles.items() if role == "control"), None)
            roles |= {} if plain is None else {plain: "baseline"}
        for name, recipe in trained.items():
            candidates.append(Candidate(name, roles[name], recipe, lambda seed, own=recipe: [self._seeded(own, seed)]))
        student = next((name for name, role in roles.items() if role == "student"), None)
        if isinstance(baseline, Recipe):
            given = Candidate(label(baseline), "baseline", baseline, lambda seed: [self._seeded(baseline, seed)])
            candidates.append(given)
        elif baseline is None and "baseline" not in roles.values() and student is not None:
            candidates.append(self._made_baseline(trained[student]))
        for name in self.asked.controls:
            assert student is not None
            candidates.append(self._control(name, self.method.controls[name], trained[student]))
        return candidates

    def _made_baseline(self, student: Recipe) -> Candidate:
        # One that depends on what came of its student is another one for each seed.
        several = trains_several_times(student)

        def of_seed(seed: int) -> list[Recipe]:
            path = self.output / (f"{BASELINE}-seed{seed}.yaml" if several else f"{BASELINE}.yaml")
            place = self.trainings.place(self._seeded(student, seed))
            return [self._seeded(make_baseline(student, path, place), seed)]

        recipe = of_seed(self.seeds[0])[0]
        return Candidate(self.method.baseline_name or label(recipe), "baseline", recipe, of_seed)

    def _control(self, name: str, control: Control, student: Recipe) -> Candidate:
        def of_seed(seed: int) -> list[Recipe]:
            seeded = self._seeded(student, seed)
            place, own, stages = self.trainings.place(seeded), seeded, ()
            if student.in_stages:
                last = plan(seeded.with_(output_dir=str(place)))[-1]
                place, own, stages = last.folder, last.recipe, (last.name,)
            recipes = []
            for number, keys in enumerate(control.candidates(own, place)):
                path = self.output / "controls" / f"{name}-{number}-seed{seed}.yaml"
                recipes.append(self._seeded(with_keys(student, path, keys, stages), seed))
            return recipes

        return Candidate(name, "control", student, of_seed, control.usual)

    def _seeded(self, recipe: Recipe, seed: int) -> Recipe:
        return recipe.with_(**dict.fromkeys(self.method.seeds, seed))

    # Training

    def _train_equally_long(self) -> dict[str, list[float]]:
        """Gives all candidates the time of the one that takes most; by how much their steps grow.

        What a step takes is measured with the first seed, which is trained by the steps of the recipes for it.
        """

        def measured(name: str, recipe: Recipe) -> ComparedModel:
            if self.trainings.known(recipe) is None:
                self.progress.say(f"Measuring the time of a step: {name}.")
                with quiet(self.progress.log):
                    return self.trainings.get(recipe)
            return self.trainings.get(recipe)

        first = {candidate.name: candidate.of_seed(self.seeds[0]) for candidate in self.candidates}
        factors = step_factors(first, measured)
        self.candidates = [
            replace(candidate, of_seed=self._longer(number, candidate, factors[candidate.name]))
            for number, candidate in enumerate(self.candidates)
        ]
        return factors

    def _longer(self, number: int, candidate: Candidate, factors: Sequence[float]) -> Callable[[int], list[Recipe]]:
        def of_seed(seed: int) -> list[Recipe]:
            place = self.output / "equal_time"
            return [
                longer(recipe, factor, place / f"{number}-{choice}-seed{seed}.yaml")
                for choice, (recipe, factor) in enumerate(zip(candidate.of_seed(seed), factors, strict=True))
            ]

        return of_seed

    def _begin(self, jobs: Sequence[tuple[Candidate, int]]) -> None:
        recipes = [_recipes(candidate, seed) for candidate, seed in jobs]
        finished = sum(bool(own) and all(map(self.trainings.known, own)) for own in recipes)
        steps = [steps_of(each.recipe) * max(1, len(own)) for (each, _), own in zip(jobs, recipes, strict=True)]
        self.progress.begin(steps, finished)

    def _trained(self, candidate: Candidate, seed: int) -> ComparedModel:
        """The training of a seed, of several candidates the chosen one."""
        recipes, name = candidate.of_seed(seed), f"{candidate.name}, seed {seed}"
        known = all(self.trainings.known(recipe) for recipe in recipes)
        with nullcontext() if known else self.progress.running(name):
            models = [self.trainings.get(recipe) for recipe in recipes]
        model = chosen(models, candidate.usual, self.method.metrics)
        seconds = [each.cost["seconds"] for each in models if each.cost is not None]
        self.progress.count(sum(seconds) if seconds else None)
        if not known:
            self.progress.say(f"{name}: {first_of(model, self.method)}, {readable_time(sum(seconds))}")
        return model

    def _untrained_rows(self) -> list[Row]:
        """The teacher, and the student before training where it can be asked."""
        first = self.judge or self.first
        rows = []
        if has_view(first):
            self.progress.say(
                "The teacher is left out of the tables: it reads its teacher_view, and the students' questions do not "
                "show that."
            )
        elif teacher_of(first) is not None:
            rows.append(self._row("teacher", "teacher", first))
        if not trains_several_times(first) and self.method.measure is None:
            rows.append(self._row("student, untrained", "untrained", self.judge or self.first))
        return rows

    def _row(self, name: str, stage: str, recipe: Recipe) -> Row:
        if self.trainings.known(recipe, stage) is None:
            self.progress.say(f"Measuring: {name}.")
            with quiet(self.progress.log):
                self.trainings.get(recipe, stage)
        run = self.trainings.get(recipe, stage)
        return Row(name, stage, recipe.name, [run], [self._tasks_of(run)])

    def _tasks_of(self, run: ComparedModel) -> list[dict[str, Any]]:
        asked = self.asked
        if not asked.tasks:
            return []
        return evaluate(find_model(run.folder), asked.tasks, asked.settings, include=asked.include)

    def _plot(self, rows: Sequence[Row]) -> Path | None:
        if self.method.plot is None:
            return None
        if importlib.util.find_spec("matplotlib") is None:
            self.progress.say("No picture is drawn without matplotlib: pip install 'mmkd[plot]'.")
            return None
        folders = {
            row.name: [Path(run.folder) for run in row.runs] for row in rows if row.role in ("student", "control")
        }
        return self.method.plot(folders, self.output)


def labelled(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """The recipes by a name of their own."""
    by_label: dict[str, Recipe] = {}
    for recipe in recipes:
        names = [label(recipe), f"{recipe.method}, {recipe.name}", *(f"{label(recipe)} ({n})" for n in range(2, 100))]
        by_label[next(name for name in names if name not in by_label)] = recipe
    return by_label


def chosen(models: Sequence[ComparedModel], usual: int, metrics: Mapping[str, Metric]) -> ComparedModel:
    """Of several candidates the one that validation prefers; each metric is that of the candidate chosen for it."""
    if len(models) == 1:
        return models[0]

    def best(by: str | None) -> ComparedModel:
        if by is None or any(by not in model.metrics for model in models):
            return models[usual]
        # max() keeps the first of equals.
        return max(models, key=lambda model: model.metrics[by])

    main = best(next((metric.chosen_by for metric in metrics.values()), None))
    own = {name: best(metrics[name].chosen_by).metrics[name] for name in main.metrics if name in metrics}
    return replace(main, metrics={**main.metrics, **own})


def _recipes(candidate: Candidate, seed: int) -> list[Recipe]:
    """The recipes of a row's seed; none that could be finished where its student is not trained yet."""
    try:
        return candidate.of_seed(seed)
    except (UserError, OSError):
        return []
