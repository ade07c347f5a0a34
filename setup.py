"""What pyproject.toml cannot say: the CUDA sources lie in kernels/ and are installed as fastdp.kernels.

Beside the package they are easy to find and to read; inside it they travel in the wheel and in the sdist,
and no top-level package called `kernels` is installed. Everything else is in pyproject.toml.
"""

from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildModules(build_py):
    """Leaves the modes of the checkout's files behind, so that each checkout makes the same wheel."""

    def copy_file(self, *arguments: Any, **options: Any) -> Any:
        """Copy a module or a kernel into the build."""
        return super().copy_file(*arguments[:2], **{**options, "preserve_mode": False})


setup(
    packages=["fastdp", *(f"fastdp.{name}" for name in find_packages("fastdp")), "fastdp.kernels"],
    package_dir={"fastdp.kernels": "kernels"},
    package_data={"fastdp": ["py.typed"], "fastdp.kernels": ["*.cu", "*.cuh"]},
    cmdclass={"build_py": BuildModules},
)
