# SPDX-License-Identifier: Apache-2.0
"""push: an adapter and a merged model on a loopback Hub, with a card, and what is loaded from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mirrortune.merging.push import kept_notes
from mirrortune.reports.model_card import is_generated
from mirrortune.system.hub import Upload
from mirrortune.system.outputs import COMPARISON, Marker, write_marker
from mirrortune.system.paths import sha256_of
from tests.cli.console import Outcome, mirrortune, reviews, write_table
from tests.hub_fixtures import client_env
from tests.hub_server import LoopbackHub
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and its merged model."""
    folder = tmp_path_factory.mktemp("desk")
    base = write_tiny_model(folder / "base")
    write_table(folder / "reviews.csv", reviews(24))
    trained = mirrortune(
        "train", "-m", base, "-t", "text-classification", "-d", folder / "reviews.csv", "--max-steps", 2, "-q",
        "-o", folder / "run", cache=folder / "cache",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    merged = mirrortune("merge", folder / "run", "-o", folder / "merged", "-q", cache=folder / "cache")
    assert merged.exit_code == 0, merged.stderr
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty Hub."""
    with LoopbackHub(tmp_path / "hub") as found:
        yield found


def run(
    hub: LoopbackHub, desk: Path, *words: object, token: str | None = "hf_loopback"
) -> subprocess.CompletedProcess[str]:
    """A process whose Hub is ours."""
    env = client_env(hub.endpoint, desk / "hf-home") | {"MIRRORTUNE_CACHE": str(desk / "cache")}
    env |= {"HF_TOKEN": token} if token else {}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2])])
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=desk)


def push(hub: LoopbackHub, desk: Path, *words: object, token: str | None = "hf_loopback") -> Outcome:
    """``mirrortune push`` in this process with ours as the Hub, in a fraction of the time."""
    from huggingface_hub import constants

    home = desk / "hf-home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("no_proxy", "127.0.0.1")
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        patch.chdir(desk)
        return mirrortune("push", *words, cache=desk / "cache")


SAVE = """
import sys, mirrortune
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
mirrortune.attach(model, target_modules="query")
mirrortune.save_adapter(model, "mine", repository="me/many", revision="main", subfolder="tasks/one")
again = AutoModelForSequenceClassification.from_pretrained("base", num_labels=2)
mirrortune.load_adapter(again, "me/many", revision="main", subfolder="tasks/one")
print(mirrortune.merge_adapter("base", "me/many", "from-hub", subfolder="tasks/one")["passed"])
mirrortune.save_adapter(model, "mine", repository="alone")
print(mirrortune.merge_adapter("base", "loopback/alone", "as-lora", format="lora", rank=8)["passed"])
"""
LOAD = """
import json, sys, mirrortune
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
mirrortune.load_adapter(model, f"loopback/sst2@{sys.argv[2]}")
mirrortune.save_adapter(model, "again")
"""


def test_an_adapter_goes_to_the_hub_and_back(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    done = run(hub, desk, "-m", "mirrortune", "push", "run", "sst2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["repository"] == "loopback/sst2"
    assert result["kind"] == "adapter"
    assert set(result["files"]) == {
        "README.md", "adapter.json", "adapter.safetensors", "curves.png", "recipe.yaml", "results.json"
    }  # fmt: skip
    sent = tmp_path / "hub" / "models" / "loopback" / "sst2"
    assert (sent / "adapter.safetensors").read_bytes() == (desk / "run/adapter/adapter.safetensors").read_bytes()
    card = ModelCard.load(sent / "README.md")
    results = json.loads((desk / "run" / "results.json").read_text())
    found = {e.metric_type: e.metric_value for e in card.data.eval_results}
    assert found == results["metrics"]
    assert card.data.pipeline_tag == "text-classification"
    assert "## Training" in card.text
    assert "![curves](curves.png)" in card.text
    commit = result["url"].rpartition("/")[2]
    loaded = run(hub, desk, "-c", LOAD, "base", commit)
    assert loaded.returncode == 0, loaded.stderr
    assert (desk / "again" / "adapter.safetensors").is_file()
    scored = run(hub, desk, "-m", "mirrortune", "eval", f"loopback/sst2@{commit}", "-d", "reviews.csv", "--json")
    assert scored.returncode == 0, scored.stderr
    shutil.copytree(desk / "run" / "adapter", tmp_path / "lone")  # without its run's recipe
    here = mirrortune("eval", tmp_path / "lone", "-d", desk / "reviews.csv", "--json", cache=desk / "cache")
    assert json.loads(scored.stdout) == json.loads(here.stdout)
    shutil.copytree(sent, tmp_path / "hub" / "models" / "me" / "many" / "tasks" / "one")
    (tmp_path / "hub" / "models" / "me" / "many" / "README.md").touch()
    merged = run(hub, desk, "-m", "mirrortune", "merge", "me/many@main:tasks/one", "-o", "merged-from-hub", "--json")
    assert merged.returncode == 0, merged.stderr
    own, theirs = (desk / name / "model.safetensors" for name in ("merged-from-hub", "merged"))
    assert own.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_python_saves_to_a_repository_and_merges_from_it(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    done = run(hub, desk, "-c", SAVE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
    sent = tmp_path / "hub" / "models"
    assert {p.name for p in (sent / "me" / "many" / "tasks" / "one").iterdir()} == {
        "adapter.json",
        "adapter.safetensors",
    }
    assert ModelCard.load(sent / "loopback" / "alone" / "README.md").data.library_name == "mirrortune"


def test_a_merged_model_goes_with_its_card(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    done = push(hub, desk, "merged", "me/merged", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "merged"
    sent = tmp_path / "hub" / "models" / "me" / "merged"
    assert (sent / "model.safetensors").read_bytes() == (desk / "merged" / "model.safetensors").read_bytes()
    card = ModelCard.load(sent / "README.md")
    assert card.data.library_name == "transformers"
    assert {e.metric_type for e in card.data.eval_results} >= {"accuracy"}


def sent_texts(folder: Path) -> dict[str, str]:
    """Every text that lies in a repository, by its path."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".md", ".json", ".yaml", ".jinja")]
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def test_nothing_that_is_sent_tells_of_this_machine(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in desk.rglob("*") if p.is_file() and not p.is_relative_to(desk / "hf-home")}
    for source, target in (("run", "me/adapter"), ("merged", "me/merged")):
        done = push(hub, desk, source, target)
        assert done.exit_code == 0, done.stderr
        sent = sent_texts(tmp_path / "hub" / "models" / target)
        assert len(sent) >= 4
        for name, text in sent.items():
            assert str(desk) not in text, name
            assert "--max-steps" not in text, name
        assert f"cut from recipe.yaml: model.name: '{desk / 'base'}' -> ./base" in done.stderr
        assert f"cut from recipe.yaml: data.path: '{desk / 'reviews.csv'}' -> ./reviews.csv" in done.stderr
        assert f"pushing {len(list((tmp_path / 'hub' / 'models' / target).iterdir())) - 1} files (" in done.stderr
        assert "README.md" in done.stderr.split("pushing")[1]
    recipe = sent_texts(tmp_path / "hub" / "models" / "me" / "adapter")["recipe.yaml"]
    assert "name: ./base" in recipe
    assert "output_dir" not in recipe
    assert before == {p: p.read_bytes() for p in before}  # what is here keeps its full record


def test_of_a_merged_folder_only_the_model_is_sent(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    folder, secret = tmp_path / "merged", tmp_path / "id_ed25519"
    shutil.copytree(desk / "merged", folder)
    secret.write_text("PRIVATE KEY")
    (folder / ".env").write_text("TOKEN=x")
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # added by a person, of the tokenizer
    (folder / "key.json").symlink_to(secret)
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "thesis.txt").write_text("mine")
    done = push(hub, desk, folder, "me/clean", "--json")
    assert done.exit_code == 0, done.stderr
    assert "not sent, as not of the model: .env, key.json, notes/deep/thesis.txt" in done.stderr
    sent = tmp_path / "hub" / "models" / "me" / "clean"
    model = {p.name for p in (desk / "merged").iterdir()} - {".mirrortune.json"}
    assert {p.name for p in sent.rglob("*")} == model | {".gitattributes", "chat_template.jinja"}
    assert json.loads((folder / "merge.json").read_text())["files"] == sorted(model)


def test_a_card_of_a_person_is_kept(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    card = tmp_path / "hub" / "models" / "me" / "cards" / "README.md"
    for source in ("run", "merged"):
        for _ in range(2):  # the second push replaces the generated card of the first
            done = push(hub, desk, source, "me/cards", "--json")
            assert done.exit_code == 0, done.stderr
            assert "README.md" in json.loads(done.stdout)["files"]
        generated = card.read_text()
        assert is_generated(generated)
        card.write_text(mine := generated.replace("\n# ", "\nMy own words.\n\n# ", 1))
        done = push(hub, desk, source, "me/cards", "--json")
        assert done.exit_code == 0, done.stderr
        assert (card.read_text(), json.loads(done.stdout)["kept"]) == (mine, ["README.md"])
        assert "README.md" not in json.loads(done.stdout)["files"]
        assert "README.md of me/cards is kept, as it was written or edited by hand" in done.stderr
        done = push(hub, desk, source, "me/cards", "--replace-card")
        assert (done.exit_code, card.read_text()) == (0, generated), done.stderr


def test_a_card_of_a_person_in_the_folder_is_sent(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    for name in ("run", "merged"):
        shutil.copytree(desk / name, tmp_path / name)
    shutil.copytree(desk / "run" / "adapter", tmp_path / "alone")
    for name in ("run", "merged", "alone"):
        (tmp_path / name / "README.md").write_text(f"---\nlicense: mit\n---\n# Mine, from {desk / 'base'}\n")
        done = push(hub, desk, tmp_path / name, f"me/{name}")
        assert done.exit_code == 0, done.stderr
        sent = tmp_path / "hub" / "models" / "me" / name / "README.md"
        assert sent.read_text() == "---\nlicense: mit\n---\n# Mine, from base\n"


def test_a_card_in_another_encoding_is_not_sent(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    shutil.copytree(desk / "run", tmp_path / "run")
    (tmp_path / "run" / "README.md").write_bytes("# Caf\u00e9\n".encode("latin-1"))
    refused = push(hub, desk, tmp_path / "run", "me/cafe")
    assert (refused.exit_code, "README.md: it is not UTF-8. Save it as UTF-8." in refused.said) == (5, True)


def test_a_card_of_a_person_is_kept_when_a_merge_is_replaced(desk: Path, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(desk / "merged", folder)
    generated = (folder / "README.md").read_bytes()
    for card in (b"# Mine\n", "# Caf\u00e9\r\n".encode("latin-1"), generated):
        (folder / "README.md").write_bytes(card)
        done = mirrortune("merge", desk / "run", "-o", folder, "--overwrite", cache=desk / "cache")
        assert done.exit_code == 0, done.stderr
        assert (folder / "README.md").read_bytes() == card
        assert ("is kept, as it was written or edited by hand" in done.said) is (card != generated)


def test_weights_that_changed_after_the_merge_are_refused(desk: Path, tmp_path: Path) -> None:
    whole = (desk / "merged" / "model.safetensors").read_bytes()
    damages = {"cut": whole[:-4], "edited": whole[:-1] + bytes([whole[-1] ^ 1]), "missing": None}
    for name, content in damages.items():
        folder = tmp_path / name
        shutil.copytree(desk / "merged", folder)
        (folder / "model.safetensors").unlink()
        if content is not None:
            (folder / "model.safetensors").write_bytes(content)
        done = mirrortune("push", folder, "me/x", cache=desk / "cache")
        assert (done.exit_code, "model.safetensors" in done.said) == (5, True), done.stderr


def test_the_records_of_a_merge_must_agree(desk: Path, tmp_path: Path) -> None:
    for change in (lambda files: files.remove("model.safetensors"), lambda files: files.append("model-2.safetensors")):
        folder = tmp_path / "merged"
        shutil.copytree(desk / "merged", folder, dirs_exist_ok=True)
        shutil.copy(desk / "merged" / "model.safetensors", folder / "model-2.safetensors")
        report = json.loads((folder / "merge.json").read_text())
        change(report["files"])
        (folder / "merge.json").write_text(json.dumps(report))
        done = mirrortune("push", folder, "me/x", cache=desk / "cache")
        assert (done.exit_code, ".mirrortune.json and merge.json disagree about 'model" in done.said) == (5, True)


def test_a_damaged_index_of_weights_is_refused_as_damage(desk: Path, tmp_path: Path) -> None:
    shutil.copytree(desk / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors.index.json").write_text("{}")
    done = mirrortune("push", tmp_path / "merged", "me/x", cache=desk / "cache")
    assert (done.exit_code, "index.json: damaged" in done.said) == (5, True), done.stderr


def test_changed_settings_are_said_and_hashes_hold_after_a_push(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    folder, sent = tmp_path / "merged", tmp_path / "hub" / "models" / "me" / "x"
    shutil.copytree(desk / "merged", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(desk / "base")}))
    done = push(hub, desk, folder, "me/x")
    assert done.exit_code == 0, done.stderr
    assert "config.json was changed after the merge" in done.stderr
    recorded = json.loads((sent / "merge.json").read_text())["sha256"]
    assert {"model.safetensors", "config.json"} <= recorded.keys()
    assert all(sha256_of(sent / name) == digest for name, digest in recorded.items())
    again = push(hub, desk, sent, "me/y")
    assert again.exit_code == 0, again.stderr


def test_weights_of_an_earlier_model_do_not_stay_beside_others(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    sent = tmp_path / "hub" / "models" / "me" / "x"
    words = ("merge", desk / "run", "-o", tmp_path / "sharded", "--max-shard-size", "20KB", "-q")
    assert mirrortune(*words, cache=desk / "cache").exit_code == 0
    assert push(hub, desk, "merged", "me/x").exit_code == 0
    (sent / "notes.safetensors").write_text("of a person")
    # transformers would read model.safetensors instead of the shards
    for source, gone in ((tmp_path / "sharded", ["model.safetensors"]), (desk / "merged", None)):
        done = push(hub, desk, source, "me/x", "--json")
        assert done.exit_code == 0, done.stderr
        deleted = json.loads(done.stdout)["deleted"]
        assert deleted == gone or (gone is None and "model.safetensors.index.json" in deleted)
        there = {path.name for path in sent.iterdir() if path.name.startswith("model")}
        assert there == {path.name for path in source.iterdir() if path.name.startswith("model")}
        assert (sent / "notes.safetensors").is_file()


def test_an_earlier_adapter_does_not_stay_beside_merged_weights(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    of_peft = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"]
    outdated = {"merged": ["adapter.json", "adapter.safetensors", *of_peft], "run": []}
    for source, gone in outdated.items():
        sent = tmp_path / "hub" / "models" / "me" / source
        (sent / "step-5").mkdir(parents=True)
        for name in ("step-5/adapter_config.json", "adapter_notes.json", *of_peft, *gone):
            (sent / name).write_text("{}")
        done = push(hub, desk, source, f"me/{source}", "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["deleted"] == gone
        assert ("deleted files of an earlier model or adapter there: adapter" in done.stderr) is bool(gone)
        assert (", ".join(of_peft) + f" of me/{source} are not of this adapter" in done.stderr) is not bool(gone)
        assert {name for name in of_peft if (sent / name).exists()} == ({*()} if gone else {*of_peft})
        assert (sent / "step-5" / "adapter_config.json").is_file()
        assert (sent / "adapter_notes.json").is_file()


def test_only_files_that_transformers_loads_are_named_with_their_folder() -> None:
    untouched = ["tasks/one/adapter.safetensors", "tasks/one/adapter_config.json", "tasks/one/notes.txt"]
    done = Upload(repository="me/x", url="", kept=[], deleted=[], untouched=untouched)
    (line,) = kept_notes(done)
    assert line.startswith("tasks/one/adapter_config.json of me/x are not of this adapter")


@pytest.mark.parametrize("name", ["../id_ed25519", "/etc/passwd", ".env", "notes/.ssh/key", "a/../../id_ed25519"])
def test_a_report_that_lists_what_is_no_file_of_a_model_is_refused(desk: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(desk / "merged", tmp_path / "merged")
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    report["files"].append(name)
    (tmp_path / "merged" / "merge.json").write_text(json.dumps(report))
    done = mirrortune("push", tmp_path / "merged", "me/x", cache=desk / "cache")
    assert done.exit_code == 5
    assert f"it lists '{name}', which is not a file of a model" in done.said


@pytest.mark.parametrize("source", ["merged/tokenizer.json", "run/curves.png", "run/adapter/adapter.safetensors"])
def test_links_are_not_followed(desk: Path, tmp_path: Path, source: str) -> None:
    for name in ("run", "merged"):
        shutil.copytree(desk / name, tmp_path / name)
    file = tmp_path / source
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    done = mirrortune("push", tmp_path / source.split("/", maxsplit=1)[0], "me/x", cache=desk / "cache")
    assert done.exit_code == 5
    assert "it is a link or not a regular file, and is not sent" in done.said


def test_private_is_not_sent_to_a_public_repository(hub: LoopbackHub, desk: Path, tmp_path: Path) -> None:
    public = tmp_path / "hub" / "models" / "me" / "public"
    assert push(hub, desk, "run", "me/public").exit_code == 0
    before = {p: p.read_bytes() for p in public.rglob("*") if p.is_file()}
    refused = push(hub, desk, "merged", "me/public", "--private")
    assert refused.exit_code == 2, refused.stderr
    assert "--private: repository 'me/public' is public, nothing was sent" in refused.stderr
    assert before == {p: p.read_bytes() for p in public.rglob("*") if p.is_file()}
    for _ in range(2):  # made private, and private already
        made = push(hub, desk, "run", "me/secret", "--private")
        assert made.exit_code == 0, made.stderr
    assert hub.private == {"me/secret"}


@pytest.mark.parametrize(
    ("words", "token", "said"),
    [
        (("loopback/nothing@main:sub/folder", "me/x"), "t", "no such repository on the Hub"),
        (("run", "me/x"), None, "HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: LoopbackHub, desk: Path, words: tuple[str, str], token: str | None, said: str
) -> None:
    done = push(hub, desk, *words, token=token)
    assert (done.exit_code, said in done.stderr) == (6, True), done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    for file in (desk / "run" / "adapter").iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes()[:-1])
    compared = tmp_path / "compared"
    cell = compared / "cells" / "reviews" / "mirror" / "lr-1e-02" / "seed-0"
    cell.mkdir(parents=True)
    (cell / "results.json").write_text("{}")
    write_marker(compared, Marker(COMPARISON.name, frozenset()))
    for words, code, said in (
        ((desk / "nothing", "me/x"), 2, "push: '"),
        ((desk / "nothing", "me/x"), 2, "neither a run directory nor an adapter folder"),
        ((compared, "me/x"), 2, f"is a comparison of many runs. Give one of them, such as {cell}."),
        ((desk / "run", "a/b/c"), 2, "name or owner/name"),
        ((desk / "run", "me/../x"), 2, "ID: 'me/../x' is not the id of a repository. Allowed: name or owner/name, of"),
        ((desk / "run", "/"), 2, "ID: '/' is not the id of a repository. Allowed: name or owner/name, of letters"),
        ((tmp_path / "damaged", "me/x"), 5, "damaged"),
    ):
        done = mirrortune("push", *words, cache=desk / "cache")
        assert (done.exit_code, said in done.stderr) == (code, True), done.stderr


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "environment.json", "validation.json"])
@pytest.mark.parametrize("command", ["merge", "push", "report"])
def test_no_link_in_a_run_is_read_for_others(desk: Path, tmp_path: Path, command: str, name: str) -> None:
    if name == "validation.json" and command != "report":
        return  # neither reads it
    folder, secret = tmp_path / "run", tmp_path / "hosts.yml"
    shutil.copytree(desk / "run", folder)
    (folder / "report.html").unlink()
    secret.write_text('{"github.com": {"oauth_token": "gho_secret"}}')
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    more = {"merge": ["-o", tmp_path / "out"], "push": ["me/x"], "report": []}[command]
    done = mirrortune(command, folder, *more, cache=desk / "cache")
    assert done.exit_code == 5, done.stderr
    assert f"{name}: it is a link or not a regular file" in done.said
    assert not (tmp_path / "out").exists()
    assert not (folder / "report.html").exists()


def test_only_a_recipe_is_sent_as_one(desk: Path, tmp_path: Path) -> None:
    for name in ("run", "merged"):
        shutil.copytree(desk / name, tmp_path / name)
        (tmp_path / name / "recipe.yaml").write_text("github.com:\n  oauth_token: gho_secret\n")
    for words in (
        ("push", tmp_path / "run", "me/x"),
        ("push", tmp_path / "merged", "me/x"),
        ("merge", tmp_path / "run", "-o", tmp_path / "out"),
    ):
        done = mirrortune(*words, cache=desk / "cache")
        assert done.exit_code == 2, done.stderr
        assert "unknown" in done.said
    (tmp_path / "run" / "recipe.yaml").unlink()
    (tmp_path / "run" / "results.json").unlink()
    done = mirrortune("merge", tmp_path / "run", "-o", tmp_path / "out", cache=desk / "cache")
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "out" / "recipe.yaml").exists()


@pytest.mark.parametrize("text", ["[]", "{}", "null", "1", "", "9" * 5000, "[" * 100_000, "\xff", '{"metrics": {}}'])
def test_damaged_files_of_a_run_are_said(desk: Path, tmp_path: Path, text: str) -> None:
    for name in ("results.json", "environment.json"):
        folder = tmp_path / name.removesuffix(".json")
        shutil.copytree(desk / "run", folder)
        (folder / name).write_bytes(text.encode("latin-1"))
        for words in (("push", folder, "me/x"), ("merge", folder, "-o", tmp_path / "out")):
            if name == "environment.json" and text in ("{}", '{"metrics": {}}'):
                continue  # a record without entries
            done = mirrortune(*words, cache=desk / "cache")
            assert done.exit_code in (2, 5), done.stderr
            assert "damaged" in done.said
    assert not (tmp_path / "out").exists()


def test_no_link_out_of_a_base_is_copied_into_a_merge(desk: Path, tmp_path: Path) -> None:
    base, secret = tmp_path / "base", tmp_path / "id_ed25519"
    shutil.copytree(desk / "base", base)
    secret.write_text("PRIVATE KEY")
    (base / "chat_template.jinja").symlink_to(secret)
    words = ("merge", desk / "run", "-m", base, "-o", tmp_path / "out")
    done = mirrortune(*words, cache=desk / "cache")
    assert done.exit_code == 5, done.stderr
    assert "chat_template.jinja: it is a link out of the model's folder" in done.said
    (base / "chat_template.jinja").unlink()
    (base / "own").write_text("a template")
    (base / "chat_template.jinja").symlink_to(base / "own")  # within the folder
    assert mirrortune(*words, cache=desk / "cache").exit_code == 0


def test_curves_are_an_image(desk: Path, tmp_path: Path) -> None:
    shutil.copytree(desk / "run", tmp_path / "run")
    (tmp_path / "run" / "curves.png").write_text("PRIVATE KEY")
    done = mirrortune("push", tmp_path / "run", "me/x", cache=desk / "cache")
    assert (done.exit_code, "curves.png: damaged (not a PNG image)" in done.said) == (5, True), done.stderr
