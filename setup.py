"""Packaging: everything is read from settings.ini, which the notebooks' exporter reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
about = config["DEFAULT"]


class SourceWithSettings(sdist):
    """A source archive that can be built: setup.py needs settings.ini beside it."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [*files, "settings.ini"])


setup(
    name=about["lib_name"],
    version=about["version"],
    description=about["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=about["git_url"],
    author=about["author"],
    author_email=about["author_email"],
    license="MIT",
    license_files=["LICENSE"],
    keywords=about["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    python_requires=f">={about['min_python']}",
    install_requires=about["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): about[key].split() for key in about if key.endswith("_requirements")},
    entry_points={"console_scripts": ["spinereg = spinereg.apps.command:main"]},
    cmdclass={"sdist": SourceWithSettings},
    packages=[*find_packages(include=["spinereg", "spinereg.*"]), "spinereg.notebooks"],
    package_dir={"spinereg.notebooks": "nbs/apps"},
    package_data={"spinereg.notebooks": ["*.ipynb"], "spinereg.interactive": ["static/*"], "spinereg.apps": ["static/*"]},
)
