"""Who replies: a transformers model in this process, or any server that speaks OpenAI's chat protocol."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import release_memory
from transformers import PreTrainedModel, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from mmkd.capture.scoring import score_labels
from mmkd.errors import UserError
from mmkd.generation.generator import Prompt, RowError, Sampling
from mmkd.generation.local_generation import LocalGenerator, on_device, prompt_inputs, seed_of, together
from mmkd.models.backbone import allow_consumers
from mmkd.models.load import positions_of, tokenizer_of
from mmkd.teachers.chat_api import Chat, ChatClient, ChatReply
from mmkd.teachers.signals import DenseSignal

from .instructions import answered, open_image
from .reply_record import Engine, Question, Reply


class LocalEngine(Engine):
    """A model in this process, which reads questions of like length together, `batch_size` at a time.

    `load` gives the model and its tokenizer or processor. Raises UserError for a question with images to a model that
    reads text only, and for a model without a chat template.
    """

    def __init__(
        self,
        name: str,
        identity: Mapping[str, Any],
        load: Callable[[], tuple[PreTrainedModel, Any]],
        batch_size: int,
    ):
        self.name, self.identity = name, identity
        self._load, self._batch_size = load, batch_size
        self._loaded: LocalGenerator[Prompt] | None = None
        self._scores = False

    def close(self) -> None:
        self._loaded, self._scores = None, False
        release_memory()

    def replies(self, questions: Sequence[Question], sampling: Sampling) -> Iterator[list[tuple[int, Reply]]]:
        generator = self._generator()
        # Rows with and without images are not read together; the longest first, so that memory runs out at once.
        order = sorted(
            range(len(questions)), key=lambda place: (not questions[place].images, -_length(questions[place]))
        )
        size = self._batch_size if generator.tokenizer.pad_token_id is not None else 1
        while order:
            batch = [
                place for place in order[:size] if bool(questions[place].images) == bool(questions[order[0]].images)
            ]
            order = order[len(batch) :]
            asked = [questions[place] for place in batch]
            start = time.perf_counter()
            scored = asked[0].answer is not None
            replies = self._scored(generator, asked) if scored else self._generated(generator, asked, sampling)
            seconds = (time.perf_counter() - start) / len(batch)
            yield [(place, replace(reply, seconds=seconds)) for place, reply in zip(batch, replies, strict=True)]

    def _generator(self) -> LocalGenerator[Prompt]:
        if self._loaded is None:
            model, processing_class = self._load()
            if processing_class.chat_template is None:
                raise UserError(
                    f"{self.name} is asked through messages, but it has no chat template. Use an instruct model, or "
                    "save a template with its tokenizer."
                )
            inputs = partial(prompt_inputs, processing_class)
            self._loaded = LocalGenerator(on_device(model).eval(), processing_class, inputs, together)
        return self._loaded

    def _generated(self, generator: LocalGenerator[Prompt], asked: list[Question], sampling: Sampling) -> list[Reply]:
        prompts = [self._prompt(generator, question) for question in asked]
        positions = positions_of(generator.model.config)
        longest = max(len(prompt.ids) for prompt in prompts)
        if positions is not None and longest + sampling.max_new_tokens > positions:
            raise UserError(
                f"{self.name}: a question has {longest} tokens and may be answered in {sampling.max_new_tokens}, "
                f"but the model has room for {positions}. Lower answer_max_new_tokens, or filter long rows out."
            )
        replies = []
        for answers in generator.generate(prompts, replace(sampling, seed=_seed(sampling.seed, asked))):
            assert not isinstance(answers, RowError), "a model in this process refuses nothing"
            replies.append(Reply(answers[0].text.strip(), len(answers[0].ids), answers[0].finish_reason, 0.0))
        return replies

    @torch.no_grad()
    def _scored(self, generator: LocalGenerator[Prompt], asked: list[Question]) -> list[Reply]:
        """How likely the model finds each given answer and its end."""
        model: Any = generator.model
        tokenizer: Any = generator.tokenizer
        if not self._scores:
            allow_consumers(model)
            self._scores = True
        inputs = generator.read([self._prompt(generator, question) for question in asked])
        answers = [self._answer_ids(generator, question) for question in asked]
        ids, longest = inputs["input_ids"], max(map(len, answers))
        tail = torch.full((len(asked), longest), tokenizer.pad_token_id or 0, device=ids.device)
        real = torch.zeros_like(tail, dtype=torch.bool)
        for row, answer in enumerate(answers):
            tail[row, : len(answer)] = torch.tensor(answer, device=ids.device)
            real[row, : len(answer)] = True
        # Whatever else says something of each token says nothing of an answer's.
        for name, value in list(inputs.items()):
            if isinstance(value, torch.Tensor) and value.shape == ids.shape:
                more = {"input_ids": tail, "attention_mask": real.to(value.dtype)}.get(name, torch.zeros_like(tail))
                inputs[name] = torch.cat([value, more.to(value.dtype)], 1)
        start = ids.shape[1] - 1

        def read(hidden: torch.Tensor, head: Any) -> Any:
            return score_labels(DenseSignal(hidden[:, start:-1][real], head), tail[real]).log_probs[:, 0]

        values = model(**inputs, consumer=read)
        replies, first = [], 0
        for answer in answers:
            total = float(values[first : first + len(answer)].sum())
            first += len(answer)
            replies.append(Reply("", len(answer), "stop", 0.0, total))
        return replies

    def _prompt(self, generator: LocalGenerator[Prompt], question: Question) -> Prompt:
        processing_class: Any = generator.processing_class
        messages = [dict(message) for message in question.messages]
        if question.images:
            if not isinstance(processing_class, ProcessorMixin):
                raise UserError(
                    f"A question has images, but {self.name} reads text only. Use a vision-language model in its "
                    "role.",
                    because="meaning",
                )
            images = [open_image(path) for path in question.images]
            return Prompt((), prepare_multimodal_messages(messages, images=images), images)
        if isinstance(processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages, images=[])
        output: Any = processing_class.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = output["input_ids"]
        return Prompt(ids[0] if isinstance(ids[0], list) else ids)

    def _answer_ids(self, generator: LocalGenerator[Prompt], question: Question) -> list[int]:
        """The tokens of the answer as the chat template writes it after the prompt."""
        assert question.answer is not None
        template: Any = generator.processing_class
        before = template.apply_chat_template(list(question.messages), add_generation_prompt=True, tokenize=False)
        whole = template.apply_chat_template(answered(question.messages, question.answer), tokenize=False)
        text = whole[len(before) :] if whole.startswith(before) else question.answer
        return list(tokenizer_of(template)(text, add_special_tokens=False)["input_ids"])


class ChatServer(Engine):
    """Any server of OpenAI's chat protocol (vLLM, SGLang, llama.cpp, ...), several URLs of one model taking turns.

    The key is the environment's VLLM_API_KEY, or OPENAI_API_KEY. Raises UserError when nobody answers, when
    permission is refused, and when the servers offer several models and `model` names none of them. `name` is what
    the record calls a model that is not named.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        name: str | None,
        concurrency: int,
        timeout: float,
        retries: int = 6,
    ):
        # Where a server stands decides nothing: replies are found again when it has moved.
        self.identity = {"served": model or name}
        self._urls, self._settings = urls, {"concurrency": concurrency, "timeout": timeout, "retries": retries}
        self._model = model
        self._client: ChatClient | None = None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def replies(self, questions: Sequence[Question], sampling: Sampling) -> Iterator[list[tuple[int, Reply]]]:
        if any(question.answer is not None for question in questions):
            raise UserError(
                "assessor: likelihood needs the log-probs of a model in this process. Give the teacher as a folder or "
                "Hub id without teacher_server, or choose another assessor.",
                because="not built",
            )
        if self._client is None:
            role = "teacher_server_model, assessor_server_model or augmentor_server_model"
            keys = ("VLLM_API_KEY", "OPENAI_API_KEY")
            self._client = ChatClient(self._urls, self._model, key_names=keys, model_key=role, **self._settings)
        body = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        chats = (
            Chat(
                question.messages,
                [open_image(path) for path in question.images],
                _seed(sampling.seed, [question]),
            )
            for question in questions
        )
        begun = time.perf_counter()
        for place, answer in self._client.each(chats, body):
            # Many requests are under way at a time: their own times would count one second several times.
            now = time.perf_counter()
            yield [(place, _reply(answer, now - begun))]
            begun = now


def _reply(answer: ChatReply | RowError, seconds: float) -> Reply:
    if isinstance(answer, RowError):
        return Reply("", 0, f"refused: {answer.reason}", seconds)
    return Reply(answer.text.strip(), answer.completion_tokens, answer.finish_reason, seconds)


def _length(question: Question) -> int:
    characters = sum(len(str(message["content"])) for message in question.messages)
    return characters + len(question.answer or "")


def _seed(seed: int, asked: list[Question]) -> int:
    return seed_of(f"{seed} {[(question.messages[-1], question.digests, question.sample) for question in asked]}")
