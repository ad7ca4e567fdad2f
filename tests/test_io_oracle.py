"""Files held against the packages that define their formats: gguf for GGUF, safetensors for safetensors."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM

from coterie import _engine

QUANTIZED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
QUANTIZED += ["IQ4_NL", "IQ4_XS", "MXFP4"]
# Offsets of the half-precision scales in a block.
SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
    "MXFP4": [],
}
CONFIG = {
    "architectures": ["CoterieForCausalLM"],
    "model_type": "coterie",
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "layers": [{"num_experts": 0, "intermediate_size": 5}],
}
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.input_norm.weight": (6,),
    "model.layers.0.attention.q_proj.weight": (8, 6),
    "model.layers.0.attention.k_proj.weight": (4, 6),
    "model.layers.0.attention.v_proj.weight": (4, 6),
    "model.layers.0.attention.o_proj.weight": (6, 8),
    "model.layers.0.post_attention_norm.weight": (6,),
    "model.layers.0.mlp.up.weight": (10, 6),
    "model.layers.0.mlp.down.weight": (6, 5),
    "model.norm.weight": (6,),
}


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal fp32 arrays bit by bit; NaNs only have to be NaNs."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(actual), ~number)
    assert np.array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))


def write_gguf(path: Path, data: np.ndarray, kind: GGMLQuantizationType) -> str:
    """One tensor "w": values for F32 and F16, otherwise bytes [rows, bytes of a row]."""
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("w", data, raw_dtype=kind if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """Bytes of any value, but for the scales, which are finite."""
    _, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for offset in SCALES[name]:
        scales = rng.integers(0, 1 << 16, (rows, blocks), dtype=np.uint16)
        scales[~np.isfinite(scales.view(np.float16))] = 0x8001  # the least subnormal, negative
        data[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
    return data.reshape(rows, blocks * size)


@pytest.mark.parametrize("name", QUANTIZED)
def test_random_blocks_dequantize_as_gguf_py_does(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    data = random_blocks(name, rows=3, blocks=40)
    path = write_gguf(tmp_path / "w.gguf", data, kind)
    with np.errstate(over="ignore"):  # the largest scales of MXFP4 make infinities
        expected = gguf.quants.dequantize(data, kind)
    assert_same_bits(_engine.read_tensor(path, "w"), expected)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_values_come_back(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    data = gguf.quants.quantize(values, kind)
    path = write_gguf(tmp_path / "w.gguf", data, kind)
    actual = _engine.read_tensor(path, "w")
    assert_same_bits(actual, gguf.quants.dequantize(data, kind))
    # A step of 4 bits is at most an eighth of a block's largest value (Q4_0), here below 4.5.
    assert np.abs(actual - values).max() < 4.5 / 8
    assert _engine.stored_tensors(path) == [{"name": "w", "shape": [5, 96], "dtype": name, "bytes": data.nbytes}]


def test_all_half_and_bfloat16_patterns(tmp_path: Path) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    half = patterns.view(np.float16)
    path = write_gguf(tmp_path / "half.gguf", half, GGMLQuantizationType.F16)
    assert_same_bits(_engine.read_tensor(path, "w"), half.astype(np.float32))
    path = write_gguf(tmp_path / "bfloat16.gguf", patterns.view(np.uint8), GGMLQuantizationType.BF16)
    assert_same_bits(_engine.read_tensor(path, "w"), (patterns.astype(np.uint32) << 16).view(np.float32))


def test_every_tensor_of_smollm2_equals_gguf_py(smollm2: Path) -> None:
    stored = {tensor["name"]: tensor for tensor in _engine.stored_tensors(str(smollm2))}
    tensors = GGUFReader(smollm2).tensors
    assert len(stored) == len(tensors) == 272
    for tensor in tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        shape = [int(n) for n in tensor.shape[::-1]]
        assert stored[tensor.name] == {
            "name": tensor.name,
            "shape": shape,
            "dtype": kind.name,
            "bytes": int(tensor.n_bytes),
        }
        expected = gguf.quants.dequantize(tensor.data, kind).reshape(shape)
        assert_same_bits(_engine.read_tensor(str(smollm2), tensor.name), expected)


def test_metadata_of_smollm2_equals_gguf_py(smollm2: Path) -> None:
    fields = GGUFReader(smollm2).fields
    expected = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert _engine.gguf_metadata(str(smollm2)) == expected


def test_smollm2_is_the_model_that_transformers_loads(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    config = json.loads(_engine.model_config(str(smollm2)))
    for key in ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "max_position_embeddings", "tie_word_embeddings", "bos_token_id"]:  # fmt: skip
        assert config[key] == getattr(model.config, key), key
    # <|im_end|>, and <|endoftext|>, which the file does not name.
    assert config["eos_token_id"] == [model.config.eos_token_id, 0]
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert np.float32(config["norm_eps"]) == np.float32(model.config.rms_norm_eps)
    weights = _engine.load_weights(str(smollm2))
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    for layer in (f"model.layers.{n}." for n in range(len(config["layers"]))):
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"]:  # rows of q and k lie reordered in the file
            assert_same_bits(weights[f"{layer}attention.{name}.weight"], expected[f"{layer}self_attn.{name}.weight"])
        gate_up = np.concatenate([expected[f"{layer}mlp.{name}.weight"] for name in ["gate_proj", "up_proj"]])
        assert_same_bits(weights[layer + "mlp.up.weight"], gate_up)
        assert_same_bits(weights[layer + "mlp.down.weight"], expected[layer + "mlp.down_proj.weight"])
        assert_same_bits(weights[layer + "input_norm.weight"], expected[layer + "input_layernorm.weight"])
        assert_same_bits(
            weights[layer + "post_attention_norm.weight"], expected[layer + "post_attention_layernorm.weight"]
        )
    for name in ["model.embed_tokens.weight", "model.norm.weight"]:
        assert_same_bits(weights[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"w": torch.randn(3, 5).to(dtype), "scalar": torch.tensor(2.5, dtype=dtype), "é": torch.ones(0, 2)}
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert {t["name"]: tuple(t["shape"]) for t in _engine.stored_tensors(path)} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        assert_same_bits(_engine.read_tensor(path, name), tensor.float().numpy())


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    """In: two shards and an index, written by safetensors. Out: one file, read by safetensors."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    source, written = tmp_path / "source", tmp_path / "written"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for shard, names in {"1.safetensors": list(SHAPES)[::2], "2.safetensors": list(SHAPES)[1::2]}.items():
        safetensors.torch.save_file({name: tensors[name] for name in names}, source / shard)
        weight_map |= dict.fromkeys(names, shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    _engine.export_model(str(source), str(written), "CoterieForCausalLM")
    loaded = safetensors.torch.load_file(written / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name].numpy(), tensor.numpy())
    with safetensors.safe_open(written / "model.safetensors", "pt") as file:
        assert (file.metadata() or {}).get("format") == "pt"  # what transformers asks for


def test_messages_reach_python(tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(b"\xff" * 16)
    with pytest.raises(_engine.CorruptFile, match="hostile.safetensors: header: length 18446744073709551615 exceeds"):
        _engine.stored_tensors(str(path))
    with pytest.raises(_engine.InvalidArgument, match="absent.gguf: No such file or directory"):
        _engine.gguf_metadata(str(tmp_path / "absent.gguf"))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = Path(write_gguf(tmp_path / "w.gguf", np.zeros((1, 32), np.float32), GGMLQuantizationType.F32))
    path.write_bytes(path.read_bytes().replace(b"llama", b"ll\xffma", 1))
    with pytest.raises(_engine.CorruptFile, match="w.gguf: metadata 'general.architecture': text that is not UTF-8"):
        _engine.gguf_metadata(str(path))
