# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A script as somebody writes who has the installed mmkd in an editor: it type-checks, and its mistakes do not."""

from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]
from peft import LoraConfig

from mmkd import (
    ALMConfig,
    ALMTrainer,
    CachedTeacher,
    KDConfig,
    KDTrainer,
    ServerTeacher,
    SeveralTeachers,
    TAIDConfig,
    TAIDTrainer,
    UserError,
)


def distil(rows: Dataset) -> float:
    """The parameters by name, evaluation on rows by name, and an adapter."""
    args = KDConfig(output_dir="student", divergence="jsd", beta=0.1, max_steps=10)
    trainer = KDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        teacher="Qwen/Qwen2.5-7B-Instruct",
        args=args,
        train_dataset=rows,
        eval_dataset={"held_out": rows},
        peft_config=LoraConfig(r=8),
    )
    try:
        result = trainer.train(resume_from_checkpoint=True)
    except UserError as error:
        raise SystemExit(str(error)) from error
    trainer.save_model("student")
    return result.training_loss + trainer.evaluate()["eval_kl"]


def other_teachers(rows: Dataset) -> None:
    """The parameters by position, and teachers of every kind."""
    TAIDTrainer("student", CachedTeacher("cache"), TAIDConfig(output_dir="taid", t_start=0.2), rows).train()
    both = SeveralTeachers({"code": "coder", "chat": ServerTeacher("http://localhost:8000")})
    KDTrainer("student", both, KDConfig(output_dir="several"), rows).train()
    ALMTrainer(model="student", teacher="teacher", args=ALMConfig(output_dir="alm")).train()


def mistakes(rows: Dataset) -> None:
    """What an editor underlines."""
    KDTrainer("student", "teacher", train_data=rows)  # pyright: ignore[reportCallIssue]
    KDTrainer("student", "teacher", {"output_dir": "student"})  # pyright: ignore[reportArgumentType]
    KDConfig(output_dir="student", divergance="jsd")  # pyright: ignore[reportCallIssue]
