"""One update of a model, and everything that the next one depends on."""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdr.errors import SDRError
from sdr.loading import Batch
from sdr.losses import Losses
from sdr.objective import build_objective
from sdr.train_config import TrainConfig, learning_rate

FIGURES = (*Losses._fields, "grad_norm", "skipped")  # of an update, as Trainer.step returns them


class Trainer:
    """Model, losses, optimiser and moving average of one run; ``step`` is one update.

    Args:
        config: of the run.
        fabric: launched, see :func:`sdr.engine.make_fabric`.
    """

    def __init__(self, config: TrainConfig, fabric) -> None:
        self.config, self.fabric = config, fabric
        torch.manual_seed(config.seed)
        self.module = fabric.setup_module(build_objective(config))
        self.objective = self.module.module
        self.norms = [m for m in self.module.modules() if isinstance(m, nn.BatchNorm3d)]
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        # fused, since that one leaves the weights alone where found_inf says so, without the host
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.averages = [value.detach().clone() for value in self._averaged()] if config.ema else []
        self.hosts = host_group() if fabric.world_size > 1 and fabric.device.type == "cuda" else None
        # dropout differs between processes
        rank = fabric.global_rank
        drawn = int(np.random.SeedSequence([config.seed, rank]).generate_state(1)[0]) if rank else config.seed
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(drawn)

    def step(self, batches: Sequence[Batch], *, epoch: float) -> Tensor:
        """One update; a non-finite loss or gradient leaves every weight and statistic as it was.

        Nothing here waits for the device.

        Args:
            batches: the ``accumulate`` parts of the update.
            epoch: passes over the data until now, fractions too; sets the learning rate.

        Returns:
            [7] float32 on the device, named by FIGURES: losses, means over parts and processes; length of the
            gradient, before it is clipped; 1 where the update was skipped.
        """
        self.module.train()
        if self.config.bn == "frozen":
            for norm in self.norms:
                norm.eval()
        buffers = list(self.module.buffers())
        kept = [buffer.clone() for buffer in buffers]
        losses = torch.zeros(len(Losses._fields), device=self.fabric.device)
        for number, batch in enumerate(batches, 1):
            with self.fabric.no_backward_sync(self.module, enabled=number < len(batches)):
                parts = self.module(batch.views, batch.labels)
                self.fabric.backward(parts[0] / len(batches))
            losses += parts.detach() / len(batches)
        if self.fabric.world_size > 1:
            dist.all_reduce(losses)  # not Fabric's, which has a barrier that waits for the GPU
            losses /= self.fabric.world_size
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        skipped = ~(losses[0].isfinite() & norm.isfinite())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.update()
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(torch.where(skipped, before, buffer))
            self._average(skipped)
        return torch.cat([losses, norm[None], skipped[None].float()])

    def _gradient_norm(self) -> Tensor:
        """Length of the gradient over all processes, which is clipped to ``clip_norm``."""
        held = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in held])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP's shards
        if self.config.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(held, self.config.clip_norm, norm)
        return norm.float()

    def _averaged(self) -> list[Tensor]:
        """What the moving average is of: parameters and running statistics."""
        return [*self.parameters, *(b for b in self.module.buffers() if b.is_floating_point())]

    def _average(self, skipped: Tensor) -> None:
        if self.averages:
            averages, live = (
                [local(value.detach()) for value in values] for values in (self.averages, self._averaged())
            )
            change = torch._foreach_sub(live, averages)
            torch._foreach_mul_(change, (1 - self.config.ema) * (~skipped).float())
            torch._foreach_add_(averages, change)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights, where there is one."""
        live = [value.detach() for value in self._averaged()] if self.averages else []
        kept = [value.clone() for value in live]
        with torch.no_grad():
            for value, average in zip(live, self.averages, strict=True):
                value.copy_(average)
            try:
                yield
            finally:
                for value, before in zip(live, kept, strict=True):
                    value.copy_(before)
                for part in self.module.modules():
                    if hasattr(part, "reshard"):  # FSDP's, which would keep the average that it has gathered
                        part.reshard()

    def share_buffers(self) -> None:
        """Rank 0's running statistics for every process: the ones that are validated and written."""
        if self.fabric.world_size > 1:
            for buffer in (*self.module.buffers(), *self.averages[len(self.parameters) :]):
                dist.broadcast(buffer, 0)

    def weights(self) -> dict[str, Tensor]:
        """The whole model's state_dict on the CPU, on rank 0; empty on others. Every process must call it."""
        state = self._model_state()
        return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}

    def _model_state(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(self.objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {name: value.clone() for name, value in state.items()}  # on a CPU they are the weights themselves

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors by name, and values of JSON, to go on from; on rank 0. Every process must call it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        self.share_buffers()
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = {f"now.{name}": value for name, value in self._model_state().items()}
        moments = get_optimizer_state_dict(self.objective, self.optimizer, options=whole).get("state", {})
        tensors |= {f"adam.{key}.{name}": value for name, state in moments.items() for key, value in state.items()}
        if self.averages:
            with self.averaged():
                tensors |= {f"average.{name}": value for name, value in self._model_state().items()}
        for rank, generators in enumerate(self.gather(generator_states(self.fabric.device))):
            tensors |= {f"generator.{rank}.{name}": value for name, value in generators.items()}
        return tensors, {"scaler": self.scaler.state_dict() if self.scaler else {}}

    def gather(self, value: object) -> list:
        """The value of every process, on each of them."""
        if self.fabric.world_size == 1:
            return [value]
        found = [None] * self.fabric.world_size
        dist.all_gather_object(found, value, group=self.hosts)
        return found

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """Go on where :meth:`state` was taken, by as many processes; each must have the whole state."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        whole = StateDictOptions(full_state_dict=True)
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in part_of(tensors, "adam").items():
            key, _, parameter = name.partition(".")
            moments.setdefault(parameter, {})[key] = value
        groups = get_optimizer_state_dict(self.objective, self.optimizer)["param_groups"]
        set_optimizer_state_dict(
            self.objective, self.optimizer, {"state": moments, "param_groups": groups}, options=whole
        )
        if self.averages:
            set_model_state_dict(self.objective, part_of(tensors, "average"), options=whole)
            for average, value in zip(self.averages, self._averaged(), strict=True):
                average.copy_(value.detach())
        set_model_state_dict(self.objective, part_of(tensors, "now"), options=whole)
        if self.scaler:
            self.scaler.load_state_dict(values["scaler"])
        set_generator_states(part_of(tensors, f"generator.{self.fabric.global_rank}"), self.fabric.device)


@functools.cache
def host_group() -> "dist.ProcessGroup":
    """All processes over gloo: what they say to one another does not wait for their GPUs."""
    return dist.new_group(backend="gloo")


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor of FSDP's; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def refusals(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """What PyTorch refuses for want of memory or of a deterministic operation, as SDRError that names the settings."""
    try:
        yield
    except RuntimeError as error:  # on the CPU, running out of memory has no type of its own
        if "deterministic" in str(error) and config.deterministic:
            raise SDRError("deterministic", str(error).splitlines()[0], "deterministic false allows it") from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        hint = f"raise accumulate (now {config.accumulate}) or lower batch_size (now {config.batch_size})"
        hint += "" if config.recompute or config.compile else ", or set recompute true"
        hint += ", or precision bf16" if config.precision == "fp32" else ""
        what = f"an update of {config.batch_size} clips does not fit into that of {device}"
        raise SDRError("memory", what, hint) from None


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name starts with ``prefix`` and a dot, without it."""
    return {n.removeprefix(f"{prefix}."): value for n, value in tensors.items() if n.startswith(f"{prefix}.")}


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Of every generator that training could draw from: PyTorch's, NumPy's and Python's."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), next(iter(states["python_gauss"].tolist()), None)))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
