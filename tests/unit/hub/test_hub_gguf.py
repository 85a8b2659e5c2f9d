"""GGUF to Hugging Face folder: against the model the GGUF file was written from, and against dequantisation by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from tests.support.tiny_models import write_tiny_gguf, write_tiny_model

from mint.errors import UnsupportedError
from mint.hub import ModelSource, load_tokenizer
from mint.hub.gguf_convert import convert_llama_gguf, to_bfloat16

TEXTS = [
    "What is the capital of France?\n\n1. Paris\n2. 1234 and 12.50",
    "<|im_start|>user\nHi<|im_end|>\n",
    "naïve café, 東京 №  7\t8",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("original"), "smollm", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_llama_gguf(write_tiny_gguf(folder / "tiny.gguf", original), folder)
    return folder


def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(ModelSource(str(folder), folder, "folder", None, ""))


def test_every_weight_is_the_original_rounded_to_bfloat16(original: Path, converted: Path) -> None:
    expected, found = load_file(original / "model.safetensors"), load_file(converted / "model.safetensors")
    assert sorted(found) == sorted(expected)
    for name, weight in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name


def test_quantised_weights_are_dequantised_exactly(original: Path, tmp_path: Path) -> None:
    """Q4_1: per 32 numbers a float16 scale, a float16 minimum, 16 bytes; low halves first. Q8_0: scale, 32 int8."""
    gguf_file = write_tiny_gguf(tmp_path / "tiny.gguf", original, quantised=True)
    convert_llama_gguf(gguf_file, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    raw = {tensor.name: np.array(tensor.data) for tensor in read_tensors(gguf_file)}
    down = [value for row in raw["blk.1.ffn_down.weight"] for value in q4_1(row.tobytes())]
    embedding = [value for row in raw["token_embd.weight"] for value in q8_0(row.tobytes())]
    query = torch.tensor([q4_1(row.tobytes()) for row in raw["blk.0.attn_q.weight"]])
    # row 2i+h of a head of 16 rows is its row i of half h
    rows = [16 * head + 2 * i + half for head in range(4) for half in range(2) for i in range(8)]
    layers = "model.layers"
    assert torch.equal(found[f"{layers}.1.mlp.down_proj.weight"].flatten(), torch.tensor(down).to(torch.bfloat16))
    assert torch.equal(found["model.embed_tokens.weight"].flatten(), torch.tensor(embedding).to(torch.bfloat16))
    assert torch.equal(found[f"{layers}.0.self_attn.q_proj.weight"], query[rows].to(torch.bfloat16))
    original_query = load_file(original / "model.safetensors")[f"{layers}.0.self_attn.q_proj.weight"]
    assert (query[rows] - original_query).abs().max() < 0.1  # and the order is that of the original


def read_tensors(gguf_file: Path) -> list[Any]:
    import gguf

    return list(gguf.GGUFReader(gguf_file).tensors)


def q4_1(data: bytes) -> list[float]:
    values: list[float] = []
    for start in range(0, len(data), 20):
        scale, minimum = (np.float32(number) for number in struct.unpack("<ee", data[start : start + 4]))
        packed = data[start + 4 : start + 20]
        quants = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
        values += [float(scale * np.float32(quant) + minimum) for quant in quants]
    return values


def q8_0(data: bytes) -> list[float]:
    values: list[float] = []
    for start in range(0, len(data), 34):
        (scale,) = struct.unpack("<e", data[start : start + 2])
        quants = struct.unpack("<32b", data[start + 2 : start + 34])
        values += [float(np.float32(scale) * np.float32(quant)) for quant in quants]
    return values


def test_rounding_to_bfloat16_is_torchs_for_every_kind_of_number() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = [0.0, -0.0, np.inf, -np.inf, 1.0039062, 1.01171875, 3.4e38, 1e-45, -1e-40]
    values: npt.NDArray[np.float32] = np.concatenate([bits.view(np.float32), np.array(special, np.float32)])
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values), expected)


def test_a_nan_stays_a_nan() -> None:
    bits = to_bfloat16(np.array([np.nan], np.float32))
    assert np.isnan((bits.astype(np.uint32) << 16).view(np.float32)).all()


def test_the_configuration_is_the_originals(original: Path, converted: Path) -> None:
    from transformers import AutoConfig

    expected, found = AutoConfig.from_pretrained(original).to_dict(), AutoConfig.from_pretrained(converted).to_dict()
    differing = {key for key in expected if found[key] != expected[key]}
    assert differing <= {"_name_or_path", "dtype"}
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_converted_model_computes_what_the_original_does_and_can_be_trained(
    original: Path, converted: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 43).reshape(1, 40)
    reference = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)


def test_an_untied_output_matrix_is_kept(tmp_path: Path) -> None:
    original = write_tiny_model(tmp_path / "untied", "smollm", tied=False)
    (tmp_path / "converted").mkdir()
    convert_llama_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", original), tmp_path / "converted")
    found = load_file(tmp_path / "converted" / "model.safetensors")
    expected = load_file(original / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found["lm_head.weight"], expected.to(torch.bfloat16))
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_the_originals_ids_and_decodes_to_the_text(
    text: str, original: Path, converted: Path
) -> None:
    expected, found = tokenizer_of(original), tokenizer_of(converted)
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert found.decode(found(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own_and_does_not_break_the_newlines_before_it(converted: Path) -> None:
    assert tokenizer_of(converted).tokenize("\n\n1 120") == ["ĊĊ", "1", "Ġ", "1", "2", "0"]


def test_special_tokens_template_and_length_survive(original: Path, converted: Path) -> None:
    tokenizer = tokenizer_of(converted)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.model_max_length == 512
    assert tokenizer.chat_template == (original / "chat_template.jinja").read_text()
    assert tokenizer.decode([0, 1, 2], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("add_tokenizer_pre", "qwen2", "tiny.gguf has tokenizer.ggml.pre = 'qwen2'; only 'smollm' can be converted"),
        ("add_tokenizer_model", "llama", "tiny.gguf has tokenizer.ggml.model = 'llama'; only 'gpt2' can be converted"),
        ("add_tokenizer_pre", None, "tiny.gguf has no 'tokenizer.ggml.pre', which the conversion needs"),
    ],
)
def test_another_tokenizer_is_refused_by_name(
    method: str, value: str | None, message: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    add = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, _: add(self, value) if value else None)
    with pytest.raises(UnsupportedError) as caught:
        convert_llama_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", original), tmp_path)
    assert str(caught.value).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_another_architecture_is_refused_by_name(original: Path, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"general\.architecture = 'gemma3'; only 'llama' can be converted"):
        convert_llama_gguf(tmp_path / "other.gguf", tmp_path)


def test_an_unknown_tensor_is_refused_by_name(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.tiny_models._gguf_name", lambda name: name.replace("mlp.up_proj", "ffn_new"))
    with pytest.raises(UnsupportedError, match=r"has a tensor 'model.*' that the conversion does not know"):
        convert_llama_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", original), tmp_path)
