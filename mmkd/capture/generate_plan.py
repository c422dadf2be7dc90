"""The plan of a cache of answers, from a recipe. Only who would answer is asked what it is."""

from typing import Any

from datasets import Dataset, Features, List, Value

from mmkd.data.data_recipe import OUTPUT_COLUMNS
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.preparation.row_views import RowView
from mmkd.recipe.cache_arguments import CacheArguments
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import load_rows_of
from mmkd.recipe.run_models import teacher_processing_class
from mmkd.training.preparing import preparation_of

from .answer_verdicts import check_gold_column
from .answering import api_teacher
from .build_plan import folder_of, manifest_of
from .captured_teacher import described_teacher
from .generate import GeneratePlan


def make_generate_plan(run: Run) -> GeneratePlan:
    """The plan of a cache of answers. Raises UserError for data without prompts and settings that cannot be."""
    settings, arguments = run.arguments, run.cache
    check_answerer(run)
    view = run.training.view
    told = view and RowView(view, run.training.privileged_dropout, run.training.seed)
    data = load_rows_of(run, arguments.read_columns)
    columns = data["train"].column_names
    if "text" in columns:
        raise UserError(
            f"The data {settings.data!r} is plain text without prompts, so there is nothing to answer. Map its "
            "columns to prompt (and completion), or to messages.",
            because="meaning",
        )
    check_gold_column(columns, arguments.cache_gold_column)
    if view is not None:
        view.check(columns, "train")
    if settings.teacher_api is not None:
        processing_class, teacher = None, api_teacher(run)
        rendering: dict[str, Any] = dict.fromkeys(("tokenizer", "chat_template", "image_processor"))
    else:
        processing_class = teacher_processing_class(run)
        # vLLM has to have room for prompt and answer; how long prompts are is not known before they are rendered.
        teacher = described_teacher(run, tokenizer_of(processing_class), 0, arguments.cache_max_new_tokens)
        facts = preparation_of(processing_class, run.training)
        rendering = {name: facts[name] for name in ("tokenizer", "chat_template", "image_processor")}
    if told is not None:
        rendering["teacher_view"] = told.facts
    rows = {str(split): len(dataset) for split, dataset in data.items()}
    # Answers stay what they are when they are verified by another column.
    read = () if view is None else view.reads
    asked = data.remove_columns(
        [name for name in arguments.read_columns if name not in read and name not in OUTPUT_COLUMNS]
    )
    described = {"signal": {"kind": "text"}, "preparation": rendering, "sampling": _sampling(arguments)}
    manifest = manifest_of(run, teacher, asked, rows, **described)
    features = _features(data["train"], budgeted=arguments.cache_max_think_tokens is not None)
    plan = GeneratePlan(run, folder_of(run), manifest, features, data, processing_class, told)
    # A verifier that cannot be made, or a judge that is not there, is told before hours of generation.
    plan.files()
    return plan


def check_answerer(run: Run) -> None:
    """Raises UserError where nobody is named who answers, and without a folder to write."""
    settings = run.arguments
    if (settings.teacher is None and settings.teacher_api is None) or settings.teacher_cache is None:
        raise UserError(
            "Generating needs `teacher` (who answers; with teacher_server too) or `teacher_api`, and `teacher_cache` "
            "(the folder to write)."
        )
    if settings.teacher_api is None:
        return
    if run.cache.cache_max_think_tokens is not None:
        raise UserError(
            "cache_max_think_tokens ends thoughts within the teacher's tokens, which a chat API does not take. Use a "
            "local teacher or vLLM (teacher_server), or limit thoughts with the API's own settings.",
            because="upstream",
        )


def _sampling(arguments: CacheArguments) -> dict[str, Any]:
    """What a manifest says of how answers are drawn."""
    budget = arguments.cache_max_think_tokens
    return {
        "samples": arguments.cache_samples,
        "max_new_tokens": arguments.cache_max_new_tokens,
        "temperature": arguments.cache_temperature,
        "top_p": arguments.cache_top_p,
        "seed": arguments.cache_seed,
        **({} if budget is None else {"max_think_tokens": budget}),
    }


def _features(data: Dataset, budgeted: bool = False) -> Features:
    prompt = data.features["prompt" if "prompt" in data.column_names else "messages"]
    others = {name: data.features[name] for name in ("images", "tools") if name in data.column_names}
    message = {"role": Value("string"), "content": Value("string")}
    return Features(
        {
            "key": Value("binary"),
            "tokens": Value("int32"),
            "crc32": Value("uint32"),
            "prompt": prompt,
            "completion": prompt if isinstance(prompt, Value) else List(message),
            **others,
            "sample": Value("int32"),
            "finish_reason": Value("string"),
            **({"thoughts_cut": Value("bool")} if budgeted else {}),
        }
    )
