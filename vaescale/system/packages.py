"""The packages that vaescale imports, and what a verb says when one of them is not installed."""

import importlib.util

# Training with tracking.mlflow=null needs these, and the verbs after it some more.
TRAINING = (
    *(
        "torch",
        "accelerate",
        "einops",
        "numpy",
        "matplotlib",
        "pydantic",
        "omegaconf",
        "pyyaml",
        "safetensors",
    ),
    *("pillow", "simplejpeg", "filelock", "psutil", "rich"),
)
OTHERS = ("scikit-learn", "scipy", "threadpoolctl", "torchmetrics", "webdataset", "fsspec")
OPTIONAL = {
    "mlflow": "tracking.mlflow, export",
    "datasets": "make-shards hf:NAME",
    "lmdb": "make-shards lsun:PATH",
    "deepspeed": "DeepSpeed ZeRO",
    "constriction": "compress, decompress",
    "h5py": "make-shards arrays:FILE.h5",
    "av": "sequences in MP4 files",
    "transformers": "accelerate's DeepSpeed path",
    "onnx": "export --format onnx",
    "onnxruntime": "export --format onnx",
    "onnxscript": "export --format onnx",
    "tensorboard": "sync --to tensorboard",
    "wandb": "sync --to wandb",
    "trackio": "sync --to trackio",
    "huggingface_hub": "export --push-to-hub",
}
_MODULES = {"scikit-learn": "sklearn", "pyyaml": "yaml", "pillow": "PIL"}


def module_of(package: str) -> str:
    """The name under which Python imports a package: sklearn of scikit-learn."""
    return _MODULES.get(package, package)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package of vaescale's that an import did not find; None if the package is there, or it is none of vaescale's."""
    root = (error.name or "").partition(".")[0]
    for package in (*TRAINING, *OTHERS, *OPTIONAL):
        if module_of(package) == root and importlib.util.find_spec(root) is None:
            return package
    return None
