"""Caches on a Hub: pushed by the real client to a loopback server, pulled, trained from; and what is refused."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Features, Image, List, Value, load_from_disk

from mmkd.cache.cache_card import HUB_LICENSE, hub_license
from mmkd.cache.hub import local_cache, push_cache
from mmkd.cache.manifest import Manifest, Skipped
from mmkd.cache.side_files import TOKEN_ORDER
from mmkd.cache.store import LOG, Cache, CacheWriter, shard_path
from mmkd.data.load_data import load_data
from mmkd.methods.clip_kd.clip_config import ContrastiveKDConfig
from mmkd.methods.clip_kd.pair_inputs import pair_rows
from mmkd.teachers.cached_encoder import CachedEncoder
from scripts.make_tiny_models import sentences
from tests.classes import NAMES, pixels, vit
from tests.forked import ForkServer, run_forked
from tests.helpers import environment
from tests.hub_server import LoopbackHub, loopback_hub
from tests.pairs import cached_teacher, captioned

REPO = "user/words"
READ_ON_IMPORT = {"HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"}

# Each call is [function of mmkd.cache.hub, arguments, keywords]; says for each what it returned or refused.
DRIVER = """
import json, os, sys
import mmkd.cache.hub
from mmkd.errors import UserError
mmkd.cache.hub.FILE_BYTES = int(os.environ.get("FILE_BYTES", mmkd.cache.hub.FILE_BYTES))
said = []
for name, arguments, keywords in json.loads(sys.argv[1]):
    try:
        said.append(str(getattr(mmkd.cache.hub, name)(*arguments, **keywords)))
    except UserError as error:
        said.append(f"refused: {error}")
print(json.dumps(said))
"""

LOAD = """
import json, sys
from datasets import load_dataset
found = load_dataset(sys.argv[1])
print(json.dumps({split: [found[split].column_names, found[split]["tokens"][:]] for split in found}))
"""

MODELS = """
import json, sys, tempfile
from huggingface_hub import HfApi, ModelCard, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
model.push_to_hub("user/student", private=True)
tokenizer.push_to_hub("user/student")
ModelCard("---\\nlicense: mit\\n---\\n# Student").push_to_hub("user/student")
again = AutoModelForCausalLM.from_pretrained("user/student")
api = HfApi()
with tempfile.TemporaryDirectory() as folder:
    open(f"{folder}/eval.json", "w").write("{}")
    api.upload_folder(folder_path=folder, path_in_repo="results", repo_id="user/student")
print(json.dumps({
    "user": api.whoami()["name"],
    "equal": all((a == b).all().item() for a, b in zip(model.parameters(), again.parameters())),
    "template": AutoTokenizer.from_pretrained("user/student").chat_template == tokenizer.chat_template,
    "exists": [api.file_exists("user/student", name) for name in ("results/eval.json", "nothing.txt")],
    "private": api.model_info("user/student").private,
    "listed": len(api.list_repo_files("user/student")),
    "license": ModelCard.load("user/student").data.license,
    "snapshot": snapshot_download("user/student", allow_patterns="results/*"),
}))
"""

DUAL_HEAD = """
import json, sys, numpy
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
import mmkd
model, processor = (
    auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForImageClassification, AutoImageProcessor)
)
for part in (model, processor):
    part.push_to_hub("user/classifier")
