"""coterie.torch.initialize: against plain PyTorch, against DeepSpeed, and between numbers of ranks."""

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import engine_ranks
import pytest
import torch
from torch import nn

import coterie.torch as ct
from coterie.torch.engine_config import read_config
from coterie.torch.schedules import SCHEDULES, make_schedule

HERE = Path(__file__).parent
TIMEOUT = 180
# fp32 sums of some hundred terms in another order differ by 1e-6 of gradients of size 1; a step of rate 0.02 divides
# them by at least eps = 0.01, and the few steps that follow amplify little.
WEIGHT_TOLERANCE = 1e-5
# Of losses and norms of the script's 32 micro-batches, where eps is 1e-6 and the rate up to 0.01: an element whose
# gradient is as small as its error moves anywhere within the rate, but then hardly matters to the loss.
LOSS_TOLERANCE = 1e-4


def run_program(program: Path, ranks: int, *arguments: object) -> None:
    """As so many ranks under torchrun; with none, as a process that nobody launched."""
    launcher = [] if ranks == 0 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE)}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def run_script(out: Path, ranks: int, *arguments: object, program: Path = HERE / "deepspeed_script.py") -> dict:
    run_program(program, ranks, "--out", out, *arguments)
    return json.loads(out.read_text())


def steps_of(said: dict, passes: int) -> tuple[list[float], list[float]]:
    """Loss and norm of every step."""
    losses = torch.tensor(said["losses"]).view(-1, passes).mean(1).tolist()
    return losses, said["norms"][passes - 1 :: passes]


def make_engine(config: dict, net: nn.Module | None = None, **arguments: object) -> ct.Engine:
    net = net or nn.Linear(4, 3)
    base = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    return ct.initialize(model=net, config={**base, **config}, **arguments)[0]


def micro_step(engine: ct.Engine, x: torch.Tensor) -> float:
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


# Against plain PyTorch.


@pytest.mark.parametrize("ranks", [0, 2, 4])
def test_equals_plain_pytorch(ranks: int, tmp_path: Path) -> None:
    run_program(HERE / "engine_ranks.py", ranks, tmp_path / "out.json")
    for case, differences in json.loads((tmp_path / "out.json").read_text()).items():
        assert max(differences.values()) < WEIGHT_TOLERANCE, (case, differences)


def test_bf16_equals_a_loop_with_fp32_masters() -> None:
    net = engine_ranks.make_net()
    plain = copy.deepcopy(net)
    engine = engine_ranks.make_engine(net, 0, torch.optim.AdamW, bf16={"enabled": True})
    assert engine.bfloat16_enabled() and all(p.dtype == torch.bfloat16 for p in net.parameters())
    assert net.scale.dtype == torch.float32
    for p in plain.parameters():
        p.data = p.data.bfloat16()
    trained = [p for p in plain.parameters() if p.requires_grad]
    masters = [nn.Parameter(p.detach().float()) for p in trained]
    groups = engine_ranks.make_groups(plain)
    master_of = dict(zip(map(id, trained), masters, strict=True))
    for group in groups:
        group["params"] = [master_of[id(p)] for p in group["params"] if id(p) in master_of]
    made = torch.optim.AdamW(groups, lr=engine_ranks.LR, eps=engine_ranks.EPS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, engine_ranks.halved)
    for step in range(engine_ranks.STEPS):
        sums = [torch.zeros_like(m) for m in masters]
        for x, y in engine_ranks.batches(step):
            x = x.bfloat16()
            loss = plain(x, y)
            (loss / engine_ranks.PASSES).backward()
            for total, p in zip(sums, trained, strict=True):
                total += 0 if p.grad is None else p.grad.float()
                p.grad = None
            own = engine(x, y)
            assert own.item() == loss.item()
            engine.backward(own)
            engine.step()
        for total, m in zip(sums, masters, strict=True):
            m.grad = total
        norm = nn.utils.clip_grad_norm_(masters, engine_ranks.CLIP)
        assert engine.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-5)
        made.step()
        schedule.step()
        for own_p, p, m in zip([p for p in net.parameters() if p.requires_grad], trained, masters, strict=True):
            # Masters that differ in the last bits may round to neighbours: 2^-8 of the value. Both go on from ours.
            assert torch.allclose(own_p, m.bfloat16(), rtol=2**-7, atol=0.0)
            assert (own_p != m.bfloat16()).sum() <= 1 + 0.01 * p.numel()
            p.data.copy_(own_p.data)


