"""Who plays teacher, assessor, augmentor and student in a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmkd.cache.identity import weights_sha256
from mmkd.errors import UserError
from mmkd.generation.generator import Sampling
from mmkd.models.load import computed_dtype, load_model, load_processing_class
from mmkd.precision import name_of_dtype
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_models import load_teacher
from mmkd.recipe.run_teacher import teacher_identity

from .assess import AgreementAssessor, Assessor, JudgeAssessor, LikelihoodAssessor, ReferenceAssessor
from .augment import Augmentor, ModelAugmentor, RandomAugmentor, TemplateAugmentor, picker
from .comd_engines import ChatServer, LocalEngine
from .comd_prompts import Prompts
from .comd_trainer import CoMDConfig
from .instructions import ImageStore, Instruction
from .reply_record import Engine, Record, engine_key
from .similar import SimilarImages


class Roles:
    """The engines of a run; nothing is loaded or connected before it is asked.

    The teacher plays every role that names nobody else. Raises UserError for a run without a teacher.
    """

    def __init__(self, run: Run):
        arguments, training = run.arguments, run.training
        assert isinstance(training, CoMDConfig)
        if arguments.teacher is None and arguments.teacher_server is None:
            raise UserError(
                "comd needs a teacher that answers: set `teacher` to a Hub id or a folder, or teacher_server to the "
                "URLs of chat servers."
            )
        if arguments.teacher_cache is not None:
            raise UserError(
                "comd's teacher answers instructions that are not known before, so it cannot be a teacher_cache. Set "
                "`teacher` or teacher_server; round_cache: true keeps its distributions on disk, round by round.",
                because="meaning",
            )
        self.run, self.training = run, training
        self.taught: Path | None = None
        """The teacher after lessons of the student, where it had some."""
        self.teacher = self._teacher()
        self._teachers = [engine_key(self.teacher)]
        self.assessor = self._role("assessor")
        self.augmentor = self._role("augmentor")

    def close(self) -> None:
        """Gives back all memory and connections."""
        for engine in (self.teacher, self.assessor, self.augmentor):
            engine.close()

    def checkpoint(self, folder: Path) -> LocalEngine:
        """A model that was trained in this run."""
        return self._local("The student", str(folder), {"weights": weights_sha256(str(folder))})

    def teacher_tokens(self, record: Record) -> int:
        """Tokens that the teacher has generated in all its roles, before and after lessons."""
        return sum(record.spent[key] for key in self._teachers)

    def replace_teacher(self, folder: Path) -> None:
        """Puts another checkpoint in the teacher's place, also where it plays other roles."""
        engine = self.checkpoint(folder)
        self._teachers.append(engine_key(engine))
        self.taught = folder
        self.assessor, self.augmentor = (
            engine if role is self.teacher else role for role in (self.assessor, self.augmentor)
        )
        self.teacher.close()
        self.teacher = engine

    def make_assessor(self, record: Record, prompts: Prompts, student: Engine) -> Assessor:
        """The assessor of the run's settings, for a student."""
        training = self.training
        if training.assessor == "judge":
            sampling = Sampling(training.judge_max_new_tokens, training.judge_temperature, seed=training.seed)
            return JudgeAssessor(record, self.assessor, prompts, sampling, training.assessor_tries - 1)
        if training.assessor == "likelihood":
            return LikelihoodAssessor(record, self.teacher, student)
        return AgreementAssessor() if training.assessor == "agreement" else ReferenceAssessor(training.assessor)

    def make_augmentor(
        self,
        record: Record,
        prompts: Prompts,
        pool: Sequence[Instruction],
        store: ImageStore,
        similar: SimilarImages,
    ) -> Augmentor:
        """The augmentor of the run's settings, for a pool."""
        training = self.training
        pick = picker(training.new_image == "parent", similar, training.seed)
        if training.augmentor == "templates":
            return TemplateAugmentor(pool, store, pick, training.type_words, training.seed)
        if training.augmentor == "random":
            return RandomAugmentor(pool, store, training.seed)
        sampling = Sampling(training.augment_max_new_tokens, training.augment_temperature, seed=training.seed)
        return ModelAugmentor(record, self.augmentor, prompts, sampling, store, pick)

    def _teacher(self) -> Engine:
        arguments = self.run.arguments
        if arguments.teacher_server is not None:
            return self._server(arguments.teacher_server, arguments.teacher_server_model, arguments.teacher)
        name = arguments.teacher
        assert name is not None
        facts = teacher_identity(self.run)
        config = AutoConfig.from_pretrained(name, **self.run.hub(arguments.teacher_revision))
        dtype = computed_dtype(arguments.teacher_dtype, config, self.training.device)
        how: dict[str, Any] = {"dtype": name_of_dtype(dtype)}
        how |= {"quantised": 4 if arguments.teacher_load_in_4bit else 8 if arguments.teacher_load_in_8bit else None}
        return self._local(
            "The teacher", name, {"weights": facts["weights"], **how}, lambda: load_teacher(self.run, name)
        )

    def _role(self, role: str) -> Engine:
        urls = getattr(self.training, f"{role}_server")
        name, served = getattr(self.training, f"{role}_model"), getattr(self.training, f"{role}_server_model")
        if urls is not None:
            return self._server(urls, served, name or role)
        if served is not None:
            raise UserError(
                f"{role}_server_model is set without {role}_server: give the URLs of its servers.", because="meaning"
            )
        if name is None:
            return self.teacher
        return self._local(f"The {role}", name, {"weights": weights_sha256(name)})

    def _server(self, urls: list[str], model: str | None, name: str | None) -> ChatServer:
        arguments = self.run.arguments
        return ChatServer(urls, model, name, arguments.teacher_concurrency, arguments.teacher_timeout)

    def _local(
        self, title: str, name: str, identity: Mapping[str, Any], load: Callable[[], Any] | None = None
    ) -> LocalEngine:
        hub = self.run.hub(self.run.arguments.teacher_revision if title == "The teacher" else None)
        where = {"device": self.training.device, "trust_remote_code": hub["trust_remote_code"]}
        make = load or (lambda: load_model(name, title.split()[-1], **where))
        return LocalEngine(
            f"{title} {name!r}",
            identity,
            lambda: (make(), load_processing_class(name, title.split()[-1], **hub)),
            self.training.generation_batch_size,
        )
