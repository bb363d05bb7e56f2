"""`benchmarks/paths.py`: what it says of paths is theirs, without the engines that the bundle has in any case."""

import sys
from types import SimpleNamespace

from benchmarks import paths


def test_joining_does_not_count_what_opening_takes_without_masks(tiny, monkeypatch, capsys):
    now_s, n_bytes, opened = 0.0, 0, paths.Orchestrator.open

    def open_slowly(bundle, *, paths=None, **options):
        nonlocal now_s, n_bytes
        if paths is not None:
            now_s += 1 + 0.01 * len(paths.ahead)
            n_bytes += (100 + 2 * len(paths.ahead)) * 2**20
        return opened(bundle, paths=paths, **options)

    monkeypatch.setattr(paths, "Orchestrator", SimpleNamespace(open=open_slowly))
    monkeypatch.setattr(paths, "time", SimpleNamespace(perf_counter=lambda: now_s))
    monkeypatch.setattr(paths, "resident_bytes", lambda: n_bytes)
    words = ["paths.py", str(tiny.bundle), "--paths", "2", "--policy", "random:1:3", "--duration", "0.05"]
    monkeypatch.setattr(sys, "argv", words)
    paths.main()
    shown = capsys.readouterr().out
    n_paths = int(shown.split("without bounds: ")[1].split()[0])
    assert f"joined in {20 / n_paths:.1f} ms each" in shown
    assert "memory of the paths 4 MiB" in shown
