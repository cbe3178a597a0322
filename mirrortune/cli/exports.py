# SPDX-License-Identifier: Apache-2.0
"""Define the commands that export a run, ``merge`` and ``push``."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mirrortune.cli.flags import Debug, Json, Quiet, Verbose
from mirrortune.errors import ConfigError
from mirrortune.system.console import Reporter
from mirrortune.system.paths import local_path, shell_word

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge(
    targets: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directory or adapter folder; several are merged in order.", show_default=False)], *,
    output_dir: Annotated[str, typer.Option("-o", "--output-dir", metavar="TEXT", help="Output folder.", show_default=False)],
    format: Annotated[str, typer.Option("--format", metavar="hf|lora|gguf", help="Plain weights (hf), a LoRA adapter in PEFT's format (lora) or in llama.cpp's (gguf).")] = "hf",
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="For lora and gguf: rank to keep; all of it by default.", show_default=False)] = None,
    max_shard_size: Annotated[str | None, typer.Option("--max-shard-size", metavar="SIZE", help="Maximum size of a file of plain weights, such as 2GB; as in the base by default.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option("--base", "-m", "--model", metavar="TEXT", help="The base model: the same weights elsewhere, or the full-precision weights of a quantised base.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", rich_help_panel="Dangerous options", help="Merge into a base whose weights differ from those the adapter was trained on.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", rich_help_panel="Dangerous options", help="Run Python code from the model's repository.")] = False,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Merge adapters into plain weights, and verify the result before it is put in place.

    mirrortune merge runs/sst2-roberta-base-mirror-scale -o merged
    """
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    if format not in ("hf", "lora", "gguf"):
        raise ConfigError("--format", f"got '{format}'", allowed="hf, lora, gguf")
    if rank is not None and format == "hf":
        raise ConfigError("--rank", "plain weights have none", fix="Add --format lora")
    if format != "hf":
        _check_for_lora(targets, max_shard_size)
    output_dir = str(local_path(output_dir))
    shard_bytes = None if max_shard_size is None else _parse_size(max_shard_size)
    from mirrortune.merging import gguf, lora  # noqa: PLC0415
    from mirrortune.merging import write as merging  # noqa: PLC0415

    where: dict[str, Any] = {"base": base, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    verdict: Any
    if format == "hf":
        more: dict[str, Any] = {"max_shard_bytes": shard_bytes, "force_base": force_base}
        verdict = merging.merge(targets, reporter, output_dir=output_dir, **more, **where)
    else:
        write: Any = lora.export_lora if format == "lora" else gguf.export_gguf
        remarks: list[str] | None = [] if force_base else None
        verdict = write(targets[0], Path(output_dir), rank=rank, remarks=remarks, **where)
        for remark in remarks or ():
            reporter.note(f"by force: {remark}")
    data = {"output_dir": output_dir, "format": format, "verification": asdict(verdict)}
    reporter.result(data, _merge_lines(verdict, output_dir))


def push(
    target: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, adapter folder, or what merge wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ID", help="Repository on the Hub: name or owner/name; created if it does not exist.", show_default=False)], *,
    revision: Annotated[str | None, typer.Option("--revision", metavar="TEXT", help="Branch to push to.", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    replace_card: Annotated[bool, typer.Option("--replace-card", help="Replace a model card in the repository that was written or edited by hand.")] = False,
    json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Upload an adapter or a merged model to the Hub, with a model card; its files are checked first.

    mirrortune push runs/sst2-roberta-base-mirror-scale me/sst2-mirror
    """
    reporter = Reporter(verbosity=-1 if quiet else int(verbose), as_json=json)
    from mirrortune.merging import push as sharing  # noqa: PLC0415

    result = sharing.push(target, repository, reporter, revision=revision, private=private, replace_card=replace_card)
    reporter.result(asdict(result), [f"{result.kind} pushed to {result.repository}: {result.url}"])


def _parse_size(text: str) -> int:
    """Parse ``500MB``, ``2GiB`` or ``1000000`` to a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or not float(found[1]) * _UNITS[found[2].upper()] >= 1:
        raise ConfigError("--max-shard-size", f"got '{text}'", allowed="a size such as 500MB, 2GB or 4GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _check_for_lora(targets: list[str], max_shard_size: str | None) -> None:
    if len(targets) > 1:
        raise ConfigError("--format", f"a LoRA is made of one adapter, got {len(targets)}", fix="Merge plain weights")
    if max_shard_size is not None:
        raise ConfigError("--max-shard-size", "it is for plain weights", fix="Remove it, or use --format hf")


def _merge_lines(verdict: Any, output_dir: str) -> list[str]:
    from mirrortune.merging import gguf, lora, verify  # noqa: PLC0415

    if isinstance(verdict, verify.Verification):
        said = f"merged into {output_dir}, verified: {verdict.describe()}"
        return [said, "", f"score it: mirrortune eval {shell_word(output_dir)}"]
    if isinstance(verdict, lora.GgufExport):
        return [f"LoRA adapter {output_dir}/{gguf.FILE}, verified: {verdict.describe()}"]
    lines = [f"LoRA adapter in {output_dir}, verified: {verdict.describe()}"]
    if verdict.has_head:
        lines.append("its task head is loaded by PEFT, not by LoRA servers such as vLLM; for those merge plain weights")
    return lines
