"""Package list and requirements; everything else about the build stands in pyproject.toml."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

_DALI = "nvidia-dali-cuda130>=2.4; sys_platform == 'linux'"

setup(
    name="timefast",
    version="0.1.0",
    description="Fast, trustworthy training of video transformers that understand time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # timefast/kernels and timefast/pipelines are links to the folders of that name beside this
    # file; neither has an __init__.py (docs/adr/0001-import-names.md says why)
    packages=find_namespace_packages(include=["timefast", "timefast.*"]),
    package_data={
        "timefast": ["report_template.html"],
        "timefast.kernels": ["native.c", "tuned/*.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        "numpy",
        "einops",
        "av>=18",
        "opencv-python-headless",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "tqdm",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "transformers",
            "onnx",
            "onnxscript",
            "onnxruntime",
            _DALI,  # its CPU decoder is tested wherever there is a wheel
        ],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "dev": ["ruff", "mypy"],
        "tensorboard": ["tensorboard"],
        "dali": [_DALI],
    },
)
