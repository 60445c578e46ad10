"""The viewer of itkwidgets, an npm package, unpacked to where JupyterLab serves it from. Written by hand; told of in 77_interactive.view3d.ipynb."""

import base64
import hashlib
import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from jupyter_core.paths import jupyter_data_dir, jupyter_path

ITK_VIEWER = "https://registry.npmjs.org/itk-vtk-viewer/-/itk-vtk-viewer-14.51.0.tgz"  # 36 MB
ITK_VIEWER_SHA512 = "i1H0PfekLdCfL45lZ96aWCoh4thzxeexiGJ3NYC9euF1WefXW0P1JijBLIJfrDBvp5fhjncj/EEnIW1auBh+zw=="
LEFT_OUT = ("itk/image-io/", "itk/mesh-io/")  # readers of image files, most of the package


def has_itk_viewer() -> bool:
    "Whether a folder that JupyterLab serves holds itk-vtk-viewer."
    return any((Path(folder) / "itk-vtk-viewer" / "itkVtkViewer.js").exists() for folder in jupyter_path("labextensions"))


def install_itk_viewer(
    source: str | Path = ITK_VIEWER,  # where the package is: its address, or a file
) -> Path:  # the folder, 32 MB
    "Unpack itk-vtk-viewer to where JupyterLab serves it from."
    packed = Path(source).read_bytes() if Path(source).exists() else urlopen(str(source), timeout=60).read()
    found = base64.b64encode(hashlib.sha512(packed).digest()).decode()
    if found != ITK_VIEWER_SHA512:
        raise ValueError(f"{source}: its SHA-512 is {found}, expected {ITK_VIEWER_SHA512}; take the file from {ITK_VIEWER}")
    folder = Path(jupyter_data_dir()) / "labextensions" / "itk-vtk-viewer"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as aside, tarfile.open(fileobj=BytesIO(packed)) as package:
        for member in package:
            path = member.name.removeprefix("package/dist/")
            if member.isfile() and path != member.name and not path.startswith(LEFT_OUT):
                Path(aside, "new", path).parent.mkdir(parents=True, exist_ok=True)
                Path(aside, "new", path).write_bytes(package.extractfile(member).read())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(aside, "new"), folder)
    return folder
