"""Programs that keep the curves of many runs, behind the same four methods.

None of them is needed: a library is imported when it is first asked for.
"""

import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
from PIL import Image

from scale_smog.errors import UserError

MOST_PARAMS, MOST_METRICS = 100, 1000  # of one request to MLflow
SOON = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class Point(NamedTuple):
    """Figures of a step."""

    step: int
    figures: Mapping[str, float]


class Tracker(ABC):
    """Keeps one run.

    Args:
        project: under which runs are gathered.
        server: address or folder; "": what the library takes by itself.
        folder: of the run, for what the library keeps on this disk.
    """

    def __init__(self, project: str, server: str, folder: Path) -> None:
        self._project, self._server, self._folder = project, server, folder

    @abstractmethod
    def open(self, id: str | None, name: str, config: Mapping[str, Any]) -> str:
        """Begins to keep a run, or goes on with one.

        Args:
            id: what `open` returned when it began; None: it begins.
            name: of the run.
            config: its settings, flat.

        Returns:
            The id under which the run is kept.
        """

    @abstractmethod
    def log(self, points: Sequence[Point]) -> None:
        """Keeps figures, each step's in the order of the steps."""

    @abstractmethod
    def picture(self, name: str, step: int, png: bytes) -> None:
        """Keeps a picture."""

    @abstractmethod
    def close(self) -> None:
        """Waits until all is kept."""


class Mlflow(Tracker):
    """MLflow's tracking server."""

    def open(self, id: str | None, name: str, config: Mapping[str, Any]) -> str:
        for key, value in SOON.items():  # the follower tries again by itself, and says so
            os.environ.setdefault(key, value)
        mlflow = _imported("mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=self._server or None)
        if id:
            self._id = self._client.get_run(id).info.run_id
            return self._id
        experiment = self._client.get_experiment_by_name(self._project)
        number = experiment.experiment_id if experiment else self._new_experiment()
        self._id = self._client.create_run(number, run_name=name).info.run_id
        params = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])
        return self._id

    def _new_experiment(self) -> str:
        return self._client.create_experiment(self._project)

    def log(self, points: Sequence[Point]) -> None:
        metric, now = _imported("mlflow").entities.Metric, int(time.time() * 1000)
        metrics = [metric(k, v, now, step) for step, line in points for k, v in line.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])

    def picture(self, name: str, step: int, png: bytes) -> None:
        self._client.log_image(self._id, _image(png), artifact_file=f"{name}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Wandb(Tracker):
    """Weights & Biases; WANDB_MODE=offline keeps all in the run's folder, for `wandb sync`."""

    def open(self, id: str | None, name: str, config: Mapping[str, Any]) -> str:
        wandb = _imported("wandb")
        if self._server:
            os.environ["WANDB_BASE_URL"] = self._server
        id = id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=self._project,
            id=id,
            name=name,
            config=dict(config),
            resume="allow",
            dir=str(self._folder),
        )
        # Accuracies come later than the figures of their step: wandb's own step only grows.
        self._run.define_metric("*", step_metric="step")
        return id

    def log(self, points: Sequence[Point]) -> None:
        for step, line in points:
            self._run.log({"step": step, **line})

    def picture(self, name: str, step: int, png: bytes) -> None:
        self._run.log({"step": step, name: _imported("wandb").Image(_image(png))})

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """Trackio's own store on this disk, or a server of it."""

    def open(self, id: str | None, name: str, config: Mapping[str, Any]) -> str:
        self._trackio = _imported("trackio")
        self._require_server()
        id = id or f"{name}-{uuid.uuid4().hex[:4]}"
        self._run = self._trackio.init(
            project=self._project,
            name=id,
            server_url=self._server or None,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return id

    def log(self, points: Sequence[Point]) -> None:
        self._require_server()
        for step, line in points:
            self._trackio.log(dict(line), step=step)

    def picture(self, name: str, step: int, png: bytes) -> None:
        image = self._trackio.Image(np.asarray(_image(png)))
        self._trackio.log({name: image}, step=step)

    def close(self) -> None:
        self._trackio.finish()

    def _require_server(self) -> None:
        """Trackio itself takes figures that no server has, and sends them when it can."""
        if self._server:
            urlopen(self._server, timeout=20).close()


class TensorBoard(Tracker):
    """A folder of TensorBoard's, such as one for the runs of many machines."""

    def open(self, id: str | None, name: str, config: Mapping[str, Any]) -> str:
        from torch.utils.tensorboard import SummaryWriter

        if not self._server:
            raise UserError(
                "--to tensorboard needs --server FOLDER; the run's own is in its folder"
            )
        folder = Path(self._server) / self._project
        if not id:  # a run of another machine may have the same name
            id = f"{name}-{uuid.uuid4().hex[:4]}" if (folder / name).exists() else name
        self._writer = SummaryWriter(str(folder / id))
        return id

    def log(self, points: Sequence[Point]) -> None:
        for step, line in points:
            for key, value in line.items():
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def picture(self, name: str, step: int, png: bytes) -> None:
        self._writer.add_image(name, np.asarray(_image(png)), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
}


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError:
        raise UserError(
            f"--to {library} needs {library}: pip install 'scale_smog[{library}]'"
        ) from None


def _image(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png)).convert("RGB")
