"""The program that test_initialize.py runs as several ranks: the engine against plain PyTorch on the whole batch.

`python engine_ranks.py OUT`: the first rank writes, for every ZeRO stage, the largest difference of a weight, of a loss
and of a norm, relative to the norm.
"""

import json
import sys
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import coterie.torch as ct

STEPS, PASSES, MICRO_BATCH = 4, 2, 8
D, CLASSES = 16, 7
LR, EPS, CLIP = 0.02, 1e-2, 0.05


class Net(nn.Module):
    """A linear layer, a norm, experts, a frozen matrix, a buffer, and a matrix that no loss ever reaches."""

    def __init__(self, ep_size: int = 1, looped: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        middle = nn.Softplus() if looped else nn.ReLU()  # what no kernel of ours has
        expert = nn.Sequential(nn.Linear(D, 2 * D), middle, nn.Linear(2 * D, D))
        self.moe = ct.MoE(
            D, expert, num_experts=4, ep_size=ep_size, k=2, drop_tokens=False, top2_2nd_expert_sampling=False
        )
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.unused = nn.Linear(D, 3)
        self.head = nn.Linear(D, CLASSES)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(self.inner(x))
        h = h + self.moe(h)[0] + self.scale * self.frozen(h)
        return F.cross_entropy(self.head(h).float(), y)


def make_groups(net: nn.Module) -> list[dict]:
    """Matrices with a decay, the rest with another learning rate and without."""
    matrices = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "lr": 2 * LR, "betas": (0.7, 0.9)}]


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of all ranks of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(PASSES, MICRO_BATCH, D, generator=generator)
    y = torch.randint(0, CLASSES, (PASSES, MICRO_BATCH), generator=generator)
    return list(zip(x, y, strict=True))


def halved(step: int) -> float:
    return 0.5 ** (step // 2)


def train_plainly(net: nn.Module, optimizer: type[torch.optim.Optimizer]) -> tuple[list[float], list[float]]:
    made = optimizer(make_groups(net), lr=LR, eps=EPS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, halved)
    losses, norms = [], []
    for step in range(STEPS):
        for x, y in batches(step):
            loss = net(x, y)
            (loss / PASSES).backward()
            losses.append(loss.item())
        for p in net.parameters():  # what no loss reaches decays, as with DeepSpeed, where torch leaves it alone
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), CLIP)))
        made.step()
        made.zero_grad()
        schedule.step()
    return losses, norms


def make_engine(net: nn.Module, stage: int, optimizer: type[torch.optim.Optimizer], **config: object) -> ct.Engine:
    made = optimizer(make_groups(net), lr=LR, eps=EPS, weight_decay=0.0)
    engine, *_ = ct.initialize(
        model=net,
        optimizer=made,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(made, halved),
        config={
            "train_batch_size": PASSES * MICRO_BATCH,
            "gradient_accumulation_steps": PASSES,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 700},
            **config,
        },
    )
    return engine


def train(engine: ct.Engine, first_step: int = 0, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Each rank on its stretch of every micro-batch; the losses are of all ranks."""
    losses, norms = [], []
    for step in range(first_step, first_step + steps):
        for x, y in batches(step):
            own = slice(engine.global_rank, MICRO_BATCH, engine.world_size)
            loss = engine(x[own], y[own])
            assert engine.is_gradient_accumulation_boundary() == (len(losses) % PASSES == PASSES - 1)
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            if engine.world_size > 1:
                dist.all_reduce(mean)
            losses.append(mean.item() / engine.world_size)
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def make_net(ep_size: int = 1, looped: bool = False) -> Net:
    """With experts that differ; the values of an expert are the same on whatever rank it is."""
    torch.manual_seed(3)
    net = Net(ep_size, looped)
    with torch.no_grad():
        for p, name, first, rows in net.moe.logical_experts(part_of(ep_size)):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = 0.3 * torch.randn(rows or len(p), *p.shape[1:], generator=generator)
            p.copy_(whole[first : first + len(p)])
    return net


def part_of(ep_size: int) -> int:
    return dist.get_rank() % ep_size if ep_size > 1 else 0


def largest_difference(net: Net, whole: Net) -> float:
    """Between a rank's parameters and those of the model that has all experts."""
    shared = dict(whole.named_parameters())
    pairs = [(p, shared[name]) for name, p in net.named_parameters() if ".experts." not in name]
    experts = {name: p for p, name, _, _ in whole.moe.logical_experts(0)}
    for p, name, first, rows in net.moe.logical_experts(part_of(net.moe.ep_size)):
        pairs.append((p, experts[name][first : first + len(p)] if rows else experts[name]))
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return difference.item()


def main() -> None:
    torch.set_num_threads(1)
    ct.init_distributed()
    adam, adam_w = torch.optim.Adam, torch.optim.AdamW
    cases = [(0, adam_w, 1, False), (1, adam_w, 1, False), (2, adam_w, 1, False), (2, adam, 1, True)]
    if dist.get_world_size() > 1:
        cases += [(0, adam_w, 2, False), (2, adam_w, 2, False), (1, adam_w, 2, True)]
    if dist.get_world_size() > 2:
        cases = cases[-3:] + [(2, adam_w, 4, False)]
    differences = {}
    for stage, optimizer, ep_size, looped in cases:
        net, plain = make_net(ep_size, looped), make_net(1, looped)
        if ep_size == 1 and dist.get_rank() > 0:  # the first rank's values count
            with torch.no_grad():
                for p in net.parameters():
                    p.zero_()
        losses, norms = train(make_engine(net, stage, optimizer))
        plain_losses, plain_norms = train_plainly(plain, optimizer)
        differences[f"{optimizer.__name__}, stage {stage}, ep_size {ep_size}, looped {looped}"] = {
            "weights": largest_difference(net, plain),
            "losses": max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)),
            "norms": max(abs(a / b - 1) for a, b in zip(norms, plain_norms, strict=True)),
        }
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(differences, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
