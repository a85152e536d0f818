"""`InfViT.predict_file`: what the model in memory gives, whatever the form, and whatever happens on the way."""

import contextlib
import copy
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import infsa_kernels
from infsa_kernels import streaming
from infsa_kernels.explain import attention_maps
from infsa_kernels.nn import InfViT
from infsa_kernels.streaming import predict, tokens
from infsa_kernels.testing import FORWARD, assert_close_to_reference

ROOT = Path(infsa_kernels.__file__).parents[1]
H, W, PATCH, D = 83, 61, 4, 32
COLUMNS = 16
# Rows of patches; 21 of them, the last in part.
CHUNK = 2 * COLUMNS


def model(dtype=torch.float64, depth=3, **arguments):
    made = InfViT(16, PATCH, 3, 5, D, depth, 4, dtype=dtype, **{"tied": False} | arguments).eval()
    for name, p in made.named_parameters():
        if p.dim() < 2 or name.startswith("head"):
            nn.init.normal_(p, std=0.5)
    return made


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8))
    return path


def in_memory(path, dtype=torch.float64, full=255, mean=0.0, std=1.0):
    x = torch.from_numpy(np.load(path).astype(np.float32)).permute(2, 0, 1)[None]
    mean, std = (torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1) for t in (mean, std))
    return ((x / full - mean) / std).to(dtype)


def predicted(made, path, **arguments):
    return made.predict_file(path, **{"chunk_tokens": CHUNK, "progress": False} | arguments)


FORMS = [
    dict(),
    dict(tied=True),
    dict(pool="mean"),
    dict(pool="mean", tied=True, neumann="head", rho_per_head=True),
    dict(neumann="layer", pos_embed=False),
    dict(pool="mean", neumann="layer", depth=1),
    dict(depth=0),
    dict(depth=0, pool="mean"),
    dict(depth=1, rho_trainable=False),
    dict(num_classes=0),
    dict(score_floor=0.3),
    dict(score_floor=0.3, pool="mean", tied=True),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())) or "plain")
