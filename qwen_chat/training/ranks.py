"""The processes of a run: joined, asked, and left together.

In: what one rank knows. Out: the same on every rank. Alone, every question is answered by this process.
"""

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from qwen_chat.console import is_rank_zero

Found = TypeVar("Found")


def start_deepspeed(accelerator: bool) -> None:
    """Join the ranks. On a CPU gloo does the work: DeepSpeed's own shared-memory op compiles for minutes."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    if not accelerator:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "WORLD_SIZE" not in os.environ:  # started without a launcher: a group of one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    deepspeed.init_distributed(dist_backend=None if accelerator else "gloo")
    if not accelerator:
        # Left to itself, accelerate finds no backend for DeepSpeed on a CPU: every rank would see all data.
        from accelerate import PartialState

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    # DeepSpeed loads its shards as pickles, which may run code; torch is told to load plain values only.
    plain = [ZeroStageEnum, fragment_address, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler]
    torch.serialization.add_safe_globals(plain)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def from_rank_zero(find: Callable[[], Found]) -> Found:
    """What `find` gives on rank 0, on every rank; the others do not call it."""
    if not _is_joined():
        return find()
    box: list[Any] = [find() if is_rank_zero() else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return cast(Found, box[0])


def any_rank(value: bool) -> bool:
    """Whether it is so on any rank."""
    return any(_from_every_rank(value))


def process_ids_here() -> list[int]:
    """Process ids of the ranks on this machine."""
    found = _from_every_rank((socket.gethostname(), os.getpid()))
    return [pid for host, pid in found if host == socket.gethostname()]


def _from_every_rank(value: Found) -> list[Found]:
    if not _is_joined():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _is_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave() -> None:
    """Leave the process group once every rank is done, before the interpreter is torn down.

    A group that is left standing until then can abort a rank after its work: "terminate called without an active
    exception" (gloo's threads; pytorch/pytorch issue 190489), and a saved run would end as a failed one.
    """
    if _is_joined():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
