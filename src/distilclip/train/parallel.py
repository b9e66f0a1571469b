"""Run the towers in one process or many (DDP, FSDP2), compiled, with activations kept or computed again.

Losses are sums over processes (losses.terms), so gradients are added up over processes, never averaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from distilclip import distributed
from distilclip.errors import InputError
from distilclip.models.batch_norm import batch_norms, fixed_statistics, synchronise_batch_norms
from distilclip.models.clip import Clip
from distilclip.models.patch_dropout import every_patch
from distilclip.train.settings import Execution

OWNED = ("logit_scale", "logit_bias")
"""Parameters of a model that the objective uses directly: they stay outside DDP and FSDP, and we sum them."""


class Towers(nn.Module):
    """Both towers as one forward pass, so that DDP, FSDP2 and torch.compile have one module to wrap."""

    def __init__(self, clip: Clip, precision: torch.dtype) -> None:
        super().__init__()
        self.model = clip.model
        self._clip, self._precision = clip, precision

    def forward(
        self,
        pixels: Float[Tensor, "n 3 h w"] | None,
        tokens: Int[Tensor, "n context"] | None,
        masked: Float[Tensor, "n 3 h w"] | None = None,
    ) -> list[Float[Tensor, "n dim"]]:
        """Unit image and text embeddings and, if given, those of masked images; float32, the towers under autocast.

        A tower that is given nothing is not run, and its embeddings are zero; one of the two must be given something.
        """
        device = self._clip.device
        with torch.autocast(device.type, self._precision, enabled=self._precision != torch.float32):
            image = None if pixels is None else self._clip.encode_image(pixels)
            text = None if tokens is None else self._clip.encode_text(tokens)
            features = [torch.zeros_like(text) if image is None else image]  # type: ignore[arg-type]
            features.append(torch.zeros_like(features[0]) if text is None else text)
            if masked is not None:
                with fixed_statistics(self.model), every_patch(self.model):
                    features.append(self._clip.encode_image(masked))
        return features


def build_towers(clip: Clip, *, precision: torch.dtype, execution: Execution, synchronising: bool = True) -> nn.Module:
    """Wrap the towers as `execution` asks; FSDP2 replaces the model's parameters, so optimizers are built after it.

    Where `synchronising`, batch norms use the rows of all processes, else those of their own (`average_statistics_`).
    Raises `InputError` for a model that cannot recompute activations, and for batch norm on several CPU processes.
    """
    if execution.activations == "recompute":
        _recompute_activations(clip)
    if distributed.world() > 1 and synchronising:
        synchronise_batch_norms(clip)
    towers: nn.Module = Towers(clip, precision)
    if execution.compile != "no":
        sharded = distributed.world() > 1 and execution.strategy == "fsdp"  # its messages between blocks end a graph
        for module in _blocks(towers) if sharded else (towers,):
            module.compile(mode=execution.compile)
    if distributed.world() == 1:
        return towers
    owned = {name: p for name, p in clip.model.named_parameters() if name in OWNED}
    for parameter in owned.values():
        distributed.broadcast_(parameter.data)
    if execution.strategy == "fsdp":
        return _fully_sharded(towers, ignored=set(owned.values()))
    buffers = [name for name, _ in towers.named_buffers()]  # the same everywhere: batch norms are synchronised
    ignored = [*buffers, *(f"model.{name}" for name in owned)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(towers, ignored)
    replicated = DistributedDataParallel(towers)
    replicated.register_comm_hook(  # DDP itself would average
        None,
        lambda _, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0]),
    )
    return replicated


def _fully_sharded(towers: nn.Module, *, ignored: set[nn.Parameter]) -> nn.Module:
    """FSDP2 over every block of every tower, then over what is left."""
    for block in _blocks(towers):
        fully_shard(block)
    fully_shard(towers, ignored_params=ignored)
    for module in towers.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return towers


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists and sequences of modules: a transformer's blocks, a network's stages."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def _recompute_activations(clip: Clip) -> None:
    if norms := batch_norms(clip.model):
        raise InputError(
            f"{clip.name} has batch norms (such as {next(iter(norms))}), whose running statistics would see every "
            "batch twice. Use --activations keep."
        )
    try:
        if hasattr(clip.model.visual, "trunk"):
            clip.model.visual.trunk.set_grad_checkpointing(True)  # open_clip would log its failure and go on
        clip.model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"{clip.name} cannot recompute its activations ({error}). Use --activations keep.") from error


@contextlib.contextmanager
def gradient_sync(towers: nn.Module, *, now: bool) -> Iterator[None]:
    """Open a block for one micro-batch's passes; gradients are summed over processes where `now`, in the last one."""
    if isinstance(towers, FSDPModule):
        towers.set_requires_gradient_sync(now)
    with towers.no_sync() if isinstance(towers, DistributedDataParallel) and not now else contextlib.nullcontext():
        yield


