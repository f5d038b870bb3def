"""tour.ipynb: what is stored in it is what it does, its formulas are the README's, and it runs anywhere."""

import ast
import contextlib
import io
import json
import re

import pytest
from runs import ROOT

from beta_schedule import CosineSchedule
from gaussian_diffusion import GaussianDiffusion
from time_aware_module import TimeAwareUNet

TEXT = (ROOT / "tour.ipynb").read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
TRAINED = 0.1  # relative, of what a line with ≈ prints: it comes from training
EXACT = {"rel": 1e-3, "abs": 1.1e-3}  # of the others, which are printed to the third decimal


def source(cell: dict) -> str:
    return "".join(cell["source"])


def printed(outputs: list[dict]) -> list[str]:
    """The lines that a cell prints."""
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream").splitlines()


def assert_same_figures(lines: list[str], stored: list[str]) -> None:
    assert [NUMBER.sub("#", line) for line in lines] == [NUMBER.sub("#", line) for line in stored]
    for line, expected in zip(lines, stored, strict=True):
        tolerance = {"rel": TRAINED} if "≈" in expected else EXACT
        assert [float(x) for x in NUMBER.findall(line)] == pytest.approx(
            list(map(float, NUMBER.findall(expected))), **tolerance
        )


# As stored


def test_every_cell_ran_in_its_turn_and_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12


def test_each_equation_up_to_16_is_the_readmes_and_was_checked():
    equations = re.compile(r"^\$\$(.*?) \\tag\{(\d+)\}\$\$$", re.MULTILINE)
    readme = {int(number): text for text, number in equations.findall((ROOT / "README.md").read_text())}
    told = [(int(number), text) for text, number in equations.findall("\n".join(PROSE))]
    assert [number for number, _ in told] == list(range(1, 17))
    for number, text in told:
        assert text == readme[number]
    lines = [line for cell in CODE for line in printed(cell["outputs"])]
    for number in range(1, 17):
        assert f"({number}) the call and the formula agree" in lines


def test_nothing_of_the_machine_that_ran_it_is_in_it():
    assert len(TEXT.encode()) < 1.5e6
    assert not re.search(r"(?<![\w.)])/(home|root|work|tmp|usr|opt|mnt|var|Users)/|[A-Z]:\\\\", TEXT)
    assert json.loads(TEXT)["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in CELLS)


def test_the_files_that_it_names_are_there():
    links = [link for text in PROSE for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    headings = re.findall(r"^#+ (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link
    for path in re.findall(r"[\w/]+\.(?:py|json)\b", "\n".join(PROSE)):
        assert (ROOT / path).exists(), path


# As it runs


def test_what_it_imports_and_asks_of_a_model_exists():
    diffusion = GaussianDiffusion(CosineSchedule(4), TimeAwareUNet(1, 8, ch_mult=(1,), num_res_blocks=1))
    asked = set()
    for node in (node for cell in CODE for node in ast.walk(ast.parse(source(cell)))):
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], []), "tour.ipynb", "exec"), {})
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in ("diffusion", "model", "early", "learnable", "fitted", "never_wrong", "guided"):
                asked.add(node.attr)
    assert len(asked) > 15
    assert all(hasattr(diffusion, name) for name in asked)


def test_the_equations_run_and_print_what_is_stored():
    """All up to the training, in this process."""
    names = {}
    for cell in CODE:
        if "STEPS, BATCH" in source(cell):
            break
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(source(cell), "tour.ipynb", "exec"), names)
        assert_same_figures(output.getvalue().splitlines(), printed(cell["outputs"]))
    assert len(names["models"]) == 4  # equation 10 is behind


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_prints_what_is_stored(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    for name, value in {
        "PYTHONPATH": ROOT,
        "IPYTHONDIR": tmp_path,
        "JUPYTER_RUNTIME_DIR": tmp_path,
        "OMP_NUM_THREADS": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.reads(TEXT, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, stored in zip((cell for cell in notebook.cells if cell.cell_type == "code"), CODE, strict=True):
        assert_same_figures(printed(cell.outputs), printed(stored["outputs"]))
        pictures = [
            sum("image/png" in output.get("data", {}) for output in outputs) for outputs in (cell.outputs, stored["outputs"])
        ]
        assert pictures[0] == pictures[1]