def test_scores_are_those_of_the_model(form, picture, tmp_path):
    form = {"num_classes": 5} | form
    made = model(**{k: v for k, v in form.items() if k != "num_classes"})
    if not form["num_classes"]:
        made.head = nn.Identity()
    expected = made(in_memory(picture)).detach()
    for arguments in ({}, {"work_dir": tmp_path / "work"}, {"chunk_tokens": None}, {"chunk_tokens": 1}):
        scores = predicted(made, picture, **arguments)
        assert scores.shape == expected.shape and not scores.requires_grad
        # What has no float64 in it: the picture, and its mean.
        assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "form", [dict(), dict(pool="mean", tied=True), dict(score_floor=0.3)], ids=["cls", "mean", "floor"]
)
def test_lower_dtypes(dtype, form, picture, tmp_path):
    made, x = model(dtype, **form), in_memory(picture)
    with torch.no_grad():
        low = made(x.to(dtype))
        scores = predicted(made, picture, work_dir=tmp_path)
        truth = made.double()(x)
    assert scores.dtype == dtype
    assert_close_to_reference(scores, low, truth, FORWARD, "scores")
    if dtype == torch.float32:
        assert_close(scores, low, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, full", [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_pixels_are_normalised(dtype, full, picture):
    np.save(picture, (np.load(picture).astype(np.float64) / 255 * full).astype(dtype))
    made, scale = model(torch.float32), {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    with torch.no_grad():
        expected = made(in_memory(picture, torch.float32, full, **scale))
        assert (made(in_memory(picture, torch.float32, full)) - expected).abs().max() > 1e-3
    assert_close(predicted(made, picture, **scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("layer", "floor"), [(0, 0.0), (1, 0.0), (-1, 0.0), (1, 0.3)])
def test_the_map_is_that_of_the_model(layer, floor, pool, picture, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    made, path = model(pool=pool, score_floor=floor), tmp_path / "map.tif"
    found = streaming.predict_file(
        made, picture, attention_map=path, map_layer=layer, work_dir=tmp_path / "w", chunk_tokens=CHUNK, progress=False
    )
    # Without a class token, what all of them read is so many times what one does.
    kind, tokens = ("class_token", 1) if pool == "cls" else ("in", found.attention.numel())
    expected = attention_maps(made, in_memory(picture), layer, kind)[0] / tokens
    assert_close(found.attention, expected, rtol=1e-5, atol=1e-7, check_dtype=False)
    assert_close(found.scores, predicted(made, picture))
    with tifffile.TiffFile(path) as tif:
        assert tif.pages[0].is_tiled
        assert np.array_equal(tif.asarray(), found.attention.numpy())


def test_bytes_are_counted(picture, tmp_path):
    made = model(torch.float32)
    plan = streaming.plan(made, H, W)
    found = streaming.predict_file(made, picture, work_dir=tmp_path / "w", chunk_tokens=CHUNK, progress=False)
    assert found.bytes_written == plan.bytes_written
    # The plan's last row of patches is a whole one.
    assert 0 <= plan.bytes_read - found.bytes_read < 3 * COLUMNS * PATCH * PATCH + 3 * PATCH * H


class Interrupted(BaseException):
    """As KeyboardInterrupt, at a moment of the test's choice."""


def test_an_interrupted_run_goes_on_to_the_same_bits(picture, tmp_path, monkeypatch):
    """Again and again, each time a little later, in every pass."""
    made, arguments = model(torch.float32, pool="mean"), {"work_dir": tmp_path / "w", "attention_map": tmp_path / "map"}
    arguments["map_layer"] = 1
    expected = predicted(made, picture, **arguments)
    map_bytes = (tmp_path / "map").read_bytes()
    (tmp_path / "map").unlink()
    left, ends, passes = 0, 0, set()

    class Bar:
        def update(self, n):
            nonlocal left
            left -= 1
            if left == 0:
                raise Interrupted

        def set_description_str(self, text):
            self.text = text
            passes.add(text)

    monkeypatch.setattr(predict, "SECONDS", 0.0)
    monkeypatch.setattr(predict, "WRITING_SHARE", math.inf)
    monkeypatch.setattr(predict, "_NoBar", Bar)
    scores = None
    while scores is None:
        left = 4 + ends
        with contextlib.suppress(Interrupted):
            scores = predicted(made, picture, **arguments)
        ends += scores is None
    assert ends >= 7 and len(passes) == 8
    assert torch.equal(scores, expected) and (tmp_path / "map").read_bytes() == map_bytes


KILLED = """
    import math, os, signal, sys
    from pathlib import Path
    import torch
    from infsa_kernels.nn import InfViT
    from infsa_kernels.streaming import predict, tokens

    picture, work = sys.argv[1:]
    torch.manual_seed(0)
    model = InfViT(16, 4, 3, 5, 32, 3, 4).eval()
    torch.nn.init.normal_(model.head.weight)

    def run(work_dir):
        return model.predict_file(picture, work_dir=work_dir, chunk_tokens=48, progress=False)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying:
        def __init__(self, file, number):
            self.file, self.left = file, number
            self.seek, self.fileno, self.close = file.seek, file.fileno, file.close

        def write(self, data):
            self.left -= 1
            if self.left == 0:
                self.file.write(data[: len(data) // 2])
                die()
            return self.file.write(data)

    def dying(number, opened=tokens._open_file):
        # In the middle of writing tokens, or between writing a state and moving it to its place.
        def open_file(*args):
            read, write = opened(*args)
            return read, Dying(write, number)

        tokens._open_file = open_file
        if number % 2:  # a state after every chunk, else only where it must be
            predict.SECONDS, predict.WRITING_SHARE = 0.0, math.inf
        if number == 3:
            os.replace = lambda *names: die()

    def ends_by_signal(number):
        child = os.fork()
        if child == 0:
            dying(number)
            run(work)
            os._exit(0)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    # Until it ends, each time where fewer writes are left.
    killed = 0
    while ends_by_signal(2 + killed % 4):
        killed += 1
    assert killed >= 8, killed
    assert ends_by_signal(9) and ends_by_signal(4)
    assert list(Path(work).glob("state-*"))
    resumed = run(work)
    assert torch.equal(resumed, run(work + "-whole")), "other bits"
    assert not list(Path(work).iterdir())
"""


def script(text, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_killed_run_goes_on_to_the_same_bits(picture, tmp_path):
    script(KILLED, picture, tmp_path / "w")


CAPPED = """
    import resource, sys
    import numpy as np
    import torch
    from infsa_kernels.nn import InfViT

    model = InfViT(16, 4, 3, 5, 64, 2, 4, mlp_ratio=1).eval()
    torch.nn.init.normal_(model.head.weight)
    side, path, work = 1024, sys.argv[1] + "/large.npy", sys.argv[1] + "/work"
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.save(path, small)
    model.predict_file(path, work_dir=work)  # threads start, and what is imported late is
    np.save(path, np.tile(small, (side // 64, side // 64, 1)))
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * resource.getpagesize()
    tokens = (side // 4) ** 2 * 64 * 4  # 17 MB, of which the model in memory needs twice
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(1.2 * tokens), -1))
    streamed = model.predict_file(path, work_dir=work, chunk_tokens=1024)
    try:
        with torch.no_grad():
            model(torch.from_numpy(np.load(path)).permute(2, 0, 1)[None] / 255)
    except (MemoryError, RuntimeError):
        pass
    else:
        raise AssertionError("the limit is none")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    with torch.no_grad():
        whole = model(torch.from_numpy(np.load(path)).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space, as Linux does")
def test_a_picture_larger_than_the_address_space(tmp_path):
    script(CAPPED, tmp_path, MALLOC_ARENA_MAX="1")


def test_a_state_of_another_run_is_refused(picture, tmp_path, monkeypatch):
    made, work = model(), tmp_path / "w"

    def interrupted(**arguments):
        with monkeypatch.context() as patch:
            patch.setattr(predict._Run, "_map", None)
            patch.setattr(predict.Attention, "set_scores", None)
            with pytest.raises(TypeError):
                predicted(made, picture, work_dir=work, **arguments)

    interrupted()
    files = {p.name for p in work.iterdir()}
    assert files == {"tokens-0-of-1.bin", "state-0-of-1.pt"}
    with pytest.raises(
        ValueError, match=r"state of a run with another chunk_tokens 32, here 48; give another work_dir"
    ):
        predicted(made, picture, work_dir=work, chunk_tokens=48)
    with pytest.raises(ValueError, match="another mean None, here"):
        predicted(made, picture, work_dir=work, mean=(0, 0, 0))
    changed = copy.deepcopy(made)
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.bias[0] += 1
    for other in (changed, model(tied=True)):
        with pytest.raises(ValueError, match="another model"):
            predicted(other, picture, work_dir=work)
    (work / "tokens-0-of-1.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"goes with .*tokens-0-of-1\.bin, which is not there, or cut off"):
        predicted(made, picture, work_dir=work)
    (work / "state-0-of-1.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no state of a run"):
        predicted(made, picture, work_dir=work)
    (work / "state-0-of-1.pt").unlink()
    interrupted()
    np.save(picture, np.load(picture) + 1)
    with pytest.raises(ValueError, match="another picture's changed"):
        predicted(made, picture, work_dir=work)


def test_too_little_disk_or_memory_is_said_before_it_starts(picture, tmp_path, monkeypatch):
    made = model(torch.float32, depth=1)
    need = (21 + 2) * COLUMNS * D * 4  # and a spare chunk
    usage = tokens.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda folder: usage._replace(free=need - 1))
    with pytest.raises(
        OSError, match=r"GB free, expected .* GB for the tokens of this picture; free some, or give"
    ) as e:
        predicted(made, picture, work_dir=tmp_path / "w")
    assert e.value.errno == tokens.errno.ENOSPC and not list((tmp_path / "w").iterdir())
    monkeypatch.setattr(tokens, "available_memory", lambda: need - 1)
    with pytest.raises(MemoryError, match=r"of memory are free, expected .* give a work_dir"):
        predicted(made, picture)
    monkeypatch.undo()
    assert streaming.plan(made, H, W).store <= need + 2 * COLUMNS * D * 4


def test_a_disk_that_fills_up_later_is_an_error(picture, tmp_path, monkeypatch):
    with open("/dev/full", "wb", buffering=0) as write, open(picture, "rb") as read:
        monkeypatch.setattr(tokens, "_open_file", lambda *args: (read, write))
        with pytest.raises(OSError, match="No space left"):
            predicted(model(), picture, work_dir=tmp_path / "w")


def test_two_runs_do_not_share_a_folder(picture, tmp_path):
    pytest.importorskip("fcntl")
    store = tokens.Store(tmp_path / "tokens-0-of-1.bin", 2, (4, D), torch.float32, torch.device("cpu"))
    with pytest.raises(OSError, match="is in use by another run"):
        predicted(model(), picture, work_dir=tmp_path)
    store.close(remove=True)


def test_backends_are_those_that_were_asked_for(picture):
    made = model(torch.float32)
    expected = predicted(made, picture)
    calls = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with infsa_kernels.backend("eager"), Seen():
        assert_close(predicted(made, picture), expected, rtol=1e-5, atol=1e-5)
    used = {call for call in calls if call.startswith("infsa.")}
    assert used == {"infsa.central_query_fwd_eager.default", "infsa.score_pool_fwd_eager.default"}
    with infsa_kernels.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        predicted(made, picture)


def test_what_cannot_be_streamed_is_refused(picture, tmp_path, monkeypatch):
    def refused(made, words, error=NotImplementedError, **arguments):
        with pytest.raises(error, match=words):
            predicted(made, picture, **arguments)

    for variant in ("pure_infsa", "multi_hop_infsa", "softmax"):
        refused(model(variant=variant), rf"variant is '{variant}', expected 'linear_infsa': every token")
    made = model()
    attn = made.blocks[1].attn
    for module, name, value in (
        (made, "sequence_group", "0"),
        (attn, "activation", "gelu"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            refused(made, "model was parallelized|activation is 'gelu', expected 'relu'")
    with torch.autocast("cpu", torch.bfloat16):
        refused(made, r"autocast is on, .* give model\.bfloat16\(\)")
    for name in ("", "blocks.1", "blocks.1.attn"):
        handle = made.get_submodule(name).register_forward_hook(print)
        refused(made, "has a hook, which would never be called")
        handle.remove()
    for name in ("blocks.0.norm1", "blocks.2.attn.q_proj"):
        handle = made.get_submodule(name).register_forward_pre_hook(print)
        refused(made, rf"model\.{name} is \w+, with a hook, an adapter")
        handle.remove()
    nn.utils.parametrizations.weight_norm(made.blocks[1].attn.k_proj)
    refused(made, r"model\.blocks\.1\.attn\.k_proj is Parametrized")

    class Other(InfViT):
        def forward(self, images):
            return super().forward(images) + 1

    refused(Other(16, PATCH, 3, 5, D, 1, 4), "model is Other, expected an InfViT whose forward is its own")
    made = model()
    refused(made, r"mean has shape \[2\], expected a number for each of the 3 channels", ValueError, mean=(0, 0))
    refused(made, "std is .*expected numbers above 0", ValueError, std=(1, 0, 1))
    refused(made, "chunk_tokens is 0, expected at least 1", ValueError, chunk_tokens=0)
    refused(made, "map_layer is 3, expected -3 to 2", ValueError, attention_map=tmp_path / "m.tif", map_layer=3)
    refused(made, "expected a file in a folder that exists", FileNotFoundError, attention_map=tmp_path / "no" / "m.tif")


def test_hooks_that_are_called_see_every_token(picture):
    made, seen = model(), 0

    def count(module, args, out):
        nonlocal seen
        seen += out.shape[1]

    made.blocks[0].mlp.register_forward_hook(count)
    predicted(made, picture)
    assert seen == 21 * COLUMNS + 1


def test_the_bar_says_what_is_left(picture, capsys):
    predicted(model(), picture, progress=True)
    shown = capsys.readouterr().err
    assert "layer 2 of 3: update" in shown and "100%" in shown and "left" in shown
