"""What is installed is whole: the tests run against the built wheel, not the checkout."""

from importlib.metadata import files, metadata, requires
from importlib.resources import files as resources

from recordings import ROOT

FOLDERS = {
    "runtime": "runtime",
    "graph": "graph",
    "quant": "quant",
    "kernels": "kernels",
    "bench": "bench",
    "": "src/horsepower",
}


def test_every_module_and_table_is_installed():
    installed = resources("horsepower")
    for package, folder in FOLDERS.items():
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.json")):
            if path.name.startswith("test_"):
                continue
            there = installed.joinpath(package, *path.relative_to(ROOT / folder).parts)
            assert there.is_file(), f"{path.relative_to(ROOT)} is not installed"
            assert there.read_text() == path.read_text(), f"{path.relative_to(ROOT)} is not what is installed"


def test_types_and_native_module_are_installed():
    installed = resources("horsepower")
    assert installed.joinpath("py.typed").is_file()
    assert installed.joinpath("_native.pyi").is_file()
    from horsepower import _native

    assert "portable" in _native.isas()


def test_metadata():
    said = metadata("horsepower")
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.11"
    assert "torch>=2.11" in requires("horsepower")
    assert any(str(file).endswith("licenses/LICENSE") for file in files("horsepower"))