def sum_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of parameters that every process has, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if distributed.world() == 1 or not gradients:
        return
    packed = distributed.reduce_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, packed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def average_statistics_(model: nn.Module) -> None:
    """Replace the running statistics of batch norms that are not synchronised by their mean over processes."""
    norms = [norm for norm in batch_norms(model).values() if norm.training and not isinstance(norm, nn.SyncBatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]
    if distributed.world() == 1 or not buffers:
        return
    packed = distributed.reduce_(torch.cat([buffer.flatten() for buffer in buffers])) / distributed.world()
    for buffer, mean in zip(buffers, packed.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def clip_gradients_(parameters: Sequence[Tensor], *, sharded: Sequence[Tensor], max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients so that their norm is at most `max_norm` (0: leave them), and return the norm before.

    `parameters` have the same gradient on every process, or are FSDP2's; `sharded` are parameters of this process. A
    norm that is NaN scales nothing, so that what is not finite can still be told from what is.
    """
    with_gradient = [(p, p.grad) for p in parameters if p.grad is not None]
    replicated = [g for _, g in with_gradient if not isinstance(g, DTensor)]
    parts = [g.to_local() for _, g in with_gradient if isinstance(g, DTensor)]
    parts += [p.grad for p in sharded if p.grad is not None]
    if distributed.world() == 1:
        norm = get_total_norm([*replicated, *parts])
    else:
        device = parameters[0].device
        square = distributed.reduce_(get_total_norm(parts).to(device).square())
        norm = (get_total_norm(replicated).to(device).square() + square).sqrt()
    if max_norm:
        torch._foreach_mul_([*replicated, *parts], (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(nan=1.0))
    return norm


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole copies in host memory, on rank 0 only. Every process must call it with the same names."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        if distributed.rank() == 0:
            found[name] = full.cpu().contiguous()
    return found


def copy_whole_(target: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values of a state dict, which may be FSDP2's, into a model that every process has whole."""
    with torch.no_grad():
        for name, value in target.state_dict().items():
            source = values[name].detach()
            value.copy_(source.full_tensor() if isinstance(source, DTensor) else source)


def place_(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has, into `target`, or this process's part of it."""
    with torch.no_grad():
        target.copy_(like(target, value))


def like(target: Tensor, value: Tensor) -> Tensor:
    """Bring `value` to the device of `target`, distributed as it is; no message is sent."""
    value = value.to(target.device)
    if isinstance(target, DTensor) and value.ndim:
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def non_finite_gradients(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of parameters whose gradient on this process holds a NaN or an infinity."""
    return non_finite_values({name: p.grad for name, p in parameters.items() if p.grad is not None})


def non_finite_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold a NaN or an infinity on this process, in one transfer from the device."""
    floats = {name: local(tensor.detach()) for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return []
    flags = [torch.isfinite(values).all() for values in floats.values()]
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for name, is_finite in zip(floats, finite, strict=True) if not is_finite]
