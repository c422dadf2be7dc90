"""The answers to `aspects` of a recipe of classes: who gives them, and where they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from mmkd.cache.identity import weights_sha256
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.models.load import computed_dtype, load_model
from mmkd.recipe.recipe import Run
from mmkd.teachers.aspects import (
    AspectTeacher,
    LocalAspects,
    ServedAspects,
    ask_for_questions,
    build_aspects,
    has_aspects,
    read_aspects,
)
from mmkd.teachers.chat_api import ChatClient
from mmkd.teachers.class_logits import rows_digest

from .class_run import Classes, load_classes, settings_of


def aspects_folder(run: Run) -> Path:
    """Where the answers of a run are, or will be."""
    training = settings_of(run)
    return Path(training.aspects_cache or Path(training.output_dir or ".") / "aspects")


def build_class_aspects(run: Run) -> Path:
    """Writes the answers about all training rows; the folder. Questions that are to be written come first.

    Raises UserError for a recipe that names no questions, or nobody to answer them.
    """
    training = settings_of(run)
    if training.aspects is None:
        raise UserError("job: aspects needs `aspects`: the questions, as a list or a file with one a line.")
    classes = load_classes(run)
    with _answering(run) as teacher:
        if training.lacks_questions:
            assert isinstance(teacher, ServedAspects)
            assert training.aspects_count is not None
            questions = ask_for_questions(teacher.client, classes.data.class_names, training.aspects_count)
            write_file(Path(str(training.aspects)), "\n".join(questions) + "\n")
        _build(run, classes, teacher)
    return aspects_folder(run)


def cached_aspects(run: Run, classes: Classes) -> Float[Tensor, "row question"]:
    """The answers about every training row, from the cache or asked for and written there."""
    training, rows, folder = settings_of(run), classes.rows, aspects_folder(run)
    if classes.is_text:
        raise UserError("aspects are questions about images, and the rows are texts. Remove them.", because="meaning")
    asks = training.aspects_model is not None or training.aspects_server is not None
    # One rank asks, the others read what it wrote.
    with training.main_process_first(desc="aspects"):
        if asks and not has_aspects(folder, len(rows)):
            with _answering(run) as teacher:
                _build(run, classes, teacher)
    return read_aspects(folder, len(rows), training.questions, rows_digest(rows.content, len(rows)))


def _build(run: Run, classes: Classes, teacher: AspectTeacher) -> None:
    rows = classes.rows
    digest = rows_digest(rows.content, len(rows))
    build_aspects(aspects_folder(run), teacher, rows.raw, len(rows), settings_of(run).questions, digest)


@contextmanager
def _answering(run: Run) -> Iterator[AspectTeacher]:
    """Who answers. Raises UserError where the recipe names nobody."""
    training = settings_of(run)
    if training.aspects_server is not None:
        named = training.aspects_server_model
        with ChatClient([training.aspects_server], named, model_key="aspects_server_model") as client:
            yield ServedAspects(client)
        return
    name = training.aspects_model
    if name is None:
        raise UserError("Nobody answers aspects: set aspects_model (a Hub id or a folder) or aspects_server (a URL).")
    hub: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    dtype = computed_dtype("auto", AutoConfig.from_pretrained(name, **hub), training.device)
    model: Any = load_model(name, "aspects_model", dtype=dtype, **hub)
    yield LocalAspects(
        model.to(training.device), AutoProcessor.from_pretrained(name, **hub), weights_sha256(name, None)
    )
