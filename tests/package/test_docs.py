"""What README and docs say holds: their code runs, calls have the arguments that are written, and what is named exists."""

import builtins
import importlib
import re
import warnings

import pytest
import torch
from helpers import anchors, documents

import infsa_kernels
from infsa_kernels import compat, explain, graph, nn

ROOT = documents.ROOT
README = ROOT / "README.md"
PAGES = [pytest.param(page, id=page.name) for page in documents.PAGES]

# Whose names a page uses bare; infsa_kernels' otherwise.
SPEAKS_OF = {"explain.md": explain, "graph.md": graph, "migration.md": compat, "nn.md": nn, "convert.md": nn}
# Calls of other libraries.
OTHERS = ("tl.dot",)

CALL = re.compile(r"([A-Za-z_][\w.]*)\((.*)\)")
OURS = re.compile(r"(?:torch\.ops\.infsa|infsa_kernels)(?:\.\w+)+")
FILE = re.compile(r"(?:bench|csrc|docs|infsa_kernels|tests|requirements)/[\w./*-]*\w")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the blocks of a page, once and in order, and returns what they define."""
    done = {}

    def namespace(page):
        if page not in done:
            done[page] = {}
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp(page.stem))
                for block in documents.blocks(page.read_text(), "python"):
                    if block.runs:
                        for name in re.findall(r"^ *(?:import|from) (\w+)", block.text, re.MULTILINE):
                            pytest.importorskip(name)
                        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), done[page])
        return done[page]

    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_from_top_to_bottom(page, run, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        found = run(page)
    if page == README:
        assert found["report"].converted
        assert found["scores"].shape == (1, 1000)
        assert found["rho"].grad.shape == (64,)
        assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_calls_are_written_with_their_arguments(page, run):
    text = page.read_text()
    calls = [(code.line, found) for code in documents.inline(text) if (found := CALL.fullmatch(code.text))]
    if not calls:
        return
    speaks_of = SPEAKS_OF.get(page.name, infsa_kernels)
    known = vars(builtins) | {"torch": torch, "nn": torch.nn, "infsa_kernels": infsa_kernels}
    known |= {
        name: getattr(module, name) for module in (nn, infsa_kernels, speaks_of) for name in module.__all__
    } | run(page)
    wrong = []
    for line, found in calls:
        name, arguments = found.groups()
        if name in OTHERS:
            continue
        try:
            function = eval(name, known)
        except (AttributeError, NameError):
            wrong.append(f"{page.name}:{line}: {name} is not there")
            continue
        # Elsewhere than in a table a call is an example, and what it gives is no default.
        ours = is_ours(function) and text.splitlines()[line - 1].startswith("|")
        misfits = [documents.misfit(arguments, s, defaults=ours) for s in documents.signatures(function)]
        if all(misfits):
            wrong.append(f"{page.name}:{line}: {name} {' and '.join(dict.fromkeys(misfits))}")
    assert not wrong, "\n".join(wrong)


def is_ours(function) -> bool:
    """Whether what is written after "=" is a default; not for other libraries' functions and modules that an example calls."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        return True
    return not isinstance(function, torch.nn.Module) and function.__module__.startswith("infsa_kernels")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_exists(page):
    text = page.read_text()
    # A source distribution has none of the last, which are made by measuring.
    made = ("bench/out", *(() if (ROOT / "bench" / "results").exists() else ("bench/results",)))
    makefile = (ROOT / "Makefile").read_text()
    missing = []
    for code in documents.inline(text) + documents.blocks(text, ""):
        if OURS.fullmatch(code.text) and not resolves(code.text):
            missing.append(f"{code.line}: {code.text}")
        for path in FILE.findall(re.sub(r"<\w+>", "*", code.text)):
            if not path.startswith(made) and not list(ROOT.glob(path)):
                missing.append(f"{code.line}: {path}")
    for line in text.splitlines():
        targets = re.findall(r"(?:`|^)make ([a-z][a-z-]*)", line)
        missing += [f"make {t}" for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]
    for link in documents.links(text):
        path, _, anchor = link.text.partition("#")
        if path.removeprefix("../").startswith(("http", *made)):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in documents.headings(target.read_text())
        ):
            missing.append(f"{link.line}: {link.text}")
    assert not missing, f"{page.name} names what is not there: " + "; ".join(missing)