def test_a_scheduler_of_torch_moves_each_groups_rate() -> None:
    net = nn.Linear(4, 3)
    groups = [{"params": [net.weight], "lr": 0.5}, {"params": [net.bias]}]
    engine = make_engine({}, net, model_parameters=groups, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
    assert engine.get_lr() == [0.5, 0.1]
    micro_step(engine, torch.ones(2, 4))
    assert engine.get_lr() == pytest.approx([0.05, 0.01])
    assert isinstance(engine.optimizer, torch.optim.Optimizer)


def test_a_step_that_overflows_is_left_out_in_bf16() -> None:
    engine = make_engine({"bf16": {"enabled": True}, "scheduler": {"type": "WarmupLR", "params": {}}})
    before = engine.module.weight.clone()
    micro_step(engine, torch.full((8, 4), float("inf"), dtype=torch.bfloat16))
    assert torch.equal(engine.module.weight, before) and engine.skipped_steps == 1
    assert not engine.was_step_applied() and engine.lr_scheduler.last_batch_iteration == -1
    micro_step(engine, torch.ones(8, 4, dtype=torch.bfloat16))
    assert engine.was_step_applied() and engine.optimizer.num_steps == 1 and engine.global_steps == 2


def test_counts_and_properties(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"gradient_accumulation_steps": 2, "steps_per_print": 2, "wall_clock_breakdown": True}
    engine = make_engine({**config, "zero_optimization": {"stage": 1}})
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (8, 4)
    assert (engine.gradient_accumulation_steps(), engine.zero_optimization_stage()) == (2, 1)
    assert (engine.local_rank, engine.global_rank, engine.world_size) == (0, 0, 1)
    x = torch.ones(4, 4)
    scaled = engine.backward(loss := engine(x).square().mean())
    assert scaled.item() == loss.item() / 2
    engine.step()
    assert (engine.micro_steps, engine.global_steps, engine.was_step_applied()) == (1, 0, False)
    for _ in range(3):
        micro_step(engine, x)
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (4, 2, 16)
    line = r"step=2, skipped=0, lr=\[0.1\], mom=\[\(0.9, 0.999\)\], forward=[\d.]+ ms, backward=[\d.]+ ms, step=.*\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    assert engine.in_features == 4  # of the module
    engine.eval()
    assert not engine.module.training
    assert set(engine.module.state_dict()) == {"weight", "bias"}


def test_passes_and_steps_alternate() -> None:
    engine = make_engine({})
    loss = engine(torch.ones(8, 4)).sum()
    with pytest.raises(ValueError, match=r"^step: there was no backward\(\)"):
        engine.step()
    engine.backward(loss, retain_graph=True)
    with pytest.raises(ValueError, match=r"^backward: was called already"):
        engine.backward(loss)


# The script of a user of DeepSpeed.


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Three epochs of 16 micro-batches, two to a step."""
    return run_script(tmp_path_factory.mktemp("alone") / "out.json", 0, "--epochs", 3)


def test_the_script_learns(alone: dict) -> None:
    losses, norms = steps_of(alone, 2)
    assert len(losses) == 24 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert all(norm > 0 for norm in norms)


def test_two_ranks_equal_one(alone: dict, tmp_path: Path) -> None:
    # Two ranks take a step's samples at once, where one takes them in two passes.
    two = run_script(tmp_path / "out.json", 2, "--epochs", 3, "--stage", 2, "--accumulate", 1)
    for ours, expected in zip(steps_of(two, 1), steps_of(alone, 2), strict=True):
        assert ours == pytest.approx(expected, abs=LOSS_TOLERANCE)


STANDARD_TOP2 = "--stage 2 --top-k 2 --mlp-type standard"


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [(ranks, arguments) for ranks in (1, 2) for arguments in ("", "--stage 1", STANDARD_TOP2)]
    + [(2, f"{arguments} --ep-world-size 2") for arguments in ("", "--stage 1", STANDARD_TOP2)],
)
def test_equals_deepspeed(ranks: int, arguments: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    theirs = tmp_path / "script.py"
    theirs.write_text((HERE / "deepspeed_script.py").read_text().replace("coterie.torch", "deepspeed"))
    expected = run_script(tmp_path / "theirs.json", ranks, *arguments.split(), program=theirs)
    ours = run_script(tmp_path / "ours.json", ranks, *arguments.split())
    assert ours["losses"] == pytest.approx(expected["losses"], abs=LOSS_TOLERANCE)
    if None not in expected["norms"][1:]:  # DeepSpeed knows none at stage 0
        assert steps_of(ours, 2)[1] == pytest.approx(steps_of(expected, 2)[1], abs=LOSS_TOLERANCE)


# The configuration.


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, (24, 4, 3)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, (24, 4, 3)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, (24, 4, 3)),
        ({"train_batch_size": 24}, (24, 12, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, (8, 4, 1)),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, (24, 4, 3)),
    ],
)
def test_two_of_three_sizes_give_the_third(config: dict, sizes: tuple) -> None:
    read = read_config(config, world_size=2)
    assert (read.train_batch_size, read.micro_batch_size, read.gradient_accumulation_steps) == sizes


def test_what_changes_nothing_is_accepted() -> None:
    zero = {
        "stage": 2,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
        "allgather_partitions": True,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": False,
        "round_robin_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "stage3_max_live_parameters": 1e9,
    }
    config = {
        "train_batch_size": 4,
        "zero_optimization": zero,
        "fp16": {"enabled": False, "loss_scale": 0},
        "bfloat16": {"enabled": True},
        "tensorboard": {"enabled": False, "output_path": "x"},
        "amp": {"enabled": False},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": None,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    read = read_config(config, 1)
    assert (read.zero_stage, read.reduce_bucket_size, read.bf16, read.gradient_clipping) == (2, 500_000_000, True, 1.0)


def test_states_may_lie_in_files(tmp_path: Path):
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": True}
    weights = []
    for zero in ({}, {"offload_optimizer": offload}):
        torch.manual_seed(3)
        model = nn.Linear(6, 4)
        config = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1, **zero}}
        engine, *_ = ct.initialize(model=model, config=config)
        for step in range(3):
            engine.backward(engine(torch.ones(2, 6) * step).square().sum())
            engine.step()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
    assert not list(tmp_path.iterdir())


REFUSED = [
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3 is not supported"),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        "zero_optimization.offload_optimizer.nvme_path: is missing",
    ),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param.device: 'cpu'"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights: True"),
    ({"zero_optimization": {"stages": 1}}, "zero_optimization.stages: this key"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size: 0 is not a whole"),
    ({"fp16": {"enabled": True}}, "fp16.enabled: True is not supported: kernels for CPUs have no fp16"),
    ({"bf16": {"enabled": "auto"}}, "bf16.enabled: 'auto' is neither"),
    ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states: True"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: 'bf16'"),
    ({"train_batch_size": 9}, "train_batch_size: 9 is not train_micro_batch_size_per_gpu (4)"),
    ({"train_batch_size": "auto"}, "train_batch_size: 'auto' is not a whole"),
    ({"gradient_clipping": -1}, "gradient_clipping: -1 is not a number"),
    ({"prescale_gradients": True}, "prescale_gradients: True is not supported"),
    ({"gradient_predivide_factor": 2}, "gradient_predivide_factor: 2 is not supported"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type: 'Lamb' is not supported, only Adam and AdamW"),
    ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "optimizer.params.max_grad_norm: this key"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "optimizer.params.betas: [0.9] is not a pair"),
    ({"scheduler": {"type": "Warm"}}, "scheduler.type: 'Warm' is none of"),
    ({"scheduler": {"type": "WarmupLR", "params": {"steps": 1}}}, "scheduler.params: .*steps"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "scheduler.params.warmup_num_steps: 0"),
    ({"flops_profiler": {"enabled": True}}, "flops_profiler: {'enabled': True} is not supported unless"),
    ({"sparse_attention": {}}, "sparse_attention: this key is not supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_is_not_honoured_names_itself(config: dict, message: str) -> None:
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match="^" + pattern) as raised:
        make_engine({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, **config})
    assert "\n" not in str(raised.value)


def test_the_configuration_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"train_batch_size": 4, "optimizer": {"type": "Adam"}}))
    args = ct.add_config_arguments(ArgumentParser()).parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    data = torch.arange(10.0).view(10, 1)
    _, optimizer, loader, schedule = ct.initialize(args=args, model=nn.Linear(1, 1), training_data=data)
    assert schedule is None and optimizer.defaults["lr"] == 1e-3
    assert sorted(x for batch in loader for x in batch.flatten().tolist()) == list(range(10))
    with pytest.raises(ValueError, match="^initialize: there is both a config"):
        ct.initialize(args=args, model=nn.Linear(1, 1), config={})
    with pytest.raises(ValueError, match="^initialize: config is missing"):
        ct.initialize(model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match=f"^config: {path}x: No such file"):
        ct.initialize(args=Namespace(deepspeed_config=f"{path}x"), model=nn.Linear(1, 1))


def test_optimizers_that_cannot_be_taken_over_name_themselves() -> None:
    def refusal(optimizer: object, net: nn.Module, parameters: object = None) -> str:
        with pytest.raises(ValueError) as raised:
            ct.initialize(model=net, optimizer=optimizer, model_parameters=parameters, config={"train_batch_size": 1})
        return str(raised.value)

    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert refusal(torch.optim.SGD(net.parameters()), net).startswith("optimizer: SGD is not supported")
    amsgrad = torch.optim.Adam(net.parameters(), amsgrad=True)
    assert refusal(amsgrad, net) == "optimizer: amsgrad=True is not supported"
    assert refusal(None, net) == "optimizer: is missing in the configuration, and none was given"
    strangers = refusal(torch.optim.Adam(other.parameters()), net)
    assert strangers == "model_parameters: 2 of them are none of the model's"
    double = refusal(torch.optim.Adam, nn.Linear(2, 2).double())
    assert double == "model: parameter weight is torch.float64 on cpu, not fp32 or bf16 on the CPU"
    engine = make_engine({}, net)
    with pytest.raises(ValueError, match="^add_param_group"):
        engine.optimizer.add_param_group({"params": [other.weight]})


def test_experts_need_ranks_that_their_degree_divides() -> None:
    net = ct.MoE(4, nn.Linear(4, 4), num_experts=4, ep_size=2)
    assert net.num_local_experts == len(net.deepspeed_moe.experts.deepspeed_experts) == 2
    with pytest.raises(ValueError, match=r"^\[MoE\] ep_size \(2\) does not divide the number of ranks \(1\)$"):
        make_engine({}, net)


def test_experts_get_groups_of_their_own() -> None:
    net = nn.Sequential(nn.Linear(4, 4), ct.MoE(4, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), 2))
    experts = [p for p in net.parameters() if ct.is_moe_param(p)]
    assert [tuple(p.shape) for p in experts] == [(2, 8, 4), (2, 4, 8), (2, 8), (2, 4)]
    given = {"params": list(net.parameters()), "name": "all", "weight_decay": 0.3}
    groups = ct.split_params_into_different_moe_groups_for_optimizer(given)
    assert [group["name"] for group in groups] == ["all", "ep_size_1"] and groups[1]["moe"]
    assert groups[1]["weight_decay"] == 0.3 and groups[1]["params"] == experts
    assert not any(ct.is_moe_param(p) for p in groups[0]["params"])
    given = {"params": list(net.parameters()), "name": "all"}
    groups = ct.split_params_into_different_moe_groups_for_optimizer(given, max_group_size=70)
    assert [[p.numel() for p in group["params"]] for group in groups[1:]] == [[64], [64], [16, 8]]


SCHEDULE_CASES = [
    ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": 0.2, "warmup_num_steps": 5}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear", "warmup_max_lr": 0.3}),
    ("WarmupLR", {"warmup_num_steps": 4}),
    ("WarmupDecayLR", {"total_num_steps": 12, "warmup_max_lr": 0.2, "warmup_num_steps": 5, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 14, "warmup_num_steps": 5, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.02}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4, "decay_step_size": 3,
                  "cycle_second_step_size": 6, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01}),
    ("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 6, "cycle_momentum": False,
                  "cycle_first_stair_count": 3}),
]  # fmt: skip


def points(schedule: object, optimizer: torch.optim.Optimizer) -> list[tuple]:
    seen = []
    for _ in range(20):
        seen.append([(group["lr"], *group["betas"]) for group in optimizer.param_groups])
        schedule.step()
    return seen


def two_groups() -> torch.optim.Adam:
    return torch.optim.Adam([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.4}], lr=0.1)


@pytest.mark.parametrize(("name", "params"), SCHEDULE_CASES)
def test_schedules_equal_deepspeeds(name: str, params: dict) -> None:
    theirs = pytest.importorskip("deepspeed.runtime.lr_schedules")
    expected, made = two_groups(), two_groups()
    expected_points = points(getattr(theirs, name)(expected, **params), expected)
    for ours, theirs_ in zip(points(make_schedule(name, made, params), made), expected_points, strict=True):
        assert ours[0] == pytest.approx(theirs_[0], rel=1e-12) and ours[1] == pytest.approx(theirs_[1], rel=1e-12)


def test_schedules_by_hand() -> None:
    def rates(name: str, **params: object) -> list[float]:
        optimizer = two_groups()
        return [seen[0][0] for seen in points(make_schedule(name, optimizer, params), optimizer)]

    linear = rates("WarmupLR", warmup_max_lr=0.4, warmup_num_steps=4, warmup_type="linear")
    assert linear[:7] == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    decay = rates("WarmupDecayLR", total_num_steps=8, warmup_max_lr=0.4, warmup_num_steps=4, warmup_type="linear")
    assert decay[5:10] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    cosine = rates("WarmupCosineLR", total_num_steps=6, warmup_num_steps=2, cos_min_ratio=0.2)
    root = 0.5**0.5
    assert cosine[3:7] == pytest.approx([0.1 * (0.6 + 0.4 * c) for c in (root, 0.0, -root, -1.0)])
    assert set(SCHEDULES) == {"WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle"}
    assert rates("ConstantLR", factor=0.5, total_iters=3)[0] == 0.05  # torch's


# Checkpoints.


def test_the_script_goes_on_where_it_stopped(alone: dict, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out.json"
    first = run_script(out, 0, "--epochs", 1, "--save", runs)
    second = run_script(out, 0, "--epochs", 2, "--load", runs)
    assert first["losses"] + second["losses"] == alone["losses"][:32]
    assert steps_of(first, 2)[1] + steps_of(second, 2)[1] == steps_of(alone, 2)[1][:16]
    # Two ranks go on from the same, at stage 2 instead of 0 and with half of the experts each; then one at stage 1 with
    # what they saved.
    spread = ("--stage", 2, "--accumulate", 1, "--ep-world-size", 2)
    two = run_script(out, 2, "--epochs", 2, "--load", runs, "--save", runs, *spread)
    assert steps_of(two, 1)[0] == pytest.approx(steps_of(second, 2)[0], abs=LOSS_TOLERANCE)
    assert (runs / "latest").read_text() == "global_step16\n"
    files = ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.pt"]
    assert sorted(path.name for path in (runs / "global_step16").iterdir()) == files
    third = run_script(out, 0, "--epochs", 3, "--load", runs, "--stage", 1)
    assert third["losses"] == pytest.approx(alone["losses"][32:], abs=LOSS_TOLERANCE)


class Counting(nn.Module):
    """Buffers that matter, one of them of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.mean.lerp_(x.detach().float().mean(0), 0.1)
        return x - (self.mean / self.seen).to(x.dtype)


def make_saved(tmp_path: Path, **config: object) -> tuple[ct.Engine, list]:
    """An engine that has saved, with the weights of that moment."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 5}}
    engine = make_engine({"scheduler": scheduler, **config}, nn.Sequential(nn.Linear(4, 3), Counting()))
    train_some(engine, 0, 3)
    client_state = {"epoch": 2, "best": torch.ones(2), "names": ["a"]}
    assert engine.save_checkpoint(str(tmp_path), tag="good", client_state=client_state)
    return engine, [t.clone() for t in engine.module.state_dict().values()]


def test_a_damaged_state_changes_nothing(tmp_path: Path) -> None:
    engine, _ = make_saved(tmp_path)
    state = tmp_path / "good" / "state.pt"
    whole = state.read_bytes()
    train_some(engine, 3, 5)
    before = [t.clone() for t in engine.module.state_dict().values()]
    for content in (b"", whole[: len(whole) // 2], b"text"):
        state.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{state}: is damaged: ")) as refused:
            engine.load_checkpoint(str(tmp_path))
        assert "\n" not in str(refused.value)
    state.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{state}: is missing")):
        engine.load_checkpoint(str(tmp_path))
    for t, value in zip(engine.module.state_dict().values(), before, strict=True):
        assert torch.equal(t, value)


def train_some(engine: ct.Engine, first: int, last: int) -> list[float]:
    generator = torch.Generator().manual_seed(first)
    dtype = next(engine.module.parameters()).dtype
    return [micro_step(engine, torch.randn(8, 4, generator=generator).to(dtype)) for _ in range(first, last)]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_checkpoint_restores_everything(bf16: bool, tmp_path: Path) -> None:
    engine, _ = make_saved(tmp_path, bf16={"enabled": bf16})
    expected = train_some(engine, 3, 7)
    rates = engine.get_lr()
    fresh = make_saved(tmp_path / "other", bf16={"enabled": bf16})[0]
    train_some(fresh, 3, 5)
    path, client_state = fresh.load_checkpoint(str(tmp_path))
    assert path == f"{tmp_path}/good"
    assert client_state["epoch"] == 2 and client_state["names"] == ["a"] and client_state["best"].tolist() == [1, 1]
    assert (fresh.global_steps, fresh.global_samples, fresh.micro_steps) == (3, 24, 3)
    assert train_some(fresh, 3, 7) == expected and fresh.get_lr() == rates
    for ours, theirs in zip(fresh.module.state_dict().values(), engine.module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_parts_of_a_checkpoint(tmp_path: Path) -> None:
    engine, saved = make_saved(tmp_path)
    train_some(engine, 3, 7)
    moved = engine.get_lr()
    engine.load_checkpoint(str(tmp_path), tag="good", load_module_only=True)
    assert all(map(torch.equal, engine.module.state_dict().values(), saved))
    assert engine.global_steps == 7 and engine.get_lr() == moved and engine.optimizer.num_steps == 7
    engine.load_checkpoint(str(tmp_path), load_optimizer_states=False)
    assert engine.global_steps == 3 and engine.optimizer.num_steps == 7 and engine.get_lr() == moved
    engine.load_checkpoint(str(tmp_path), load_lr_scheduler_states=False)
    assert engine.optimizer.num_steps == 3 and engine.get_lr() != moved


def test_tags_and_latest(tmp_path: Path) -> None:
    engine, _ = make_saved(tmp_path / "runs")
    runs = str(tmp_path / "runs")
    train_some(engine, 3, 4)
    engine.save_checkpoint(runs, save_latest=False)
    assert engine.load_checkpoint(runs)[0] == f"{runs}/good"
    assert engine.load_checkpoint(runs, tag="global_step4")[0] == f"{runs}/global_step4"
    engine.save_checkpoint(runs, tag="good")  # replaced
    assert engine.load_checkpoint(runs) == (f"{runs}/good", {}) and engine.global_steps == 4
    assert engine.load_checkpoint(str(tmp_path)) == (None, None)
    with pytest.raises(ValueError, match=f"^load_checkpoint: {runs}/bad is not there"):
        engine.load_checkpoint(runs, tag="bad")
    with pytest.raises(ValueError, match="'a/b' can't be the name of a checkpoint"):
        engine.save_checkpoint(runs, tag="a/b")
    with pytest.raises(ValueError, match="holds no manifest.json"):
        engine.load_checkpoint(str(tmp_path), tag="runs")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    make_saved(tmp_path)
    wide = make_engine({}, nn.Sequential(nn.Linear(4, 5), Counting()))
    with pytest.raises(ValueError, match=r"tensor '0.bias': has shape \[3\], the model's is \[5\]"):
        wide.load_checkpoint(str(tmp_path))
    without = make_engine({}, nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="state.pt: tensor 1.mean is not in the model"):
        without.load_checkpoint(str(tmp_path))
    net = nn.Sequential(nn.Linear(4, 3), Counting())
    grouped = make_engine({}, net, model_parameters=[{"params": [p]} for p in net.parameters()])
    with pytest.raises(ValueError, match="the checkpoint has 1 parameter groups, the run 2"):
        grouped.load_checkpoint(str(tmp_path))
