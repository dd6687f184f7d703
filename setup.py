from setuptools import find_packages, setup

# `kernels/` stands at the top of the tree and installs as `meter_fast.kernels`: a top-level package of that name
# would collide with the optional dependency of transformers that is called the same.
packages = find_packages(include=["meter_fast", "meter_fast.*"])
kernel_packages = ["meter_fast." + name for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    name="meter-fast",
    version="0.1.0",
    description="Fast training of METER vision-and-language transformers",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages + kernel_packages,
    package_dir={"meter_fast": "meter_fast", "meter_fast.kernels": "kernels"},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "triton>=3.2; platform_system == 'Linux'",
        "deepspeed>=0.17",
        "transformers>=5.0",
        "timm>=1.0.24",
        "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
        "tensorboard>=2.16",
        "numpy>=1.26",
        "packaging>=22",
        "psutil>=5.9",
        "pillow>=10.3",
        "pyarrow>=16",
        "safetensors>=0.4.3",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "huggingface-hub>=1.0",
        "matplotlib>=3.8",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.6"],
        "caption": ["pycocoevalcap>=1.2"],  # scores of captions; 100 MB, most of it Java that is not used
        "dev": ["pytest>=8", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["meter-fast = meter_fast.cli:main"]},
)
