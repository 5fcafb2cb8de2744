"""Builds the loader that the recipe names."""

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import torch

from scale_smog import distributed
from scale_smog.config import DataConfig, EvaluationConfig
from scale_smog.data.augment import CentreView, View
from scale_smog.data.batch import Batch
from scale_smog.data.datasets import Images, is_tars, open_split
from scale_smog.data.loaders.batch_source import BatchSource
from scale_smog.data.loaders.memory import MemoryLoader
from scale_smog.data.loaders.synthetic import SyntheticLoader
from scale_smog.data.loaders.torch import TorchLoader
from scale_smog.data.plan import EpochPlan, SequentialPlan
from scale_smog.data.remote.read_ahead import Node
from scale_smog.data.tar_dataset import TarDataset
from scale_smog.data.workers import workers_of_rank
from scale_smog.errors import UserError
from scale_smog.runtime.stores import is_url

# On a CPU, views up to this size are DALI's own: of 32 px a view costs less than torch's calls that
# make it (the demo trains at 410 images/s against 210); larger ones torch makes sooner.
SMALL_VIEW_PX = 64
READ_AT_ONCE = 256  # images of a step of reading all of a set


def open_together(path: str, split: str) -> Images:
    """A split that rank 0 reads for all ranks; a collective.

    Its manifest and sidecars are two files a shard, and a folder may have a million names. Each
    rank then reads images from its own host's `path`.

    Raises:
        UserError: on every rank; there is no such dataset or split.
    """
    return distributed.call_on_main(lambda: open_split(path, split)).at(path)


def build_plan(data: DataConfig, dataset: Images, seed: int) -> EpochPlan:
    """The order of a run's samples."""
    sizes = dataset.shard_sizes if data.order == "block" else None
    return EpochPlan(dataset.num_samples, data.global_batch, seed, sizes, data.block_shards)


def build_training_loader(
    data: DataConfig,
    views: Sequence[View],
    dataset: Images,
    plan: EpochPlan,
    steps: range,
    device: torch.device,
) -> Iterable[Batch]:
    """This rank's batches of `steps`, made by the loader the recipe names.

    Raises:
        UserError: the ranks do not divide the batch; DALI or a GPU is asked for and missing.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    source = BatchSource(dataset, plan, views, plan.seed, rank, world_size)
    return _build(data, source, steps, device)


def with_random_access(data: DataConfig) -> DataConfig:
    """The settings with a loader that reads any samples in any order, whichever the run had.

    DALI where it was one of DALI's, else torch.
    """
    if data.loader in ("dali", "fast"):
        return data.model_copy(update={"loader": "dali"})
    return data.model_copy(update={"loader": "torch", "device": "auto", "stream": ""})


def build_evaluation_loader(
    data: DataConfig,
    evaluation: EvaluationConfig,
    dataset: Images,
    sample_ids: np.ndarray,
    device: torch.device,
) -> Iterable[Batch]:
    """This rank's batches of centre crops of `sample_ids` [N], in the order of a SequentialPlan."""
    rank, world_size = distributed.rank(), distributed.world_size()
    share = -(-len(sample_ids) // world_size)
    plan = SequentialPlan(sample_ids, min(evaluation.batch, share))  # few images: a small batch
    view = CentreView(evaluation.image_px, evaluation.crop_share)
    source = BatchSource(dataset, plan, [view], 0, rank, world_size)
    return _build(with_random_access(data), source, range(plan.num_steps(world_size)), device)


def require_loader(data: DataConfig, device: torch.device) -> None:
    """Says early what building a loader would say late.

    Raises:
        UserError: DALI or a GPU is asked for and missing, or data.stream is refused.
    """
    if data.device == "gpu" and device.type != "cuda":
        raise UserError("data.device=gpu, but no GPU is visible: take data.device=auto or cpu")
    if data.device == "gpu" and data.loader in ("torch", "stream"):
        raise UserError(
            f"data.loader={data.loader} makes its views on the CPU, not with data.device=gpu: "
            "take data.loader=memory or dali, or data.device=auto"
        )
    if data.loader in ("dali", "fast"):
        _import_dali(data.loader)
    if data.loader == "fast" and is_url(data.path):
        raise UserError(
            f"data.loader=fast reads tars on a disk, and data.path={data.path} is a store: take "
            "data.loader=dali"
        )
    if data.loader == "fast" and not is_tars(data.path):
        raise UserError(
            f"data.loader=fast reads tars, and data.path={data.path} is a folder of images: take "
            "data.loader=dali, or make tars of it (smog shard)"
        )
    if data.loader == "stream":
        _import_stream().shard_urls(data.stream, data.allow_pipe)


def _build(
    data: DataConfig, source: BatchSource, steps: range, device: torch.device
) -> Iterable[Batch]:
    require_loader(data, device)
    remote = source.dataset.remote if isinstance(source.dataset, TarDataset) else None
    if remote is None or data.loader in ("synthetic", "stream"):
        return _loader(data, source, steps, device)
    node = Node.of_rank(source.rank, source.world_size, distributed.ranks_per_node())
    if data.loader == "memory":  # once, and all of it
        plan = SequentialPlan(np.arange(source.dataset.num_samples), READ_AT_ONCE)
        ahead = remote.read_ahead(plan, range(plan.num_steps()), node.that_reads_all())
    else:
        ahead = remote.read_ahead(source.plan, steps, node)
    loader = _loader(data, source, steps, device)
    if ahead is None:
        return loader
    if data.loader == "memory":
        ahead.close()  # the loader has all it will read
        return loader
    return ahead.followed(loader)


def _loader(
    data: DataConfig, source: BatchSource, steps: range, device: torch.device
) -> Iterable[Batch]:
    if data.loader == "synthetic":
        return SyntheticLoader(source.views, source.batch_size, len(steps), device)
    if data.loader == "memory":
        return MemoryLoader(source, steps, device)
    on_gpu = device.type == "cuda" and data.device != "cpu"
    processes = workers_of_rank(data.workers, distributed.num_sharing_ranks())
    threads = max(1, processes)
    if data.loader == "stream":
        stream = _import_stream()
        urls = stream.shard_urls(data.stream, data.allow_pipe)
        return stream.StreamLoader(urls, source, steps, threads, device)
    if data.loader == "fast":
        fast = import_module("scale_smog.data.loaders.dali_fast")
        return fast.FastDaliLoader(source, steps, threads, device, on_gpu)
    if data.loader == "dali":
        dali = _import_dali(data.loader)
        if on_gpu or max(view.px for view in source.views) <= SMALL_VIEW_PX:
            return dali.DaliLoader(source, steps, threads, device, on_gpu)
        return dali.DaliCpuLoader(source, steps, threads, device)
    return TorchLoader(source, steps, processes, device)


def _import_stream() -> ModuleType:
    try:
        return import_module("scale_smog.data.loaders.stream")
    except ImportError as error:
        raise UserError(
            f"data.loader=stream needs webdataset ({error}): install it, or take data.loader=dali"
        ) from None


def _import_dali(loader: str) -> ModuleType:
    try:
        return import_module("scale_smog.data.loaders.dali")
    except ImportError as error:
        raise UserError(
            f"data.loader={loader} needs nvidia-dali-cuda120 or -cuda130 ({error}): "
            "install it, or take data.loader=torch"
        ) from None
