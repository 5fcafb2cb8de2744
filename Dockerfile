# scale_smog with the versions of constraints.txt. PyTorch and DALI bring their own CUDA libraries;
# the host needs an NVIDIA driver and the container toolkit.
#
#     docker build -t scale_smog .
#     docker run --gpus all --ipc=host --network=host -v /data:/data scale_smog \
#         torchrun --standalone --nproc_per_node=8 launcher/pretrain.py recipes/r50.yaml \
#         data.path=/data/imagenet run.dir=/data/runs/r50
#
# apptainer.def builds the same for clusters without Docker; benchmarks need the devel image.
ARG BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04
FROM ${BASE}

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# g++ and Python.h are for engine.compile.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates curl g++ git make openssh-client pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/scale_smog
# Dependencies first: a change of the code does not install them again.
COPY constraints.txt setup.py README.md ./
RUN mkdir scale_smog && touch scale_smog/__init__.py \
    && python3 -m venv .venv \
    && .venv/bin/pip install -c constraints.txt -e '.[test]' \
    && touch .venv/.installed .venv/.installed-test

COPY . .
ENV PATH=/opt/scale_smog/.venv/bin:$PATH
CMD ["python", "launcher/pretrain.py", "--help"]
