"""What keeps the house in order: import floors, public names, configuration that is read."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from timefast.config import TrainConfig, sections
from timefast.models import keywords

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "kernels": 0, "ops": 0,
    "models": 1, "losses": 1, "data": 1, "config": 1, "optim": 1, "log": 1, "errors": 0,
    "device": 1, "distributed": 1, "interrupt": 1, "profiling": 1,
    "failures": 1, "meter": 1, "cache": 1,
    "methods": 2, "pipelines": 2, "cuda_graph": 2,
    "recipes": 3, "checkpoint": 3, "eval": 3, "run_folder": 3, "weights": 3, "convert": 3,
    "patching": 3,
}  # fmt: skip
COMMANDS = 4  # everything else, and every __main__.py
ONE_FILE_ONLY = {
    "cv2": {"kernels/farneback.py", "timefast/demo_data.py"},
    "nvidia": {"pipelines/dali_gpu.py"},
    "torch.distributed": {"timefast/distributed.py"},
    "av": {"pipelines/cpu_decode.py", "timefast/demo_data.py"},
}


def sources():
    folders = ("timefast", "kernels", "pipelines")
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in path.parents):
                yield path


def imports(path):
    """(module, line number) of every import statement of a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "timefast":
                for alias in node.names:
                    yield f"timefast.{alias.name}", node.lineno


def part_of(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "timefast":
        return relative.parts[0]
    return relative.stem if len(relative.parts) == 2 else relative.parts[1]


def floor(name):
    return FLOORS.get(name, COMMANDS)


def test_imports_point_downwards_or_sideways():
    wrong = []
    for path in sources():
        if path.name == "__main__.py" or path == ROOT / "timefast/__init__.py":
            continue
        here = part_of(path)
        for module, line in imports(path):
            if not module.startswith("timefast."):
                continue
            there = module.split(".")[1]
            if there != "__version__" and floor(there) > floor(here):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong


def test_kernels_know_nothing_of_the_library():
    for path in (ROOT / "kernels").glob("*.py"):
        for module, line in imports(path):
            if module.startswith("timefast"):
                assert module.startswith("timefast.kernels"), f"{path.name}:{line} {module}"


def test_nobody_imports_the_folders_by_their_bare_names():
    everything = [*sources(), *(ROOT / "tests").glob("*.py"), *(ROOT / "bench").glob("*.py")]
    for path in everything:
        for module, line in imports(path):
            assert module.split(".")[0] not in ("kernels", "pipelines"), f"{path}:{line}"


def test_the_top_folders_are_no_packages():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "pipelines/__init__.py").exists()


@pytest.mark.parametrize("package", ONE_FILE_ONLY)
def test_an_optional_package_is_imported_where_it_belongs(package):
    found = {
        str(path.relative_to(ROOT))
        for path in sources()
        for module, _ in imports(path)
        if f"{module}.".startswith(f"{package}.")
    }
    assert found <= ONE_FILE_ONLY[package]


def test_importing_timefast_loads_nothing_heavy():
    code = (
        "import sys, timefast, timefast.ops, timefast.losses\n"
        "heavy = {'triton', 'cv2', 'av', 'nvidia', 'matplotlib', 'PIL', 'torch._dynamo'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_each_torch_load_refuses_code():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_each_config_field_is_read_somewhere():
    text = "\n".join(p.read_text("utf-8") for p in sources() if p.name != "recipes.py")
    read = {
        node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)
    }  # config.optim.lr -> lr
    fields = {
        f"{section}.{spec.name}"
        for section in sections()
        for spec in dataclasses.fields(getattr(TrainConfig(), section))
    }
    read |= set(keywords("timesformer"))  # the model's section is handed over as a whole
    assert not {f for f in fields if f.split(".")[1] not in read}


def test_public_names_exist():
    import timefast

    for name in timefast.__all__:
        assert getattr(timefast, name) is not None


def test_no_file_is_endless():
    lines = {p.name: len(p.read_text("utf-8").splitlines()) for p in sources()}
    assert not {n: k for n, k in lines.items() if k > (900 if n.endswith("_triton.py") else 620)}
