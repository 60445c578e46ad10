"""Registration of a spine CT to an MR: soft tissue deforms, every vertebra stays rigid."""

__version__ = "0.1.1"

from contextlib import suppress
from importlib import import_module
from inspect import isfunction

PUBLIC = {  # name -> where it is defined; imported when it is first asked for
    "register": "registration.register",
    "load": "registration.load",
    "apply": "registration.apply",
    "check": "learning.cases",
    "rigidify": "registration.rigidify",
    "fit": "learning.fit",
    "run_batch": "apps.batch",
    "write_report": "apps.report",
    "register_elastix": "compare.elastix",
    "evaluate_transform": "compare.given",
    "read_pair": "files.pairs",
    "read_transform": "files.transforms",
    "read_poses": "registration.bones_first",
    "Grid": "space.geometry",
    "Pair": "files.pairs",
    "SpineTransform": "files.transforms",
    "Registration": "registration.results",
    "Metrics": "registration.report",
    "Fitted": "learning.fit",
    "Step": "registration.run",
    "InputError": "files.problems",
    "Problem": "files.problems",
    "Notice": "files.problems",
    "ElastixError": "compare.elastix",
    "SliceViewer": "interactive.viewers",
    "JacobianMap": "interactive.viewers",
    "DeformedGrid": "interactive.viewers",
    "Quiver": "interactive.viewers",
    "VertebraMotion": "interactive.motion",
    "view3d": "interactive.view3d",
    "install_itk_viewer": "interactive.itk_viewer",
    "TrainingMonitor": "interactive.monitor",
}

__all__ = sorted(PUBLIC)


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'spinereg' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
    if isfunction(value):
        with suppress(OSError):  # comments are read from the source, which need not be installed
            value.__doc__ = import_module(f"{__name__}.apps.help").explain(value)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
