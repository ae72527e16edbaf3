"""The archive that a workspace is filled from."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from orchestrator.providers.docker_filling import _Archive
from orchestrator.providers.workspace import remove_tree


def test_a_clone_goes_as_it_is_however_deep(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1200):
        deep /= "d"
        deep.mkdir()
    (deep / "file").write_text("deep")
    (tmp_path / "link").symlink_to("./deep//link/")
    with tarfile.open(fileobj=io.BytesIO(b"".join(_Archive(tmp_path, 1, 2).parts()))) as archive:
        entries = archive.getmembers()
        at = f"workspace/project/{'d/' * 1200}file"
        assert archive.extractfile(at).read() == b"deep"  # type: ignore[union-attr]
    # Nobody else can do so.
    remove_tree(tmp_path / "d")
    assert next(entry.linkname for entry in entries if entry.issym()) == "./deep//link/"
    assert {(entry.uid, entry.gid) for entry in entries} == {(1, 2)}
    # What half an archive leaves is told from a whole one.
    assert [entries[place].name for place in (2, -1)] == [
        "workspace/.cluster-code/filling",
        "workspace/.cluster-code/complete",
    ]
