"""A training program as DeepSpeed's users write them; with `coterie.torch` replaced by `deepspeed` it is one.

A small classifier of images with mixture-of-experts layers, `deepspeed.initialize` with arguments of the command line,
parameter groups, a training loop, checkpoints. `test_initialize.py` runs it, alone and as several ranks, with either
system. The first rank writes the losses of all its steps to --out.
"""

import argparse
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import coterie.torch as deepspeed
from coterie.torch.moe.layer import MoE
from coterie.torch.moe.utils import split_params_into_different_moe_groups_for_optimizer

CLASSES = 5
SIDE = 8


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--ep-world-size", type=int, default=1)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[4, 4])
    parser.add_argument("--mlp-type", default="residual")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--out", required=True)
    return deepspeed.add_config_arguments(parser).parse_args()


class Images(torch.utils.data.Dataset):
    """Noise around a picture of each class."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        pictures = torch.randn(CLASSES, 3, SIDE, SIDE, generator=generator)
        self.labels = torch.arange(count) % CLASSES
        self.images = pictures[self.labels] + torch.randn(count, 3, SIDE, SIDE, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


class Net(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(6 * 3 * 3, 24)
        self.moe_layers = nn.ModuleList(
            MoE(
                hidden_size=24,
                expert=nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)),
                num_experts=num_experts,
                ep_size=args.ep_world_size,
                use_residual=args.mlp_type == "residual",
                k=args.top_k,
                drop_tokens=False,  # as many places as tokens, so that no random choice is made
                top2_2nd_expert_sampling=False,
            )
            for num_experts in args.num_experts
        )
        self.fc2 = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        for layer in self.moe_layers:
            x, _, _ = layer(x)
        return self.fc2(x)


def create_moe_param_groups(model: nn.Module) -> list[dict]:
    parameters = {"params": list(model.parameters()), "name": "parameters"}
    return split_params_into_different_moe_groups_for_optimizer(parameters)


def make_config(args: argparse.Namespace) -> dict:
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": args.accumulate,
        "steps_per_print": 1000,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 0.01, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.01, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 10},
        },
        "gradient_clipping": 0.5,
        "prescale_gradients": False,
        "bf16": {"enabled": args.dtype == "bf16"},
        "fp16": {"enabled": args.dtype == "fp16", "loss_scale": 0, "initial_scale_power": 15},
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": args.stage,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 50000000,
            "reduce_bucket_size": 50000000,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
    }


def main() -> None:
    args = read_arguments()
    deepspeed.init_distributed()
    deepspeed.accelerator.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    net = Net(args)
    engine, _, loader, _ = deepspeed.initialize(
        args=args,
        model=net,
        model_parameters=create_moe_param_groups(net),
        training_data=Images(64),
        config=make_config(args),
    )
    device = deepspeed.accelerator.get_accelerator().device_name(engine.local_rank)
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else None
    criterion = nn.CrossEntropyLoss()
    losses, norms = [], []
    first_epoch = 0
    if args.load:
        _, client_state = engine.load_checkpoint(args.load)
        first_epoch = client_state["epoch"]
    for epoch in range(first_epoch, args.epochs):
        for images, labels in loader:
            images, labels = images.to(device, dtype), labels.to(device)
            loss = criterion(engine(images).float(), labels)
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / dist.get_world_size())
            norms.append(engine.get_global_grad_norm())
        if args.save:
            engine.save_checkpoint(args.save, client_state={"epoch": epoch + 1})
    if dist.get_rank() == 0:
        with open(args.out, "w") as file:
            json.dump({"losses": losses, "norms": [None if n is None else float(n) for n in norms]}, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