again = AutoModelForImageClassification.from_pretrained("user/classifier")
classify = pipeline("image-classification", model="user/classifier")
print(json.dumps({
    "class": type(again).__name__,
    "equal": all((a == b).all().item() for a, b in zip(model.parameters(), again.parameters(), strict=True)),
    "alpha": again.config.alpha,
    "labels": sorted(found["label"] for found in classify(Image.new("RGB", (9, 9), "red"))),
}))
"""

Client = Callable[..., Any]


@pytest.fixture(scope="module")
def workplace(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `recipe.yaml` and the `cache` that `mmkd cache build` made of it."""
    folder = tmp_path_factory.mktemp("workplace")
    for split, seed in (("train", 0), ("eval", 1)):
        rows = [json.dumps({"text": text}) for text in sentences(32, seed=seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    files = {"train": "train.jsonl", "eval": "eval.jsonl"}
    data |= {"data_files": files, "splits": {split: split for split in files}}
    (folder / "words.yaml").write_text(yaml.safe_dump(data))
    recipe = {"method": "kd", "data": "words.yaml", "teacher_cache": "cache", "max_steps": 4, "learning_rate": 1e-2}
    recipe |= {"student": str(tiny["student"]), "teacher": str(tiny["teacher"]), "output_dir": "run", "bf16": False}
    recipe |= {"teacher_top_k": 8, "cache_tail_draws": 4, "cache_shard_rows": 10, "per_device_train_batch_size": 4}
    recipe |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run_forked(["-m", "mmkd.commands.main", "cache", "build", "recipe.yaml"], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def cache(workplace: Path, tmp_path: Path) -> Path:
    """A copy of the cache to break."""
    return shutil.copytree(workplace / "cache", tmp_path / "cache")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where processes of the Hub keep what they fetch."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub_of_all() -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(hub_of_all: LoopbackHub, home: Path) -> Iterator[ForkServer]:
    """Forks processes of the Hub; where it is, its client reads when it is imported."""
    server = ForkServer(hub_of_all.environment(home))
    yield server
    server.close()


@pytest.fixture
def hub(hub_of_all: LoopbackHub, home: Path) -> LoopbackHub:
    """A Hub on which there is nothing, and nothing of which was fetched."""
    hub_of_all.forget()
    shutil.rmtree(home)
    home.mkdir()
    return hub_of_all


@pytest.fixture
def client(hub: LoopbackHub, server: ForkServer, home: Path, tmp_path: Path) -> Client:
    """`client(call, ...)` runs calls of mmkd.cache.hub in a process of this Hub; keywords add to its environment."""

    def call(*calls: tuple[Any, ...], code: str = DRIVER, **variables: str) -> Any:
        argument = code == DRIVER and json.dumps([[name, a, k[0] if k else {}] for name, a, *k in calls])
        arguments = ["-c", code, *([argument] if argument else [str(value) for value in calls])]
        if READ_ON_IMPORT & variables.keys():
            done = run(arguments, tmp_path, {**hub.environment(home), **variables})
        else:
            done = run_forked(arguments, tmp_path, variables, server)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    return call


def run(arguments: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def push(folder: Path, repo_id: str = REPO, **keywords: Any) -> tuple[Any, ...]:
    return "push_cache", [str(folder), repo_id], keywords


def pull(name: str = REPO, **keywords: Any) -> tuple[Any, ...]:
    return "local_cache", [name], keywords


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def changed(content: bytes) -> bytes:
    """A good Parquet file with other rows."""
    table, sink = pq.read_table(io.BytesIO(content)), io.BytesIO()
    table = table.set_column(1, table.field("tokens"), pa.array(range(len(table)), pa.int32()))
    pq.write_table(table, sink, row_group_size=10)
    return sink.getvalue()


def uploads(hub: LoopbackHub) -> list[str]:
    return [request for request in hub.requests if request.startswith("PUT")]


def text_cache(folder: Path) -> Path:
    """A cache of a teacher's answers, one row of which it could not read."""
    content = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(content, "png")
    image = {"bytes": content.getvalue(), "path": None}
    names = ("key", "tokens", "crc32", "prompt", "completion", "sample", "finish_reason")
    types = ("binary", "int32", "uint32", "string", "string", "int32", "string")
    features = Features({name: Value(kind) for name, kind in zip(names, types, strict=True)})
    features["images"] = List(Image())
    identity = {
        "job": "generate",
        "mmkd": "0.1.0",
        "teacher": {"name": "big", "revision": None, "weights": None, "backend": "vllm", "dtype": None}
        | {"quantization": None},
        "signal": {"kind": "text"},
        "preparation": {"tokenizer": "a" * 64, "chat_template": None, "image_processor": "b" * 64},
        "data": {"name": "questions", "fingerprint": "c" * 64, "license": "mixed, see each part"},
        "sampling": {"samples": 1, "temperature": 0.7},
    }
    row = {"prompt": "Who?", "completion": "Me | you", "sample": 0, "finish_reason": "stop", "images": [image]}
    with CacheWriter(folder, Manifest(identity, 2, {"train": 5, "eval": 2}), features) as writer:
        for split, number in writer.manifest.missing():
            span = writer.manifest.span(split, number)
            rows = [{**row, "key": f"{split:8}{place:8}".encode(), "tokens": 3} for place in span if place != 4]
            skipped = {place: Skipped("no image") for place in span if place == 4}
            writer.write(split, number, rows, skipped, {"seconds": 1.0})
        writer.finish()
    columns = {name: name for name in ("prompt", "completion", "images")}
    recipe = {"name": "answers", "license": "mit", "source": ".", "splits": {"train": "train", "eval": "eval"}}
    (folder / "data.yaml").write_text(yaml.safe_dump({**recipe, "columns": columns}))
    return folder


def test_a_pulled_cache_says_the_same(hub: LoopbackHub, client: Client, workplace: Path) -> None:
    folder = workplace / "cache"
    url, pulled = client(push(folder), pull())
    assert url == f"{hub.url}/datasets/{REPO}"
    ours, theirs = Cache(folder), Cache(pulled)
    assert len(ours) == len(theirs) == 64
    for key in (key for table in ours._tables for key in table["key"].to_pylist()):
        place, other = ours.find(key), theirs.find(key)
        assert place is not None
        assert other is not None
        left, right = vars(ours.scores(place)), vars(theirs.scores(other))
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    assert ours.manifest.identity == theirs.manifest.identity
    assert len(load_from_disk(pulled)["train"]) == 32
    assert (Path(pulled) / LOG).read_bytes() == (folder / LOG).read_bytes()
    # Nothing of the way here is left over, and the next time nothing is fetched.
    assert [path.name for path in Path(pulled).parent.iterdir() if path.is_dir()] == [Path(pulled).name]
    hub.requests.clear()
    assert client(pull()) == [pulled]
    assert not [request for request in hub.requests if ".parquet" in request]
    assert client(pull(), HF_HUB_OFFLINE="1") == [pulled]


def test_pushing_again_sends_what_changed(hub: LoopbackHub, client: Client, cache: Path) -> None:
    fidelity = {"kl_live_cache": 0.00123, "kl_live_cache_max": 0.5, "rows": 64, "tokens": 800}
    client(push(cache))
    before, head = len(uploads(hub)), hub.dataset(REPO).refs["main"]
    client(push(cache))
    assert len(uploads(hub)) == before
    assert hub.dataset(REPO).refs["main"] == head
    _, pulled = client(push(cache, fidelity=fidelity), pull())
    assert len(uploads(hub)) == before
    assert "0.00123 nats per token, measured on 64 rows" in hub.dataset(REPO).files["README.md"].decode()
    # The card does not decide what the cache is.
    assert client(pull(revision=head)) == [pulled]
    # Other files for the same shards replace those that were there.
    client(push(cache), FILE_BYTES="1")
    names = [path for path in hub.dataset(REPO).files if path.startswith("data/")]
    assert sorted(names) == [f"data/{s}-{n:05d}-{n:05d}.parquet" for s in ("eval", "train") for n in range(4)]
    assert client(pull(), HF_HOME=str(cache / "elsewhere"))[0].startswith(str(cache / "elsewhere"))


def test_an_interrupted_push_shows_nothing_and_goes_on(hub: LoopbackHub, client: Client, cache: Path) -> None:
    hub.failing = "/commit/"
    (said,) = client(push(cache))
    assert said.startswith(f"refused: The Hub failed on {REPO}")
    assert hub.dataset(REPO).files == {}
    before, hub.failing = len(uploads(hub)), None
    client(push(cache))
    assert len(uploads(hub)) == before
    assert "manifest.json" in hub.dataset(REPO).files


def test_the_hub_shows_splits_and_a_card(hub: LoopbackHub, client: Client, workplace: Path) -> None:
    client(push(workplace / "cache"))
    found = client(REPO, code=LOAD)
    assert found["train"][0] == ["key", "tokens", "crc32", "blob", "images", "image_tokens"]
    manifest = Manifest.read(workplace / "cache")
    for split, shards in manifest.shards.items():
        assert sum(found[split][1]) == sum(entry.tokens for entry in shards.values())
    card = hub.dataset(REPO).files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "cc0-1.0"
    assert header["tags"] == ["mmkd", "distillation", "teacher-cache"]
    assert header["task_categories"] == ["text-generation"]
    teacher, data = manifest.identity["teacher"], manifest.identity["data"]
    size = sum(entry.bytes for shards in manifest.shards.values() for entry in shards.values())
    for fact in (teacher["name"], teacher["weights"], "float32, by transformers", data["fingerprint"], "CC0-1.0"):
        assert fact in card
    assert "8 most likely tokens with their log-probs, 4 draws from the tail" in card
    assert "Mean mass kept" in card
    assert f"{size:,} bytes" in card
    assert "Not measured" in card
    assert f"teacher_cache: {REPO}" in card
    assert "the teacher's licence" in card


def test_training_from_the_hub_is_training_from_the_folder(
    client: Client, server: ForkServer, workplace: Path, tmp_path: Path
) -> None:
    client(push(workplace / "cache"))
    losses = []
    for name in ("cache", REPO):
        flags = ["--teacher_cache", name, "--output_dir", str(tmp_path / "run" / name)]
        done = run_forked(["-m", "mmkd.commands.main", "train", "recipe.yaml", *flags], workplace, server=server)
        assert done.returncode == 0, done.stderr
        state = json.loads((tmp_path / "run" / name / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_doctor_looks_at_the_hub_though_the_teacher_is_named(
    client: Client, server: ForkServer, workplace: Path
) -> None:
    client(push(workplace / "cache"))
    for name, status, words in (
        (REPO, 0, "is complete: 64 sequences"),
        ("user/nothing", 1, "There is no data set user/nothing on the Hub"),
        ("./user/nothing", 0, "There is no ./user/nothing yet; it must be built"),
    ):
        arguments = ["-m", "mmkd.commands.main", "doctor", "recipe.yaml", "--teacher_cache", name]
        done = run_forked(arguments, workplace, server=server)
        assert done.returncode == status, done.stdout + done.stderr
        assert words in done.stdout


def test_a_cache_of_embeddings_is_pulled_as_it_was_pushed(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """Pictures and captions stay where they are: embeddings, views and keys travel."""
    (tmp_path / "made").mkdir()
    folder = Path(cached_teacher(tmp_path / "made"))
    pushed, pulled = client(push(folder), pull())
    assert "refused" not in pushed
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name not in (LOG, ".lock")):
        assert (Path(pulled) / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    ours, theirs = (CachedEncoder(place) for place in (folder, pulled))
    assert theirs.width == ours.width
    assert theirs.logit_scale == ours.logit_scale
    rows = pair_rows(captioned(4), ContrastiveKDConfig(str(tmp_path / "out")), "train", theirs.pairs)
    pairs = [rows[number] for number in range(4)]
    for pulled_inputs, own_inputs in zip(theirs.prepare_pairs(pairs), ours.prepare_pairs(pairs), strict=True):
        assert all(tensor.equal(own_inputs[name]) for name, tensor in pulled_inputs.items())
    card = hub.dataset(REPO).files["README.md"].decode()
    assert "embedding" in card


def test_a_cache_of_answers(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = text_cache(tmp_path / "answers")
    said, pulled = client(push(folder, "user/answers"), pull("user/answers"))
    assert not said.startswith("refused"), said
    ours, theirs = Manifest.read(folder), Manifest.read(Path(pulled))
    assert ours.skipped == theirs.skipped
    for split, number in ours.planned():
        assert ours.shards[split][number].sha256 == theirs.shards[split][number].sha256
        assert shard_path(Path(pulled), split, number).stat().st_size == theirs.shards[split][number].bytes
    row = load_data(f"{pulled}/data.yaml")["train"][0]
    assert row["completion"] == "Me | you"
    assert row["images"][0].size == (2, 2)
    assert set(client("user/answers", code=LOAD)) == {"train", "eval"}
    card = hub.dataset("user/answers").files["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "other"
    assert header["task_categories"] == ["image-text-to-text"]
    for fact in (
        "have no answer of the teacher's: 1 times: no image",
        "temperature 0.7",
        "source: user/answers",
    ):
        assert fact in card
    (folder / "data.yaml").unlink()
    (said,) = client(push(folder, "user/answers"))
    assert "data.yaml is missing" in said


def break_shard(cache: Path) -> None:
    path = cache / "train" / "00001.arrow"
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) // 2))


def truncate_shard(cache: Path) -> None:
    path = cache / "train" / "00001.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def forget_shard(cache: Path) -> None:
    manifest = Manifest.read(cache)
    del manifest.shards["eval"][0]
    manifest.write(cache)


def make_part(cache: Path) -> None:
    manifest = Manifest.read(cache)
    manifest.part = (0, 2)
    manifest.write(cache)


def lose_manifest(cache: Path) -> None:
    (cache / "manifest.json").unlink()


def break_order(cache: Path) -> None:
    (cache / TOKEN_ORDER).write_bytes(flipped((cache / TOKEN_ORDER).read_bytes(), 200))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_shard, r"1 shards of the cache are damaged: .*train/00001.arrow"),
        (truncate_shard, r"1 shards of the cache are damaged: .*train/00001.arrow"),
        (forget_shard, "not complete: 1 of 8 shards are missing. Run `mmkd cache build`"),
        (make_part, "part 0 of 2.*`mmkd cache merge`"),
        (lose_manifest, "no teacher cache"),
        (break_order, "token_order.npy is missing or damaged"),
    ],
)
def test_damaged_and_incomplete_caches_are_not_pushed(
    damage: Callable[[Path], None], reason: str, cache: Path, hub: LoopbackHub
) -> None:
    damage(cache)
    # In this process, which has no Hub: the cache is looked at first.
    with pytest.raises(ValueError, match=reason):
        push_cache(cache, REPO)
    assert not hub.repos


def test_repositories_that_may_not_be_written(hub: LoopbackHub, client: Client, cache: Path) -> None:
    hub.create("dataset", "user/photos", {"train/cat.jpg": b"cat"})
    hub.create("dataset", "user/named", {"README.md": b"# Soon"})
    said = client(
        push(cache, "user/photos"),
        push(cache, "user/named", private=True),
        push(cache, "somebody/words"),
        push(cache, "user/a b"),
        push(cache, "user/secret", private=True),
        push(cache, "user/named"),
    )
    assert "user/photos is no teacher cache" in said[0]
    assert "exists and is public" in said[1]
    assert "The Hub refuses somebody/words to you. Log in with `hf auth login`" in said[2]
    assert "'user/a b' is no Hub id" in said[3]
    assert said[4] == f"{hub.url}/datasets/user/secret"
    assert said[5] == f"{hub.url}/datasets/user/named"
    assert hub.dataset("user/secret").private
    assert list(hub.dataset("user/photos").files) == ["train/cat.jpg"]
    anonymous = client(push(cache), pull("user/secret"), HF_TOKEN="")
    assert "`hf auth login`" in anonymous[0]
    assert "There is no data set user/secret on the Hub that you may read" in anonymous[1]


def test_what_cannot_be_pulled(hub: LoopbackHub, client: Client, cache: Path) -> None:
    hub.create("dataset", "user/photos", {"train/cat.jpg": b"cat"})
    client(push(cache))
    repo = hub.dataset(REPO)
    whole, (train, *_) = repo.files, [path for path in repo.files if "train" in path]
    repo.refs |= {name: repo.refs["main"] for name in ("flipped", "changed", "cut", "short", "order", "edited")}
    repo.commit({train: flipped(whole[train], len(whole[train]) // 2)}, "flipped")
    repo.commit({train: changed(whole[train])}, "changed")
    repo.commit({train: whole[train][:500]}, "cut")
    repo.commit({train: None}, "short")
    repo.commit({TOKEN_ORDER: flipped(whole[TOKEN_ORDER], 200)}, "order")
    repo.commit({"manifest.json": whole["manifest.json"].replace(b"CC0", b"MIT")}, "edited")
    said = client(
        pull("user/nothing"),
        pull("nothing"),
        pull("user/photos"),
        *[pull(f"{REPO}@{name}") for name in ("v9", "flipped", "changed", "cut", "short", "order", "edited")],
    )
    for text, reason in zip(
        said,
        (
            "There is no data set user/nothing on the Hub that you may read (and no folder has this name; one to "
            "build is written ./user/nothing)",
            "The teacher cache 'nothing' does not exist. Make it with `mmkd cache build`",
            "user/photos on the Hub is no teacher cache",
            "no such revision",
            f"{train} of {REPO} on the Hub is damaged",
            f"{train} of {REPO} on the Hub is damaged: the rows of train shard",
            f"{train} of {REPO} on the Hub is damaged",
            f"The cache {REPO} on the Hub is not complete: train shard 0 is missing",
            f"The {TOKEN_ORDER} of {REPO} is missing or damaged",
            "was edited",
        ),
        strict=True,
    ):
        assert text.startswith("refused: ")
        assert reason in text
    # All but the last have one manifest and hence one folder, which the right files then complete.
    (pulled,) = client(pull())
    assert len(Cache(pulled)) == 64


def test_without_a_network(client: Client, cache: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for text in client(push(cache), pull(), **nowhere) + client(pull(), HF_HUB_OFFLINE="1"):
        assert f"refused: The Hub could not be reached for {REPO}" in text
        assert "\n" not in text


def test_a_pulled_folder_is_repaired(client: Client, cache: Path) -> None:
    _, pulled = client(push(cache), pull())
    path = Path(pulled) / "train" / "00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    (Path(pulled) / "eval" / "00000.arrow").unlink()
    assert client(pull()) == [pulled]
    assert path.read_bytes() == content
    assert len(Cache(pulled)) == 64


def test_ranks_that_pull_together(hub: LoopbackHub, client: Client, cache: Path) -> None:
    client(push(cache))
    hub.requests.clear()
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: client(pull()), range(2))
    assert first == second
    assert len([request for request in hub.requests if request.startswith("GET") and "train-" in request]) == 1


def test_a_folder_stays_what_it_is(tmp_path: Path) -> None:
    assert local_cache(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="does not exist"):
        local_cache(str(tmp_path / "nothing"))


def test_licences() -> None:
    assert hub_license("Apache-2.0") == {"license": "apache-2.0"}
    assert hub_license("PSF-2.0") == {"license": "other", "license_name": "psf-2.0"}
    assert hub_license("those of its parts (mit; odc-by)") == {"license": "other"}
    assert hub_license(None) == {"license": "unknown"}
    assert HUB_LICENSE.fullmatch("cc-by-nc-sa-4.0")


def test_the_loopback_hub_serves_models(hub: LoopbackHub, client: Client, tiny: dict[str, Path]) -> None:
    found = client(str(tiny["student"]), code=MODELS)
    snapshot = Path(found.pop("snapshot"))
    assert (snapshot / "results" / "eval.json").read_text() == "{}"
    assert found.pop("listed") == len(hub.repos["model", "user/student"].files) + 1
    assert found == {
        "user": "user",
        "equal": True,
        "template": True,
        "exists": [True, False],
        "private": True,
        "license": "mit",
    }


def test_a_dual_head_student_is_pushed_and_classifies(client: Client, tmp_path: Path) -> None:
    model = vit()
    model.config.alpha = 0.3
    model.save_pretrained(tmp_path / "student")
    pixels().save_pretrained(tmp_path / "student")
    assert client(str(tmp_path / "student"), code=DUAL_HEAD) == {
        "class": "DualHeadForImageClassification",
        "equal": True,
        "alpha": 0.3,
        "labels": sorted(NAMES),
    }
