"""Files that are whole or not there, and checkpoints that are refused with a reason."""

import dataclasses
import functools
import io
import json
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import tiny

from moe_numpy import files, tree
from moe_numpy.config import SGD, LearnedNoise
from moe_numpy.training import checkpoint, data, loop

TREES = {"a": (np.arange(6.0).reshape(2, 3), None), "b": np.array([1, 2], np.uint16)}
META = {"step": 7, "text": "\u03b1\u2603\U0001f600\n", "nested": {"list": [1, None]}}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "run.npz"
    checkpoint.save_checkpoint(path, TREES, META)
    return path


def refused(path, match):
    """Both readers of a checkpoint complain in one line that names the file."""
    for read in (checkpoint.load_checkpoint, loop.load_model):
        with pytest.raises(ValueError, match=match) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def only(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


# -------------------------------------------------------------------------------------- round trip
def test_what_was_saved_comes_back(written):
    arrays, meta = checkpoint.load_checkpoint(written)
    assert meta == {"format": checkpoint.FORMAT, **META}
    assert arrays.keys() == {"a.0", "b"}
    for name, branch in TREES.items():
        assert tiny.same_bits(checkpoint.restore(branch, arrays, name), branch)


def test_a_whole_run_comes_back(tmp_path):
    path = tmp_path / "run.npz"
    run = tiny.trained(tiny.moe(noise=LearnedNoise(), bias_rate=0.1), optimizer=SGD())
    run.settings = {"text": None, "rate": 0.01}
    loop.save_run(path, run)
    again = loop.load_run(path, tiny.corpus())
    assert tiny.same_run(run, again)
    assert again.settings == run.settings
    params, cfg, alphabet = loop.load_model(path)
    assert (cfg, alphabet) == (run.cfg, run.corpus.alphabet)
    assert tiny.same_bits(params, run.params)


def test_only_arrays_whose_names_begin_so_are_read(written):
    arrays, meta = checkpoint.load_checkpoint(written, only="a.")
    assert list(arrays) == ["a.0"] and meta["step"] == META["step"]
    assert len(checkpoint.load_checkpoint(written)[0]) == 2


def test_restored_parameters_can_be_trained_on_without_touching_the_file_or_each_other(tmp_path):
    path = tmp_path / "run.npz"
    loop.save_run(path, tiny.run())
    before = path.read_bytes()
    first, second = (loop.load_run(path, tiny.corpus()) for _ in range(2))
    loop.train(first, show_progress=False)
    assert path.read_bytes() == before
    assert tiny.same_bits(second.params, tiny.run().params)


def test_the_file_is_a_plain_archive_that_numpy_reads_without_pickle(tmp_path):
    path = tmp_path / "run.npz"
    loop.save_run(path, tiny.run(tiny.moe()))
    with np.load(path, allow_pickle=False) as archive:
        assert "params.blocks.0.feed.router.w_CE" in archive.files
        assert json.loads(archive["meta"].tobytes())["step"] == 0


# ------------------------------------------------------------------------------------------ atomic
def test_a_writer_that_fails_leaves_the_older_file_and_nothing_else(written):
    before = written.read_bytes()

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        files.write_atomically(written, fail)
    assert written.read_bytes() == before
    only(written.parent, "run.npz")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one(written, monkeypatch, error):
    before, savez = written.read_bytes(), np.savez

    def broken(file, **arrays):
        savez(file, **arrays)
        raise error("no space left")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(error, match="no space"):
        checkpoint.save_checkpoint(written, TREES, META)
    assert written.read_bytes() == before
    only(written.parent, "run.npz")


def test_a_rename_that_fails_leaves_the_older_file_whole(written, monkeypatch):
    before = written.read_bytes()

    def fail(*_):
        raise PermissionError("somebody has it open")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(PermissionError):
        checkpoint.save_checkpoint(written, TREES, META)
    assert written.read_bytes() == before
    only(written.parent, "run.npz")


def test_a_full_disk_is_told_with_the_file_and_leaves_the_older_one(written):
    resource = pytest.importorskip("resource")
    before, limits = written.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"run\.npz must be written, got: .*\. Make room"
        ) as error:
            checkpoint.save_checkpoint(written, {"a": np.zeros(99_999)}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert written.read_bytes() == before
    only(written.parent, "run.npz")


def test_the_older_file_stays_in_place_while_the_new_one_is_written(written):
    before = written.read_bytes()
    seen = []

    def write(file):
        file.write(b"new")
        seen.append(written.read_bytes())

    files.write_atomically(written, write)
    assert (seen, written.read_bytes()) == ([before], b"new")
    only(written.parent, "run.npz")


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_older_one(written, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, real=real: done.append(name) or real(*given)
        )
    files.write_json(written, [1])
    assert done == ["fsync", "replace"]


def test_folders_on_the_way_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "record.json"
    files.write_json(path, {"x": [1, 2.5, None]})
    assert files.read_json(path) == {"x": [1, 2.5, None]}
    only(path.parent, "record.json")


# --------------------------------------------------------------------------------- damaged, foreign
def test_a_truncated_checkpoint_is_refused_at_every_length(written):
    whole = written.read_bytes()
    for length in (0, 1, 4, 30, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        written.write_bytes(whole[:length])
        refused(written, "must be a whole checkpoint of moe_numpy, got a truncated or foreign")


def test_a_damaged_byte_never_ends_in_anything_but_a_refusal_or_the_same_content(written):
    whole = written.read_bytes()
    intact, meta = checkpoint.load_checkpoint(written)
    refusals = 0
    for at in range(0, len(whole), 3):
        for flip in (0x01, 0xFF):
            written.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                arrays, found = checkpoint.load_checkpoint(written)
            except ValueError as error:
                assert str(written) in str(error)
                refusals += 1
                continue
            assert found == meta
            assert {n: a.tolist() for n, a in arrays.items()} == {
                n: a.tolist() for n, a in intact.items()
            }
    assert refusals > len(whole) / 3


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_refused(seed, tmp_path):
    path = tmp_path / "run.npz"
    path.write_bytes(np.random.default_rng(seed).bytes(5000))
    refused(path, "truncated or foreign")


def npy_bytes():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [npy_bytes(), b"{}", b"\x80\x04N.", b"PK\x05\x06" + bytes(18)], ids=repr
)
def test_files_of_another_kind_are_refused(content, tmp_path):
    path = tmp_path / "run.npz"
    path.write_bytes(content)
    refused(path, "must be a whole checkpoint|must say")


@pytest.mark.parametrize(
    "meta", [None, b"no json", b"[1]", b'"text"', b'{"format": "moe_numpy checkpoint 0"}', b"\xff"]
)
def test_an_archive_of_somebody_else_is_refused(meta, tmp_path):
    path = tmp_path / "run.npz"
    arrays = {} if meta is None else {"meta": np.frombuffer(meta, np.uint8)}
    np.savez(path, w=np.zeros((2, 2)), **arrays)
    refused(path, "must be a whole checkpoint|must say")


class Bomb:
    """Pickled data that, if anybody unpickles it, opens a file for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["params", "meta"])
def test_an_object_array_is_refused_and_never_unpickled(name, tmp_path):
    path, trace = tmp_path / "run.npz", tmp_path / "trace"
    good = {"params": np.zeros(2), "meta": np.zeros(2, np.uint8)}
    np.savez(path, **good | {name: np.array([Bomb(trace)], object)})
    refused(path, "truncated or foreign")
    assert not trace.exists()
    with np.load(path, allow_pickle=True) as archive:
        archive[name][0].close()
    assert trace.exists(), "the bomb was no bomb"


def test_a_bare_pickle_is_refused_and_never_unpickled(tmp_path):
    path, trace = tmp_path / "run.npz", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    refused(path, "truncated or foreign")
    assert not trace.exists()


def test_a_compressed_archive_that_is_damaged_is_refused(written):
    with np.load(written) as archive:
        arrays = dict(archive) | {"params.big": np.arange(4000.0)}
    np.savez_compressed(written, **arrays)
    with zipfile.ZipFile(written) as archive:
        start = archive.getinfo("params.big.npy").header_offset
    content = bytearray(written.read_bytes())
    content[start + 80 : start + 200] = bytes(120)
    written.write_bytes(content)
    refused(written, "truncated or foreign")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(tmp_path / "none.npz", "must be a checkpoint, got no such file")
    refused(tmp_path / "none" / "run.npz", "must be a checkpoint, got no such file")
    refused(tmp_path, "truncated or foreign")


# ---------------------------------------------------------------------------- another configuration
@pytest.mark.parametrize(
    ("like", "message"),
    [
        (np.zeros((3, 2)), r"a\.0 must be float64 \(3, 2\), got float64 \(2, 3\)"),
        (np.zeros((2, 3), "f4"), r"a\.0 must be float32 \(2, 3\), got float64 \(2, 3\)"),
    ],
)
def test_an_array_of_another_shape_or_type_is_named(written, like, message):
    arrays, _ = checkpoint.load_checkpoint(written)
    with pytest.raises(ValueError, match=message):
        checkpoint.restore((like, None), arrays, "a")


def test_a_missing_array_is_named(written):
    arrays, _ = checkpoint.load_checkpoint(written)
    with pytest.raises(ValueError, match=r"a\.1 must be float64 \(2,\), got none"):
        checkpoint.restore((TREES["a"][0], np.zeros(2)), arrays, "a")


def test_a_model_of_another_configuration_is_told_which_array_differs(tmp_path):
    path = tmp_path / "run.npz"
    loop.save_run(path, tiny.run(tiny.moe()))
    arrays, _ = checkpoint.load_checkpoint(path)
    other = tiny.run(tiny.moe(num_experts=5))
    with pytest.raises(ValueError, match=r"params\.blocks\.0\.feed\.router\.w_CE must be .*5"):
        checkpoint.restore(other.params, arrays, "params")
    with pytest.raises(ValueError, match=r"params\.blocks\.0\.feed"):
        checkpoint.restore(tiny.run().params, arrays, "params")


def test_another_text_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    loop.save_run(path, tiny.run())
    with pytest.raises(ValueError, match="must be the one that the run was started on"):
        loop.load_run(path, tiny.corpus(seed=1))


def test_the_built_in_text_of_another_python_is_told(tmp_path):
    path, other, mine = tmp_path / "run.npz", tiny.corpus(seed=1), tiny.run()
    other, mine.corpus = (
        dataclasses.replace(corpus, name=data.BUILT_IN) for corpus in (other, mine.corpus)
    )
    loop.save_run(path, mine)
    with pytest.raises(ValueError, match=r"got .*\. It is made of .* the Python that began it\."):
        loop.load_run(path, other)


def test_the_same_text_cut_elsewhere_is_refused(tmp_path):
    path, corpus = tmp_path / "run.npz", tiny.corpus()
    loop.save_run(path, tiny.run())
    shorter = dataclasses.replace(corpus, train=corpus.train[:-9])
    with pytest.raises(ValueError, match=f"cut as it was: {len(corpus.train)} characters to train"):
        loop.load_run(path, shorter)


NESTED = functools.reduce(lambda inner, _: [inner], range(900), 1)


def changed(path, entries):
    """Write the checkpoint of a run, but with other entries; a value of ... takes one away."""
    loop.save_run(path, tiny.run())
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    meta = json.loads(arrays["meta"].tobytes())
    for name, value in entries.items():
        place, name = (arrays, name.replace("__", ".")) if "__" in name else (meta, name)
        place.pop(name)
        if value is not ...:
            place[name] = value
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "entries",
    [
        *({name: ...} for name in ("corpus", "config", "training", "dtype", "step", "settings")),
        *({name: ...} for name in ("evaluations", "data_rng", "noise_rng", "series__norm")),
        *({name: None} for name in ("corpus", "config", "training", "dtype", "step", "data_rng")),
        *({name: []} for name in ("config", "training", "data_rng")),
        *({"step": step} for step in ("1", -1, 10, 0.5)),
        {"series__rate": np.zeros(3)},
        {"series__rate": np.zeros(9, int)},
        {"series__dropped": np.full((9, 0), "")},
        *({"evaluations": came} for came in (None, {}, "", [1], [{"step": 1, "loss": 2.0}])),
        {"evaluations": [dict.fromkeys(("step", "loss", "wished", "decisiveness"))]},
        {"evaluations": [], "step": 9},
        {"config": NESTED},
        *({"seconds": seconds} for seconds in (None, "1", -1.0, math.nan)),
        {"noise_rng": {"bit_generator": "MT19937"}},
        {"dtype": "int8"},
    ],
    ids=lambda entries: str(entries)[:60],
)
def test_a_run_that_lacks_something_or_holds_something_else_is_refused(entries, tmp_path):
    path = changed(tmp_path / "run.npz", entries)
    with pytest.raises(ValueError, match=r"^(load_run|restore|from_dict|init_model|new_run): "):
        loop.load_run(path, tiny.corpus())


def test_a_checkpoint_from_before_the_time_was_kept_is_read(tmp_path):
    path = changed(tmp_path / "run.npz", {"seconds": ...})
    assert loop.load_run(path, tiny.corpus()).seconds == 0


@pytest.mark.parametrize(
    "entries",
    [
        *({name: ...} for name in ("config", "dtype", "alphabet")),
        *({name: None} for name in ("config", "dtype", "alphabet")),
        {"config": [1]},
        {"config": NESTED},
        {"alphabet": "ab"},
        {"alphabet": tiny.corpus().alphabet + "!"},
    ],
    ids=lambda entries: str(entries)[:60],
)
def test_a_model_that_lacks_something_is_refused(entries, tmp_path):
    path = changed(tmp_path / "run.npz", entries)
    with pytest.raises(ValueError, match=r"^(load_model|init_model): "):
        loop.load_model(path)


# ------------------------------------------------------------------------------------ JSON, folders
def test_a_folder_in_the_place_of_a_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} must be a file, got a folder"):
        files.write_json(tmp_path, [1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="permissions of another kind")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_permissions_that_the_user_gives_to_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        files.write_json(tmp_path / "record.json", [1])
    finally:
        os.umask(before)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_tree_is_rebuilt_from_as_many_leaves_as_it_has():
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"3 leaves need as many replacements, got {count}"):
            tree.from_leaves((1.0, (2.0, None), 3.0), [0.0] * count)


@pytest.mark.parametrize("trees", [((1.0, None), (1.0, 2.0)), ((1.0, 2.0), (1.0, None))])
def test_an_array_has_no_partner_where_another_tree_has_none(trees):
    with pytest.raises(ValueError, match="a leaf is None in one tree and an array in another"):
        tree.map(lambda *leaves: sum(leaves), *trees)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_with_a_number_that_is_not_finite_is_not_written(bad, tmp_path):
    path = tmp_path / "record.json"
    files.write_json(path, [1])
    with pytest.raises(ValueError):
        files.write_json(path, {"loss": [0.5, bad]})
    assert files.read_json(path) == [1]
    only(tmp_path, "record.json")


@pytest.mark.parametrize(
    "content", [None, b"{", b"", b"\xff\xfe", b"[" * 99_999], ids=lambda c: repr(c)[:9]
)
def test_a_record_that_is_missing_or_no_json_is_named(content, tmp_path):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json must be a record in JSON"):
        files.read_json(path)


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_folder_that_cannot_be_made_is_refused_by_name(below, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / below
    for attempt in (
        lambda: files.require_folder(folder),
        lambda: files.write_json(folder / "x.json", 1),
    ):
        with pytest.raises(ValueError, match=r"must be writable, got: .*Choose another") as error:
            attempt()
        assert str(folder) in str(error.value)
    only(tmp_path, "file")


def test_requiring_a_folder_leaves_no_trace_in_it(tmp_path):
    files.require_folder(tmp_path / "new")
    only(tmp_path / "new")


def test_every_leaf_has_a_name_of_its_own():
    run = tiny.run(tiny.moe(noise=LearnedNoise(), bias_rate=0.1))
    names = [name for name, _ in tree.named_leaves((run.params, run.state, run.series))]
    assert len(set(names)) == len(names)
