# SPDX-License-Identifier: Apache-2.0
"""What the command line says of flags that are given twice, of many mistakes at once, and of what other tools do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.console import mirrortune

TASK = ["-t", "text-classification", "-d", "reviews.csv"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "quickstart", "-o", ""], "-o: got an empty text"),
        (["train", "quickstart", "--output-dir="], "--output-dir, -o: got an empty text"),
        (["train", "--model", "", "-t", "", "--method="], "--model, -m: got an empty text"),
        (["train", "-d", "reviews.csv", "-d", ""], "--data, -d: got an empty text. Give a value, or leave it out."),
        (["train", "quickstart", "--resume", ""], "arguments: got an empty text"),
        (["train", ""], "arguments: got an empty text"),
        (["eval", "", "--split", ""], "--split: got an empty text"),
        (["predict", "run", "--text", "one", "--text", ""], "--text: got an empty text"),
        (["predict", "run", "--image", ""], "--image: got an empty text"),
        (["merge", "run", "-o", ""], "-o, --output-dir: got an empty text"),
        (["push", "run", ""], "arguments: got an empty text"),
        (["compare", "quickstart", "--methods", ""], "--methods: got an empty text"),
        (["train", "quickstart", "train.lr="], "'train.lr=': it has no value"),
    ],
)
def test_a_value_is_not_empty(desk: Path, words: list[str], says: str) -> None:
    """That of a shell variable that is not set; the default would take its place."""
    outcome = mirrortune(*words)
    assert outcome.exit_code == 2
    assert says in outcome.said


def test_a_working_directory_that_was_deleted_is_named(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = desk / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    outcome = mirrortune("prepare", "quickstart", "--dry-run")
    assert outcome.exit_code == 4
    assert "the working directory: it has been deleted" in outcome.said


def test_a_system_prompt_may_be_empty(desk: Path) -> None:
    assert "empty text" not in mirrortune("chat", "nowhere/at-all", "--system", "").said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train --lora-r 8", "--lora-r: no such option. Use --rank."),
        ("train --max_seq_length=9 --model_name_or_path x", "--model_name_or_path: no such option. Use --model."),
        ("train --weight-decay 0.1", "--weight-decay: no such option. Write train.weight_decay=VALUE."),
        ("train --bf16 true", "--bf16: no such option. Use train.precision=bf16, or remove it if false."),
        ("train --evaluation-strategy epoch", "or at intervals of train.eval_every_steps"),
        ("merge run -o merged --evaluation-strategy epoch", "No such option: --evaluation-strategy"),
        ("train quickstart evals_per_epoch=4", "Use train.eval_every_steps, a number of steps."),
        ("merge run -o merged --base_model x", "--base_model: no such option. Use --model."),
        ("eval run --weight-decay 0.1", "No such option: --weight-decay"),
        ("train quickstart learning_rate=1", "'learning_rate=1': unknown key 'learning_rate'. It is train.lr here."),
        ("train --config my.yaml", "--config: no such option. Give the recipe without a flag."),
        ("train quickstart --split test", "Write data.train_split=NAME or data.validation_split=NAME."),
        ("train --do-train", "--do-train: no such option. Remove it: the command train does this."),
        ("merge run -o merged --bf16", "No such option: --bf16"),
        ("eval run --max-samples 9", "No such option: --max-samples"),
        ("train quickstart train.lora_alpha=1", "unknown key 'lora_alpha'. It is adapter.options.lora_alpha here."),
        ("train quickstart max_grad_norm=1", "unknown key 'max_grad_norm'. It is train.max_grad_norm here."),
        ("train quickstart train.output_dir=a", "unknown key 'output_dir'. It is output_dir here."),
        ("train quickstart train.load_best_model_at_end=true", "the best checkpoint is always the result."),
    ],
)
def test_names_of_other_tools_are_translated(desk: Path, words: str, says: str) -> None:
    outcome = mirrortune(*words.split())
    assert outcome.exit_code == 2
    assert says in outcome.said
    assert "Allowed:" not in outcome.said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "train --lr 1 --learning-rate 2 --lr 3",
            "--lr, --learning-rate: given 3 times, but takes one value.",
        ),
        ("train --max_steps 1 --max-steps 2", "--max-steps: given 2 times"),
        ("train -t glue/rte --task glue/mrpc", "-t, --task: given 2 times"),
        ("train --num-processes 1 --num-processes 2", "--num-processes: given 2 times"),
        ("eval run --split a --split b", "--split: given 2 times"),
        ("eval run --batch-size 1 --batch-size 2", "--batch-size: given 2 times"),
        ("compare --methods mirror --methods lora", "--methods: given 2 times"),
        ("compare --methods lora:rank=2:rank=4 quickstart", "--methods: 'lora:rank=2:rank=4' sets adapter.rank twice"),
        ("merge run -o a -o b", "-o, --output-dir: given 2 times"),
        ("push run me/it --revision a --revision b", "--revision: given 2 times"),
        ("analyze a b --top-k 2 --top-k 3", "--top-k: given 2 times"),
        ("report run -o a --output b", "-o, --output: given 2 times"),
        ("train train.lr=1 train.lr=2", "'train.lr=2': 'train.lr=1' sets the same. Keep one of them"),
        ("train train.head-lr=1 train.head_lr=1", "'train.head_lr=1': 'train.head-lr=1' sets the same"),
        ("eval run data.path=a data.path=b", "'data.path=b': 'data.path=a' sets the same"),
    ],
)
def test_a_flag_that_takes_one_value_is_given_once(desk: Path, words: str, says: str) -> None:
    outcome = mirrortune(*words.split())

    assert outcome.exit_code == 2
    assert says in outcome.said
    assert [path.name for path in desk.iterdir()] == ["reviews.csv"]


def test_flags_that_take_several_values_or_none_may_be_repeated(desk: Path, tiny_model_dir: Path) -> None:
    (desk / "pairs.csv").write_text(
        "a,b,label\n" + "good film,bad film,x\nbad film,good film,y\n" * 20, encoding="utf-8"
    )

    outcome = mirrortune(
        "prepare", "-m", tiny_model_dir, "-t", "text-classification", "-d", "pairs.csv", "--text-column", "a",
        "--text-column", "b", "--dry-run", "--dry-run", "-q", "-q",
    )  # fmt: skip

    assert outcome.exit_code == 0, outcome.stderr


def test_a_setting_of_the_command_line_goes_before_what_compare_sets_itself(desk: Path, tiny_model_dir: Path) -> None:
    words = ["-m", tiny_model_dir, *TASK, "--methods", "none:lr=1e-3", "-o", "out", "--report-only", "--max-steps", 1]

    outcome = mirrortune("compare", *words, "eval.protocol=dev-best")

    assert outcome.exit_code == 0, outcome.stderr
    assert "protocol: dev-best" in (desk / "out" / "recipes" / "reviews.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "--method mirorr --precision fp7 --rank 0",
            ["--precision: got 'fp7'", "--rank: got 0", "unknown method 'mirorr'. Did you mean 'mirror'?"],
        ),
        (
            "--method mirorr --pairing miror --epochs 0",
            ["--epochs: got 0", "unknown method 'mirorr'", "adapter.pairing: unknown pairing 'miror'"],
        ),
        (
            "--method mirorr --pairing miror -t regression",
            ["unknown method 'mirorr'", "adapter.pairing: unknown pairing 'miror'"],
        ),
        (
            "--method psoft adapter.options.bta=1 --pairing mirror --lr x",
            ["--lr: got 'x'", "adapter.options.bta: core 'psoft' has no option 'bta'", "method 'psoft' pairs nothing"],
        ),
        (
            "--method lora adapter.options.lora_dropot=1 adapter.options.target_modules=x --rank full --precision fp7",
            ["--precision: got 'fp7'", "has no option 'lora_dropot'. Did you mean 'lora_dropout'?",
             "adapter.options.target_modules: it follows from adapter.target_modules", "adapter.rank: got 'full'"],
        ),
        (
            "adapter.options.rounds=0 --pairing miror train.lrr=1",
            ["'train.lrr=1': unknown key 'lrr'", "adapter.options.rounds: got 0", "unknown pairing 'miror'"],
        ),
        (
            "-t text-clasification --method mirorr train.track=x",
            ["--task: unknown task 'text-clasification'", "unknown method 'mirorr'", "'train.track=x': got 'x'"],
        ),
        (
            "mine.yaml --method mirorr --lr=[ train.epochs=[ train.x=1",
            ["cannot read mine.yaml", "unknown method 'mirorr'", "--lr:1: not valid", "'train.epochs=[':1: not valid",
             "'train.x=1': unknown key 'x'"],
        ),
        (
            "task.metrics=[acuracy] task.kind=nothing train.seed=-1",
            ["'train.seed=-1': got -1", "task.metrics: unknown metric 'acuracy'", "unknown kind of task 'nothing'"],
        ),
    ],
)  # fmt: skip
def test_all_mistakes_are_told_at_once(desk: Path, words: str, says: list[str]) -> None:
    outcome = mirrortune("prepare", "--dry-run", "-m", "./nowhere", "-d", "reviews.csv", *words.split())

    assert outcome.exit_code == 2
    lines = outcome.stderr.removeprefix("error: ").splitlines()
    assert {part: any(part in line for line in lines) for part in says} == dict.fromkeys(says, True)
    assert len(lines) == len(says), outcome.stderr


@pytest.mark.parametrize("command", ["generate", "serve runs/x --port 8000"])
def test_a_command_of_other_tools_says_what_to_use(command: str) -> None:
    outcome = mirrortune(*command.split())

    assert outcome.exit_code == 2
    assert "mirrortune has no such command. Talk to a run with mirrortune chat; to serve it, merge it" in outcome.said


@pytest.mark.parametrize("words", ["--method dpo", "--method orpo -t causal-lm", "-t kto", "-t GRPO"])
def test_methods_that_learn_from_preferences_are_refused_as_such(desk: Path, words: str) -> None:
    outcome = mirrortune("prepare", "--dry-run", "-m", "./nowhere", "-d", "reviews.csv", *words.split())

    assert outcome.exit_code == 2
    assert "learns from preferences, which mirrortune does not train on" in outcome.said
    assert "Use TRL's trainer around a model that mirrortune.attach() has adapted" in outcome.said
    assert "Did you mean" not in outcome.said


PAIRS = {"chosen": "good film", "rejected": "bad film"}


@pytest.mark.parametrize(
    ("task", "row"),
    [
        *((task, row) for task in ("causal-lm", "seq2seq", "text-classification")
          for row in (PAIRS, {"prompt": "the film was", **PAIRS}, {"text": "the film was", **PAIRS})),
        ("causal-lm", {"prompt": "the film was", "completion": "bad", "label": False}),
        ("seq2seq", {"prompt": "the film was", "completion": "bad", "label": True}),
        ("causal-lm", {"prompt": "the film was", "response": "bad", "label": False}),
        *(("causal-lm", {"messages": [{"role": "assistant", "content": "bad"}], mark: False})
          for mark in ("label", "kto_tag")),
        *(("causal-lm", {asked: "the film was", answer: "bad", "kto_tag": False})
          for asked, answer in (("instruction", "output"), ("instruction", "response"), ("question", "answer"))),
    ],
)  # fmt: skip
def test_one_side_of_preferences_is_not_learned(
    desk: Path, tiny_model_dir: Path, task: str, row: dict[str, object]
) -> None:
    (desk / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")

    outcome = mirrortune("prepare", "--dry-run", "-m", tiny_model_dir, "-t", task, "-d", "rows.jsonl")

    assert outcome.exit_code == 3, outcome.stderr
    assert "it holds preferences (columns" in outcome.said
    assert "--label-column" not in outcome.said


def test_settings_that_each_run_of_a_comparison_has_are_refused(desk: Path, tiny_model_dir: Path) -> None:
    own = {
        "output_dir=a": "Use -o.", "adapter.method=svft": "Use --methods.", "train.seed=3": "Use --seeds.",
        "train.lr=0.1": "Use --lr-grid, or --methods NAME:lr=X/Y for one method.",
    }  # fmt: skip
    words = ["compare", "-m", tiny_model_dir, *TASK, "--methods", "none", "-o", "out", "--report-only"]

    outcome = mirrortune(*words, *own, "train.head_lr=0.1")

    assert outcome.exit_code == 2
    assert outcome.stderr.count("\n") == len(own)
    for word, fix in own.items():
        assert f"'{word}': each run of a comparison has its own. {fix}" in outcome.stderr
    assert mirrortune(*words, "train.head_lr=0.1").exit_code == 0


@pytest.mark.parametrize("command", ["eval run", "predict run --text good", "chat run"])
def test_settings_of_training_are_refused_where_nothing_is_trained(desk: Path, command: str) -> None:
    outcome = mirrortune(*command.split(), "train.lr=1", "adapter.rank=4", "train.precision=fp32", "train.seed=3")

    assert outcome.exit_code == 2
    for word in ("train.lr=1", "adapter.rank=4"):
        says = f"'{word}': it is a setting of training, and this command trains nothing. Remove it."
        assert says in outcome.stderr
    assert "train.precision=" not in outcome.stderr
    assert "train.seed=" not in outcome.stderr


@pytest.mark.parametrize("setting", ["data.path=rows.csv", "data.system=Hello", "data.max_length=9", "eval.samples=2"])
def test_settings_that_do_not_change_a_conversation_are_refused(desk: Path, setting: str) -> None:
    Path("run/adapter").mkdir(parents=True)
    outcome = mirrortune("chat", "run", setting)

    assert outcome.exit_code == 2
    assert f"'{setting}': it has no effect on this conversation. Remove it" in outcome.stderr


@pytest.mark.parametrize("command", ["predict run", "eval run", "train -m bert -t text-classification"])
def test_a_table_in_the_place_of_a_recipe_is_given_its_flag(desk: Path, command: str) -> None:
    outcome = mirrortune(*command.split(), "my rows.csv")

    assert outcome.exit_code == 2
    says = "arguments: got my rows.csv, and a recipe is YAML. Name rows with --data 'my rows.csv'."
    assert says in outcome.stderr