def resolves(name: str) -> bool:
    """A module, or what is in one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        try:
            for part in parts[n:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    lengths = [len(sentence.split()) for sentence in documents.sentences(page.read_text())]
    assert sum(lengths) / len(lengths) < (17 if page == README else 18)


def test_readme_is_short_and_has_one_picture():
    text = README.read_text()
    assert len(text.split()) <= 1500
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1


def test_readme_says_what_why_and_how_first():
    titles = re.findall(r"^## (.+)$", README.read_text(), re.MULTILINE)
    assert titles[:3] == ["Two commands", "Quick start", "Install"]


@pytest.mark.parametrize("page", documents.DOCS, ids=lambda p: p.name)
def test_every_page_is_reached_from_readme(page):
    assert f"](docs/{page.name})" in README.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("device, dtype, shape", "takes 'op' where 'device' is written"),
        ("device, ...", "takes 'op' where 'device' is written"),
        ("op, device, dtype", "needs shape"),
        ("op, device, dtype, size", "has no argument 'size'"),
        ("op, ..., forced=None", "has the default forced='', not None"),
        ("op, ..., shape, dtype", "takes 'dtype' before 'shape'"),
        ('"pure", 1, 2, 3, 4, 5', "too many positional arguments"),
        ('op, device, dtype, shape, forced=""', None),
        ('op, ..., forced=""', None),
        ('"pure", q.device, q.dtype, q.shape', None),
    ],
)
def test_a_call_that_does_not_fit_is_found(arguments, says):
    (signature,) = documents.signatures(infsa_kernels.choose_backend)
    assert documents.misfit(arguments, signature) == says
    assert infsa_kernels.choose_backend.__name__ in infsa_kernels.__all__


def test_a_rho_of_another_default_is_found():
    found = [documents.misfit("q, k, v, eps=1e-6, rho=0.95", s) for s in documents.signatures(torch.ops.infsa.linear)]
    assert all(found) and "has the default rho=1.0, not 0.95" in found


def test_names_that_do_not_exist_are_found():
    assert resolves("torch.ops.infsa.linear_fwd") and resolves("infsa_kernels.nn.timm")
    assert not resolves("torch.ops.infsa.linear_forward") and not resolves("infsa_kernels.nn.Attention")


def test_links_to_lines_lead_to_what_they_name():
    found = 0
    for page in documents.DOCS:
        text = page.read_text()
        found += len(anchors.ANCHOR.findall(text))
        assert anchors.corrected(text) == text, "write them anew: PYTHONPATH=tests python -m helpers.anchors"
        assert len(re.findall(r"#L\d+\)", text)) == len(anchors.ANCHOR.findall(text)), (
            "a link to a line names its symbol"
        )
    assert found >= 10


def test_a_link_to_a_line_follows_its_symbol_and_is_missed_with_it():
    moved = anchors.corrected("[`linear_infsa_scores`](../infsa_kernels/ops/pure.py#L1)")
    path, line = re.search(r"\.\./(\S+)#L(\d+)", moved).groups()
    assert (ROOT / path).read_text().splitlines()[int(line) - 1].startswith("def linear_infsa_scores(")
    with pytest.raises(LookupError, match="does not define linear_infinity; files that do: none"):
        anchors.corrected("[`linear_infinity`](../infsa_kernels/ops/linear.py#L1)")


def test_nothing_calls_upwards():
    """As the tour's table of rooms says: by the imports, those inside functions too."""
    below = {
        "ops": ("nn", "graph", "onnx", "compat"),
        "nn": ("onnx", "compat"),
        "graph": ("nn", "onnx", "compat"),
    }
    for room, above in (below | dict.fromkeys(("eager", "triton"), below["ops"])).items():
        named = re.compile(rf"^\s*from (?:\.\.|infsa_kernels\.)(?:{'|'.join(above)})\b", re.MULTILINE)
        for source in (ROOT / "infsa_kernels" / room).rglob("*.py"):
            assert not named.search(source.read_text()), source


def test_the_count_of_other_mechanisms_is_that_of_the_benchmark():
    from bench import peers

    others = [name for name in peers.CORES if name not in peers.OWN and name not in peers.VARIANTS]
    here = [name for name in others if not peers.CORES[name].unavailable(torch.device("cpu"))]
    assert len(here) == 22
    for page in (README, ROOT / "docs" / "benchmark.md"):
        assert "Twenty-two other mechanisms" in page.read_text()
