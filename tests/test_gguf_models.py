"""GGUF files of every architecture that we read, against transformers: tiny models, written with the gguf package."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import Encoded, add_metadata, as_fp32, write_model
from transformers import PreTrainedModel

from coterie import LLM, CorruptFile, InvalidArgument, _engine
from coterie.cli import main
from coterie.tokenizer import ChatTokenizer

TOLERANCE = 1e-4  # as in test_parity.py

# The tiny model, and the name of its architecture in GGUF.
FILES = {
    "llama": "llama",
    "llama_biased_untied": "llama",
    "llama3": "llama",
    "mixtral": "llama",
    "qwen2_plain": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe_sparse": "qwen2moe",
    "qwen3_moe_sparse": "qwen3moe",
    "olmoe": "olmoe",
    "granite_moe": "granitemoe",
    "phimoe_published": "phimoe",
    "glm4_moe": "glm4moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v2_lite": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}


def build(name: str) -> PreTrainedModel:
    """A tiny model of what its GGUF files can say."""
    if name == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "original_max_position_embeddings": 64}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return tiny_models.seeded(lambda: tiny_models.llama_scaled(rope), seed=1)
    if name == "qwen2_plain":  # no windows
        return tiny_models.changed("qwen2", use_sliding_window=False, layer_types=None)
    if name == "qwen2_moe_sparse":  # a MoE in every layer, weights not normalised
        return tiny_models.changed("qwen2_moe", decoder_sparse_step=1, norm_topk_prob=False)
    if name == "qwen3_moe_sparse":
        return tiny_models.changed("qwen3_moe", mlp_only_layers=[])
    if name == "phimoe_published":
        return tiny_models.changed("phimoe", router_jitter_noise=0.01)
    if name == "deepseek_v2_lite":  # one mscale for both
        model = tiny_models.build("deepseek_v2_greedy")
        rope = {**model.config.rope_parameters, "mscale": 0.9, "mscale_all_dim": 0.9}
        return tiny_models.changed("deepseek_v2_greedy", rope_parameters=rope)
    return tiny_models.build(name)


@pytest.mark.parametrize("name", list(FILES))
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    path = write_model(tmp_path / "model.gguf", FILES[name], model)
    token_ids = tiny_models.prompt(100, seed=100)
    expected = model(torch.tensor([token_ids])).logits[0].numpy()
    actual = _engine.Engine(str(path), dtype="fp32", threads=2).logits(token_ids)
    assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


def test_surplus_experts_are_refused(tmp_path: Path) -> None:
    model = build("mixtral")
    model.config.num_local_experts = 6
    path = write_model(tmp_path / "model.gguf", "llama", model)
    with pytest.raises(Exception, match=r"blk.0.ffn_gate_inp.weight: shape \[7, 48\] is not \[6, 48\]"):
        LLM(path)


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    model = build("qwen3")
    writer = GGUFWriter(tmp_path / "model.gguf", "qwen3")
    add_metadata(writer, "qwen3", model)
    writer.add_attn_logit_softcapping(30.0)
    writer.add_tensor("token_embd.weight", np.zeros((131, 48), dtype=np.float32))
    for index in range(3):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", np.zeros(48, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidArgument, match=r"qwen3\.attn_logit_softcapping.*is not supported"):
        _engine.model_config(str(tmp_path / "model.gguf"))


def test_names_that_are_not_text_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "model.gguf", "qwen3", build("qwen3"))
    path.write_bytes(path.read_bytes().replace(b"blk.2.ffn_up.weight", b"blk.2.ffn_up.weigh\xff"))
    name = r"'blk\.2\.ffn_up\.weigh\\xff'"
    with pytest.raises(CorruptFile, match=f"{path}: tensor {name}: a name that is not UTF-8$"):
        _engine.stored_tensors(str(path))
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    path = write_model(tmp_path / "other.gguf", "qwen3", build("qwen3"), add=add_surplus)
    path.write_bytes(path.read_bytes().replace(b"surplus", b"sur\n\xff\x1b["))
    with pytest.raises(CorruptFile, match=r"'sur\\x0a\\xff\\x1b\[': not a tensor of this model$"):
        LLM(path)


def add_surplus(writer: GGUFWriter) -> None:
    """A tensor that no model has."""
    writer.add_tensor("surplus", np.zeros(3, dtype=np.float32))


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    """Of a type that gguf-py does not write: random codes with scales that make weights of about 0.1, around 0."""
    scales = {"Q2_K": {80: 1, 82: 1.5}, "Q4_K": {0: 1, 2: 7.5}, "Q3_K": {108: 1}, "Q6_K": {208: 1}}
    scales |= {"IQ4_NL": {0: 1}, "IQ4_XS": {0: 1}}
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // elements, size), dtype=np.uint8)

    def scaled(factor: float) -> np.ndarray:
        for offset, scale in scales[kind.name].items():
            data[..., offset : offset + 2] = np.frombuffer(np.float16(factor * scale).tobytes(), np.uint8)
        return data.reshape(*shape[:-1], -1)

    spread = gguf.quants.dequantize(scaled(0.001), kind).std()
    return scaled(0.001 * 0.1 / spread)


def quantized(types: dict[str, str]) -> Callable[[str, np.ndarray], Encoded]:
    """Tensors whose name has a key of `types` in it as that type; the model gets the values that are left of them."""

    def encode(stored: str, values: np.ndarray) -> Encoded:
        name = next((name for part, name in types.items() if part in stored), None)
        if name is None:
            return as_fp32(stored, values)
        kind = GGMLQuantizationType[name]
        try:
            data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        except NotImplementedError:
            data = random_blocks(values.shape, kind, seed=len(stored))
        values[...] = gguf.quants.dequantize(data, kind)
        return data, kind

    return encode


# Gates, ups and downs of experts; files differ in what they mix.
EXPERT_TYPES = [
    ("Q8_0", "Q8_0", "Q8_0"),
    ("Q4_0", "Q4_0", "Q5_1"),
    ("Q4_K", "Q4_K", "Q6_K"),
    ("Q2_K", "Q2_K", "Q3_K"),
    ("IQ4_XS", "IQ4_XS", "IQ4_NL"),
    ("MXFP4", "Q4_1", "Q5_0"),
]


@pytest.mark.parametrize("arch", ["qwen3moe", "olmoe"])
@pytest.mark.parametrize("types", EXPERT_TYPES, ids="-".join)
@torch.no_grad()
def test_quantized_experts(arch: str, types: tuple[str, str, str], tmp_path: Path) -> None:
    """The oracles: transformers on what gguf-py dequantizes, and a directory with those weights in fp32."""
    name, sizes = {
        "qwen3moe": ("qwen3_moe", {"mlp_only_layers": [], "moe_intermediate_size": 256}),
        "olmoe": ("olmoe", {"intermediate_size": 256}),
    }[arch]
    # Rows of 256, a block of the largest types.
    sizes |= {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.1}
    model = tiny_models.changed(name, **sizes)
    kinds = dict(zip(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), types, strict=True))
    file = write_model(tmp_path / "model.gguf", arch, model, quantized({**kinds, "attn_v": "Q8_0"}))
    stored = {tensor["name"]: tensor["dtype"] for tensor in _engine.stored_tensors(str(file))}
    assert [stored[f"blk.1.{part}.weight"] for part in kinds] == list(types)

    directory = tiny_models.save(model, tmp_path / "dequantized")
    token_ids = tiny_models.prompt(60, seed=60)
    expected = model(torch.tensor([token_ids])).logits[0].numpy()
    for dtype in ("fp32", "bf16", "int8", "int4"):
        actual = _engine.Engine(str(file), dtype=dtype, threads=2).logits(token_ids)
        assert np.array_equal(actual, _engine.Engine(str(directory), dtype=dtype, threads=2).logits(token_ids)), dtype
        if dtype == "fp32":
            assert np.abs(actual - expected).max() < TOLERANCE * np.abs(expected).max()


def test_types_that_are_not_read_are_refused_at_once(tmp_path: Path) -> None:
    def encode(stored: str, values: np.ndarray) -> Encoded:
        kind = GGMLQuantizationType.IQ2_XS
        if stored != "blk.2.ffn_down_exps.weight":
            return as_fp32(stored, values)
        return np.zeros((*values.shape[:-1], values.shape[-1] // 256 * 74), dtype=np.uint8), kind

    model = tiny_models.changed("olmoe", intermediate_size=256)
    path = write_model(tmp_path / "model.gguf", "olmoe", model, encode)
    message = r"model.gguf: tensor 'blk.2.ffn_down_exps.weight': type: IQ2_XS is not one of F32, F16, "
    with pytest.raises(InvalidArgument, match=message):
        LLM(path, dtype="int8", mmap=True)
    assert list(tmp_path.iterdir()) == [path], "something was written before"
    with pytest.raises(InvalidArgument, match=message):
        _engine.quantize_model(str(path), str(tmp_path / "out"), "int8", "", "", 1, lambda done, total: None)
    assert list(tmp_path.iterdir()) == [path]


def write_parts(directory: Path, model: PreTrainedModel) -> list[Path]:
    """The model as three files."""

    def add_tokenizer(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([chr(ord("!") + i) for i in range(90)])
        writer.add_token_types([1] * 90)
        writer.add_token_merges([])

    num_tensors = len(model.state_dict()) + model.config.num_hidden_layers  # gates and ups lie apart
    write_model(directory / "m.gguf", "olmoe", model, split_max_tensors=-(-num_tensors // 3), add=add_tokenizer)
    files = sorted(directory.glob("m-*.gguf"))
    assert [file.name for file in files] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return files


@pytest.fixture
def split_model(tmp_path: Path) -> list[Path]:
    (tmp_path / "model").mkdir()
    return write_parts(tmp_path / "model", build("olmoe"))


def test_a_split_model_is_opened_from_any_part(split_model: list[Path], tmp_path: Path) -> None:
    token_ids = tiny_models.prompt(60)
    whole = write_model(tmp_path / "whole.gguf", "olmoe", build("olmoe"))
    expected = LLM(whole, dtype="fp32").logits(token_ids)
    for path in (*split_model, split_model[0].parent):
        assert np.array_equal(LLM(path, dtype="fp32").logits(token_ids), expected)
    assert ChatTokenizer.load(split_model[2]).encode("A!") == [32, 0]
    assert len(_engine.stored_tensors(str(split_model[1]))) == len(_engine.stored_tensors(str(whole)))


def test_a_missing_part_is_named(split_model: list[Path]) -> None:
    split_model[1].unlink()
    for path in (split_model[0], split_model[2], split_model[0].parent):
        with pytest.raises(CorruptFile, match=f"{split_model[1]}: is missing; 3 files make up the model"):
            LLM(path)


def test_a_wrong_number_of_tensors_is_refused(split_model: list[Path]) -> None:
    content = split_model[0].read_bytes()
    at = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    count = int.from_bytes(content[at : at + 4], "little")
    split_model[0].write_bytes(content[:at] + (count + 1).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(CorruptFile, match=rf"split.tensors.count': {count + 1} is not {count}, the number of tensors"):
        LLM(split_model[2])


def test_other_files_beside_the_parts_of_a_model_are_refused(split_model: list[Path]) -> None:
    shutil.copy(split_model[0], split_model[0].with_name("other.gguf"))
    with pytest.raises(InvalidArgument, match=r"nor exactly one .gguf file \(4 found\)"):
        LLM(split_model[0].parent)


def test_packed_weights_of_all_parts_are_one_file(split_model: list[Path]) -> None:
    for path in (*split_model[::-1], split_model[0].parent):
        LLM(path, dtype="int8", mmap=True)
    (packed,) = split_model[0].parent.glob("*.coterie")
    assert packed.name.startswith(split_model[0].name)


def test_a_file_named_like_a_part_that_is_a_whole_model_has_packed_weights_of_its_own(tmp_path: Path) -> None:
    token_ids = tiny_models.prompt(20)
    files = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for seed, file in enumerate(files):
        write_model(file, "olmoe", tiny_models.seeded(tiny_models.olmoe, seed=seed))
    actual = [LLM(file, dtype="int8", mmap=True).logits(token_ids) for file in files]
    assert not np.array_equal(*actual)
    assert len(list(tmp_path.glob("*.coterie"))) == 2


def test_packed_weights_are_made_anew_when_any_part_has_changed(split_model: list[Path], tmp_path: Path) -> None:
    token_ids = tiny_models.prompt(20)
    before = LLM(split_model[0], dtype="int8", mmap=True).logits(token_ids)
    (tmp_path / "other").mkdir()
    shutil.copy(write_parts(tmp_path / "other", tiny_models.seeded(tiny_models.olmoe, seed=0))[1], split_model[1])
    after = LLM(split_model[0], dtype="int8", mmap=True).logits(token_ids)
    assert not np.array_equal(after, before)
    assert np.array_equal(after, LLM(split_model[0], dtype="int8", weight_cache=False).logits(token_ids))
