"""What pyproject.toml cannot say: the CUDA sources lie in kernels/ and are installed as fastdp.kernels.

Beside the package they are easy to find and to read; inside it they travel in the wheel and in the sdist,
and no top-level package called `kernels` is installed. Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=["fastdp", *(f"fastdp.{name}" for name in find_packages("fastdp")), "fastdp.kernels"],
    package_dir={"fastdp.kernels": "kernels"},
    package_data={"fastdp": ["py.typed"], "fastdp.kernels": ["*.cu", "*.cuh"]},
)
