"""Packaging. `tools/` installs as `vaescale.tools`, so `vaescale fit-gmm` and `tools/fit_gmm.py` are one file, and `recipes/` as
`vaescale.recipes`, so that `vaescale train vaescale:digits/optimal` needs no clone.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

DEPENDENCIES = [
    "accelerate>=1.15",
    "datasets>=5.0",
    "einops>=0.8",
    "filelock>=3.15",
    "fsspec[http]>=2025.3",
    "matplotlib>=3.10.8",
    "mlflow>=3.10",  # earlier ones do not import with SQLAlchemy 2.1
    "numpy>=2.0",
    "omegaconf>=2.3",
    "pillow>=11.0",
    "psutil>=5.9",
    "pydantic>=2.13",
    "pyyaml>=6.0",
    "rich>=13.7",
    "safetensors>=0.5",
    "scikit-learn>=1.5",
    "scipy>=1.13",
    "simplejpeg>=1.8",
    "threadpoolctl>=3.1",
    "torch>=2.11",
    "torchmetrics>=1.8",
    "webdataset>=1.0.2",
]
EXTRAS = {
    # To read .h5 files and MATLAB's version 7.3.
    "arrays": ["h5py>=3.11"],
    # For `vaescale compress`.
    "compress": ["constriction>=0.5"],
    # accelerate's DeepSpeed path imports transformers.
    "deepspeed": ["deepspeed>=0.18", "ninja>=1.11", "transformers>=5.0"],
    # To use what `export --format diffusers` writes, and to test it.
    "diffusers": ["diffusers>=0.42"],
    "dev": [
        "constriction>=0.5",
        "h5py>=3.11",
        "hypothesis>=6.100",
        "lmdb>=1.6",
        "mypy>=2.4",
        "pillow-heif>=1.1",
        "pillow-jxl-plugin>=1.3.4",
        "pre-commit>=4.0",
        "pytest>=8.3",
        "pytest-xdist>=3.8",
        "ruff>=0.9",
        "tifffile>=2025.1.10",
        "types-PyYAML>=6.0",
        "types-psutil>=7.0",
    ],
    # To send exported runs to a model repository.
    "hub": ["huggingface_hub>=1.0"],
    # To read LSUN's databases.
    "lsun": ["lmdb>=1.6"],
    # For `mlflow server --backend-store-uri postgresql+psycopg://... --artifacts-destination s3://...`.
    "mlflow-server": ["boto3>=1.40", "mlflow>=3.10", "psycopg[binary]>=3.2"],
    # To export encoder and decoder as ONNX graphs, and to check them.
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5.4"],
    # For `vaescale sync RUN --to NAME`.
    "tensorboard": ["tensorboard>=2.18"],
    "trackio": ["trackio>=0.7"],
    "wandb": ["wandb>=0.19"],
    # To read sequences in MP4 files.
    "video": ["av>=18.1"],
    # To read HEIC and JPEG XL, and TIFF of several channels of 16 bits.
    "pictures": ["pillow-heif>=1.1", "pillow-jxl-plugin>=1.3.4", "tifffile>=2025.1.10"],
}

setup(
    name="vaescale",
    version=runpy.run_path("vaescale/__init__.py")["__version__"],
    description="Variational autoencoders with calibrated decoders, from one laptop to many GPU nodes",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["vaescale", "vaescale.*"]), "vaescale.tools", "vaescale.recipes"],
    package_dir={"vaescale.tools": "tools", "vaescale.recipes": "recipes"},
    package_data={
        "vaescale": ["py.typed", "__init__.pyi", "**/*.cpp", "system/*.h", "figures/browser/*"],
        "vaescale.recipes": ["**/*.yaml", "**/*.md", "**/*.sbatch", "**/*.sh"],
    },
    install_requires=DEPENDENCIES,
    extras_require={**EXTRAS, "all": sorted({name for extra in EXTRAS.values() for name in extra})},
    entry_points={"console_scripts": ["vaescale = vaescale.cli:program"]},
)
