"""What mmkd borrows of accelerate beyond its documentation."""

import argparse
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model


def forget_prepared(accelerator: Accelerator, model: Any) -> None:
    """Has accelerate prepare a model anew, which it would leave alone for having prepared it before.

    `free_memory` forgets all models and optimizers at once.
    """
    accelerator._models = [prepared for prepared in accelerator._models if prepared is not model]
    model._is_accelerate_prepared = False


def count_ranks_as_gpus() -> None:
    """Tells accelerate, before its state is complete, that its CPU ranks are GPUs, where alone it offers FSDP."""
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def shard_by_fsdp2(accelerator: Accelerator, model: Any) -> Any:
    """The model cut into shards as accelerate cuts a trained one: `prepare` takes no second model under FSDP2."""
    return fsdp2_prepare_model(accelerator, model)


def has_no_embeddings(model: Any) -> None:
    """Has accelerate cut a model of two towers for FSDP2: it asks for the embeddings, which raises an error there."""
    model.get_input_embeddings = model.get_output_embeddings = lambda: None


def launch_actions() -> list[argparse.Action]:
    """The options of `accelerate launch`, of which there is no list but that of its parser, which is private."""
    return [action for action in launch_command_parser()._actions if action.option_strings]


def parsed_launch(words: list[str]) -> Any:
    """What `accelerate launch` reads of its command line."""
    return launch_command_parser().parse_args(words)


def launch(parsed: Any) -> None:
    """`accelerate launch` in this process, so that its errors are exceptions and not a status."""
    launch_command(parsed)
