"""What a key that does not exist may have been meant to be."""

import difflib
from collections.abc import Collection

# What TRL's scripts and trainers call keys of ours whose names are too unlike theirs to be found by spelling.
_NAMES_ELSEWHERE = {name: "student" for name in ("model", "model_name_or_path", "student_model")}
_NAMES_ELSEWHERE |= {name: "teacher" for name in ("teacher_model", "teacher_model_name_or_path")}
_NAMES_ELSEWHERE |= {name: "data" for name in ("dataset", "dataset_name", "train_dataset")}

# Keys that a release had and none has any more.
_REMOVED = {
    "kernel": "mmkd 0.1 had it, to compute the loss by Liger or TRL. Remove the key: mmkd's own loss, which was the "
    "default, is the only one now."
}

_QUANTISATION = "student_quantization"


def hint_at(word: object, choices: Collection[str]) -> str:
    """A hint at the key that may be meant by a word, which may be a number in YAML."""
    word = str(word)
    if word in _REMOVED:
        return f" {_REMOVED[word]}"
    if word.startswith(_QUANTISATION) and _QUANTISATION not in choices:
        return (
            " Methods over tokens have it (kd, sft, taid, alm, llava_kd): what the others train is not exported in "
            "such a format. Remove the key."
        )
    if _NAMES_ELSEWHERE.get(word) in choices:
        return f" Here it is {_NAMES_ELSEWHERE[word]!r}."
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else " `mmkd-train --help_keys WORD` finds keys."
