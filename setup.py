"""Packaging of scale_smog; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

LINUX = "platform_system == 'Linux'"
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]

setup(
    name="scale_smog",
    version="0.1.0",
    description="Self-supervised pre-training of image backbones by SMoG (ECCV 2022), at any scale",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["scale_smog", "scale_smog.*"]),
    package_data={
        "scale_smog": ["py.typed", "recipes/*.yaml", "recipes/*/*.yaml"],
        "scale_smog.evaluation": ["paper_tables.yaml"],
        "scale_smog.profiling": ["hardware/*.yaml"],
        "scale_smog.report": ["assets/*"],
        "scale_smog.rehearsal": ["runtime/*.c", "runtime/crt/*.h"],
    },
    entry_points={"console_scripts": ["smog = scale_smog.cli.main:main"]},
    install_requires=[
        # torch and torchvision come together: a torchvision of another build does not import.
        "torch>=2.11",
        "torchvision",
        f"deepspeed>=0.19; {LINUX}",
        "timm>=1.0",
        "webdataset>=1.0",
        "braceexpand",
        # DALI opens NPP and cuFFT of CUDA 12 at run time and asks for no wheel of them, and a
        # torch for CUDA 13 brings others. nvidia-dali-cuda130 may take the place of the three.
        *(
            f"{package}; {LINUX} and platform_machine in 'x86_64 aarch64'"
            for package in ("nvidia-dali-cuda120>=2.2", "nvidia-npp-cu12", "nvidia-cufft-cu12")
        ),
        "pyyaml",
        "tensorboard",
        "numpy",
        "threadpoolctl",
        "psutil",
        "pillow",
        "pydantic>=2.7",
        "tqdm",
        "safetensors",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "dense": ["pycocotools", "torchmetrics"],  # segmentation and detection
        # Datasets and checkpoints in object stores (docs/stores.md); fsspec comes with torch.
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "az": ["adlfs"],
        "hf": ["huggingface_hub"],
        "https": ["aiohttp"],
        # Where `smog follow` sends a run's figures (docs/tracking.md).
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "trackio": ["trackio"],
        "onnx": ["onnx", "onnxscript"],  # smog export --format onnx
        "docs": DOCS,  # mkdocs serve
        "completion": ["argcomplete"],  # eval "$(register-python-argcomplete smog)"
        "test": [
            "s3fs",
            "moto[s3]",  # an S3 server for the tests
            "flask",
            "flask-cors",
            "jsonschema",
            *DOCS,
            "argcomplete",
            "nbclient",
            "ipykernel",
            "scipy",
            "pycocotools",
            "torchmetrics",
            "pytest>=8",
            "pytest-xdist",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "playwright",  # drives a chromium of the system
            "scikit-learn",
            "faiss-cpu",
            "pyarrow",
            "ruff",
            "pyright",
        ],
        "bench": ["lightly", "faiss-cpu", "scikit-learn"],
    },
)
